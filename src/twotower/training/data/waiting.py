"""Pieces that are read and not placed yet, as the state of a run stores them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from twotower.training.data.packing import Piece
from twotower.training.data.state import RowStreamState, WaitingState


def waiting_state(pieces: Sequence[Piece]) -> WaitingState:
    """The tensors of the pieces; `turns` only if there are conversations, which earlier versions did not know."""
    parts = [torch.from_numpy(piece.tokens) for piece in pieces]
    waiting = [[len(p.tokens), p.context, p.lead, int(p.ends), int(p.prompted)] for p in pieces]
    state: WaitingState = {
        "tokens": torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int32),
        "waiting": torch.tensor(waiting, dtype=torch.int64).reshape(-1, 5),
    }
    turns = [[number, *span, int(piece.aligned)] for number, piece in enumerate(pieces) for span in piece.turns]
    if turns:
        state["turns"] = torch.tensor(turns, dtype=torch.int64)
    return state


def waiting_pieces(saved: RowStreamState) -> list[Piece]:
    """The pieces of a state."""
    flat = saved["tokens"].numpy().copy()
    rows = saved["waiting"].tolist()
    turns = saved["turns"].tolist() if "turns" in saved else []
    out = []
    for number, (end, row) in enumerate(zip(itertools.accumulate(length for length, *_ in rows), rows, strict=True)):
        length, context, lead, ends, prompted = row
        own = [(begin, stop, aligned) for piece, begin, stop, aligned in turns if piece == number]
        spans = tuple((begin, stop) for begin, stop, _ in own)
        aligned = all(aligned for *_, aligned in own)
        out.append(Piece(flat[end - length : end], context, lead, bool(ends), bool(prompted), spans, aligned))
    return out
