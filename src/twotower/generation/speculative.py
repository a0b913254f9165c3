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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from twotower.generation.diffusion import DenoisedBlock, StepCallback, denoise_block
from twotower.generation.output import BlockEvent
from twotower.generation.sampling import AR_TOKEN, choose, confidence
from twotower.generation.session import Session
from twotower.mirror import Transport

if TYPE_CHECKING:
    from twotower.model.two_tower import TwoTowerForCausalLM

CHOICES = (0, 1, 2, 4)  # denoiser passes a round; 0 is AR
CREDIT_STEPS, CREDIT_SHARE = 2.0, 0.05  # what trying may cost: so many AR steps, and this share of AR's time
SAVED_STEPS = 8.0  # of what drafts gained, so many AR steps may be risked as well
AGAIN = 24  # rounds until another choice is tried again


def verified(session: Session, callback: StepCallback | None = None) -> Iterator[list[BlockEvent]]:
    """Rounds of draft and check until every row has ended."""
    session.prefill(upto=-1)
    params, device = session.params, session.model.device
    transport = session.model.transport or Transport()
    pending = torch.tensor([[session.prompts[row][-1]] for row in session.rows], device=device)
    pace = pace_of(session)
    assert session.model.denoiser is not None
    while session.rows:
        room = max(session.room(row) for row in session.rows)  # the AR model's own token needs no draft
        passes = pace.passes()
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
        own = choose(logits, session.sampling.to(device), positions, AR_TOKEN)
        accepted = agreement(drafted[:, 1:], own[:, :-1], logits[:, :-1], params.acceptance)
        if drafted.shape[1] > 1:  # an AR step has nothing to take back
            session.state.rollback(read + 1 + accepted)
        place = torch.arange(drafted.shape[1], device=device)
        following = torch.cat([drafted[:, 1:], own[:, -1:]], dim=1)
        tokens = torch.where(place < accepted[:, None], following, own)
        pending = tokens.gather(1, accepted[:, None])
        events = _book(session, block, tokens, logits, accepted.tolist(), drafted.shape[1] - 1, passes)
        pace.record(passes, sum(len(event.tokens) for event in events), len(session.rows), accepted.tolist())
        kept = session.drop_ended()
        if kept is not None:
            pending = pending[kept]
        if session.rows:
            session.state.tighten(max(session.length(row) for row in session.rows))
        yield events


def draft(session: Session, pending: Tensor, passes: int, callback: StepCallback | None) -> DenoisedBlock:
    """A block of every running row that begins with its pending token (R, 1), filled in `passes` passes.

    Candidates take the noise that the AR model will take at their positions, so that both choose alike where they
    believe alike.
    """
    block = denoise_block(session, callback, decided=pending, steps=passes, purpose=AR_TOKEN)
    session.passes += int(block.passes.max())
    return block


def agreement(drafted: Tensor, own: Tensor, logits: Tensor, acceptance: float) -> Tensor:
    """How many drafted tokens (B, D) from the left are kept (B,): those that equal the AR model's choice `own` (B, D);
    with acceptance α < 1 also those it gives at least α times the probability of its likeliest token."""
    agrees = drafted == own
    if acceptance < 1:
        chance = logits.log_softmax(-1)
        near = chance.gather(-1, drafted[..., None])[..., 0] - chance.amax(-1)
        agrees = agrees | (near.exp() >= acceptance)
    return agrees.long().cumprod(1).sum(1)


def _book(
    session: Session, block: DenoisedBlock | None, tokens: Tensor, logits: Tensor, accepted: list[int], drafted: int,
    passes: int,
) -> list[BlockEvent]:  # fmt: skip
    """The round's tokens of each row: what was kept of its draft, and the AR model's own."""
    steps = torch.full_like(tokens, passes)
    if block is not None:
        steps[:, :drafted] = block.committed_at[:, 1 : drafted + 1].to(steps.device)
    for slot, (row, count) in enumerate(zip(session.rows, accepted, strict=True)):
        steps[slot, count] = passes
        session.drafted[row] += drafted
        session.accepted[row] += count
        session.drafts[row] += drafted > 0
        session.rejected[row] += count < drafted
    counts = [count + 1 for count in accepted]
    taken = None if block is None else block.passes.tolist()
    drafts = None if block is None else block.tokens[:, 1 : drafted + 1].tolist()
    return session.take(tokens, steps, confidence(logits, tokens), taken, counts, drafts)


