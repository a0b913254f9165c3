"""Balances the load of experts without an auxiliary loss."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from twotower.model.moe import Router
from twotower.ops.reference.routing import selections
from twotower.training.fsdp import World

NOT_BALANCED = (
    "the routers of this model have no selection biases, so nothing balances the load of its experts "
    "(--balance-rate 0 leaves out this line)"
)


class LoadBalance:
    """Auxiliary-loss-free load balancing (DeepSeek-V3), by the selection biases that the released router has.

    After each step, the bias of an expert with more than the mean load falls by `rate`; the other biases rise.
    Only routers that train and have such biases are balanced. Recomputation counts a token twice, which changes no
    sign. note: one line if trained routers have no such biases, else None.
    """

    def __init__(self, module: nn.Module, rate: float, world: World) -> None:
        self.rate, self.world = rate, world
        routers = [m for m in module.modules() if isinstance(m, Router) and m.weight.requires_grad and rate]
        both = [(m, m.e_score_correction_bias) for m in routers]
        self.routers = [(router, bias) for router, bias in both if bias is not None]
        self.note = None if len(self.routers) == len(both) else NOT_BALANCED
        self.loads = [torch.zeros_like(bias) for _, bias in self.routers]
        self._hooks = [
            router.register_forward_hook(partial(self._count, load))
            for (router, _), load in zip(self.routers, self.loads, strict=True)
        ]

    @staticmethod
    def _count(load: Tensor, module: nn.Module, inputs: object, output: tuple[Tensor, Tensor]) -> None:
        if torch.is_grad_enabled():
            load += selections(output[0], len(load))

    def step(self) -> None:
        """Updates the biases from the loads that all processes counted since the last step."""
        if self.routers and self.world.size > 1:
            flat = torch.cat(self.loads)
            dist.all_reduce(flat)
            for load, part in zip(self.loads, flat.split([len(load) for load in self.loads]), strict=True):
                load.copy_(part)
        for (_, bias), load in zip(self.routers, self.loads, strict=True):
            bias += self.rate * torch.sign(load.mean() - load)
            load.zero_()

    def close(self) -> None:
        """Removes the hooks that count."""
        for hook in self._hooks:
            hook.remove()
