"""A whole tower's pass in one call of compiled code, where nothing but this package's own kernels would run in it.

Launching a pass of a hundred small operations from Python takes longer than computing it. The result is that of the
kernels one by one (in fp32 but for a fused multiply-add at each residual sum). Wherever a part of the tower has been
replaced, is being watched or is differentiated, `run` returns None and the layers run as they are written in model/.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from twotower.kernels import select
from twotower.kernels.attention import Cached
from twotower.kernels.mamba_block import empty_trace
from twotower.kernels.native.ops import call, few
from twotower.model.attention import Attention
from twotower.model.conditioning import Modulation
from twotower.model.coupling import Added, KeyValue, MambaPast, Past, Visibility
from twotower.model.linear import Int8Linear, Linear
from twotower.model.mamba2 import CausalConv, Mamba2
from twotower.model.moe import MLP, Experts, Int8Experts, MoE, Router
from twotower.model.norm import GatedGroupRMSNorm, RMSNorm

if TYPE_CHECKING:
    from twotower.model.tower import Tower

KINDS = {"M": 0, "*": 1, "E": 2, "-": 3}
WEIGHTS = INPUTS = 12  # places a layer, as in kernels/native/tower.h
# Where each weight of a mixer stands; 0 is the layer's norm. What ends in ! is fp32 whatever the model's dtype.
PLACES = {
    "M": (
        "in_proj.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias", "dt_bias!", "A_log!", "D!", "norm.weight",
        "out_proj.weight", "out_proj.bias",
    ),
    "*": tuple(f"{name}_proj.{part}" for name in "qkvo" for part in ("weight", "bias")),
    "E": (
        "gate.weight", "gate.e_score_correction_bias!", "experts.up_proj", "experts.down_proj",
        "shared_experts.up_proj.weight", "shared_experts.up_proj.bias",
        "shared_experts.down_proj.weight", "shared_experts.down_proj.bias",
    ),
    "-": ("up_proj.weight", "up_proj.bias", "down_proj.weight", "down_proj.bias"),
}  # fmt: skip
LONGEST = 128  # tokens of a row: its Mamba layers compare each with each
OPS = ("linear", "rms_norm", "route", "experts", "attention", "mamba_block")
INT8_OPS = ("linear_int8", "experts_int8")  # of a tower with int8 weights, besides


class Plan:
    """A tower as it was when it was last looked at: its modules, and where its weights lie.

    Looking again is much cheaper than making a plan, so one is kept for as long as the tower consists of the same
    modules in the same dtype, whether it may be run or not.
    """

    def __init__(self, tower: Tower) -> None:
        modules = list(tower.modules())
        self.children = [(module._modules, dict(module._modules)) for module in modules]
        self.attributes = [module.__dict__ for module in modules]
        own = _own()
        self.plain = all(type(module) in own for module in modules)
        self.dtype = tower.embeddings.weight.dtype
        self.kinds = torch.tensor([KINDS[layer.kind] for layer in tower.all_layers()])
        self.holders: list[tuple[dict[str, Any], str, torch.dtype]] = []
        self.slots: list[int] = []
        if self.plain:  # else the weights may be anywhere
            self._find_weights(tower)
        quantised = any(dtype == torch.int8 for _, _, dtype in self.holders)
        self.ops = OPS + INT8_OPS if quantised else OPS
        self.addresses: list[int] = []
        self.table = (ctypes.c_void_p * (2 * len(tower.layers) * WEIGHTS))()  # weights, then scales of int8 ones

    def _find_weights(self, tower: Tower) -> None:
        for i, layer in enumerate(tower.all_layers()):
            for place, name in enumerate(("norm.weight", *(f"mixer.{name}" for name in PLACES[layer.kind]))):
                path, _, leaf = name.rstrip("!").rpartition(".")
                module = layer.get_submodule(path)
                holder = module._buffers if leaf in module._buffers else module._parameters
                scale = f"{leaf}_scale"
                int8 = scale in module._buffers
                dtype = torch.float32 if name.endswith("!") else torch.int8 if int8 else self.dtype
                self.holders.append((holder, leaf, dtype))
                self.slots.append(i * WEIGHTS + place)
                if int8:
                    self.holders.append((holder, scale, torch.float32))
                    self.slots.append((len(tower.layers) + i) * WEIGHTS + place)

    def still_holds(self, dtype: torch.dtype) -> bool:
        """Whether the tower still consists of the same modules, in the same dtype."""
        return dtype == self.dtype and all(now == then for now, then in self.children)

    def may_run(self) -> bool:
        """Whether every module is this package's own, and none is watched by hooks or given another `forward`."""
        if not self.plain or _has_any_global_hook():
            return False
        return not any(a["_forward_hooks"] or a["_forward_pre_hooks"] or "forward" in a for a in self.attributes)

    def where(self) -> list[int]:
        """The addresses of its weights; 0 for one that is not there."""
        found = (holder.get(name) for holder, name, _ in self.holders)
        return [0 if tensor is None else tensor.data_ptr() for tensor in found]

    def weights(self) -> Any:
        """The table of them; None where one has another type or does not lie in a row."""
        addresses = self.where()
        if addresses != self.addresses:
            for holder, name, dtype in self.holders:
                tensor = holder.get(name)
                if tensor is None and name == "bias":
                    continue
                if tensor is None or tensor.dtype != dtype or not tensor.is_contiguous():
                    return None
            for slot, address in zip(self.slots, addresses, strict=True):
                self.table[slot] = address
            self.addresses = addresses
        return self.table


