"""The denoiser as a next-token predictor, for the rows of that mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from twotower.decoding.output import BlockEvent
from twotower.decoding.sampling import AR_TOKEN, pick_by_rule
from twotower.engine.sequence import Phase, Row
from twotower.ops.host_transfer import Fetched, placed

if TYPE_CHECKING:
    from twotower.cache.hybrid_cache import ContextView
    from twotower.model.towers import TwoTowerModel


def launch(model: TwoTowerModel, rows: Sequence[Row], view: ContextView) -> Fetched:
    """Puts one pass over the rows' pending tokens on its way → the tokens after them (n, 1), and the confidence in
    them."""
    device = view.lengths.device
    pending, seeds = placed([[row.pending] for row in rows], device), placed([row.seed for row in rows], device)
    logits = model.denoise(pending, None, view, causal=True, wide=False)
    purpose = torch.full((len(rows), 1), AR_TOKEN, device=device)
    rules = [row.rule for row in rows]
    positions = view.lengths[:, None] + 1
    return Fetched(*pick_by_rule(logits, rules, seeds, positions, purpose, torch.zeros_like(purpose)))


def collect(rows: Sequence[Row], proposed: Fetched) -> list[BlockEvent]:
    """Books the tokens, once they are there; the context tower reads the pending ones next."""
    events = []
    for row, (token,), sure in zip(rows, *proposed.lists(), strict=True):
        row.record.denoiser_passes += 1
        if row.request.logprobs is None:
            events.append(row.record.take([token], [0], sure))
        else:
            row.held, row.committed_at, row.confidence = [token], [0], sure
        row.block, row.pending, row.phase = [row.pending], token, Phase.COMMIT
    return events
