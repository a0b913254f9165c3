"""AdamW on sharded fp32 parameters, with a warmup-stable-decay schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from twotower.errors import ArgumentError
from twotower.model.fp32_tensors import keeps_fp32
from twotower.training.fsdp import World, local, sum_replicated_gradients


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate: linear warmup over `warmup` steps, constant `peak_lr`, linear decay.

    The decay takes the last `decay` fraction of `steps` and ends at `final_lr_ratio`·`peak_lr`.
    """

    steps: int
    peak_lr: float
    warmup: int = 100
    decay: float = 0.3
    final_lr_ratio: float = 0.01

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ArgumentError(f"steps is {self.steps}; give at least 1")
        if not 0 < self.peak_lr < 1:
            raise ArgumentError(f"learning rate is {self.peak_lr}; give a number between 0 and 1, like 1e-4")
        for name in ("decay", "final_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ArgumentError(f"{name} is {getattr(self, name)}; give a fraction from 0 to 1")

    def lr(self, step: int) -> float:
        """The learning rate of step 0, 1, …"""
        if step < self.warmup:
            return self.peak_lr * (step + 1) / self.warmup
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.peak_lr * (self.final_lr_ratio + (1 - self.final_lr_ratio) * min(1.0, left))


class ShardedAdamW:
    """AdamW (β 0.9, 0.95) over the parameters that require gradients, with weight decay on matrices only.

    Norms, biases, Mamba's decay rates and the scale–shift tables are not decayed: their neutral value is not zero.
    """

    def __init__(self, module: nn.Module, world: World, weight_decay: float, clip: float) -> None:
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.replicated = [p for name, p in trained if keeps_fp32(name)]
        sharded = [(name, p) for name, p in trained if not keeps_fp32(name)]
        decayed = [p for name, p in sharded if p.dim() >= 2 and "scale_shift_tables" not in name]
        undecayed = [p for name, p in sharded if p.dim() < 2 or "scale_shift_tables" in name]
        self.parts = [p for _, p in sharded]
        self.world, self.clip = world, clip
        groups = [(decayed, weight_decay), (undecayed, 0.0), (self.replicated, 0.0)]
        self.adam = torch.optim.AdamW(
            [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters],
            lr=0.0,
            betas=(0.9, 0.95),
            fused=True if world.device.type == "cuda" else None,
        )

    def gradient_norm(self) -> float:
        """The norm of the gradient over all processes. Call once a step, after the last backward pass."""
        return self.read_with_norm([])[1]

    def read_with_norm(self, values: Sequence[Tensor]) -> tuple[list[float], float]:
        """The sums of scalars over all processes, and the norm of the gradient, with one read of the device.

        Call once a step, after the last backward pass.
        """
        sum_replicated_gradients(self.replicated, self.world)
        own = squared_norm([local(p.grad) for p in self.parts if p.grad is not None], self.world.device)
        replicated = squared_norm([p.grad for p in self.replicated if p.grad is not None], self.world.device)
        *found, square, further = self.world.totals([*values, own], [replicated])
        norm: float = (square + further) ** 0.5
        return found, norm

    def step(self, lr: float, norm: float) -> None:
        """Clips the gradients, whose norm is `norm`, makes one update, and clears the gradients."""
        if self.clip and norm > self.clip:
            grads = [local(p.grad) for p in (*self.parts, *self.replicated) if p.grad is not None]
            torch._foreach_mul_(grads, self.clip / norm)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        self.adam.zero_grad()

    def zero_grad(self) -> None:
        """Clears the gradients."""
        self.adam.zero_grad()

    def moments(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """AdamW's state of one parameter. Before the first step it is created with zeros, so that it can be loaded."""
        state: dict[str, torch.Tensor] = self.adam.state[parameter]
        if not state:
            on = parameter.device if self.world.device.type == "cuda" else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=on)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


def squared_norm(parts: list[Tensor], device: torch.device) -> Tensor:
    """The squared norm of all tensors together, a float64 scalar. On a GPU, one operation for all norms."""
    if not parts:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(parts)).double().square().sum()
