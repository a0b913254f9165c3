"""AdamW on fp32 master weights of a bf16 model, with a warm-up–stable–decay schedule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Warm-up–stable–decay: linear up over `warmup` steps, flat, linear down to `final`·peak over the last
    `decay` fraction of `steps`."""

    steps: int
    peak: float
    warmup: int = 100
    decay: float = 0.3
    final: float = 0.01

    def rate(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.peak * (self.final + (1 - self.final) * min(1.0, left))


class MasterWeights:
    """The model computes in its own dtype; the optimizer keeps fp32 copies and writes them back after each step."""

    def __init__(self, modules: Iterable[nn.Module], weight_decay: float = 0.1, clip: float = 1.0) -> None:
        self.parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        self.masters = [p.detach().float().clone() for p in self.parameters]
        matrices = [m for m in self.masters if m.dim() >= 2]
        vectors = [m for m in self.masters if m.dim() < 2]  # norms, biases, decay rates: not decayed
        self.clip = clip
        self.adam = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=0.0,
            betas=(0.9, 0.95),
        )

    def step(self, rate: float, scale: float) -> Tensor:
        """One update from the parameters' gradients times `scale` → the norm of the scaled gradient."""
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            grad = parameter.grad
            master.grad = torch.zeros_like(master) if grad is None else grad.float() * scale
            parameter.grad = None
        norm = nn.utils.clip_grad_norm_(self.masters, self.clip)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        with torch.no_grad():
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                parameter.copy_(master)
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {"masters": self.masters, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for master, parameter, saved in zip(self.masters, self.parameters, state["masters"], strict=True):
                master.copy_(saved)
                parameter.copy_(saved)
        self.adam.load_state_dict(state["adam"])
