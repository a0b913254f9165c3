"""Cached module list and weight pointers of a tower, and cheap checks that they are current.

A runner prepares data once for a tower. Before each pass it checks that the prepared data is still correct: all modules
are of this package's classes, none has hooks, and each weight is the same tensor at the same address.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import compress, repeat
from operator import contains, eq
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from twotower.model.adapters import LowRank, MaskEmbedding
from twotower.model.attention import Attention
from twotower.model.delta_net import GatedDeltaNet
from twotower.model.draft_head import DraftHead
from twotower.model.linear import Int4Linear, Int8Linear, Linear, TiedHead
from twotower.model.mamba2 import CausalConv, Mamba2
from twotower.model.moe import MLP, Experts, Int4Experts, Int8Experts, MoE, Router
from twotower.model.norm import GatedGroupRMSNorm, RMSNorm
from twotower.model.parallel import ParallelMixer
from twotower.model.tower import Layer, Tower

# The modules whose `forward` the runners replace.
OWN_MODULES: frozenset[type[nn.Module]] = frozenset(
    {
        Tower,
        Layer,
        nn.Embedding,
        nn.ModuleList,
        RMSNorm,
        GatedGroupRMSNorm,
        Linear,
        Mamba2,
        CausalConv,
        Attention,
        ParallelMixer,
        GatedDeltaNet,
        MLP,
        MoE,
        Router,
        Experts,
        Int8Linear,
        Int8Experts,
        Int4Linear,
        Int4Experts,
        TiedHead,
        LowRank,
        MaskEmbedding,
        DraftHead,
    }
)


_tensor: Callable[[dict[str, Any], str], Tensor | None] = dict.get
_address: Callable[[Any], int] = Tensor.data_ptr


class WeightPointers(NamedTuple):
    """Identities, presence and addresses of all parameters and buffers of a tower at one moment.

    addresses has an entry for each tensor that is not None. No reference to a tensor is kept.
    """

    ids: list[int]
    present: list[bool]
    addresses: tuple[int, ...]


class ModulePlan:
    """The modules of a tower when the plan was made.

    Checking a plan is much cheaper than making one. A runner keeps its plan while the tower has the same modules.
    """

    def __init__(self, tower: Tower) -> None:
        modules = list(tower.modules())
        # The dictionaries of a module are the same objects for its whole life.
        self._children = [module._modules for module in modules]
        self._known_children = [dict(children) for children in self._children]
        self._attributes = [module.__dict__ for module in modules[1:]]  # not the tower's, which holds the runner
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self.int8 = any(isinstance(module, Int8Linear | Int8Experts) for module in modules)
        self.int4 = any(isinstance(module, Int4Linear | Int4Experts) for module in modules)
        self.int8_activations = any(getattr(module, "int8_activations", False) for module in modules)
        self._own = all(type(module) in OWN_MODULES for module in modules)
        holders: list[dict[str, Any]] = []
        for module in modules:
            holders += module._parameters, module._buffers
        self._holders = [holder for holder in holders for _ in holder]
        self._names = [name for holder in holders for name in holder]

    def is_current(self) -> bool:
        """Whether the tower still has the same modules."""
        return all(map(eq, self._children, self._known_children))

    def is_unmodified(self, tower: Tower) -> bool:
        """Whether all modules are of this package's classes, without hooks and without a replaced `forward`."""
        if not self._own or _has_any_global_hook() or "forward" in tower.__dict__:
            return False
        return not any(self._hooks) and not any(map(contains, self._attributes, repeat("forward")))

    def weights(self) -> WeightPointers:
        """The current weight pointers."""
        tensors = list(map(_tensor, self._holders, self._names))
        addresses = tuple(tensor.data_ptr() for tensor in tensors if tensor is not None)
        return WeightPointers(list(map(id, tensors)), [tensor is not None for tensor in tensors], addresses)

    def weights_unchanged(self, known: WeightPointers) -> bool:
        """Whether each weight is the same tensor at the same address. Values changed in place are not detected."""
        tensors = list(map(_tensor, self._holders, self._names))
        if list(map(id, tensors)) != known.ids:
            return False
        return tuple(map(_address, compress(tensors, known.present))) == known.addresses
