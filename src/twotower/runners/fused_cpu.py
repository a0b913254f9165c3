"""Runs a whole pass of a tower on a CPU in one call of the C++ kernels (`ops/cpu/tower.h`).

Launching a hundred small operations from Python takes longer than computing them. The result is that of the kernels
called one by one; in fp32 it differs by a fused multiply-add in each residual sum. The runner declines a pass if a
kernel of another backend would run, a module was replaced or has hooks, or gradients are needed. The layers then run
one by one as `model/tower.py` defines them.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from twotower import options
from twotower.cache.state_caches import StateCaches
from twotower.model.tower import PassInputs, PassResult, Tower, steady_period
from twotower.ops.cpu.kernels import call, max_tokens
from twotower.ops.registry import select
from twotower.runners.decode_pass import DecodePass, StateRows, kernels_selected
from twotower.runners.layer_options import spec_unsupported_reason
from twotower.runners.module_plan import ModulePlan
from twotower.runners.pass_tables import PassShape, PassTables, shape_of
from twotower.runners.rotation_tables import RotationTables
from twotower.runners.weight_table import WeightTable

MAX_ROW_TOKENS = 128  # the cost of a Mamba layer in one chunk grows with the square of the tokens
MAX_TABLES = 64  # cached pass shapes, least recently used first out
MAX_DECODE_PASSES = 40  # the widths of passes with adapters vary
PRODUCTS = ("linear", "route", "experts")
OPS = (*PRODUCTS, "rms_norm", "norm_and_rotate", "activate", "attention", "mamba_block")
INT8_OPS = ("linear_int8", "experts_int8")  # in addition, for a tower with int8 weights
INT4_OPS = ("linear_int4", "experts_int4")
W8A8_OPS, W4A8_OPS = ("linear_w8a8", "experts_w8a8"), ("linear_w4a8", "experts_w4a8")  # with activations in int8


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
        self._decode_passes: OrderedDict[PassShape, DecodePass] = OrderedDict()
        self._rotations: RotationTables | None = None
        self._supported: tuple[tuple[str, torch.dtype], bool] | None = None
        self._checked: object | None = None  # the period without changes in which the weights were checked
        self._runs_spec = False  # whether the C++ pass runs the tower's spec; valid for the plan

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
        if inputs.tokens.shape[1] > MAX_ROW_TOKENS:
            return None
        weights = self._weights_for(tower, count)
        if weights is None:
            return None
        shape = shape_of(inputs, weight.dtype)
        tables = self._tables.pop(shape, None)  # removed while in use: another thread must not use the same tables
        if tables is None:
            tables = PassTables(tower.spec, shape)
        tables.round_activations(weights.int8_activations)
        kept = tables.fill(inputs, self._rotations_of(tower))
        result = None if kept is None else _fused_pass(tower, weights, tables, inputs)
        self._tables[shape] = tables
        if len(self._tables) > MAX_TABLES:
            self._tables.popitem(last=False)
        return result

    def decode_pass(self, tower: Tower, shape: PassShape, rows: StateRows) -> DecodePass | None:
        """Decoding passes of a shape, prepared; None if not supported. Give them back with `keep`."""
        own = self._decode_passes.pop(shape, None)  # see `run`
        weights: WeightTable | None
        if own is not None and own.period is not None and own.period is steady_period() is self._checked:
            weights = self.weights
        else:
            weights = self._decode_weights(tower, shape)
        if weights is None:
            return None
        own = own or DecodePass(tower, shape)
        return own if own.prepare(tower, weights, self._rotations_of(tower), rows) else None

    def _decode_weights(self, tower: Tower, shape: PassShape) -> WeightTable | None:
        if shape.length > MAX_ROW_TOKENS or not kernels_selected(shape.dtype):
            return None
        return self._weights_for(tower, shape.rows * shape.length)

    def keep(self, own: DecodePass) -> None:
        """Takes decoding passes back for the next call."""
        own.release()
        self._decode_passes[own.shape] = own
        if len(self._decode_passes) > MAX_DECODE_PASSES:
            self._decode_passes.popitem(last=False)

    def _weights_for(self, tower: Tower, count: int) -> WeightTable | None:
        """The weights for a pass over `count` tokens; None if this runner does not support the pass."""
        dtype = tower.embeddings.weight.dtype
        if not 0 < count <= max_tokens(dtype, "packed"):
            return None
        weights = self._current_weights(tower)
        if weights is None or not weights.fits:
            return None
        return weights if count <= max_tokens(dtype, weights.storage, whole_tower=True) else None

    def _rotations_of(self, tower: Tower) -> RotationTables:
        """The rotations of all positions."""
        if self._rotations is None:
            self._rotations = RotationTables(tower.spec.ropes)
        return self._rotations

    def _current_weights(self, tower: Tower) -> WeightTable | None:
        """The addresses of the tower's weights; None if this runner does not support the tower as it is."""
        plan, weight = self._plan_of(tower), tower.embeddings.weight
        if not self._supports(plan, weight):
            return None
        if not self._is_checked():
            if not plan.is_unmodified(tower):
                return None
            if self.weights is None or not self.weights.is_current(plan, weight.dtype):
                self.weights = WeightTable(tower, plan)
            self._checked = steady_period()
        return self.weights

    def _is_checked(self) -> bool:
        """Whether the weights were checked in the current period without changes."""
        period = steady_period()
        return period is not None and period is self._checked

    def _plan_of(self, tower: Tower) -> ModulePlan:
        plan = self._plan
        if plan is None or not (self._is_checked() or plan.is_current()):
            plan = self._plan = ModulePlan(tower)
            self._runs_spec = spec_unsupported_reason(tower.spec) is None
            self.weights = self._supported = None
        return plan

    def _supports(self, plan: ModulePlan, weight: Tensor) -> bool:
        """Whether the C++ pass runs the layers, and the registry selects C++ kernels for this dtype and device."""
        device, dtype = weight.device, weight.dtype
        if (
            not self._runs_spec
            or device.type != "cpu"
            or torch.is_grad_enabled()
            or torch._C._len_torch_dispatch_stack()
        ):
            return False
        key = options.current().kernels_key, dtype
        if self._supported is None or self._supported[0] != key:
            int8, int4 = (W8A8_OPS, W4A8_OPS) if plan.int8_activations else (INT8_OPS, INT4_OPS)
            ops = OPS + (int8 if plan.int8 else ()) + (int4 if plan.int4 else ())
            chosen = (select(op, device, dtype, differentiable=False) for op in ops)
            self._supported = key, all(backend.name == "native" for backend in chosen)
        return self._supported[1]


def _fused_pass(tower: Tower, weights: WeightTable, tables: PassTables, inputs: PassInputs) -> PassResult:
    """Runs a pass whose tables are filled."""
    meta = inputs.meta
    x = tower.embed(inputs.tokens, meta.adapted_positions(inputs.tokens.shape[1]))  # the pass overwrites x
    hidden = x.new_empty(x.shape, dtype=weights.dtype)
    updates = tables.updates(hidden)
    token_mask, prefix = (None if part is None else part.contiguous() for part in (meta.token_mask, meta.prefix))
    appended = inputs.appended.contiguous() if tables.appends and inputs.appended is not None else None
    slots = inputs.past.rows if isinstance(inputs.past, StateCaches) else None
    call(
        "tower_", hidden, x, tables.pass_options, tables.layer_options, *weights.addresses, *weights.adapters,
        weights.rank, tables.inputs, tables.ropes, weights.norm_f, hidden, token_mask, appended, slots, prefix,
        int(meta.causal),
    )  # fmt: skip
    return hidden, updates
