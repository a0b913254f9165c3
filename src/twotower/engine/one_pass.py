"""Rounds of a model whose denoiser is adapters on the context tower: one pass checks a draft and makes the next.

The pass reads the pending token, the draft, and masks. Its outputs up to the draft's last token are AR's, so they check
the draft, and AR's own next token becomes pending. If the whole draft is kept, the outputs at the masks are the next
draft, of which the next pass checks a part. Otherwise they followed a wrong token, and the next pass has no draft.

In verified decoding, a drafted token is kept if it is AR's. How many tokens a pass checks, and its width, are chosen
for each sequence by expected tokens a second (`decoding/draft_planner.py`). In diffusion, drafted tokens above the
threshold are final, and the width of a pass depends on the share of tokens that masks brought so far
(`decoding/pass_width.py`), except that deterministic requests have passes of the width of a block.

A watched sequence gets a `StepEvent` after each pass that drafts: the next token, the draft, and candidates at the
other masks. In verified decoding it follows the event of the tokens that the pass checked, in diffusion it precedes the
event of the drafted tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from twotower.decoding.draft_planner import DEFAULT_SLOPE
from twotower.decoding.output import BlockEvent, Event, StepEvent
from twotower.decoding.pass_width import pass_width
from twotower.engine.scheduled import ScheduledTokens
from twotower.engine.sequence import Phase, RunningSequence
from twotower.runners.decode_pass import RoundRow


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
    if sequence.mode == "verified" and not sequence.width:  # no pass has planned the first one
        sequence.width = sequence.planner.plan([], room, slope(sequence))[1]
    if sequence.mode == "diffusion":
        sequence.width = _diffusion_width(sequence)
    left = min(sequence.width - len(sequence.block), most)
    sequence.masks = max(left, 0) if sequence.drafting else 0
    sequence.committed_at = [0] * len(sequence.block)
    sequence.max_passes = int(len(sequence.block) > 1 or sequence.masks > 0)
    sequence.phase = Phase.CHECK if sequence.max_passes else Phase.STEP


def _diffusion_width(sequence: RunningSequence) -> int:
    """The positions of the next pass, after the tokens of the text and those drafted tokens that will be."""
    if sequence.deterministic:
        return sequence.params.block_size
    known, output = len(sequence.block), sequence.output
    waiting = 0 if sequence.final_drafts else known - 1
    return pass_width(known, len(output.progress.tokens) + waiting, output.blocks, sequence.params.block_size)


def slope(sequence: RunningSequence) -> float:
    """The cost of one more position of a pass, for the plans of a sequence; fixed where times must not count."""
    return sequence.controller.costs.slope if sequence.params.depends_on_timing else DEFAULT_SLOPE


def note_cost(sequences: Sequence[RunningSequence], width: float, seconds: float) -> None:
    """Adds the time of a pass, over `width` positions of each row, to what the plans of later passes read."""
    for controller in {id(s.controller): s.controller for s in sequences if s.one_pass}.values():
        controller.costs.add(width, seconds / len(sequences))


def round_row(sequence: RunningSequence) -> RoundRow:
    """A sequence for rounds in one compiled call."""
    verified = sequence.mode == "verified"
    return RoundRow(
        size=sequence.params.block_size,
        width=sequence.width,
        room=sequence.room,
        final=sequence.final_drafts,
        tokens=len(sequence.output.progress.tokens),
        passes=-1 if sequence.deterministic else sequence.output.blocks,
        slope=slope(sequence),
        least=sequence.policy_value,
        acceptance=sequence.acceptance if verified else 1.0,
        planner=sequence.planner.state.buffer_info()[0] if verified else None,
    )


def candidates(
    entry: ScheduledTokens, new: Sequence[int], sure: Sequence[float], accepted: int
) -> tuple[Sequence[int], Sequence[float]]:
    """Tokens and confidences at the masks of a pass; none if they followed a refused token.

    new, sure: the token and confidence at each position.
    """
    first = len(entry.tokens)
    return (new[first : entry.width], sure[first : entry.width]) if accepted == first - 1 else ((), ())


def next_draft(entry: ScheduledTokens, new: Sequence[int], sure: Sequence[float], accepted: int) -> None:
    """Gives a sequence the draft that its next pass checks, and in verified decoding the width of that pass."""
    sequence = entry.sequence
    tokens, sure = candidates(entry, new, sure, accepted)
    if sequence.mode != "verified":
        pairs = zip(tokens, sure, strict=True)
        sequence.draft = [token for token, _ in takewhile(lambda pair: pair[1] > sequence.policy_value, pairs)]
        return
    if entry.plan is None:
        sequence.planner.learn(len(entry.tokens) - 1, accepted, sure)
        checked, sequence.width = sequence.planner.plan(sure, sequence.room - accepted - 1, slope(sequence))
    else:
        checked, sequence.width = entry.plan
    sequence.draft = list(tokens[:checked])


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
