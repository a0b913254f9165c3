"""Masks of one pass: which tokens are padding, and what a token attends to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from twotower.ops.reference.rope import Rotation, rotation
from twotower.specs import RopeSpec


@dataclass(frozen=True, kw_only=True)
class AttentionMetadata:
    """The masks of one pass over L tokens; the same for every layer.

    token_mask: (B, L), False at padding; None: there is no padding.
    causal: whether a token attends only to earlier tokens of its pass and itself. False for a denoiser's block.
    prefix: (B,), the tokens before the first mask. They attend as in a causal pass, and masks as in a block; adapters
    act at the masks (`model.adapters`). None: all tokens attend as `causal` says, and adapters do not act.
    start: (B,), the absolute position of the first token; None: 0.
    long: (B,), the rows with the long frequencies of LongRoPE; None: those that are longer than the original length
    after the pass.
    rotations: one for each `TowerSpec.ropes`; the tower computes them, once a pass.
    representative: (1,), the index among all B·L tokens of one that is not padding; None: not computed.
    """

    token_mask: Tensor | None = None
    causal: bool = True
    prefix: Tensor | None = None
    start: Tensor | None = None
    long: Tensor | None = None
    rotations: tuple[Rotation, ...] = ()
    representative: Tensor | None = None

    def adapted_positions(self, length: int) -> Tensor | None:
        """(B, L), where adapters act; None: nowhere."""
        if self.prefix is None:
            return None
        return torch.arange(length, device=self.prefix.device) >= self.prefix[:, None]

    def with_representative(self) -> AttentionMetadata:
        """A copy with `representative` set. Each pass computes it, so a CUDA graph replays the computation."""
        if self.token_mask is None:
            return self
        return replace(self, representative=self.token_mask.flatten().byte().argmax(0, keepdim=True))

    def with_rotations(self, ropes: tuple[RopeSpec, ...], tokens: Tensor, dtype: torch.dtype) -> AttentionMetadata:
        """A copy with `rotations` for tokens (B, L), in `dtype`, which is at least fp32."""
        if not ropes:
            return self
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None].expand(tokens.shape)
        if self.start is not None:
            positions = positions + self.start[:, None]
        turns = tuple(rotation(positions, rope, dtype, self._long(rope, positions)) for rope in ropes)
        return replace(self, rotations=turns)

    def _long(self, rope: RopeSpec, positions: Tensor) -> Tensor | None:
        """(B, 1), the rows with the long frequencies; None if the embedding has none."""
        if rope.original_length is None or self.long is not None:
            return None if self.long is None else self.long[:, None]
        after = positions + 1 if self.token_mask is None else (positions + 1) * self.token_mask
        return after.amax(1, keepdim=True) > rope.original_length

    def route_padding(self, choice: Tensor) -> Tensor:
        """Routes padding to the experts of the representative token, so that padding loads no extra weights.

        choice: (B·L, k), the experts of each token.
        """
        if self.token_mask is None or self.representative is None:
            return choice
        return torch.where(self.token_mask.flatten()[:, None], choice, choice.index_select(0, self.representative))


def context_visible(key_positions: Tensor, block_start: Tensor, window: int | None = None) -> Tensor:
    """Which context keys a denoiser block attends to: those strictly before its start, (N, T) bool.

    With a window of w, these are the w − 1 keys before its start. Generation (`window_mask`) and training share this
    rule. key_positions (T,), block_start (N,).
    """
    visible = key_positions < block_start[:, None]
    return visible if window is None else visible & (key_positions > (block_start - window)[:, None])
