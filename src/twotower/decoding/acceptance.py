"""Acceptance of drafted tokens: which of them the text keeps after the context tower has checked them.

The text is that of `generate_ar` with the same seed, at any temperature, whatever made the draft: a draft changes only
how many rounds the text takes. (A rule that accepts a token with probability min(1, p/q), as in Leviathan et al. 2023,
would be right only for drafts in which q depends on nothing but the prefix. Drafts filled in order of confidence are
not of that kind.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from twotower.decoding.sampling import by_tiles
from twotower.ops.precision import upcast


def accept(
    read: Tensor, own: Tensor, logits: Tensor, acceptance: float | Tensor, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The tokens that a check adds to each text, and how many of them were drafted.

    read (B, L): the pending token and a draft, of which the first lengths (B,) count (None: all); own (B, L): the AR
    model's choice after each; logits (B, L, V): its logits → tokens (B, L), the accepted part of the draft followed by
    the AR model's own tokens; accepted (B,).
    """
    accepted = accepted_length(read[:, 1:], own[:, :-1], logits[:, :-1], acceptance)
    if lengths is not None:
        accepted = accepted.minimum(lengths - 1)
    if not isinstance(acceptance, Tensor) and acceptance >= 1:
        return own, accepted  # accepted tokens equal the AR model's choice
    following = torch.cat([read[:, 1:], own[:, -1:]], dim=1)
    return torch.where(torch.arange(own.shape[1], device=own.device) < accepted[:, None], following, own), accepted


def accepted_length(drafted: Tensor, own: Tensor, logits: Tensor, acceptance: float | Tensor) -> Tensor:
    """The number of drafted tokens, from the left, that are accepted (B,).

    drafted, own (B, D). A drafted token is accepted where it equals the AR model's choice `own`. With acceptance α < 1
    (or one a row, (B, 1)) it is also accepted where the AR model gives it at least α times the probability of its most
    probable token; rows with α = 1 accept no others.
    """
    agrees = drafted == own
    if isinstance(acceptance, Tensor) or acceptance < 1:
        near_enough = by_tiles(_relative_probability, logits, drafted) >= acceptance
        if isinstance(acceptance, Tensor):
            near_enough &= acceptance < 1
        agrees = agrees | near_enough
    return agrees.long().cumprod(1).sum(1)


def _relative_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """The tokens' probability (n,) as a share of the most probable one's: logits (n, V)."""
    wide = upcast(logits)
    return (wide.gather(-1, tokens[..., None])[..., 0] - wide.amax(-1)).exp()
