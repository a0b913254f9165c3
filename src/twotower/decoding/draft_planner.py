"""How many drafted tokens a pass checks, and how many masks follow them: by expected tokens a second.

For models whose denoiser is adapters (`engine/one_pass.py`). A pass over the pending token, k drafted tokens and m
masks costs 1 + slope · (k + m) AR steps. With P_i, the probability that the first i drafted tokens are kept, it brings

    1 + P_1 + … + P_k  tokens, and with probability P_k a draft at its m masks, which is worth V_m tokens.

The planner chooses k and m with the largest value of tokens + P_k · V_m − rate · cost. The rate is the number of
tokens that recent passes brought per AR step of cost. P_i is a product over the first i drafted tokens: of the
confidence times the share of expected tokens that was kept so far. V_m = SHARE · (S_1 + … + S_m), with the mean S_i of
P_i over recent drafts. A draft saves less than it brings, because a pass without one brings a token and a draft too.

`ops/cpu/draft_planner.h` is the same rule for compiled passes.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

DEFAULT_SLOPE = 1 / 12  # cost of one more position of a pass, in AR steps, until it is measured
SHARE = 0.5
PRIOR_TOKENS = 8.0  # kept and expected drafted tokens before the first draft
PRIOR_COST = 6.0  # AR steps, with as many tokens
PRIOR_SURVIVAL = 0.8  # S_i = 0.8^i before the first draft
DECAY = 0.95  # of earlier passes in the rate
LEAST_WEIGHT, PRIOR_DRAFTS = 0.1, 4  # of a new draft in S
MARGIN = 1e-9  # tokens; smaller gains are ties, which the shorter draft wins
KEPT, EXPECTED, TOKENS, COST, DRAFTS, LISTS = range(6)  # places in `DraftPlanner.state`


class DraftPlanner:
    """Plans the passes of one sequence. The plans depend on this sequence alone, and on the slope.

    size: the most positions of a pass. state: the numbers that the compiled rule reads and writes; first those of the
    places above, then S (size − 1), then the confidences of the draft that the next pass checks (size − 1).
    """

    def __init__(self, size: int) -> None:
        self._most = size - 1
        survival = [PRIOR_SURVIVAL**i for i in range(1, size)]
        first = [PRIOR_TOKENS, PRIOR_TOKENS, PRIOR_COST, PRIOR_COST, 0.0]
        self.state = array("d", [*first, *survival, *[0.0] * self._most])

    def learn(self, drafted: int, kept: int, sure: Sequence[float]) -> None:
        """Adds a pass that kept `kept` of its drafted tokens. sure: confidences of the draft that it made, if any."""
        state, checked = self.state, LISTS + self._most
        for place in range(min(kept + 1, drafted)):
            state[KEPT] += place < kept
            state[EXPECTED] += state[checked + place]
        if not sure:
            return
        state[DRAFTS] += 1
        weight = max(LEAST_WEIGHT, 1 / (state[DRAFTS] + PRIOR_DRAFTS))
        share, reach = state[KEPT] / state[EXPECTED], 1.0
        for place, confidence in enumerate(sure):
            reach *= min(share * confidence, 1.0)
            state[LISTS + place] += weight * (reach - state[LISTS + place])

    def plan(self, sure: Sequence[float], room: int, slope: float) -> tuple[int, int]:
        """The drafted tokens that the next pass checks, and its width with the pending token and masks.

        sure: confidences of the draft. room: the most positions of the pass. The pass has a mask if it checks no token.
        """
        state, most = self.state, min(self._most, max(room - 1, 0))
        share, rate = state[KEPT] / state[EXPECTED], state[TOKENS] / state[COST]
        least, values, survival = 1.0, [0.0], []
        for place in range(most):
            least = min(least, state[LISTS + place])
            survival.append(SHARE * least)
            values.append(values[-1] + survival[-1])
        masks, tokens, reach = most, 1.0, 1.0
        best, chosen, width, gain = float("-inf"), 0, 1, 1.0
        for k in range(min(len(sure), most) + 1):
            if k:
                reach *= min(share * sure[k - 1], 1.0)
                tokens += reach
            fewest = min(most, 1) if k == 0 else 0
            while masks > fewest and (masks > most - k or reach * survival[masks - 1] <= rate * slope):
                masks -= 1
            value = tokens + reach * values[masks] - rate * slope * (k + masks)
            if value > best + MARGIN:
                best, chosen, width, gain = value, k, 1 + k + masks, tokens
        state[TOKENS] = DECAY * state[TOKENS] + gain
        state[COST] = DECAY * state[COST] + 1 + slope * (width - 1)
        for place in range(chosen):
            state[LISTS + self._most + place] = sure[place]
        return chosen, width


@dataclass
class PassCosts:
    """Measured seconds of passes over one position and over several → the slope of the cost.

    The first time of each kind is a warm-up, which the second replaces.
    """

    narrow: float = 0.0
    narrow_passes: int = 0
    wide: float = 0.0
    width: float = 0.0
    wide_passes: int = 0

    def add(self, width: float, seconds: float) -> None:
        """Adds a pass over `width` positions of each row; of several in a row, the means."""
        if width <= 1:
            self.narrow_passes += 1
            self.narrow += max(0.05, 1 / max(self.narrow_passes - 1, 1)) * (seconds - self.narrow)
            return
        self.wide_passes += 1
        weight = max(0.05, 1 / max(self.wide_passes - 1, 1))
        self.wide += weight * (seconds - self.wide)
        self.width += weight * (width - self.width)

    @property
    def slope(self) -> float:
        """The cost of one more position of a pass, as a share of a pass over one position."""
        if min(self.narrow_passes, self.wide_passes) < 2 or self.narrow <= 0:
            return DEFAULT_SLOPE
        return min(max((self.wide / self.narrow - 1) / (self.width - 1), 0.005), 1.0)
