"""Peak bytes on one GPU in a training step under torch's FSDP2, from a measured profile."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from twotower.training.planning.plan_setup import GIB, Setup
from twotower.training.planning.profile import Profile

FP32 = 4  # bytes


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU at the peak of a step.

    weights, gradients, moments: the GPU's shard of the trained parameters, in fp32. frozen: its shard, in the compute
    dtype. root: embeddings, head and time conditioning, gathered for the whole pass. gathered: the running unit and the
    messages of its neighbours. kept: activations and time conditioning. working: further memory of the running unit.
    moment: when the peak occurs. Gradients are reduced after each micro-batch, so none is kept unsharded.
    """

    weights: int
    gradients: int
    moments: int
    frozen: int
    root: int
    gathered: int
    kept: int
    working: int
    reserve: int
    moment: str

    @property
    def total(self) -> int:
        return sum(value for value in dataclasses.astuple(self) if isinstance(value, int))


def memory_of(measured: Profile, setup: Setup) -> Memory:
    """The peak of a step: the unit that runs, its direction, and the memory at this moment."""
    gpus, size = setup.gpus, measured.itemsize
    shares = [*(unit.share for unit in measured.units), measured.root]
    trained = sum(share.padded(gpus, True) for share in shares) // gpus
    frozen = sum(share.padded(gpus, False) for share in shares) // gpus
    alone = gpus == 1  # then trained weights are not resharded after use, and frozen ones are not gathered
    at, gathered, activations, kept = max(
        _moments(measured, gpus), key=lambda moment: moment[2] + (0 if alone else moment[1])
    )
    return Memory(
        weights=FP32 * (trained + measured.replicated),
        gradients=FP32 * (trained + measured.replicated_trained),
        moments=2 * FP32 * (trained + measured.replicated_trained),
        frozen=size * frozen,
        root=size * measured.root.count(True if alone else None),
        gathered=sum(size * unit.share.count(True) for unit in measured.units) if alone else gathered,
        kept=kept,
        working=activations - kept,
        reserve=int(setup.reserve_gib * GIB),
        moment=at,
    )


def _moments(measured: Profile, gpus: int) -> Iterator[tuple[str, int, int, int]]:
    """Yields (when, bytes of gathered weights and messages, bytes of activations, bytes kept) through a step of FSDP2.

    FSDP2 gathers the weights of a unit in one message, copies them out, and frees them after use. In the forward pass,
    a message lives until the next one has arrived. In the backward pass, the next message arrives meanwhile, and
    gradients leave in an fp32 message that lives until the message of the next unit.
    """
    size, units = measured.itemsize, measured.units
    message = [size * unit.share.padded(gpus) for unit in units]
    copied = [size * unit.share.count() for unit in units]
    grads = [size * unit.share.count(True) for unit in units]
    leaving = [FP32 * unit.share.padded(gpus, True) for unit in units] + [0]
    count = len(units)
    for i in (i for i in range(count) if units[i].gathers):
        kept = measured.fixed + measured.kept(i)
        arriving = message[i] + max(message[i - 1] if i else 0, copied[i])
        yield f"layer {i}, gathered for its forward pass", arriving, kept, kept
        yield f"layer {i}, forward", copied[i] + message[i], measured.forward(i), kept
    kept = measured.fixed + measured.kept(count)
    yield "the loss, forward", message[-1], measured.forward(count), kept
    yield "the loss, backward", message[-1], measured.backward(count), kept
    for i in (i for i in reversed(range(count)) if units[i].gathers > 1):
        kept = measured.left(i) + units[i].use.kept
        before = message[i - 1] if i else 0
        yield f"layer {i}, gathered for its backward pass", copied[i] + message[i] + leaving[i + 1], kept, kept
        yield f"layer {i}, backward", copied[i] + before + leaving[i + 1], measured.backward(i), kept
        yield f"layer {i}, its gradients sent", grads[i] + leaving[i] + before, measured.left(i), measured.left(i)
    root = measured.root
    kept = measured.fixed + measured.kept(count) + measured.tail.kept
    yield "embeddings and heads, gathered for the backward pass", size * root.padded(gpus), kept, kept
    # The embedding's gradient; of a tied head, a third tensor holds the sum of both gradients.
    last = measured.left(0) + measured.head * (2 if measured.tied_head else 1)
    yield "the embeddings' gradient", 0, last, measured.left(0)
    # The weights are freed before the gradients are sent, so the message counts only where it exceeds them.
    sent = size * root.count(True) + FP32 * root.padded(gpus, True) - size * root.count()
    yield "embeddings' and head's gradients sent", sent, measured.fixed, measured.fixed
