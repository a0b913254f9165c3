"""The memory of a pass over one micro-batch, unit by unit: the result of `memory.measure_profile`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """Tensors sharded along their first dimension and gathered together: (rows, elements of a row, trained)."""

    tensors: tuple[tuple[int, int, bool], ...]

    def count(self, trained: bool | None = None) -> int:
        """The number of elements: all, only trained (True) or only frozen (False) ones."""
        return sum(rows * width for rows, width, trains in self.tensors if trained in (None, trains))

    def padded(self, gpus: int, trained: bool | None = None) -> int:
        """`count` with each tensor padded to a multiple of the GPUs, as all-gather and reduce-scatter move it."""
        return sum(-(-rows // gpus) * gpus * width for rows, width, trains in self.tensors if trained in (None, trains))


@dataclass(frozen=True)
class UnitUse:
    """Bytes of one unit's pass over a micro-batch, without its parameters.

    kept: from the forward to the backward pass, with the inputs. forward, backward: the peak of either pass, with the
    inputs and `kept`; the backward peak includes the gradients of the parameters.
    """

    kept: int
    forward: int
    backward: int


@dataclass(frozen=True)
class Unit:
    """A unit of the objective. gathers: how often a pass over a micro-batch gathers its parameters.

    A frozen context layer without a denoiser layer is gathered once, and one that is not run never.
    """

    share: Share
    use: UnitUse
    gathers: int = 2


@dataclass(frozen=True)
class Profile:
    """The pass over one micro-batch on one GPU, for any number of GPUs.

    root: parameters that stay gathered for the whole pass. replicated, replicated_trained: replicated elements, and
    the trained ones among them. head: bytes of the head. tied_head: the head is the embedding. fixed: bytes of time
    conditioning, positions and document maps. modulation: bytes of one layer's time conditioning. tail: final norm,
    head and loss. per_tower, denoiser: parameters of the context tower and of the denoiser tower.
    """

    units: tuple[Unit, ...]
    root: Share
    head: int
    tied_head: bool
    replicated: int
    replicated_trained: int
    fixed: int
    modulation: int
    tail: UnitUse
    per_tower: int
    denoiser: int
    itemsize: int

    def kept(self, before: int) -> int:
        """Bytes that the forward passes of the units before this one keep."""
        return sum(unit.use.kept for unit in self.units[:before])

    def forward(self, i: int) -> int:
        """Peak bytes of unit i's forward pass, without parameters; i = number of units: the loss."""
        use = self.units[i].use if i < len(self.units) else self.tail
        return self.fixed + self.kept(i) + use.forward

    def backward(self, i: int) -> int:
        """Peak bytes of unit i's backward pass, without parameters; i = number of units: the loss."""
        use = self.units[i].use if i < len(self.units) else self.tail
        return self.left(i) + use.backward

    def left(self, i: int) -> int:
        """Bytes between the backward passes of units i + 1 and i, without what unit i kept.

        They include the head's gradient and the time conditioning's gradients of the later layers.
        """
        later = len(self.units) - i
        return self.fixed + self.kept(i) + (self.head + (later - 1) * self.modulation if later else 0)
