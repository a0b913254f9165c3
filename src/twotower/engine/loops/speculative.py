"""Verified decoding: the denoiser drafts, the context tower checks, and the text is the AR model's own.

A round: the draft block begins with the *pending* token (in the text, not yet in the state) as a decided position; the
denoiser fills the rest in k passes; the context tower reads [pending, draft] once, which it would have to do anyway;
its head chooses every next token as AR would, with the row's own noise for that position. Drafted tokens are kept while
they equal its choice, then its own choice follows and is pending; the state is rolled back to what was kept.

The text is therefore that of `generate_ar` with the same seed, at any temperature, whatever made the draft: what a
draft changes is how many rounds it takes. (A rule that keeps a token with probability min(1, p/q) would be right only
for drafts in which q depends on nothing but the prefix; drafts filled in order of confidence are not of that kind.)
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from twotower.cache.replica import Transport
from twotower.decoding.draft_controller import pace_of
from twotower.decoding.output import BlockEvent
from twotower.decoding.sampling import AR_TOKEN, by_tiles, confidence, pick
from twotower.engine.loops.diffusion import DenoisedBlock, StepCallback, denoise_block
from twotower.engine.loops.session import Session
from twotower.ops.precision import widened


def verified(session: Session, callback: StepCallback | None = None) -> Iterator[list[BlockEvent]]:
    """Rounds of draft and check until every row has ended."""
    session.prefill(upto=-1)
    params, device = session.params, session.model.device
    transport = session.model.transport or Transport()
    pending = torch.tensor([[session.prompts[row][-1]] for row in session.rows], device=device)
    pace = pace_of(session)
    assert session.model.denoiser is not None
    while session.rows:
        room = max(record.room for record in session.running)  # the AR model's own token needs no draft
        passes, started = pace.passes(), time.perf_counter()
        if min(params.block_size, room) == 1:  # nothing to draft
            passes = 0
        drafted, read = pending, session.state.lengths
        block = None
        if passes:
            block = draft(session, transport.send(pending, session.model.denoiser.device), passes, callback)
            width = min(room, pace.length(params.block_size))
            drafted = torch.cat([pending, transport.send(block.tokens, device)[:, 1:width]], dim=1)
        logits = session.extend(drafted, logits=True)
        assert logits is not None
        positions = read[:, None] + torch.arange(1, drafted.shape[1] + 1, device=device)
        own, sure = pick(logits, session.sampling.to(device), positions, AR_TOKEN)
        if block is None:  # an AR step: nothing to compare, nothing to take back
            tokens, accepted = own, [0] * len(session.rows)
            pending = own
        else:
            tokens, agreed = keep(drafted, own, logits, params.acceptance)
            if params.acceptance < 1:  # what is kept need not be what AR would have chosen
                sure = confidence(logits, tokens)
            session.state.rollback(read + 1 + agreed)
            pending, accepted = tokens.gather(1, agreed[:, None]), agreed.tolist()
        events = _book(session, block, tokens, sure, accepted, drafted.shape[1] - 1, passes)
        brought = sum(len(event.tokens) for event in events) / len(events)
        pace.record(passes, brought, max(accepted), time.perf_counter() - started)
        kept = session.drop_ended()
        if kept is not None:
            pending = pending[kept]
        if session.rows and block is not None:
            session.state.tighten(max(record.length for record in session.running))
        yield events


def draft(session: Session, pending: Tensor, passes: int, callback: StepCallback | None) -> DenoisedBlock:
    """A block of every running row that begins with its pending token (R, 1), filled in `passes` passes.

    Candidates take the noise that the AR model will take at their positions, so that both choose alike where they
    believe alike.
    """
    block = denoise_block(session, callback, decided=pending, steps=passes, purpose=AR_TOKEN)
    session.passes += int(block.passes.max())
    return block


def keep(
    read: Tensor, own: Tensor, logits: Tensor, acceptance: float | Tensor, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """read (B, L): the pending token and a draft, of which the first lengths (B,) count (None: all); own (B, L): the AR
    model's choice after each → tokens (B, L), the draft as far as it is kept and then AR's own; how many are kept (B,).
    """
    kept = agreement(read[:, 1:], own[:, :-1], logits[:, :-1], acceptance)
    if lengths is not None:
        kept = kept.minimum(lengths - 1)
    following = torch.cat([read[:, 1:], own[:, -1:]], dim=1)
    return torch.where(torch.arange(own.shape[1], device=own.device) < kept[:, None], following, own), kept


def agreement(drafted: Tensor, own: Tensor, logits: Tensor, acceptance: float | Tensor) -> Tensor:
    """How many drafted tokens (B, D) from the left are kept (B,): those that equal the AR model's choice `own` (B, D);
    with acceptance α < 1 (or one a row, (B, 1)) also those it gives at least α times the probability of its likeliest
    token, but never others where α is 1."""
    agrees = drafted == own
    if isinstance(acceptance, Tensor) or acceptance < 1:
        near_enough = by_tiles(_share_of_best, logits, drafted) >= acceptance
        if isinstance(acceptance, Tensor):
            near_enough &= acceptance < 1
        agrees = agrees | near_enough
    return agrees.long().cumprod(1).sum(1)


def _share_of_best(logits: Tensor, tokens: Tensor) -> Tensor:
    """The tokens' probability, (n,), as a share of the likeliest one's: logits (n, V)."""
    wide = widened(logits)
    return (wide.gather(-1, tokens[..., None])[..., 0] - wide.amax(-1)).exp()


def _book(
    session: Session, block: DenoisedBlock | None, tokens: Tensor, sure: Tensor, accepted: list[int], drafted: int,
    passes: int,
) -> list[BlockEvent]:  # fmt: skip
    """The round's tokens of each row: what was kept of its draft, and the AR model's own."""
    steps = torch.full_like(tokens, passes)
    if block is not None:
        steps[:, :drafted] = block.committed_at[:, 1 : drafted + 1].to(steps.device)
    for slot, (record, count) in enumerate(zip(session.running, accepted, strict=True)):
        steps[slot, count] = passes
        record.checked(drafted, count)
    counts = [count + 1 for count in accepted]
    taken = None if block is None else block.passes.tolist()
    drafts = None if block is None else block.tokens[:, 1 : drafted + 1].tolist()
    return session.take(tokens, steps, sure, taken, counts, drafts)
