"""Acceptance of drafted tokens, after the context tower has verified them.

With acceptance 1 the text is that of `generate_ar` with the same seed, at any temperature and for any draft: exact in
fp32 and float64, in bf16 up to near ties. A draft changes only the number of rounds. (Accepting with probability
min(1, p/q), as in Leviathan et al. 2023, is correct only if q depends on the prefix alone. A draft that is filled in
order of confidence does not have this property.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from twotower.decoding.sampling import by_tiles
from twotower.ops.precision import upcast


def accept(
    read: Tensor, own: Tensor, logits: Tensor, acceptance: float | Tensor, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the tokens that follow each token read, and the number of accepted drafted tokens.

    read (B, L): the pending token and a draft; the first lengths (B,) of them count (None: all). own (B, L), logits
    (B, L, V): the AR model's choice and logits after each token. Returns tokens (B, L), the accepted part of the draft
    followed by the AR model's own tokens, and accepted (B,).
    """
    accepted = accepted_length(read[:, 1:], own[:, :-1], logits[:, :-1], acceptance)
    if lengths is not None:
        accepted = accepted.minimum(lengths - 1)
    if not isinstance(acceptance, Tensor) and acceptance >= 1:
        return own, accepted  # accepted tokens equal the AR model's choice
    following = torch.cat([read[:, 1:], own[:, -1:]], dim=1)
    return torch.where(torch.arange(own.shape[1], device=own.device) < accepted[:, None], following, own), accepted


def accepted_length(drafted: Tensor, own: Tensor, logits: Tensor, acceptance: float | Tensor) -> Tensor:
    """Returns the number of accepted drafted tokens, counted from the left (B,).

    drafted, own (B, D). A drafted token is accepted if it equals the AR model's choice `own`. With acceptance α < 1 (a
    number, or one a row (B, 1)) it is also accepted if the AR model gives it at least α times the probability of its
    most probable token.
    """
    agrees = drafted == own
    if isinstance(acceptance, Tensor) or acceptance < 1:
        near_enough = by_tiles(_relative_probability, logits, drafted) >= acceptance
        near_enough &= logits.gather(-1, drafted[..., None])[..., 0] > -torch.inf  # else it is forbidden
        if isinstance(acceptance, Tensor):
            near_enough &= acceptance < 1
        agrees = agrees | near_enough
    return agrees.long().cumprod(1).sum(1)


def _relative_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """Each token's probability divided by that of the most probable token (n,): logits (n, V), tokens (n,)."""
    wide = upcast(logits)
    return (wide.gather(-1, tokens[..., None])[..., 0] - wide.amax(-1)).exp()
