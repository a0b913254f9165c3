"""Which positions of each block are masked in training: a mixture of patterns, one drawn for each block.

Draws are a pure function of (seed, row number), as those of `noise.corrupt`. With prediction shift 1 the first column
of a block is its last known token and is never masked.

| pattern | masks | t |
|---|---|---|
| levels | each position with probability t, as `noise.corrupt` | drawn |
| clipped | the same, t uniform between two limits (BD3-LM, arXiv 2503.09573) | drawn |
| draft | every position, as after a refused draft (Orthrus 2605.12825; DSpark) | open share |
| prefix | the positions after 1 to L − 1 visible ones, as in decoding from the left | open share |
| complementary | the block twice: masked with probability u, and the opposite masks (LaViDa, 2505.16839) | u, 1 − u |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from twotower.decoding.block_rule import noise_level
from twotower.errors import ArgumentError
from twotower.training.data.batch import Batch
from twotower.training.noise import LOWEST_NOISE, Corruption, NoiseScope, corrupt, generator_of
from twotower.training.shares import parse_shares

Pattern = Literal["levels", "clipped", "draft", "prefix", "complementary"]
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)
KEY = 0x5EED_B10C  # noise of patterns has other keys than that of `corrupt`


@dataclass(frozen=True)
class Patterns:
    """Shares of the patterns, in the order of PATTERNS. clip: the limits of clipped levels."""

    shares: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 0.0)
    clip: tuple[float, float] = (0.3, 0.8)

    def __post_init__(self) -> None:
        low, high = self.clip
        if not 0 < low <= high <= 1:
            raise ArgumentError(f"the limits of clipped levels are {low:g},{high:g}; give 0 < LOW <= HIGH <= 1")

    @classmethod
    def parse(cls, text: str, clip: tuple[float, float] = (0.3, 0.8)) -> Patterns:
        """`draft:0.4+prefix:0.6` → the mixture.

        Raises:
            ArgumentError: the text does not have this form.
        """
        shares = parse_shares(text, PATTERNS, "the mixture of patterns")
        return cls(tuple(shares.get(name, 0.0) for name in PATTERNS), clip)

    @property
    def only_levels(self) -> bool:
        """Whether every mask is drawn by its level t: what the likelihood bound needs."""
        return self.shares[0] == 1.0

    def share(self, name: Pattern) -> float:
        return self.shares[PATTERNS.index(name)]


ONLY_LEVELS = Patterns()


def draw_masks(
    batch: Batch, block_size: int, patterns: Patterns, *, seed: int, scope: NoiseScope = "document", shift: int = 0
) -> Corruption:
    """The masks and levels of a batch, on the CPU. A `pair` holds the second masks of complementary blocks."""
    levels = corrupt(batch, block_size, seed, scope)
    visible_first = torch.arange(block_size) < shift
    drawn = levels.masked.unflatten(1, (-1, block_size)) & ~visible_first
    if patterns.only_levels:
        return Corruption(levels.t, drawn.flatten(1))
    blocks = levels.t.shape[1]
    choice, spread, level, uniform = _draws(batch, blocks, block_size, seed)
    bounds = torch.tensor(patterns.shares, dtype=torch.float64).cumsum(0)[:-1]
    kind = torch.bucketize(choice.double(), bounds, right=True)
    visible = (1 + (spread * max(block_size - 1, 1)).long()).clamp(max=block_size - 1)
    low, high = patterns.clip
    clipped = low + (high - low) * level
    masks = {
        "levels": drawn,
        "clipped": uniform < clipped[..., None],
        "draft": torch.ones_like(drawn),
        "prefix": torch.arange(block_size) >= visible[..., None],
        "complementary": uniform < level[..., None],
    }
    trained = batch.denoised.unflatten(1, (-1, block_size)) & ~visible_first
    masked = torch.stack([masks[name] for name in PATTERNS]).gather(0, kind[None, ..., None].expand(1, *drawn.shape))[0]
    masked &= trained
    open_share = noise_level(masked.sum(-1), torch.tensor(max(block_size, shift + 1)), shift)
    t = torch.stack([levels.t, clipped, open_share, open_share, level]).gather(0, kind[None])[0]
    pair = None
    if patterns.share("complementary"):
        doubled = (kind == PATTERNS.index("complementary"))[..., None]
        opposite = trained & ~masks["complementary"] & doubled
        pair = Corruption((1 - level).clamp(min=LOWEST_NOISE), opposite.flatten(1))
    return Corruption(t.clamp(min=LOWEST_NOISE), masked.flatten(1), pair)


def _draws(batch: Batch, blocks: int, block_size: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uniform numbers: three (B, blocks), and one for each position (B, blocks, L)."""
    by_block, by_position = [], []
    for index in batch.index.tolist():  # a row's noise must not depend on other rows
        generator = generator_of(seed ^ KEY, index)
        by_block.append(torch.rand(3, blocks, generator=generator))
        by_position.append(torch.rand(blocks, block_size, generator=generator))
    choice, spread, level = torch.stack(by_block, 1)
    return choice, spread, level, torch.stack(by_position)


def open_predictions(masked: Tensor, block_size: int, shift: int) -> Tensor:
    """(B, S) masks → (B, S) the columns that predict an open token, in blocks with masks.

    Column c predicts token c + shift. With shift 1, the last column of a block predicts the token after the block.
    """
    if not shift:
        return masked
    blocks = masked.unflatten(1, (-1, block_size))
    after = torch.cat([blocks[..., 1:], torch.ones_like(blocks[..., :1])], -1)
    found: Tensor = (after & blocks.any(-1, keepdim=True)).flatten(1)
    return found
