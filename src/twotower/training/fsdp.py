"""Sharding with torch's FSDP2 over a mesh of all processes. A single process uses the same code."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from twotower.errors import ArgumentError
from twotower.model.fp32_tensors import keeps_fp32

Value = TypeVar("Value")


@dataclass(frozen=True)
class World:
    """The processes of a run. Rank 0 writes files and messages."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def total(self, value: float | Tensor) -> float:
        """The sum over all processes, in float64; the same result on every process."""
        return self.totals([value])[0]

    def totals(self, values: Sequence[float | Tensor], same: Sequence[Tensor] = ()) -> list[float]:
        """The sums of scalars over all processes, in float64; the same results on every process.

        same: scalars that are equal on every process; they follow, without a sum. The device is read once; values on
        the host of a single process do not read it.
        """
        scalars = [torch.as_tensor(value, dtype=torch.float64).detach().reshape(1) for value in (*values, *same)]
        on_device = self.size > 1 or any(scalar.device.type != "cpu" for scalar in scalars)
        whole = torch.cat([scalar.to(self.device) if on_device else scalar for scalar in scalars])
        if self.size > 1:
            dist.all_reduce(whole[: len(values)])
        found: list[float] = whole.tolist()
        return found

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def broadcast(self, value: Value) -> Value:
        """Returns rank 0's object on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: Value) -> list[Value]:
        """Returns the objects of all processes, in order of rank, on every process."""
        if self.size == 1:
            return [value]
        box = [value] * self.size
        dist.all_gather_object(box, value)
        return box


def start(device: str | None = None) -> World:
    """Joins the processes that torchrun started. Without torchrun, creates a group of one process.

    device: "cpu" or "cuda"; None: CUDA if there is a GPU. Each process uses the GPU of its local rank.

    Raises:
        ArgumentError: the device does not exist; or this machine has fewer GPUs than processes.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise ArgumentError(f"device is {device!r}; choose cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("device is cuda, but torch finds no GPU; use --device cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    place = torch.device("cpu")
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise ArgumentError(
                f"this machine has {torch.cuda.device_count()} GPUs for {local + 1} or more processes; "
                "start torchrun with a smaller --nproc-per-node"
            )
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        backend = "nccl" if kind == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timedelta(minutes=30))
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    size = dist.get_world_size()
    return World(dist.get_rank(), size, place, init_device_mesh(kind, (size,)))


def stop() -> None:
    """Destroys the process group."""
    with suppress(Exception):  # at interpreter shutdown the group may be gone already
        if dist.is_initialized():
            dist.destroy_process_group()


def shard(objective: nn.Module, units: Iterable[nn.Module], world: World, dtype: torch.dtype) -> None:
    """Shards the objective over all processes, unit by unit: parameters, gradients and optimizer state.

    Trained parameters are stored in fp32 (master weights) and compute in `dtype`; frozen parameters are stored in
    `dtype`. The few tensors that must stay fp32 (`checkpoint.FP32_SUFFIXES`: a number per head) are replicated on
    every process; `sum_replicated_gradients` sums their gradients. Gradients are summed, not averaged, because the
    loss is already divided by the number of targets over all processes.
    """
    for name, parameter in objective.named_parameters():
        place = parameter.device if parameter.device.type == "meta" else world.device
        wide = dtype if parameter.dtype == torch.float64 else torch.promote_types(dtype, torch.float32)
        keep = wide if parameter.requires_grad or keeps_fp32(name) else dtype
        parameter.data = parameter.data.to(place, keep)
    for buffer in objective.buffers():
        if buffer.device.type != "meta":
            buffer.data = buffer.data.to(world.device)
    whole = {parameter for name, parameter in objective.named_parameters() if keeps_fp32(name)}
    if world.size == 1:  # frozen weights are used as they are stored, without a gathered copy
        whole |= {parameter for parameter in objective.parameters() if not parameter.requires_grad}
    shard_one = partial(
        fully_shard,
        mesh=world.mesh,
        mp_policy=MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.promote_types(dtype, torch.float32), cast_forward_inputs=False
        ),
        ignored_params=whole,
        reshard_after_forward=world.size > 1,
    )
    for unit in units:
        shard_one(unit)
    shard_one(objective)
    for module in sharded(objective):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def sharded(objective: nn.Module) -> list[FSDPModule]:
    """The modules that FSDP shards: the units and the objective itself."""
    return [module for module in objective.modules() if isinstance(module, FSDPModule)]


def sum_replicated_gradients(parameters: list[nn.Parameter], world: World) -> None:
    """Sums the gradients of the replicated parameters over all processes, in one all-reduce."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if world.size == 1 or not grads:
        return
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The unsharded tensor, on every process. All processes must call this function."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
