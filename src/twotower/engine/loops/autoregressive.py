"""One token a pass: the context tower alone (AR), or the denoiser as next-token predictor (mock-AR).

The text is one *pending* token ahead of the state: each pass reads the pending token and proposes the next.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from twotower.cache.replica import Transport
from twotower.decoding.output import BlockEvent
from twotower.decoding.sampling import AR_TOKEN, pick
from twotower.engine.loops.session import Session


def autoregressive(session: Session) -> Iterator[list[BlockEvent]]:
    """The context tower reads the pending token; its head chooses the next."""
    yield from _one_by_one(session, mock=False)


def mock_autoregressive(session: Session) -> Iterator[list[BlockEvent]]:
    """The denoiser reads the pending token after the context of everything before it, without time conditioning."""
    yield from _one_by_one(session, mock=True)


def _one_by_one(session: Session, mock: bool) -> Iterator[list[BlockEvent]]:
    session.prefill(upto=-1)
    transport = session.model.transport or Transport()
    pending = torch.tensor([[session.prompts[row][-1]] for row in session.rows], device=session.model.device)
    while session.rows:
        read = session.state.lengths
        logits: Tensor | None
        if mock:
            logits, read = _mock_logits(session, pending, transport)
        else:
            logits = session.extend(pending, logits=True)
        assert logits is not None
        positions = read[:, None] + 1
        tokens, sure = pick(logits, session.sampling.to(logits.device), positions, AR_TOKEN)
        session.passes += mock
        steps = torch.zeros_like(tokens)
        passes = [int(mock)] * len(session.rows)
        events = session.take(tokens, steps, sure, passes)
        if mock:
            tokens = transport.send(tokens, session.model.device)
        kept = session.drop_ended()
        if kept is not None:
            pending, tokens = pending[kept], tokens[kept]
        if mock and session.rows:  # after the last token nobody reads the context again
            session.extend(pending, logits=False)
        pending = tokens
        yield events


def _mock_logits(session: Session, pending: Tensor, transport: Transport) -> tuple[Tensor, Tensor]:
    """The denoiser's logits after the pending token, and how many tokens it saw before that, both where it is."""
    assert session.reader is not None
    view = session.reader.view()
    block = transport.send(pending, view.lengths.device)
    return session.model.denoise(block, None, view, causal=True, wide=False), view.lengths
