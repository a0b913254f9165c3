"""Kernels and host reads of a training pass, counted on tensors without storage: no GPU, and no time for products.

The weights are on the meta device, and the batch is on the host, as in training. An operation that reads a value of the
weights' device raises an error there, so a pass that ends has none, except those that `OperationCounts` names.
Attention and RMS norms count as the kernels of CUDA, one in each direction. Experts compute as in training on CUDA (in
fp32 they read the tokens of each expert, which the meta device does not show). Not counted: gathering and reducing of
FSDP, the fused optimizer, and the kernels inside a grouped or fused operation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from twotower.specs import TowerSpec
from twotower.training.balance import LoadBalance
from twotower.training.data import Batch
from twotower.training.fsdp import World
from twotower.training.objective import AutoregressiveObjective
from twotower.training.optimizer import squared_norm
from twotower.training.planning.memory import build
from twotower.training.planning.meta_ops import tower_of_cuda

from .operation_counts import OperationCounts

RANK = 32


class _OneKernel(torch.autograd.Function):
    """An operation that is one kernel in each direction, with a result like the first tensor."""

    @staticmethod
    def forward(ctx: Any, name: str, counts: OperationCounts, like: Tensor, *others: Tensor) -> Tensor:
        ctx.name, ctx.counts, ctx.given = name, counts, (like, *others)
        counts.kernels[name] += 1
        return torch.empty_like(like)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ctx.counts.kernels[f"{ctx.name}_backward"] += 1
        return None, None, *(torch.empty_like(part) if part.requires_grad else None for part in ctx.given)


class KernelsOfCUDA(TorchFunctionMode):
    """Attention and RMS norms as on CUDA. Elsewhere torch composes them from many operations."""

    def __init__(self, counts: OperationCounts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in (F.scaled_dot_product_attention, F.rms_norm):
            return func(*args, **kwargs)
        given = [part for part in (*args, *kwargs.values()) if isinstance(part, Tensor) and part.is_floating_point()]
        return _OneKernel.apply(func.__name__, self.counts, *given)


@dataclass(frozen=True)
class PassCounts:
    """The counts of a pass over one micro-batch, and of the norm of its gradient."""

    forward: OperationCounts
    backward: OperationCounts
    norm: OperationCounts

    def kernels(self) -> dict[str, int]:
        return {name: sum(part.kernels.values()) for name, part in self.__dict__.items()}

    def host_reads(self) -> dict[str, int]:
        return {name: sum(part.host_reads.values()) for name, part in self.__dict__.items()}


def objective_without_storage(kind: str, spec: TowerSpec, dtype: torch.dtype) -> Any:
    """The objective "ar", "denoiser" or "adapters", with weights on the meta device."""
    if kind == "ar":
        with torch.device("meta"):
            tower = tower_of_cuda(spec, dtype)
        return AutoregressiveObjective(tower.to(dtype))
    adapters = RANK if kind == "adapters" else None
    options: dict[str, Any] = {"context": "frozen", "activation_checkpointing": False, "teacher": kind == "adapters"}
    return build(spec, dtype=dtype, adapters=adapters, **options)[0]


def count_pass(objective: Any, batch: Batch, block_size: int) -> PassCounts:
    """Counts one pass of an objective on the meta device over a batch on the host, and the norm of its gradient."""
    here = torch.device("meta")
    balance = LoadBalance(objective, 1e-3, World(0, 1, here, None))  # type: ignore[arg-type]
    noise = objective.draw_noise(batch, block_size)
    forward, backward, norm = (OperationCounts(here) for _ in range(3))
    with forward, KernelsOfCUDA(forward):
        loss = objective(batch, noise, block_size)
    with backward, KernelsOfCUDA(backward):
        loss.backward()
    with norm:
        squared_norm([p.grad for p in objective.parameters() if p.grad is not None], here)
        balance.step()
    balance.close()
    return PassCounts(forward, backward, norm)
