"""What is masked: a pure function of (seed, row number), whatever the batch, the process or the step it is drawn in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from twotower.errors import ArgumentError
from twotower.training.data.batch import Batch

LOWEST_NOISE = 1e-3
GOLDEN = 0.6180339887498949  # frac(GOLDEN·n) fills [0, 1) evenly, however many n there are

NoiseScope = Literal["row", "document", "block"]
NOISE_SCOPES: tuple[str, ...] = get_args(NoiseScope)


@dataclass(frozen=True)
class Corruption:
    """t (B, blocks) the noise level each block was drawn at, fp32; masked (B, S) columns that become the mask token."""

    t: Tensor
    masked: Tensor

    def to(self, device: torch.device) -> Corruption:
        return Corruption(self.t.to(device), self.masked.to(device))

    def rows(self, part: slice) -> Corruption:
        return Corruption(self.t[part], self.masked[part])


def corrupt(batch: Batch, block_size: int, seed: int, scope: NoiseScope) -> Corruption:
    """t ~ U(1e-3, 1] (spec §4); each column of a trained block is masked with probability t.

    scope: what shares one t: a whole packed row (the released recipe's sequence), a document of it, or a block.
    Levels are spread evenly, over successive rows and over the documents or blocks of a row. Runs on the CPU.

    Raises:
        ArgumentError: unknown scope.
    """
    if scope not in NOISE_SCOPES:
        raise ArgumentError(f"noise scope is {scope!r}; choose one of {', '.join(NOISE_SCOPES)}")
    rows, length = batch.tokens.shape
    offset, uniform = torch.empty(rows, 1, dtype=torch.float64), torch.empty(rows, length)
    for i, index in enumerate(batch.index.tolist()):  # a generator each: a row's noise knows no other row
        generator = torch.Generator().manual_seed(_mix(seed, index))
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


def _mix(seed: int, index: int) -> int:
    """(seed, index) → 63 bits, all different in practice (splitmix64's finaliser)."""
    z = (seed * 0x9E3779B97F4A7C15 + index * 0xD1342543DE82EF95 + 1) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) >> 1
