"""Runs a whole pass of a tower on a CPU in one call of the C++ kernels (`ops/cpu/tower.h`).

Launching a hundred small operations from Python takes longer than computing them. The result is that of the kernels
called one by one; in fp32 it differs by a fused multiply-add in each residual sum. The runner declines a pass if a
kernel of another backend would run, a module was replaced or has hooks, or gradients are needed. The layers then run
one by one as `model/tower.py` defines them.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from twotower import options
from twotower.model.tower import PassInputs, PassResult, Tower
from twotower.ops.cpu.kernels import call, max_tokens
from twotower.ops.precision import accumulation_dtype
from twotower.ops.registry import select
from twotower.runners.module_plan import ModulePlan
from twotower.runners.pass_tables import SUPPORTED_CACHES, PassShape, PassTables, cached_context, shape_of
from twotower.runners.weight_table import WeightTable
from twotower.specs import KIND_NAMES, AttentionSpec, MLPSpec, MoESpec, ParallelSpec, TowerSpec

MAX_ROW_TOKENS = 128  # the cost of a Mamba layer in one chunk grows with the square of the tokens
MAX_TABLES = 64  # cached pass shapes, least recently used first out
OPS = ("linear", "rms_norm", "route", "experts", "attention", "mamba_block")
INT8_OPS = ("linear_int8", "experts_int8")  # in addition, for a tower with int8 weights


class FusedCPURunner:
    """The CPU runner of one tower: caches its module plan, weight table and pass tables. A copy is empty."""

    def __init__(self) -> None:
        self.release()

    def __reduce__(self) -> tuple[type[FusedCPURunner], tuple[()]]:
        return type(self), ()

    def release(self) -> None:
        """Frees all data prepared for the tower."""
        self._plan: ModulePlan | None = None
        self.weights: WeightTable | None = None
        self._tables: OrderedDict[PassShape, PassTables] = OrderedDict()
        self._supported: tuple[tuple[str, torch.dtype], bool] | None = None

    @property
    def prepared(self) -> int:
        """The number of pass shapes with prepared tables."""
        return len(self._tables)

    def prefill_chunk(self, tower: Tower) -> int | None:
        """The number of prompt tokens to read in one pass; None if this runner does not support the tower."""
        return MAX_ROW_TOKENS if self._supports(self._plan_of(tower), tower.embeddings.weight) else None

    def run(self, tower: Tower, inputs: PassInputs) -> PassResult | None:
        """The result of `Tower.forward`; None if this runner does not support the pass."""
        count, weight = inputs.tokens.numel(), tower.embeddings.weight
        if not 0 < count <= max_tokens(weight.dtype, packed=True) or inputs.tokens.shape[1] > MAX_ROW_TOKENS:
            return None
        plan = self._plan_of(tower)
        if (
            spec_unsupported_reason(tower.spec) is not None
            or not self._supports(plan, weight)
            or not plan.is_unmodified(tower)
        ):
            return None
        weights = self.weights
        if weights is None or not weights.is_current(plan, weight.dtype):
            weights = self.weights = WeightTable(tower, plan)
        if not weights.fits or count > max_tokens(weight.dtype, whole_tower=True, packed=weights.all_packed):
            return None
        shape = shape_of(inputs, weight.dtype)
        if not SUPPORTED_CACHES.issuperset(shape.past):
            return None
        tables = self._tables.pop(shape, None)  # removed while in use: another thread must not use the same tables
        if tables is None:
            residual = accumulation_dtype(shape.dtype) if tower.spec.residual_in_fp32 else shape.dtype
            tables = PassTables(tower.spec, shape, residual)
        result = _fused_pass(tower, weights, tables, inputs)
        self._tables[shape] = tables
        if len(self._tables) > MAX_TABLES:
            self._tables.popitem(last=False)
        return result

    def _plan_of(self, tower: Tower) -> ModulePlan:
        plan = self._plan
        if plan is None or not plan.is_current():
            plan = self._plan = ModulePlan(tower)
            self.weights = self._supported = None
        return plan

    def _supports(self, plan: ModulePlan, weight: Tensor) -> bool:
        """Whether the registry selects the C++ kernels for every operation of the tower, given its dtype and device."""
        device, dtype = weight.device, weight.dtype
        if device.type != "cpu" or torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack():
            return False
        key = options.current().kernels_key, dtype
        if self._supported is None or self._supported[0] != key:
            ops = OPS + INT8_OPS if plan.int8 else OPS
            chosen = (select(op, device, dtype, differentiable=False) for op in ops)
            self._supported = key, all(backend.name == "native" for backend in chosen)
        return self._supported[1]


@lru_cache(maxsize=32)
def spec_unsupported_reason(spec: TowerSpec) -> str | None:
    """Why the C++ pass cannot run towers of this spec; None if it can."""
    if spec.norm_offset or spec.ropes:
        return "RMSNorms with an offset and rotary position embeddings run layer by layer"
    for layer in spec.layers:
        if not layer.pre_norm or layer.post_norm or layer.residual_factor != 1.0:
            return "layers with post-norms or a residual factor run layer by layer"
        mixer = layer.mixer
        if isinstance(mixer, AttentionSpec):
            plain = replace(mixer, scale=None, window=None, softcap=None, qk_norm="none", clip=None) == mixer
        elif isinstance(mixer, MoESpec):
            plain = mixer.scores == "sigmoid" and mixer.shared is not None and not mixer.shared_gate
            plain = plain and not mixer.latent and mixer.correction_bias and _is_relu2(mixer.expert)
            plain = plain and mixer.shared is not None and _is_relu2(mixer.shared)
        elif isinstance(mixer, MLPSpec):
            plain = _is_relu2(mixer)
        elif isinstance(mixer, ParallelSpec):
            plain = False
        else:
            plain = mixer.norm == "after_gate" and mixer.factors is None
        if not plain:
            return f"an option of the {KIND_NAMES[layer.kind]} layers runs layer by layer"
    return None


def _is_relu2(mlp: MLPSpec) -> bool:
    return mlp.activation == "relu2" and not mlp.gated


def _fused_pass(tower: Tower, weights: WeightTable, tables: PassTables, inputs: PassInputs) -> PassResult | None:
    kept = tables.fill(inputs)
    if kept is None:
        return None
    meta, cached = inputs.meta, cached_context(inputs)
    x = tower.embed(inputs.tokens)  # the pass overwrites x
    hidden = x.new_empty(x.shape, dtype=weights.dtype)
    updates = tables.updates(hidden)
    token_mask = None if meta.token_mask is None else meta.token_mask.contiguous()
    rows = cached[2:5] if cached is not None and cached.max_length else (None, None, None)  # start, stride, lengths
    call(
        "tower_", hidden, x, weights.kinds, *weights.addresses, tables.inputs, weights.norm_f, hidden, token_mask,
        int(meta.causal), *rows, tables.sizes, *tables.constants,
    )  # fmt: skip
    return hidden, updates
