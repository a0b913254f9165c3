"""Masks logits by the grammars of sequences, before the AR model samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twotower.decoding.modes import CONSTRAINT_MODES
from twotower.decoding.output import BlockEvent
from twotower.decoding.structured import Constraint, Matcher
from twotower.errors import ArgumentError, TwoTowerError
from twotower.ops.host_transfer import to_device_async

if TYPE_CHECKING:
    from twotower.engine.scheduled import ScheduledTokens
    from twotower.engine.sequence import RunningSequence


def check_constraint(constraint: Constraint, mode: str, vocab_size: int) -> None:
    """Raises ArgumentError if a request in this mode, to a model with this vocabulary, cannot follow the constraint."""
    if mode not in CONSTRAINT_MODES:
        raise ArgumentError(
            f"mode is {mode!r}, which cannot follow a constraint: only the AR model chooses token by token; use mode "
            '"ar" or "verified"',
            param="constraint",
        )
    if constraint.vocab_size > vocab_size:
        raise ArgumentError(
            f"the constraint's tokenizer has {constraint.vocab_size} tokens and this model {vocab_size}; make the "
            "constraint with model.tokenizer",
            param="constraint",
        )


def mask_logits(scheduled: Sequence[ScheduledTokens], logits: Tensor) -> list[int] | None:
    """Sets to −∞, in logits (n, L, V) and in place, what the works' grammars forbid after the pending token and after
    each token of a draft, as far as the draft is allowed → how many tokens each work may keep of its draft; None: no
    sequence has a grammar. A sequence whose matcher fails gets an `error`."""
    constrained = [(place, entry) for place, entry in enumerate(scheduled) if entry.sequence.matcher is not None]
    if not constrained:
        return None
    drafted = [len(entry.tokens) - 1 for entry in scheduled]
    walked, masks = [], []
    for place, entry in constrained:
        assert entry.sequence.matcher is not None
        try:
            found, drafted[place] = _walk(entry.sequence.matcher, entry.tokens[1:], logits.shape[2])
        except Exception as error:
            entry.sequence.error = error
            continue
        if not found[-1].any():  # the text is complete there, so the sampled token is not used
            found.pop()
        walked.append((place, len(found)))
        masks += found
    if masks:
        forbidden = unpacked(~np.stack(masks), logits.device)[:, : logits.shape[2]]
        counts = [count for _, count in walked]
        for (place, count), part in zip(walked, forbidden.split(counts), strict=True):
            logits[place, :count].masked_fill_(part, -torch.inf)  # a slice, because an index would copy the logits
    return drafted


def unpacked(masks: NDArray[np.uint8], device: torch.device) -> Tensor:
    """Converts bits (n, ⌈V / 8⌉), the lowest first, to bool (n, V rounded up) on `device`."""
    if device.type == "cpu":
        return torch.from_numpy(np.unpackbits(masks, axis=1, bitorder="little")).view(torch.bool)
    return shifted(to_device_async(masks, device))


def shifted(masks: Tensor) -> Tensor:
    """As `unpacked`, on the device of the masks."""
    bit = torch.arange(8, dtype=torch.uint8, device=masks.device)
    return ((masks[..., None] >> bit) & 1).bool().flatten(1)


def _walk(matcher: Matcher, draft: Sequence[int], size: int) -> tuple[list[NDArray[np.uint8]], int]:
    masks, count = matcher.walk(draft, size)
    if not masks[0].any():
        raise TwoTowerError("the grammar allows no token here; change the constraint")
    return masks, count


def advance(sequence: RunningSequence, matcher: Matcher, tokens: list[int]) -> tuple[list[int], bool] | BlockEvent:
    """Advances the grammar by the sequence's new tokens.

    Returns the tokens that belong to the text and whether the text is complete, or, if the matcher failed, the
    sequence's last event.
    """
    try:
        if sequence.error is not None:
            raise sequence.error
        count, complete = matcher.take(tokens)
    except Exception as error:
        return sequence.output.fail(error)
    return tokens[:count], complete
