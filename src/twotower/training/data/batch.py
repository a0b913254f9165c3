"""A batch of training: rows of packed documents, as tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace

import torch
from torch import Tensor

from twotower.ops.host_transfer import send


@dataclass(frozen=True)
class Batch:
    """B rows of S positions. S is a multiple of the block size L; block k is the positions [k·L, (k+1)·L).

    No block spans two documents. A document occupies whole blocks: its lead (padding before its first token), its
    tokens, and EOS repeated up to the end of its last block. In a conversation, each assistant turn occupies whole
    blocks: padding may end the block before it, and EOS is repeated up to the end of its last block.

    tokens: (B, S) int64; the padding id at padding.
    document: (B, S) int64; number of the document within the row (0, 1, …), also at repeated EOS; −1 at padding and
        in a lead.
    text: (B, S) bool; a document's own tokens with its EOS, which next-token prediction scores.
    denoised: (B, S) bool; positions of trained blocks: whole blocks after a document's context-only tokens, with
        repeated EOS.
    prompt: (B, S) bool; positions of a record's prompt, which next-token prediction may leave out.
    index: (B,) int64; number of the row in the whole run, the key of its noise.
    filler: (B, S) bool; repeated EOS after a turn that does not end its document, which later blocks do not read. None:
        the batch has no conversation.
    target: (B, S) bool; tokens that may be predicted: the assistant's, and repeated EOS; all tokens of documents that
        are no conversations. None: all.
    """

    tokens: Tensor
    document: Tensor
    text: Tensor
    denoised: Tensor
    prompt: Tensor
    index: Tensor
    filler: Tensor | None = None
    target: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device | str) -> Batch:
        return self._each(lambda whole: send(whole, torch.device(device)))

    def rows(self, rows: slice) -> Batch:
        """A slice of the rows: a micro-batch."""
        return self._each(lambda whole: whole[rows])

    def _each(self, function: Callable[[Tensor], Tensor]) -> Batch:
        always = (function(getattr(self, field.name)) for field in fields(self) if field.default is MISSING)
        filler, target = (None if whole is None else function(whole) for whole in (self.filler, self.target))
        return replace(Batch(*always), filler=filler, target=target)
