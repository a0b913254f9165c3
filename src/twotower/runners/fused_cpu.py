"""A whole tower's pass in one call of compiled code, where only this package's own kernels would run in the pass.

Launching a pass of a hundred small operations from Python takes longer than computing it. The result is that of the
kernels one by one (in fp32 but for a fused multiply-add at each residual sum). Where a module of the tower has been
replaced, has hooks, or is differentiated, the runner declines and the layers run as model/tower.py defines them.
"""

from __future__ import annotations

from collections import OrderedDict

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

MAX_ROW_TOKENS = 128  # tokens of a row: its Mamba layers compare each with each
MAX_TABLES = 64  # shapes of pass whose tables are kept; the one used longest ago goes first
OPS = ("linear", "rms_norm", "route", "experts", "attention", "mamba_block")
INT8_OPS = ("linear_int8", "experts_int8")  # of a tower with int8 weights, besides


class FusedCPURunner:
    """Serves one tower: keeps the tower's plan, weight table and pass tables. A copy of a runner is empty."""

    def __init__(self) -> None:
        self.release()

    def __reduce__(self) -> tuple[type[FusedCPURunner], tuple[()]]:
        return type(self), ()

    def release(self) -> None:
        """Frees everything prepared for the tower."""
        self._plan: ModulePlan | None = None
        self.weights: WeightTable | None = None
        self._tables: OrderedDict[PassShape, PassTables] = OrderedDict()
        self._supported: tuple[tuple[str, torch.dtype], bool] | None = None

    @property
    def prepared(self) -> int:
        """Shapes of pass that are prepared."""
        return len(self._tables)

    def prefill_chunk(self, tower: Tower) -> int | None:
        """Tokens of a prompt that are best read in one pass; None where this runner does not serve the tower."""
        return MAX_ROW_TOKENS if self._supports(self._plan_of(tower), tower.embeddings.weight) else None

    def run(self, tower: Tower, inputs: PassInputs) -> PassResult | None:
        """What `Tower.forward` returns; None where the pass is not this runner's."""
        count, weight = inputs.tokens.numel(), tower.embeddings.weight
        if not 0 < count <= max_tokens(weight.dtype, packed=True) or inputs.tokens.shape[1] > MAX_ROW_TOKENS:
            return None
        plan = self._plan_of(tower)
        if not self._supports(plan, weight) or not plan.is_unmodified(tower):
            return None
        weights = self.weights
        if weights is None or not weights.is_current(plan, weight.dtype):
            weights = self.weights = WeightTable(tower, plan)
        if not weights.fits or count > max_tokens(weight.dtype, whole_tower=True, packed=weights.all_packed):
            return None
        shape = shape_of(inputs, weight.dtype)
        if not SUPPORTED_CACHES.issuperset(shape.past):
            return None
        tables = self._tables.pop(shape, None)  # no other thread's pass may use the same tables meanwhile
        if tables is None:
            residual = accumulation_dtype(shape.dtype) if tower.config.residual_in_fp32 else shape.dtype
            tables = PassTables(tower.config, shape, residual)
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
        """Whether every kernel that the tower needs is the chosen one for such a weight of the tower."""
        device, dtype = weight.device, weight.dtype
        if device.type != "cpu" or torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack():
            return False
        key = options.current().kernels_key, dtype
        if self._supported is None or self._supported[0] != key:
            ops = OPS + INT8_OPS if plan.int8 else OPS
            chosen = (select(op, device, dtype, differentiable=False) for op in ops)
            self._supported = key, all(backend.name == "native" for backend in chosen)
        return self._supported[1]


def _fused_pass(tower: Tower, weights: WeightTable, tables: PassTables, inputs: PassInputs) -> PassResult | None:
    kept = tables.fill(inputs)
    if kept is None:
        return None
    meta, cached = inputs.meta, cached_context(inputs)
    x = tower.embed(inputs.tokens)  # written over by the pass
    hidden = x.new_empty(x.shape, dtype=weights.dtype)
    added = tables.updates(hidden)
    valid = None if meta.valid is None else meta.valid.contiguous()
    rows = cached[2:5] if cached is not None and cached.max_length else (None, None, None)  # start, stride, lengths
    call(
        "tower_", hidden, x, weights.kinds, *weights.addresses, tables.inputs, weights.norm_f, hidden, valid,
        int(meta.causal), *rows, tables.sizes, *tables.constants,
    )  # fmt: skip
    return hidden, added
