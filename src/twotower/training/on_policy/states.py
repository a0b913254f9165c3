"""Rows of rollouts: each state occupies a block, with the text between states as context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from twotower.decoding.block_rule import noise_level
from twotower.training.data.batch import Batch
from twotower.training.data.packing import round_up
from twotower.training.noise import Corruption
from twotower.training.on_policy.rollouts import Rollout, State


def fit(rollout: Rollout, row_length: int, block_size: int) -> Rollout | None:
    """The rollout with the first states that a row holds; None if it holds none."""
    kept = sum(end <= row_length for _, end in places(rollout, block_size))
    return replace(rollout, states=rollout.states[:kept]) if kept else None


def places(rollout: Rollout, block_size: int) -> list[tuple[int, int]]:
    """The columns of the block of each state: its first, and the end."""
    column = done = 0
    out = []
    for state in rollout.states:
        first = round_up(column + state.start - done, block_size)
        column, done = first + block_size, min(state.end, len(rollout.tokens))
        out.append((first, column))
    return out


def pack(rollouts: Sequence[Rollout], row_length: int, block_size: int) -> list[list[Rollout]]:
    """Rows of rollouts in their order. States that a row cannot hold are left out."""
    rows: list[list[Rollout]] = []
    free = 0
    for whole in rollouts:
        rollout = fit(whole, row_length, block_size)
        if rollout is None:
            continue
        columns = places(rollout, block_size)[-1][1]
        if columns > free:
            rows.append([])
            free = row_length
        rows[-1].append(rollout)
        free -= columns
    return rows


def collate_states(
    rows: Sequence[Sequence[Rollout]], row_length: int, block_size: int, *, shift: int, eos: int, pad: int
) -> tuple[Batch, Corruption]:
    """Rows of rollouts → a batch, and its masks, which are those of the states.

    A block has the columns of its state; padding fills it up. After the end of a text its masks stand for EOS. t is
    the open share of a state's predictions.
    """
    shape = (len(rows), row_length)
    tokens, document = np.full(shape, pad, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
    text, masked = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    t = np.full((len(rows), row_length // block_size), 1.0)  # float64: a model in float64 decodes with such levels
    for r, row in enumerate(rows):
        column = 0
        for number, rollout in enumerate(row):
            for place, state, lo, context in _segments(rollout, block_size):
                before = rollout.tokens[lo : state.start]
                for begin, part in ((column + context, before), (column + place, _own(rollout, state))):
                    tokens[r, begin : begin + len(part)] = part
                    document[r, begin : begin + len(part)] = number
                    text[r, begin : begin + len(part)] = True
                first, own = column + place, len(_own(rollout, state))
                stop = first + len(state.masked)
                tokens[r, first + own : stop] = eos
                document[r, first + own : stop] = number
                masked[r, first:stop] = state.masked
                t[r, first // block_size] = noise_level(sum(state.masked), len(state.masked), shift)
            column += places(rollout, block_size)[-1][1]
    index = np.zeros(len(rows), dtype=np.int64)
    nowhere = np.zeros(shape, dtype=bool)
    arrays = (tokens, document, text, masked, nowhere, index, nowhere)
    batch = Batch(*(torch.from_numpy(array) for array in arrays))
    return batch, Corruption(torch.from_numpy(t), torch.from_numpy(masked), on_policy=True)


def _segments(rollout: Rollout, block_size: int) -> Iterator[tuple[int, State, int, int]]:
    """For each state its first column, the state, the first token after the state before it, and that one's column."""
    done = column = 0
    for (first, end), state in zip(places(rollout, block_size), rollout.states, strict=True):
        yield first, state, done, column if column else first - state.start
        column, done = end, min(state.end, len(rollout.tokens))


def _own(rollout: Rollout, state: State) -> tuple[int, ...]:
    """The tokens of the state that the text has."""
    return rollout.tokens[state.start : state.end]
