"""A batch of training: rows of packed documents, as tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B rows of S positions. S is a multiple of the block size L; block k is the positions [k·L, (k+1)·L).

    No block spans two documents. A document occupies whole blocks: its lead (padding before its first token), its
    tokens, and EOS repeated up to the end of its last block.

    tokens: (B, S) int64; the padding id at padding.
    document: (B, S) int64; number of the document within the row (0, 1, …), also at repeated EOS; −1 at padding and
        in a lead.
    text: (B, S) bool; a document's own tokens with its EOS, which next-token prediction scores.
    denoised: (B, S) bool; positions of trained blocks: whole blocks after a document's context-only tokens, with
        repeated EOS.
    prompt: (B, S) bool; positions of a record's prompt, which next-token prediction may leave out.
    index: (B,) int64; number of the row in the whole run, the key of its noise.
    """

    tokens: Tensor
    document: Tensor
    text: Tensor
    denoised: Tensor
    prompt: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))

    def rows(self, rows: slice) -> Batch:
        """A slice of the rows: a micro-batch."""
        return Batch(*(getattr(self, field.name)[rows] for field in fields(self)))
