"""How many denoiser passes a round of verified decoding gets: learned from what rounds bring, within a bounded loss.

What a choice is worth is tokens ÷ seconds. Seconds hardly vary and are averaged for each choice by itself. Tokens vary
much from round to round, so all drafts speak for one another:

    tokens of a draft of k passes ≈ ease of the text (quick to change) × worth of k passes (slow to change)

`ease` is in tokens of one-pass drafts, so worth[1] = 1. A row gets at least one token a round, AR's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

CHOICES = (0, 1, 2, 4)  # denoiser passes a round; 0 is AR
CREDIT_STEPS, CREDIT_SHARE = 3.0, 0.04  # what trying may cost: so many AR steps, and this share of AR's time
SAVED_STEPS = 8.0  # of what drafts gained, so many AR steps may be risked as well
AGAIN, BACK_OFF = 32, 3  # rounds until another choice is tried again; doubled up to so often for one that stays worse
EASE, WORTH = 4.0, {1: 1.0, 2: 1.2, 4: 1.4}  # believed beforehand, as strongly as PRIOR rounds
PRIOR = 4
QUICK, SLOW = 0.08, 0.03  # least rates of the moving averages


@dataclass
class Arm:
    """A choice: a moving average of its seconds a round, tokens expected of a row, and when it was used."""

    tokens: float = 1.0
    seconds: float = 0.0
    rounds: int = 0
    last: int = 0  # the round it was last used in
    worse: int = 0  # times it was tried again in vain

    def took(self, seconds: float, now: int) -> None:
        self.rounds += 1
        self.last = now
        rate = max(QUICK, 1 / max(self.rounds - 1, 1))  # the second takes the place of the first, which warmed up
        self.seconds += rate * (seconds - self.seconds)

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class DraftController:
    """Chooses for one sequence after another: an answer of thirty tokens is too short to find out anything.

    Rounds that were slower than AR would have been are a loss; drafts are tried only while the loss is below a few AR
    steps and a small share of AR's time, so drafting that does not pay costs that and no more. A few steps of what was
    gained are kept for bad luck: rounds differ much even where drafting pays twice over. A batch does not answer for
    losses of those before it.

    steps: this many passes in every round, and no choice.
    """

    steps: int | None = None
    arms: dict[int, Arm] = field(default_factory=lambda: {passes: Arm() for passes in CHOICES})
    ease: float = EASE
    worth: dict[int, float] = field(default_factory=lambda: dict(WORTH))
    lost: float = 0.0  # seconds, less the share of AR's time; below 0: gained
    reached: float = 0.0  # the longest draft that was kept, forgotten slowly
    rounds: int = 0

    def begin(self) -> DraftController:
        """A batch begins."""
        self.lost = min(self.lost, 0.0)
        return self

    def passes(self) -> int:
        """Of the round that begins now."""
        if self.steps is not None:
            return self.steps
        ar, drafts = self.arms[0], {passes: arm for passes, arm in self.arms.items() if passes}
        if not ar.rounds or self.lost > CREDIT_STEPS * ar.seconds:
            return 0
        if not drafts[1].rounds:
            return 1
        likeliest = max(drafts, key=lambda passes: drafts[passes].speed)
        drafts[likeliest].worse = 0
        for passes, arm in drafts.items():
            patience = AGAIN << min(arm.worse, BACK_OFF)
            if passes == likeliest:  # few drafts say little
                patience = min(AGAIN, 2 * self.drafts)
            if self.rounds - arm.last >= patience:
                arm.worse += passes != likeliest
                return passes
        if self.rounds - ar.last >= min(4 << ar.rounds, 4 * AGAIN):  # what a step costs grows with the text
            return 0
        return likeliest if drafts[likeliest].speed > ar.speed else 0

    @property
    def drafts(self) -> int:
        """Rounds with one so far."""
        return sum(arm.rounds for passes, arm in self.arms.items() if passes)

    def length(self, block_size: int) -> int:
        """Positions of the block worth reading, the pending one included: some more than lately were kept."""
        if self.steps is not None or self.rounds < len(self.arms):
            return block_size
        return min(block_size, 4 + int(1.5 * self.reached))

    def record(self, passes: int, tokens: float, accepted: int, seconds: float) -> None:
        """What a round brought and took: new tokens a row, and the longest draft that was kept."""
        self.rounds += 1
        if self.steps is not None:
            return
        self.arms[passes].took(seconds, self.rounds)
        if passes:
            self._learn(passes, tokens)
            self.reached = max(accepted, 0.9 * self.reached)
        ar = self.arms[0].seconds
        as_ar = tokens * ar
        spent = seconds - as_ar if passes else 0.0
        self.lost = max(self.lost + spent - CREDIT_SHARE * as_ar, -SAVED_STEPS * ar)

    def _learn(self, passes: int, tokens: float) -> None:
        """A draft of so many passes brought so many tokens a row."""
        if passes != 1:
            rate = max(SLOW, 1 / (self.arms[passes].rounds + PRIOR))
            self.worth[passes] += rate * (tokens / self.ease - self.worth[passes])
        rate = max(QUICK, 1 / (self.drafts + PRIOR))
        self.ease += rate * (tokens / self.worth[passes] - self.ease)
        for k, worth in self.worth.items():
            self.arms[k].tokens = self.ease * worth


def bucket(rows: int) -> int:
    """The next power of two: batches of more than half of that many rows share measurements."""
    return 1 << (rows - 1).bit_length()
