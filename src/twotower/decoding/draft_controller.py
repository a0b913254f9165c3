"""Draft depth of verified decoding: how many denoising passes the next draft gets, adapted to recent throughput.

The controller maximises tokens per second. Seconds per round vary little, so each depth has its own moving average.
Tokens per round vary much, so all drafts share one estimate:

    tokens of a draft of depth k ≈ rate (adapts fast) × multiplier of depth k (adapts slowly)

`rate` is the number of tokens a round of depth 1 adds, so multipliers[1] = 1. Every round adds at least one token to a
sequence: the AR model's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from twotower.decoding.draft_planner import PassCosts

DEPTHS = (0, 1, 2, 4)  # denoising passes per draft; depth 0 is an AR step
CREDIT_STEPS, CREDIT_SHARE = 3.0, 0.04  # allowed loss by drafting: this many AR steps, and this share of AR time
SAVED_STEPS = 8.0  # of earlier gains, at most this many AR steps count as credit
RETRY_ROUNDS, MAX_BACKOFF = 32, 3  # rounds until a retry of another depth; doubled after each failure, so often at most
INITIAL_RATE, INITIAL_MULTIPLIERS = 4.0, {1: 1.0, 2: 1.2, 4: 1.4}  # these estimates count as PRIOR_ROUNDS rounds
PRIOR_ROUNDS = 4
AR_STEPS = 4  # at most, in one call, before a depth is chosen again: single ones would look slower than they are
FAST_WEIGHT, SLOW_WEIGHT = 0.08, 0.03  # least weights of a new value in the moving averages


@dataclass
class DepthStats:
    """Measurements of one draft depth.

    tokens: expected tokens a round, per sequence; seconds: moving average of a round's time; rounds: rounds so far;
    last_round: the last round with this depth; failed_retries: retries in a row in which another depth stayed better.
    """

    tokens: float = 1.0
    seconds: float = 0.0
    rounds: int = 0
    last_round: int = 0
    failed_retries: int = 0

    def add_time(self, seconds: float, this_round: int) -> None:
        """Adds the time of a round."""
        self.rounds += 1
        self.last_round = this_round
        weight = max(FAST_WEIGHT, 1 / max(self.rounds - 1, 1))  # the second round replaces the first, a warm-up
        self.seconds += weight * (seconds - self.seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class DraftController:
    """Chooses the draft depth of every round. Sequences share a controller, because one short answer shows too little.

    The loss is the time by which rounds were slower than AR steps would have been. Drafts are tried only while the loss
    is below a few AR steps and a small share of AR time, so the loss by drafting is bounded. A few AR steps of earlier
    gains count as credit, because rounds vary much even where drafting pays. A request does not pay for the losses of
    requests that ended before it.

    fixed_depth: this depth in every round (None: adaptive). stats: of the depths to choose from. costs: of passes by
    width; for models with adapters. group: the controllers of the same requests, with other numbers of rows.
    """

    fixed_depth: int | None = None
    stats: dict[int, DepthStats] = field(default_factory=lambda: {depth: DepthStats() for depth in DEPTHS})
    rate: float = INITIAL_RATE
    multipliers: dict[int, float] = field(default_factory=lambda: dict(INITIAL_MULTIPLIERS))
    loss: float = 0.0  # seconds, less the allowed share of AR time; negative: a gain
    longest: float = 0.0  # the longest accepted draft, decaying
    rounds: int = 0
    costs: PassCosts = field(default_factory=PassCosts)
    group: DraftControllers | None = None

    def of_rows(self, rows: int) -> DraftController:
        """The controller for so many sequences that run together: a pass over more rows has another cost."""
        return self if self.group is None else self.group.of_rows(rows)

    def begin(self, together: int) -> DraftController:
        """Begins a request. Forgets its share of the loss, but not of the gain. together: requests in a batch."""
        self.loss -= max(self.loss, 0.0) / together
        return self

    def choose_depth(self) -> int:
        """The draft depth of the round that begins now."""
        if self.fixed_depth is not None:
            return self.fixed_depth
        ar, drafts = self.stats[0], {depth: stats for depth, stats in self.stats.items() if depth}
        if not ar.rounds or self.loss > CREDIT_STEPS * ar.seconds:
            return 0
        if not drafts[1].rounds:
            return 1
        best = max(drafts, key=lambda depth: drafts[depth].tokens_per_second)
        drafts[best].failed_retries = 0
        for depth, stats in drafts.items():
            patience = RETRY_ROUNDS << min(stats.failed_retries, MAX_BACKOFF)
            if depth == best:  # after few drafts the estimates are unsure
                patience = min(RETRY_ROUNDS, 2 * self.drafts)
            if self.rounds - stats.last_round >= patience:
                stats.failed_retries += depth != best
                return depth
        if self.rounds - ar.last_round >= min(4 << ar.rounds, 4 * RETRY_ROUNDS):  # an AR step slows as the text grows
            return 0
        return best if drafts[best].tokens_per_second > ar.tokens_per_second else 0

    @property
    def drafts(self) -> int:
        """Rounds with a draft so far."""
        return sum(stats.rounds for depth, stats in self.stats.items() if depth)

    def draft_length(self, block_size: int) -> int:
        """Positions of the block to verify, the pending token included: some more than were recently accepted."""
        if self.fixed_depth is not None or self.rounds < len(self.stats):
            return block_size
        return min(block_size, 4 + int(1.5 * self.longest))

    def record(self, depth: int, tokens: float, accepted: int, seconds: float) -> None:
        """Adds a round of `depth`: new tokens per sequence, the longest accepted draft, and the time of the round."""
        self.rounds += 1
        if self.fixed_depth is not None:
            return
        self.stats[depth].add_time(seconds, self.rounds)
        if depth:
            self._update_rate(depth, tokens)
            self.longest = max(accepted, 0.9 * self.longest)
        ar = self.stats[0].seconds
        ar_seconds = tokens * ar
        extra = seconds - ar_seconds if depth else 0.0
        self.loss = max(self.loss + extra - CREDIT_SHARE * ar_seconds, -SAVED_STEPS * ar)

    def _update_rate(self, depth: int, tokens: float) -> None:
        """Updates the shared estimate from a draft that added `tokens` per sequence."""
        if depth != 1:
            weight = max(SLOW_WEIGHT, 1 / (self.stats[depth].rounds + PRIOR_ROUNDS))
            self.multipliers[depth] += weight * (tokens / self.rate - self.multipliers[depth])
        weight = max(FAST_WEIGHT, 1 / (self.drafts + PRIOR_ROUNDS))
        self.rate += weight * (tokens / self.multipliers[depth] - self.rate)
        for k, stats in self.stats.items():
            stats.tokens = self.rate * self.multipliers[k] if k else 1.0


@dataclass
class DraftControllers:
    """The controllers of similar requests, by the number of sequences that run together.

    depths: see `DraftController.stats`.
    """

    depths: Sequence[int] = DEPTHS
    by_rows: dict[int, DraftController] = field(default_factory=dict)

    def of_rows(self, rows: int) -> DraftController:
        """The controller for so many sequences; shared within a factor of 2."""
        key = round_up_to_power_of_two(rows)
        if key not in self.by_rows:
            self.by_rows[key] = DraftController(stats={depth: DepthStats() for depth in self.depths}, group=self)
        return self.by_rows[key]


def round_up_to_power_of_two(rows: int) -> int:
    """Batch sizes with the same result share measurements."""
    return 1 << (rows - 1).bit_length()
