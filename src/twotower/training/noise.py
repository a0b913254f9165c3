"""Noise levels and masks, as a pure function of (seed, row number): independent of batch, process and step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from twotower.errors import ArgumentError
from twotower.ops.host_transfer import send
from twotower.training.data.batch import Batch

LOWEST_NOISE = 1e-3
GOLDEN = 0.6180339887498949  # frac(GOLDEN·n) for n = 0, 1, … is spread evenly over [0, 1)

NoiseScope = Literal["row", "document", "block"]
NOISE_SCOPES: tuple[str, ...] = get_args(NoiseScope)


@dataclass(frozen=True)
class Corruption:
    """t (B, blocks): noise level of each block, fp32. masked (B, S): positions that become the mask token.

    pair: further masks of the same rows; the denoiser reads a block again that has masks there (`patterns`).
    on_policy: the masks are those of stored states (`on_policy`), and the loss is KL(AR ‖ denoiser) alone.
    """

    t: Tensor
    masked: Tensor
    pair: Corruption | None = None
    on_policy: bool = False

    def to(self, device: torch.device) -> Corruption:
        return self._each(lambda part: send(part, device))

    def rows(self, part: slice) -> Corruption:
        return self._each(lambda whole: whole[part])

    @property
    def copies(self) -> int:
        """How often the denoiser may read a block."""
        return 1 if self.pair is None else 1 + self.pair.copies

    @property
    def stacked(self) -> Corruption:
        """All masks as rows (copies·B, S): those of `pair` follow."""
        if self.pair is None:
            return self
        further = self.pair.stacked
        return Corruption(torch.cat([self.t, further.t]), torch.cat([self.masked, further.masked]))

    def _each(self, function: Callable[[Tensor], Tensor]) -> Corruption:
        pair = None if self.pair is None else self.pair._each(function)
        return Corruption(function(self.t), function(self.masked), pair, self.on_policy)


def corrupt(batch: Batch, block_size: int, seed: int, scope: NoiseScope) -> Corruption:
    """Draws t ~ U(1e-3, 1] and masks each position of a trained block with probability t. Runs on the CPU.

    scope: what shares one t: a packed row (as in the released recipe), a document or a block. The levels of
    successive rows, and of the documents or blocks of a row, are spread evenly (low discrepancy).

    Raises:
        ArgumentError: unknown scope.
    """
    if scope not in NOISE_SCOPES:
        raise ArgumentError(f"noise scope is {scope!r}; choose one of {', '.join(NOISE_SCOPES)}")
    rows, length = batch.tokens.shape
    offset, uniform = torch.empty(rows, 1, dtype=torch.float64), torch.empty(rows, length)
    for i, index in enumerate(batch.index.tolist()):  # a row's noise must not depend on other rows
        generator = generator_of(seed, index)
        offset[i] = torch.rand(1, generator=generator, dtype=torch.float64)
        uniform[i] = torch.rand(length, generator=generator)
    if scope == "row":
        shared = torch.rand(1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        place = (shared + GOLDEN * batch.index[:, None].double()).expand(-1, length // block_size)
    elif scope == "document":
        number = batch.document.unflatten(1, (-1, block_size)).amax(-1).clamp(min=0)
        place = offset + GOLDEN * number.double()
    else:
        place = offset + GOLDEN * torch.arange(length // block_size, dtype=torch.float64)
    t = 1.0 - (place % 1.0) * (1.0 - LOWEST_NOISE)
    masked = batch.denoised & (uniform < t.repeat_interleave(block_size, 1))
    return Corruption(t.float(), masked)


def generator_of(seed: int, index: int) -> torch.Generator:
    """The generator of row `index` of a run: a row's noise does not depend on other rows."""
    return torch.Generator().manual_seed(keyed_seed(seed, index))


def keyed_seed(seed: int, index: int) -> int:
    """Hashes (seed, index) to 63 bits (the finalizer of splitmix64)."""
    z = (seed * 0x9E3779B97F4A7C15 + index * 0xD1342543DE82EF95 + 1) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) >> 1
