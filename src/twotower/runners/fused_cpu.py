"""A whole tower's pass in one call of compiled code, where nothing but this package's own kernels would run in it.

Launching a pass of a hundred small operations from Python takes longer than computing it. The result is that of the
kernels one by one (in fp32 but for a fused multiply-add at each residual sum). Wherever a part of the tower has been
replaced, is being watched or is differentiated, `run` returns None and the layers run as they are written in model/.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import repeat
from operator import contains, eq
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from twotower.cache.layer_cache import Added, KeyValue, MambaPast, Past
from twotower.model.attention import Attention
from twotower.model.conditioning import Modulation
from twotower.model.layer_io import Visibility
from twotower.model.linear import Int8Linear, Linear
from twotower.model.mamba2 import CausalConv, Mamba2
from twotower.model.moe import MLP, Experts, Int8Experts, MoE, Router
from twotower.model.norm import GatedGroupRMSNorm, RMSNorm
from twotower.ops.cpu import packed_weights
from twotower.ops.cpu.kernels import call, few
from twotower.ops.reference.attention import Cached
from twotower.ops.reference.mamba_block import MambaTrace, empty_trace
from twotower.ops.registry import select

if TYPE_CHECKING:
    from twotower.model.tower import Tower

KINDS = {"M": 0, "*": 1, "E": 2, "-": 3}
WEIGHTS = INPUTS = 12  # places a layer, as in ops/cpu/tower.h
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
# Of those places the ones that are read from a copy in panels where there is one.
PRODUCTS = {"M": (1, 9), "*": (1, 3, 5, 7), "E": (3, 4, 5, 7), "-": (1, 3)}
OPS = ("linear", "rms_norm", "route", "experts", "attention", "mamba_block")
INT8_OPS = ("linear_int8", "experts_int8")  # of a tower with int8 weights, besides


class Plan:
    """A tower as it was when it was last looked at: its modules, and where its weights lie.

    Looking again is much cheaper than making a plan, so one is kept for as long as the tower consists of the same
    modules in the same dtype, whether it may be run or not.
    """

    def __init__(self, tower: Tower) -> None:
        modules = list(tower.modules())
        self.children = [module._modules for module in modules]
        self.known = [dict(children) for children in self.children]
        self.attributes = [module.__dict__ for module in modules]
        self.hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        own = _own()
        self.plain = all(type(module) in own for module in modules)
        self.dtype = tower.embeddings.weight.dtype
        self.kinds = torch.tensor([KINDS[layer.kind] for layer in tower.all_layers()])
        self.holders: list[tuple[dict[str, Any], str, torch.dtype]] = []
        self.slots: list[int] = []
        self.products: list[int] = []  # of the holders, those of products
        if self.plain:  # else the weights may be anywhere
            self._find_weights(tower)
        self.ops = OPS + INT8_OPS if any(dtype == torch.int8 for _, _, dtype in self.holders) else OPS
        self.seen: tuple[Any, ...] = ()  # what `weights` found when it last looked
        self.packed: list[Tensor] = []  # weights whose copies in panels are used
        size = len(tower.layers) * WEIGHTS
        self.table = (ctypes.c_void_p * (3 * size))()  # weights as they lie, panels, scales of int8 ones
        self.tables = [ctypes.addressof(self.table) + part * size * ctypes.sizeof(ctypes.c_void_p) for part in range(3)]

    def _find_weights(self, tower: Tower) -> None:
        size = len(tower.layers) * WEIGHTS
        for i, layer in enumerate(tower.all_layers()):
            for place, name in enumerate(("norm.weight", *(f"mixer.{name}" for name in PLACES[layer.kind]))):
                path, _, leaf = name.rstrip("!").rpartition(".")
                module = layer.get_submodule(path)
                holder = module._buffers if leaf in module._buffers else module._parameters
                slot = i * WEIGHTS + place
                if f"{leaf}_scale" in module._buffers:
                    found = [(leaf, torch.int8, slot + size), (f"{leaf}_scale", torch.float32, slot + 2 * size)]
                else:
                    found = [(leaf, torch.float32 if name.endswith("!") else self.dtype, slot)]
                    if place in PRODUCTS[layer.kind]:
                        self.products.append(len(self.holders))
                self.holders += [(holder, leaf, dtype) for leaf, dtype, _ in found]
                self.slots += [slot for *_, slot in found]

    def still_holds(self, dtype: torch.dtype) -> bool:
        """Whether the tower still consists of the same modules, in the same dtype."""
        return dtype == self.dtype and all(map(eq, self.children, self.known))

    def served(self, weight: Tensor) -> bool:
        """Whether every kernel that the tower needs is the chosen one where this weight of it lies."""
        return all(select(op, weight.device, weight.dtype).name == "native" for op in self.ops)

    def may_run(self) -> bool:
        """Whether every module is this package's own, and none is watched by hooks or given another `forward`."""
        # A module's dictionaries of hooks are made with it and stay the same objects.
        if not self.plain or _has_any_global_hook():
            return False
        return not any(self.hooks) and not any(map(contains, self.attributes, repeat("forward")))

    def where(self) -> list[int]:
        """The addresses of its weights; 0 for one that is not there."""
        return [0 if (tensor := holder.get(name)) is None else tensor.data_ptr() for holder, name, _ in self.holders]

    def weights(self) -> bool:
        """Brings the table up to date; false where a weight has another type or does not lie in a row."""
        found = self.where(), packed_weights.changes(), [weight._version for weight in self.packed]
        if found == self.seen:
            return True
        tensors = [holder.get(name) for holder, name, _ in self.holders]
        for tensor, (_, name, dtype) in zip(tensors, self.holders, strict=True):
            if tensor is None and name == "bias":
                continue
            if tensor is None or tensor.dtype != dtype or not tensor.is_contiguous():
                return False
        for slot, address in zip(self.slots, found[0], strict=True):
            self.table[slot] = address
        self.packed.clear()
        for place in self.products:
            weight = tensors[place]
            assert weight is not None
            copy = packed_weights.of(weight)
            self.table[self.slots[place] + len(self.table) // 3] = None if copy is None else copy.data_ptr()
            if copy is not None:
                self.packed.append(weight)
        self.seen = found[0], packed_weights.changes(), [weight._version for weight in self.packed]
        return True

    @property
    def all_packed(self) -> bool:
        """Whether every product is made with panels."""
        return len(self.packed) == len(self.products)


_PLANS: WeakKeyDictionary[nn.Module, Plan] = WeakKeyDictionary()


def plan_of(tower: Tower) -> Plan:
    """The tower's plan, made anew where the last one no longer describes it."""
    plan = _PLANS.get(tower)
    if plan is None or not plan.still_holds(tower.embeddings.weight.dtype):
        plan = _PLANS[tower] = Plan(tower)
    return plan


def serves(tower: Tower) -> bool:
    """Whether every kernel that it needs is the chosen one for such a tower."""
    return plan_of(tower).served(tower.embeddings.weight)


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
    if not 0 < tokens <= few(dtype, packed=True) or length > LONGEST:
        return None
    plan = plan_of(tower)
    if not plan.served(tower.embeddings.weight) or not plan.may_run() or not plan.weights():
        return None
    if tokens > few(dtype, at_once=True, packed=plan.all_packed):
        return None
    inputs = _Inputs(tower, rows, length, sees, past, modulation, trace)
    if not inputs.fit:
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
        "tower_", hidden, x, plan.kinds, *plan.tables, ctypes.addressof(inputs.table), tower.norm_f.weight, hidden,
        inputs.valid, int(sees.causal), *inputs.segments, sizes, *config.time_step_limit, config.layer_norm_epsilon,
        config.routed_scaling_factor,
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
        traces, keys = self._places(tower, rows, length, trace)
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
            new: Added = None
            if layer.kind == "M" and trace:
                new = next(traces)
                self._put(i, 5, new)
            elif layer.kind == "*":
                k, v = next(keys)
                self._put(i, 5, (k, v))
                new = KeyValue(k.transpose(1, 2), v.transpose(1, 2))
            self.added.append(new)

    @staticmethod
    def _places(
        tower: Tower, rows: int, length: int, trace: bool
    ) -> tuple[Iterator[MambaTrace], Iterator[tuple[Tensor, ...]]]:
        """Where the layers leave what they add, layer by layer: memory for all of a kind at once, since a small tensor
        takes longer to make than to fill."""
        config, dtype = tower.config, tower.embeddings.weight.dtype
        mamba = config.hybrid_override_pattern.count("M") if trace else 0
        attention = config.hybrid_override_pattern.count("*")
        sizes = config.mamba_num_heads, config.mamba_head_dim, config.n_groups, config.ssm_state_size
        traces = empty_trace(torch.empty(mamba, rows, length, config.conv_dim, dtype=dtype), *sizes)
        keys = torch.empty(attention, 2, rows, length, config.num_key_value_heads, config.head_dim, dtype=dtype)
        by_layer = zip(*(part.unbind() for part in traces), strict=True)
        return (MambaTrace(*parts) for parts in by_layer), (pair.unbind() for pair in keys.unbind())

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
