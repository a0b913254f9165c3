"""What a training step reads: rows of packed documents, as tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B rows of S columns, S a multiple of the block size; block k is the columns [k·S_b, (k+1)·S_b).

    No block spans two documents: each occupies whole blocks, from its lead (padding before its first token) to the
    end of its last block, which is filled with EOS.

    tokens: (B, S) int64; the padding id where there is nothing.
    document: (B, S) int64; which document of its row a column belongs to (0, 1, …), EOS repeats included; −1 at
        padding, in a document's lead too.
    text: (B, S) bool; a document's own tokens, its EOS included: what next-token prediction scores.
    denoised: (B, S) bool; columns of the blocks that are trained: whole blocks after a document's context-only
        part, EOS repeats included.
    prompt: (B, S) bool; columns of a prompt that came with its text: given, so next-token prediction may leave it out.
    index: (B,) int64; the row's number in the whole run: noise is keyed by it.
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
        """Some of its rows: a micro-batch."""
        return Batch(*(getattr(self, field.name)[rows] for field in fields(self)))
