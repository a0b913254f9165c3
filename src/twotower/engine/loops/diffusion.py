"""Masked diffusion, block by block (spec §3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.cache.replica import Transport
from twotower.decoding.output import BlockEvent
from twotower.decoding.sampling import DIFFUSION_CANDIDATE, pick
from twotower.decoding.unmasking import Pass
from twotower.engine.loops.session import Session
from twotower.ops.host_transfer import Fetched
from twotower.ops.precision import accumulation_dtype

StepCallback = Callable[..., None]


class DenoisedBlock(NamedTuple):
    """tokens, committed_at (the step), confidence: (B, L); passes (B,): passes in which the row had masks left."""

    tokens: Tensor
    committed_at: Tensor
    confidence: Tensor
    passes: Tensor


def diffusion(session: Session, callback: StepCallback | None = None) -> Iterator[list[BlockEvent]]:
    """Prefill, then per block: denoise it, book it, let ended rows go, read it into the context."""
    session.prefill()
    transport = session.model.transport or Transport()
    while session.rows:
        block = denoise_block(session, callback)
        passes = block.passes.tolist()
        session.passes += max(passes)
        events = session.take(block.tokens, block.committed_at, block.confidence, passes)
        tokens = transport.send(block.tokens, session.model.device)
        kept = session.drop_ended()
        if session.rows:  # after the last block nobody reads the context again
            session.extend(tokens if kept is None else tokens[kept], logits=False)
        yield events


def denoise_block(
    session: Session,
    callback: StepCallback | None,
    *,
    decided: Tensor | None = None,
    steps: int | None = None,
    purpose: int = DIFFUSION_CANDIDATE,
) -> DenoisedBlock:
    """Fills one block of every running row in at most `steps` passes. The context is read-only meanwhile.

    decided (R, n): the block's first positions, which are text already: no masks, and t does not count them.
    purpose: what the candidates' noise is keyed by; that of AR's tokens has no step.
    """
    params, model = session.params, session.model
    steps = params.steps_per_block if steps is None else steps
    assert session.reader is not None
    view = session.reader.view()
    rows, device = len(session.rows), view.lengths.device
    sampling = session.sampling.to(device)
    shape = (rows, params.block_size)
    time_dtype = accumulation_dtype(model.dtype)

    block = torch.full(shape, params.mask_token_id, device=device)
    masked = torch.ones(shape, dtype=torch.bool, device=device)
    if decided is not None:
        block[:, : decided.shape[1]] = decided
        masked[:, : decided.shape[1]] = False
    committed_at = torch.zeros(shape, dtype=torch.long, device=device)
    sureness = torch.zeros(shape, dtype=time_dtype, device=device)
    passes = torch.zeros(rows, dtype=torch.long, device=device)
    positions = view.lengths[:, None] + torch.arange(params.block_size, device=device)
    if callback:
        callback(0, steps, block, t=1.0, logits=None, block_idx=session.blocks)
    allowed = torch.full((rows, 1), steps, device=device)
    running = StopTest(device)
    session.unmasking.begin(sureness)
    for step in range(steps):
        passes += masked.any(1)
        t = masked.sum(1).to(time_dtype) / params.block_size
        # Where a pass may be idle its rows count no tokens: they read no expert of their own.
        lengths = masked.any(1) * params.block_size if running.lags else None
        logits = model.denoise(block, t, view, lengths=lengths, wide=False)
        if callback:
            level = float(t[0]) if rows == 1 else t
            callback(step, steps, block, t=level, logits=logits.to(time_dtype, copy=True), block_idx=session.blocks)
        logits[..., params.mask_token_id] = -torch.inf
        noise_step = step if purpose == DIFFUSION_CANDIDATE else 0
        candidate, sure = pick(logits, sampling, positions, purpose, noise_step)
        commit = session.unmasking(Pass(logits, candidate, sure, masked, torch.full_like(allowed, step), allowed))
        block = torch.where(commit, candidate, block)
        committed_at = committed_at.masked_fill(commit, step)
        sureness = torch.where(commit, sure, sureness)
        masked = masked & ~commit
        if not running(masked):
            break
    return DenoisedBlock(block, committed_at, sureness, passes)


class StopTest:
    """Whether any position is still masked, without making the host wait for the pass just launched.

    On an accelerator the answer lags one step behind: at worst one idle pass, which commits nothing, against a
    stall after every pass. On a CPU the answer is free and exact.
    """

    def __init__(self, device: torch.device) -> None:
        self.lags = device.type != "cpu"
        self.previous: Fetched | None = None

    def __call__(self, masked: Tensor) -> bool:
        now = Fetched(masked.any())
        tested, self.previous = (self.previous if self.lags else now), now
        return tested is None or bool(tested.wait()[0])
