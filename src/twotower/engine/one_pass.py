"""Rounds of a model whose denoiser is adapters on the context tower: one pass checks a draft and makes the next.

The pass reads the pending token, the draft, and masks. Its outputs up to the draft's last token are AR's, so they check
the draft, and AR's own next token becomes pending. If the whole draft is kept, the outputs at the masks are the next
draft, from the left up to the first one that is not sure. Otherwise they followed a wrong token, and the next pass
has no draft.

In verified decoding, a drafted token is kept if it is AR's. In diffusion, drafted tokens above the threshold are final.

A watched sequence gets a `StepEvent` after each pass that drafts: the next token, the draft, and candidates at the
other masks. In verified decoding it follows the event of the tokens that the pass checked, in diffusion it precedes the
event of the drafted tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from twotower.decoding.output import BlockEvent, Event, StepEvent
from twotower.engine.scheduled import ScheduledTokens
from twotower.engine.sequence import Phase, RunningSequence

DRAFT_CONFIDENCE = 0.4  # of drafted tokens in verified decoding: a pass that refuses a token makes no draft


def begin(sequence: RunningSequence, room: int, draft_passes: int | None) -> None:
    """Begins the next round. room: new tokens that may still follow. draft_passes: None: the controller chooses."""
    sequence.room, sequence.seconds = room, 0.0
    sequence.drafting = sequence.mode == "diffusion"
    if sequence.mode == "verified":
        sequence.drafting = bool(sequence.controller.choose_depth() if draft_passes is None else draft_passes)
    if sequence.final_drafts:
        sequence.block, most = [sequence.pending, *sequence.draft], room - 1
    else:
        sequence.block = [sequence.pending, *sequence.draft[: room - 1]]
        most = room - len(sequence.block)
    left = min(sequence.params.block_size - len(sequence.block), most)
    sequence.masks = max(left, 0) if sequence.drafting else 0
    sequence.committed_at = [0] * len(sequence.block)
    sequence.max_passes = int(len(sequence.block) > 1 or sequence.masks > 0)
    sequence.phase = Phase.CHECK if sequence.max_passes else Phase.STEP


def least_confidence(sequence: RunningSequence) -> float:
    """The confidence above which a token is drafted."""
    return sequence.policy_value if sequence.mode == "diffusion" else DRAFT_CONFIDENCE


def next_draft(entry: ScheduledTokens, new: Sequence[int], sure: Sequence[float], accepted: int) -> list[int]:
    """The draft after a pass: confident tokens at its masks. new, sure: the token and confidence at each position."""
    first = len(entry.tokens)
    if accepted < first - 1:
        return []
    least = least_confidence(entry.sequence)
    pairs = zip(new[first : entry.width], sure[first : entry.width], strict=True)
    return [token for token, _ in takewhile(lambda pair: pair[1] > least, pairs)]


def final_text(
    entry: ScheduledTokens, new: list[int], sure: list[float], accepted: int
) -> tuple[list[int], list[float]]:
    """In diffusion, the text that a pass adds (the next token, then the draft), and its confidences."""
    first, count = len(entry.tokens), len(entry.sequence.draft)
    places = [accepted, *range(first, first + count)]
    return [new[place] for place in places], [sure[place] for place in places]


def show_draft(entry: ScheduledTokens, new: Sequence[int], sure: Sequence[float], accepted: int) -> None:
    """Adds a `StepEvent` to a watched sequence, if its pass has drafted. The sequence has the draft already."""
    sequence, first = entry.sequence, len(entry.tokens)
    if not sequence.request.watched or not entry.masks or accepted < first - 1:
        return
    known = 1 + len(sequence.draft)
    step = StepEvent(
        row=sequence.output.row,
        start=len(sequence.output.progress.tokens) + (0 if sequence.final_drafts else accepted),
        step=0,
        steps=int(sequence.final_drafts),
        tokens=list(new[first - 1 : entry.width]),
        masked=[False] * known + [True] * (entry.width - first + 1 - known),
        confidence=list(sure[first - 1 : entry.width]),
    )
    if (step.start, step.step) > sequence.output.shown:  # after a recovery, passes are repeated
        sequence.step_events.append(step)


def with_steps(sequences: Sequence[RunningSequence], events: Sequence[BlockEvent]) -> list[Event]:
    """The events of a pass with the `StepEvent`s of its sequences, which then have none."""
    before: list[Event] = []
    after: list[Event] = []
    for sequence in sequences:
        if sequence.final_drafts:
            before += sequence.step_events
        elif sequence.output.running:  # else the draft follows the end of the text
            after += sequence.step_events
        sequence.step_events.clear()
    return [*before, *events, *after]
