"""The seam for another drafter: what proposes the tokens that verified decoding checks, in place of the denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from twotower.engine.sequence import Phase, Row
from twotower.errors import ArgumentError


@dataclass(frozen=True)
class DraftRequest:
    """number: of the request in the engine. tokens: its text so far, the prompt included; the context tower has read
    all but the last. size: the most tokens that a draft may have; steps: the passes that a denoiser would be given."""

    number: int
    tokens: Sequence[int]
    size: int
    steps: int


@dataclass(frozen=True)
class Draft:
    """tokens: that may follow the text, at most `size` (none: the context tower chooses one token alone). committed_at:
    the pass that fixed each (empty: the first). passes: counted as denoiser passes."""

    tokens: Sequence[int]
    committed_at: Sequence[int] = ()
    passes: int = 0


class Drafter(Protocol):
    """Proposes a draft for each text. The text that comes out is the AR model's own, whatever is proposed."""

    def __call__(self, requests: Sequence[DraftRequest]) -> Sequence[Draft]:
        """One draft a request, in their order."""
        ...


def fill(drafter: Drafter, rows: Sequence[Row]) -> None:
    """Gives each row its draft; the context tower checks the drafts next.

    Raises:
        ArgumentError: a draft is too long, or there is not one for each row.
    """
    requests = [
        DraftRequest(
            number=row.record.row,
            tokens=[*row.request.prompt, *row.record.progress.tokens],
            size=row.params.block_size - 1,
            steps=row.allowed,
        )
        for row in rows
    ]
    drafts = drafter(requests)
    if len(drafts) != len(rows):
        raise ArgumentError(f"the drafter gave {len(drafts)} drafts for {len(rows)} texts; give one for each")
    for row, request, draft in zip(rows, requests, drafts, strict=True):
        if len(draft.tokens) > request.size:
            raise ArgumentError(f"the drafter gave {len(draft.tokens)} tokens; a draft may have {request.size}")
        row.record.denoiser_passes += draft.passes
        length = min(row.record.room, row.pace.length(row.params.block_size))
        row.block = [row.pending, *draft.tokens][:length]
        row.committed_at = [0, *(draft.committed_at or [0] * len(draft.tokens))]
        row.phase = Phase.CHECK