_PLANS: WeakKeyDictionary[nn.Module, Plan] = WeakKeyDictionary()


def plan_of(tower: Tower) -> Plan:
    """The tower's plan, made anew where the last one no longer describes it."""
    plan = _PLANS.get(tower)
    if plan is None or not plan.still_holds(tower.embeddings.weight.dtype):
        plan = _PLANS[tower] = Plan(tower)
    return plan


def serves(tower: Tower) -> bool:
    """Whether every kernel that it needs is the chosen one for such a tower."""
    weight = tower.embeddings.weight
    return all(select(op, weight.device, weight.dtype).name == "native" for op in plan_of(tower).ops)


def run(
    tower: Tower,
    x: Tensor,
    sees: Visibility,
    past: Sequence[Past] | None,
    modulation: Sequence[Modulation] | None,
    trace: bool,
) -> tuple[Tensor, list[Added]] | None:
    """x (B, L, H), the embedded tokens, which are written over → what `Tower.forward` returns; None: not here."""
    rows, length, width = x.shape
    tokens, dtype = rows * length, tower.embeddings.weight.dtype
    if not 0 < tokens <= few(dtype, at_once=True) or length > LONGEST or not serves(tower):
        return None
    plan = plan_of(tower)
    if not plan.may_run():
        return None
    weights = plan.weights()
    inputs = _Inputs(tower, rows, length, sees, past, modulation, trace)
    if weights is None or not inputs.fit:
        return None
    config = tower.config
    hidden = x.new_empty(x.shape, dtype=dtype)
    sizes = torch.tensor([
        rows, length, width, len(tower.layers), inputs.stride, int(x.dtype != dtype), config.mamba_num_heads,
        config.mamba_head_dim, config.n_groups, config.ssm_state_size, config.conv_kernel, config.num_attention_heads,
        config.num_key_value_heads, config.head_dim, config.n_routed_experts, config.n_group, config.topk_group,
        config.num_experts_per_tok, config.moe_intermediate_size, config.moe_shared_expert_intermediate_size,
        int(config.norm_topk_prob), config.intermediate_size,
    ])  # fmt: skip
    call(
        "tower_", hidden, x, plan.kinds, ctypes.addressof(weights), ctypes.addressof(inputs.table), tower.norm_f.weight,
        hidden, inputs.valid, int(sees.causal), *inputs.segments, sizes, *config.time_step_limit,
        config.layer_norm_epsilon, config.routed_scaling_factor,
    )  # fmt: skip
    return hidden, inputs.added


class _Inputs:
    """What the layers of one pass read beside the weights and the stream, and what they leave: addresses, and the
    tensors behind them, which must live as long."""

    def __init__(
        self, tower: Tower, rows: int, length: int, sees: Visibility, past: Sequence[Past] | None,
        modulation: Sequence[Modulation] | None, trace: bool,
    ) -> None:  # fmt: skip
        self.table = (ctypes.c_void_p * (len(tower.layers) * INPUTS))()
        self.kept: list[Tensor] = []
        self.fit = True
        self.segments: tuple[Tensor | None, ...] = (None, None, None)
        self.valid = None if sees.valid is None else sees.valid.contiguous()
        self.stride = 0 if modulation is None else modulation[0].shift.stride(0)
        self.added: list[Added] = []
        config, dtype = tower.config, tower.embeddings.weight.dtype
        trace_sizes = config.mamba_num_heads, config.mamba_head_dim, config.n_groups, config.ssm_state_size
        key_shape = (rows, length, config.num_key_value_heads, config.head_dim)
        for i, layer in enumerate(tower.all_layers()):
            own = past[i] if past else None
            if modulation is not None:
                self.fit &= all(part.stride(0) == self.stride and part.stride(-1) == 1 for part in modulation[i])
                self._put(i, 0, modulation[i])
            if isinstance(own, Cached) and own.width:
                self._put(i, 3, (own.k, own.v))
                self.segments = (own.start, own.stride, own.lengths)
            elif isinstance(own, MambaPast):
                self._put(i, 3, tuple(part.contiguous() for part in own))
            elif own is not None and not isinstance(own, Cached):
                self.fit = False  # keys and values of whole sequences: training
            if layer.kind == "M" and trace:
                xBC = torch.empty(rows, length, config.conv_dim, dtype=dtype)
                kept = empty_trace(xBC, *trace_sizes)
                self._put(i, 5, kept)
                self.added.append(kept)
            elif layer.kind == "*":
                k, v = torch.empty(key_shape, dtype=dtype), torch.empty(key_shape, dtype=dtype)
                self._put(i, 5, (k, v))
                self.added.append(KeyValue(k.transpose(1, 2), v.transpose(1, 2)))
            else:
                self.added.append(None)

    def _put(self, layer: int, place: int, tensors: Sequence[Tensor]) -> None:
        for offset, tensor in enumerate(tensors):
            self.table[layer * INPUTS + place + offset] = tensor.data_ptr()
        self.kept += tensors


@cache
def _own() -> frozenset[type]:
    """The modules whose `forward` this file repeats."""
    from twotower.model.tower import Layer, Tower

    return frozenset({
        Tower, Layer, nn.Embedding, nn.ModuleList, RMSNorm, GatedGroupRMSNorm, Linear, Mamba2, CausalConv, Attention,
        MoE, MLP, Router, Experts, Int8Linear, Int8Experts,
    })  # fmt: skip
