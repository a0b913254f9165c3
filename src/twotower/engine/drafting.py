"""Drafts of verified decoding that another drafter proposes in place of the denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from twotower.engine.sequence import Phase, RunningSequence
from twotower.errors import ArgumentError


@dataclass(frozen=True)
class DraftRequest:
    """number: of the request in the engine. tokens: its text so far, the prompt included; the context tower has read
    all but the last token. size: the most tokens that a draft may have; steps: the passes a denoiser would be given."""

    number: int
    tokens: Sequence[int]
    size: int
    steps: int


@dataclass(frozen=True)
class Draft:
    """tokens: that may follow the text, at most `size` (none: the context tower chooses one token alone). committed_at:
    the pass that fixed each token (empty: the first). passes: counted as denoiser passes."""

    tokens: Sequence[int]
    committed_at: Sequence[int] = ()
    passes: int = 0


class Drafter(Protocol):
    """Proposes a draft for each text. The text that comes out is the AR model's own, whatever is proposed."""

    def __call__(self, requests: Sequence[DraftRequest]) -> Sequence[Draft]:
        """One draft a request, in their order."""
        ...


def fill(drafter: Drafter, sequences: Sequence[RunningSequence]) -> None:
    """Gives each sequence its draft; the context tower checks the drafts next.

    Raises:
        ArgumentError: a draft is too long, or there is not one for each sequence.
    """
    requests = [
        DraftRequest(
            number=sequence.output.row,
            tokens=[*sequence.request.prompt, *sequence.output.progress.tokens],
            size=sequence.params.block_size - 1,
            steps=sequence.max_passes,
        )
        for sequence in sequences
    ]
    drafts = drafter(requests)
    if len(drafts) != len(sequences):
        raise ArgumentError(f"the drafter gave {len(drafts)} drafts for {len(sequences)} texts; give one for each")
    for sequence, request, draft in zip(sequences, requests, drafts, strict=True):
        if len(draft.tokens) > request.size:
            raise ArgumentError(f"the drafter gave {len(draft.tokens)} tokens; a draft may have {request.size}")
        sequence.output.denoiser_passes += draft.passes
        sequence.block = [sequence.pending, *draft.tokens][: sequence.draft_length]
        sequence.committed_at = [0, *(draft.committed_at or [0] * len(draft.tokens))]
        sequence.phase = Phase.CHECK
