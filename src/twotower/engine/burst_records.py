"""Records the results of several passes in one compiled call (`engine/compiled.py`), pass by pass.

The engine begins the round after the last one.
"""

from __future__ import annotations

from collections.abc import Sequence

from twotower.decoding.output import BlockEvent
from twotower.engine import context_step, one_pass
from twotower.engine.rounds import record_round
from twotower.engine.scheduled import ScheduledTokens


def record_steps(
    scheduled: Sequence[ScheduledTokens], chosen: Sequence[Sequence[int]], sure: Sequence[Sequence[float]]
) -> list[BlockEvent]:
    """Records AR steps, each with the rows that have not ended before."""
    events: list[BlockEvent] = []
    for s in [entry.sequence for entry in scheduled]:
        s.seconds /= len(chosen)
    for number, (tokens, confidence) in enumerate(zip(chosen, sure, strict=True), 1):
        live = [place for place, entry in enumerate(scheduled) if entry.sequence.output.running]
        own = [scheduled[place] for place in live]
        for entry in own:
            entry.sequence.read += 1
            entry.sequence.output.context_passes += 1
        choice = [[tokens[place]] for place in live], [[confidence[place]] for place in live], [0] * len(live)
        steps = context_step.record_tokens(own, choice, {})
        events += steps
        if number < len(chosen):
            record_round([entry.sequence for entry in own], steps)
            for s in [entry.sequence for entry in own]:
                s.room = s.output.room
    return events


def record_rounds(
    scheduled: Sequence[ScheduledTokens],
    chosen: Sequence[list[list[int]]],
    sure: Sequence[list[list[float]]],
    accepted: Sequence[list[int]],
    plans: Sequence[list[list[int]]],
) -> list[BlockEvent]:
    """Records rounds of a model with adapters, each with the rows that have not ended before."""
    events: list[BlockEvent] = []
    for s in [entry.sequence for entry in scheduled]:
        s.seconds /= len(accepted)
    for number, round_ in enumerate(zip(chosen, sure, accepted, plans, strict=True), 1):
        live = [place for place, entry in enumerate(scheduled) if entry.sequence.output.running]
        sequences = [scheduled[place].sequence for place in live]
        tokens, confidence, kept, planned = round_
        entries = [
            ScheduledTokens(s, s.block, sampled=True, masks=s.masks, plan=(planned[i][0], planned[i][1]))
            for i, s in zip(live, sequences, strict=True)
        ]
        for entry in entries:
            entry.sequence.read += len(entry.tokens)
            entry.sequence.output.context_passes += 1
        choice = [tokens[i] for i in live], [confidence[i] for i in live], [kept[i] for i in live]
        own = context_step.record_tokens(entries, choice, {})
        events += own
        if number == len(accepted):
            continue
        record_round(sequences, own)
        for s in [s for s in sequences if s.output.running]:
            seconds = s.seconds
            one_pass.begin(s, s.output.room, draft_passes=1)
            s.seconds = seconds
    return events
