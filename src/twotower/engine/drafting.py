"""Drafts of verified decoding from a drafter that replaces the denoiser."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from twotower.engine.sequence import Phase, RunningSequence, charge
from twotower.errors import ArgumentError


@dataclass(frozen=True)
class DraftRequest:
    """The input of a drafter.

    number: the request's number in the engine. tokens: the text so far, with the prompt; the context tower has read all
    but the last token. size: the most tokens of the draft. steps: the draft depth that a denoiser would have.
    """

    number: int
    tokens: Sequence[int]
    size: int
    steps: int


@dataclass(frozen=True)
class Draft:
    """The output of a drafter.

    tokens: at most `size` proposed tokens (none: the context tower chooses one token). committed_at: the pass that
    committed each token (empty: the first). passes: the number to add to the denoiser passes.
    """

    tokens: Sequence[int]
    committed_at: Sequence[int] = ()
    passes: int = 0


class Drafter(Protocol):
    """Proposes drafts. With acceptance 1 a draft does not change the text (in bf16 up to near ties)."""

    def __call__(self, requests: Sequence[DraftRequest]) -> Sequence[Draft]:
        """Returns one draft for each request, in order."""
        ...


def draft(drafter: Drafter, sequences: Sequence[RunningSequence]) -> None:
    """Calls the drafter for the sequences that need a draft; see `fill`."""
    if sequences:
        started = time.perf_counter()
        fill(drafter, sequences)
        charge(sequences, started)


def fill(drafter: Drafter, sequences: Sequence[RunningSequence]) -> None:
    """Gives each sequence its draft, which the context tower verifies next.

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
