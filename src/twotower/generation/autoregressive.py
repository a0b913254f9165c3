"""One token a pass: the context tower alone (AR), or the denoiser as next-token predictor (mock-AR).

The text is one *pending* token ahead of the state: each pass reads the pending token and proposes the next.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from twotower.generation.output import BlockEvent
from twotower.generation.sampling import AR_TOKEN, choose, confidence
from twotower.generation.session import Session
from twotower.mirror import Transport


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
        positions = session.state.lengths[:, None] + 1
        logits = _mock_logits(session, pending, transport) if mock else session.extend(pending, logits=True)
        assert logits is not None
        positions = positions.to(logits.device)
        tokens = choose(logits, session.sampling_on(logits.device), positions, AR_TOKEN)
        session.passes += mock
        steps = torch.zeros_like(tokens)
        passes = [int(mock)] * len(session.rows)
        events = session.take(tokens, steps, confidence(logits, tokens), passes)
        if mock:
            session.extend(pending, logits=False)
            tokens = transport.send(tokens, session.model.device)
        kept = session.drop_ended()
        pending = tokens if kept is None else tokens[kept]
        yield events


def _mock_logits(session: Session, pending: Tensor, transport: Transport) -> Tensor:
    assert session.reader is not None
    view = session.reader.view()
    return session.model.denoise(transport.send(pending, view.lengths.device), None, view, causal=True)
