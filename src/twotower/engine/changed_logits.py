"""Applies the rules of sequences (`decoding/logit_rules.py`) to the logits of a pass.

The logits of a pass without such a sequence are returned as they are. Otherwise the result is a copy in at least fp32,
because log-probabilities are those before any rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from twotower.ops.precision import upcast

if TYPE_CHECKING:
    from twotower.engine.scheduled import ScheduledTokens
    from twotower.engine.sequence import RunningSequence


def for_reading(scheduled: Sequence[ScheduledTokens], logits: Tensor) -> Tensor:
    """Logits (n, L, V) of AR steps and checks: those at position i follow the text and the draft up to i."""
    if not any(entry.sequence.changes_logits for entry in scheduled):
        return logits
    logits = upcast(logits).clone()
    for place, entry in enumerate(scheduled):
        sequence, draft = entry.sequence, entry.tokens[1:]
        if sequence.logit_rules is not None:
            output = sequence.output.progress.tokens
            if sequence.final_drafts and draft:  # the draft is text already
                output = output[: -len(draft)]
            sequence.logit_rules.after_each(logits[place], output, draft)
    return logits


def for_pending(sequences: Sequence[RunningSequence], logits: Tensor) -> Tensor:
    """Logits (n, 1, V) of the denoiser in mock-AR, after the text."""
    if not any(sequence.changes_logits for sequence in sequences):
        return logits
    logits = upcast(logits).clone()
    for place, sequence in enumerate(sequences):
        if sequence.logit_rules is not None:
            sequence.logit_rules.after_each(logits[place], sequence.output.progress.tokens, [])
    return logits


def for_blocks(
    sequences: Sequence[RunningSequence], logits: Tensor, tokens: Tensor, masked: Tensor, shift: int
) -> Tensor:
    """Logits (n, L - shift, V) of blocks: all positions follow the text and the committed tokens of the block.

    tokens, masked (n, L): the blocks. The logits at i predict input i + shift.
    """
    if not any(sequence.changes_logits for sequence in sequences):
        return logits
    logits = upcast(logits).clone()
    for place, sequence in enumerate(sequences):
        if sequence.logit_rules is not None:
            begun = int(sequence.begins_with_text)
            size = sequence.params.block_size
            committed = tokens[place, begun:size][~masked[place, begun:size]].tolist()
            output = sequence.output.progress.tokens
            sequence.logit_rules.after_all(logits[place], output, len(output) - begun + shift, committed)
    return logits
