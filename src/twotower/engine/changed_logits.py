"""Applies the rules of sequences (`decoding/logit_rules.py`) to the logits of a pass.

The logits of a pass without such a sequence are returned as they are. Otherwise the result is a copy in at least fp32,
because log-probabilities are those before any rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from twotower.ops.precision import upcast

if TYPE_CHECKING:
    from twotower.decoding.logit_rules import LogitRules
    from twotower.engine.scheduled import ScheduledTokens
    from twotower.engine.sequence import RunningSequence

    Change = Callable[[int, RunningSequence, LogitRules, Tensor], None]


def for_reading(scheduled: Sequence[ScheduledTokens], logits: Tensor) -> Tensor:
    """Logits (n, L, V) of AR steps and checks: those at position i follow the text and the draft up to i."""

    def change(place: int, sequence: RunningSequence, rules: LogitRules, own: Tensor) -> None:
        output, draft = sequence.output.progress.tokens, scheduled[place].tokens[1:]
        if sequence.final_drafts and draft:  # the draft is text already
            output = output[: -len(draft)]
        rules.after_each(own, output, draft)

    return _changed([entry.sequence for entry in scheduled], logits, change)


def for_pending(sequences: Sequence[RunningSequence], logits: Tensor) -> Tensor:
    """Logits (n, 1, V) of the denoiser in mock-AR, after the text."""

    def change(place: int, sequence: RunningSequence, rules: LogitRules, own: Tensor) -> None:
        rules.after_each(own, sequence.output.progress.tokens, [])

    return _changed(sequences, logits, change)


def for_blocks(
    sequences: Sequence[RunningSequence], logits: Tensor, tokens: Tensor, masked: Tensor, shift: int
) -> Tensor:
    """Logits (n, L - shift, V) of blocks: all positions follow the text and the committed tokens of the block.

    tokens, masked (n, L): the blocks. The logits at i predict input i + shift.
    """

    def change(place: int, sequence: RunningSequence, rules: LogitRules, own: Tensor) -> None:
        begun = int(sequence.begins_with_text)
        size = sequence.params.block_size
        committed = tokens[place, begun:size][~masked[place, begun:size]].tolist()
        output = sequence.output.progress.tokens
        rules.after_all(own, output, len(output) - begun + shift, committed)

    return _changed(sequences, logits, change)


def _changed(sequences: Sequence[RunningSequence], logits: Tensor, change: Change) -> Tensor:
    """The logits after `change` of each sequence with rules: its place, the sequence, its rules, its logits (L, V)."""
    if not any(sequence.changes_logits for sequence in sequences):
        return logits
    logits = upcast(logits).clone()
    for place, sequence in enumerate(sequences):
        if sequence.logit_rules is not None:
            change(place, sequence, sequence.logit_rules, logits[place])
    return logits
