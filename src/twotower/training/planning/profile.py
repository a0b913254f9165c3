"""What the pass over one micro-batch holds in memory, unit by unit: the result of `memory.profile`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """Tensors that are cut along their first dimension and gathered together: (rows, elements of a row, trained)."""

    tensors: tuple[tuple[int, int, bool], ...]

    def count(self, trained: bool | None = None) -> int:
        """Numbers in all, or only what trains (True) or is frozen (False)."""
        return sum(rows * width for rows, width, trains in self.tensors if trained in (None, trains))

    def padded(self, gpus: int, trained: bool | None = None) -> int:
        """The same, each tensor filled up to a multiple of the GPUs: what gathering and scattering move."""
        return sum(-(-rows // gpus) * gpus * width for rows, width, trains in self.tensors if trained in (None, trains))


@dataclass(frozen=True)
class UnitUse:
    """Bytes of one unit's pass over a micro-batch, its parameters apart.

    kept: from its forward to its backward pass, inputs included; forward, backward: the most at one time in either,
    inputs and `kept` included, and in the backward pass the gradients of its parameters as they come.
    """

    kept: int
    forward: int
    backward: int


@dataclass(frozen=True)
class Unit:
    share: Share
    use: UnitUse


@dataclass(frozen=True)
class Profile:
    """The pass over one micro-batch on one GPU, whatever the number of GPUs.

    root: what is gathered for the whole pass. whole: numbers every GPU has all of
    (of these trained). fixed: time conditioning and document maps.
    modulation: one layer's time conditioning. tail: the final norm, the head and the loss.
    """

    units: tuple[Unit, ...]
    root: Share
    head: int
    whole: int
    whole_trained: int
    fixed: int
    modulation: int
    tail: UnitUse
    per_tower: int
    itemsize: int

    def kept(self, before: int) -> int:
        """What the forward passes of the units before this one have left behind."""
        return sum(unit.use.kept for unit in self.units[:before])

    def forward(self, i: int) -> int:
        """The most at one time during a unit's forward pass, parameters apart; i = number of units: the loss."""
        use = self.units[i].use if i < len(self.units) else self.tail
        return self.fixed + self.kept(i) + use.forward

    def backward(self, i: int) -> int:
        """The same in its backward pass."""
        use = self.units[i].use if i < len(self.units) else self.tail
        return self.left(i) + use.backward

    def left(self, i: int) -> int:
        """What is there between the backward passes of units i + 1 and i, besides what unit i kept: the head's
        gradient, and the time conditioning's of the later layers, which are all added up at the end."""
        later = len(self.units) - i
        return self.fixed + self.kept(i) + (self.head + (later - 1) * self.modulation if later else 0)
