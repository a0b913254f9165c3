"""AdamW on sharded fp32 parameters, with a warm-up–stable–decay schedule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from twotower.errors import ArgumentError
from twotower.model.fp32_tensors import keeps_fp32
from twotower.training.fsdp import World, local, sum_replicated_gradients


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Warm-up–stable–decay: linear up to `peak_lr` over `warmup` steps, flat, linear down to
    `final_lr_ratio`·`peak_lr` over the last `decay` fraction of `steps`."""

    steps: int
    peak_lr: float
    warmup: int = 100
    decay: float = 0.3
    final_lr_ratio: float = 0.01

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ArgumentError(f"steps is {self.steps}; at least one is needed")
        if not 0 < self.peak_lr < 1:
            raise ArgumentError(f"learning rate is {self.peak_lr}; choose one in (0, 1), as 1e-4")
        for name in ("decay", "final_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ArgumentError(f"{name} is {getattr(self, name)}; choose a fraction in [0, 1]")

    def lr(self, step: int) -> float:
        """The learning rate of step 0, 1, …"""
        if step < self.warmup:
            return self.peak_lr * (step + 1) / self.warmup
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.peak_lr * (self.final_lr_ratio + (1 - self.final_lr_ratio) * min(1.0, left))


class ShardedAdamW:
    """AdamW (β 0.9, 0.95) over what requires gradients; weight decay on matrices only.

    Norms, biases, decay rates and the time tables are not decayed: zero is not where they rest (a gate rests at 1).
    """

    def __init__(self, module: nn.Module, world: World, weight_decay: float, clip: float) -> None:
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.whole = [p for name, p in trained if keeps_fp32(name)]
        sharded = [(name, p) for name, p in trained if not keeps_fp32(name)]
        decayed = [p for name, p in sharded if p.dim() >= 2 and "scale_shift_tables" not in name]
        resting = [p for name, p in sharded if p.dim() < 2 or "scale_shift_tables" in name]
        self.parts = [p for _, p in sharded]
        self.world, self.clip = world, clip
        groups = [(decayed, weight_decay), (resting, 0.0), (self.whole, 0.0)]
        self.adam = torch.optim.AdamW(
            [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters],
            lr=0.0,
            betas=(0.9, 0.95),
            fused=True if world.device.type == "cuda" else None,
        )

    def gradient_norm(self) -> float:
        """Of the whole gradient, over all processes. Call once, after the last backward pass of a step."""
        sum_replicated_gradients(self.whole, self.world)
        parts = [local(p.grad) for p in self.parts if p.grad is not None]
        square = self.world.total(_square(parts))
        norm: float = float(square + _square([p.grad for p in self.whole if p.grad is not None])) ** 0.5
        return norm

    def step(self, lr: float, norm: float) -> None:
        """One update from gradients of norm `norm`, clipped; forgets them."""
        if self.clip and norm > self.clip:
            for p in [*self.parts, *self.whole]:
                if p.grad is not None:
                    local(p.grad).mul_(self.clip / norm)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        self.adam.zero_grad()

    def zero_grad(self) -> None:
        """Drops the gradients of a step that is not taken."""
        self.adam.zero_grad()

    def moments(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """AdamW's state of one parameter, made (zero) where no step was taken yet, so that a checkpoint can fill it."""
        state: dict[str, torch.Tensor] = self.adam.state[parameter]
        if not state:
            on = parameter.device if self.world.device.type == "cuda" else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=on)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


def _square(parts: list[Tensor]) -> Tensor:
    """The squared norm of all parts together, in fp64, a scalar."""
    norms = [torch.linalg.vector_norm(part).double() for part in parts]
    return torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64)
