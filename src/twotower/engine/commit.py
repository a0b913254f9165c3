"""Applies the commit policies to the blocks of one pass, rows of the same policy together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.decoding.unmasking import Pass, decide
from twotower.engine.sequence import RunningSequence
from twotower.ops.host_transfer import to_device_async


class Commits(NamedTuple):
    """chosen (B, L): the positions to commit. memories: each row's policy memory. errors: the exceptions of
    policies, by the row's index."""

    chosen: Tensor
    memories: list[object]
    errors: dict[int, Exception]


def commit_rows(sequences: Sequence[RunningSequence], seen: Pass, values: Tensor, catch: bool) -> Commits:
    """Applies each row's policy. The sequences do not change, because the pass may still fail.

    values (B, 1): the policy values. catch: a row whose policy raises commits nothing; otherwise the exception is
    raised.
    """
    groups: dict[tuple[str, bool], list[int]] = {}
    for place, sequence in enumerate(sequences):
        groups.setdefault((sequence.policy, sequence.policy_memory is None), []).append(place)
    if not catch and len(groups) == 1:
        return Commits(*_commit(sequences, seen, values), {})
    out = torch.zeros_like(seen.masked)
    memories: list[object] = [None] * len(sequences)
    errors: dict[int, Exception] = {}
    waiting = list(groups.values())
    while waiting:
        members = waiting.pop()
        own = [sequences[place] for place in members]
        try:
            if len(members) == len(sequences):
                return Commits(*_commit(own, seen, values), errors)
            places = to_device_async(members, out.device)
            out[places], kept = _commit(own, Pass(*(field[places] for field in seen[:-1])), values[places])
            for place, memory in zip(members, kept, strict=True):
                memories[place] = memory
        except Exception as error:  # a policy may come from the user
            if not catch:
                raise
            if len(members) > 1:
                waiting += [[place] for place in members]
            else:
                errors[members[0]] = error
    return Commits(out, memories, errors)


def _commit(sequences: Sequence[RunningSequence], seen: Pass, values: Tensor) -> tuple[Tensor, list[object]]:
    """Applies one policy to its rows. Either all rows are in the first pass of their blocks, or none is."""
    if sequences[0].policy_memory is not None:
        seen = seen._replace(memory=_joined([sequence.policy_memory for sequence in sequences]))
    chosen, memory = decide(sequences[0].policy, seen, values)
    return chosen, [_part(memory, place) for place in range(len(sequences))]


def _part(memory: object, place: int) -> object:
    """One row's part of a policy's memory: tensors with rows as the first dimension, or tuples of them."""
    if isinstance(memory, tuple):
        return tuple(_part(part, place) for part in memory)
    return memory[place : place + 1] if isinstance(memory, Tensor) else memory


def _joined(memories: Sequence[object]) -> object:
    """Joins the rows' parts."""
    first = memories[0]
    if isinstance(first, tuple):
        return tuple(_joined(parts) for parts in zip(*memories, strict=True))
    tensors = [memory for memory in memories if isinstance(memory, Tensor)]
    return torch.cat(tensors) if tensors else first
