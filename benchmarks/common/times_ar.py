"""Speed of diffusion as a multiple of AR, from the costs of passes: by rows at once and by tokens per pass.

One row misleads: an AR step reads few experts, a block of 16 tokens many, so that AR looks cheap. With 64 rows both
read nearly all experts.
"""

from __future__ import annotations

import torch

from common import roofline
from common.models import BLOCK
from twotower.nemotron_h_fields import NemotronHFields

ROWS = (1, 8, 64)
TOKENS_PER_PASS = (1.9, 3.0, 5.0)


def times_ar(step: float, denoise: float, commit: float, per_pass: float) -> float:
    """× AR by the times of the three passes at the same number of rows, without the time between passes."""
    return BLOCK * step / (BLOCK / per_pass * denoise + commit)


def at_roofline(
    config: NemotronHFields, dtype: torch.dtype, rates: roofline.Rates, *, context: int, per_pass: float
) -> dict[int, float]:
    """× AR at each of `ROWS`, if every pass took its roofline."""
    found = {}
    for rows in ROWS:
        works = roofline.passes_of(config, dtype, context, rows=rows).values()
        found[rows] = times_ar(*(roofline.pass_seconds(work, rates) for work in works), per_pass)
    return found