@dataclass
class Arm:
    """What rounds of one kind have brought: moving averages of tokens a row and seconds a round."""

    tokens: float = 0.0
    seconds: float = 0.0
    rounds: int = 0
    last: int = 0  # the round it was last used in

    def update(self, tokens: float, seconds: float, now: int) -> None:
        self.rounds += 1
        self.last = now
        rate = max(0.08, 1 / max(self.rounds - 1, 1))  # the second takes the place of the first, which warmed up
        self.tokens += rate * (tokens - self.tokens)
        self.seconds += rate * (seconds - self.seconds)

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class Pace:
    """How many denoiser passes the next round gets, none at all included: what has lately given most tokens a second.

    Rounds that were slower than AR would have been are a loss; others are tried only while the loss is below a small
    share of the time that AR would have taken so far, so drafting that does not pay costs that share and no more. A few
    steps of what was gained are kept for bad luck: rounds differ much even where drafting pays twice over.

    steps: this many passes in every round, and no choice. One that chooses outlives a request (`pace_of`): an answer of
    thirty tokens is too short to find out anything, and what was lost on one text is not risked again on the next.
    """

    steps: int | None = None
    clock: Callable[[], float] = time.perf_counter
    arms: dict[int, Arm] = field(default_factory=lambda: {passes: Arm() for passes in CHOICES})
    lost: float = 0.0  # seconds; below 0: gained
    ar_seconds: float = 0.0  # that AR would have taken for the text so far
    reached: float = 0.0  # the longest draft that was kept, forgotten slowly
    rounds: int = 0
    _started: float = 0.0

    def passes(self) -> int:
        """Of the round that begins now."""
        self._started = self.clock()
        if self.steps is not None:
            return self.steps
        return self._choose()

    def _choose(self) -> int:
        ar = self.arms[0]
        if not ar.rounds:
            return 0
        if self.lost > CREDIT_STEPS * ar.seconds + CREDIT_SHARE * self.ar_seconds:
            return 0
        for passes, arm in self.arms.items():
            if not arm.rounds or (passes and self.rounds - arm.last >= AGAIN * (1 + (arm.speed < 0.5 * ar.speed))):
                return passes
        if self.rounds - ar.last >= min(4 << ar.rounds, 4 * AGAIN):  # what a step costs grows with the text
            return 0
        return max(self.arms, key=lambda passes: self.arms[passes].speed)

    def length(self, block_size: int) -> int:
        """Positions of the block worth reading, the pending one included: some more than lately were kept."""
        if self.steps is not None or self.rounds < len(self.arms):
            return block_size
        return min(block_size, 4 + int(1.5 * self.reached))

    def record(self, passes: int, tokens: int, rows: int, accepted: list[int]) -> None:
        """What the round brought: tokens of all rows."""
        seconds = self.clock() - self._started
        self.rounds += 1
        if self.steps is not None:
            return
        self.arms[passes].update(tokens / rows, seconds, self.rounds)
        if passes:
            self.reached = max(max(accepted), 0.9 * self.reached)
        as_ar = tokens / rows * self.arms[0].seconds
        self.ar_seconds += as_ar
        if passes:
            self.lost = max(self.lost + seconds - as_ar, -SAVED_STEPS * self.arms[0].seconds)


_paces: WeakKeyDictionary[TwoTowerForCausalLM, dict[tuple[int, ...], Pace]] = WeakKeyDictionary()


def pace_of(session: Session) -> Pace:
    """The pace of a batch that begins: its own where the number of passes is fixed, else the one that the model's
    batches of like size and length have had so far.

    Under relaxed acceptance the draft shows in the text, so there it is one pass unless the caller says otherwise: the
    same seed gives the same text, whatever the clock said.
    """
    params = session.params
    fixed = 1 if params.draft_steps is None and params.acceptance < 1 else params.draft_steps
    if fixed is not None:
        return Pace(fixed)
    shape = len(session.rows), params.block_size, max(session.length(row) for row in session.rows)
    key = tuple((size - 1).bit_length() for size in shape)
    return _paces.setdefault(session.model, {}).setdefault(key, Pace())
