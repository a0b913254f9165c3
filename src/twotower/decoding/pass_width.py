"""The width of a pass of diffusion with adapters: by expected final tokens for the cost of a mask.

For models whose denoiser is adapters (`engine/one_pass.py`). Every pass brings AR's next token, and the masks before
the first that is not confident. So r, the share of the new tokens that masks brought, is the chance that a mask becomes
final if those before it do, and mask i becomes final with probability r^i.

A final token costs its mask, and a position of the next pass, which reads the token. With S AR steps for a position and
R tokens for an AR step, a mask pays if r^i > R·S · (1 + r^i), that is r^i > R·S ÷ (1 − R·S). R and S are constants, and
r depends on the text alone. So a text does not depend on measured times, and not on other requests.

`ops/cpu/draft_planner.h` has the same rule for compiled passes.
"""

from __future__ import annotations

from twotower.decoding.draft_planner import DEFAULT_SLOPE

PRIOR_FINAL, PRIOR_TOKENS = 8, 10  # r is their ratio before the first pass
TOKENS_PER_STEP = 2.0  # R
PRICE = TOKENS_PER_STEP * DEFAULT_SLOPE
LEAST = PRICE / (1 - PRICE)  # the least probability of a mask that pays


def pass_width(known: int, tokens: int, passes: int, size: int) -> int:
    """The positions of a pass: `known` tokens, then at least one mask, but at most `size` positions.

    tokens, passes: new tokens of the text so far, and the passes that brought them.
    """
    rate = (PRIOR_FINAL + tokens - passes) / (PRIOR_TOKENS + tokens)
    width, chance = min(known + 1, size), rate
    while width < size:
        chance *= rate
        if chance <= LEAST:
            break
        width += 1
    return width
