"""What the denoiser learns to predict: the tokens of the text, or the distribution of the AR model.

A mixture of losses at each trained column; q is the denoiser's distribution, p that of the AR model on the clean text:

| name | loss | source |
|---|---|---|
| tokens | −ln q(token) | as released |
| kl | KL(p ‖ q) | Orthrus, arXiv 2605.12825; Hinton et al., 1503.02531 |
| tv | total variation ½ Σ |p − q|: the share of drafts that verification refuses | Uno 2609.04010; DSpark |
| acceptance | −ln Σ min(p, q), the likelihood of acceptance | LK losses, 2602.23881 |

Where the AR model has no prediction (the first token of a document, EOS repeated after its end), the loss is that of
tokens. The AR model is the context tower, at temperature 1 and without gradient. The mask token has probability 0.
A draft head (`model.draft_head`) gets the text's token before each target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.model.tower import Tower
from twotower.training.layer_pair import run_unit
from twotower.training.logits import in_chunks, logits_of
from twotower.training.noise import Corruption
from twotower.training.shares import parse_shares

Target = Literal["tokens", "kl", "tv", "acceptance"]
TARGETS: tuple[Target, ...] = get_args(Target)
BARRED = -1e4  # logit of the mask token: its probability is 0, and its logarithm is finite


@dataclass(frozen=True)
class Targets:
    """Shares of the losses; they add up to 1."""

    tokens: float = 1.0
    kl: float = 0.0
    tv: float = 0.0
    acceptance: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Targets:
        """`kl:0.7+tokens:0.3` → the mixture.

        Raises:
            ArgumentError: the text does not have this form.
        """
        return cls(**{"tokens": 0.0, **parse_shares(text, TARGETS, "the mixture of targets")})

    @property
    def teacher(self) -> bool:
        """Whether the AR model's distribution is needed."""
        return self.tokens < 1.0


ONLY_TOKENS = Targets()
ONLY_KL = Targets(tokens=0.0, kl=1.0)


@dataclass(frozen=True)
class Examples:
    """n trained columns: final hidden states of the denoiser and of the AR model (n, H), the tokens to predict (n,),
    whether the AR model predicts them (n,), and the tokens before them (n,), −1 where there is none."""

    hidden: Tensor
    clean: Tensor
    tokens: Tensor
    known: Tensor
    before: Tensor


def target_losses(targets: Targets, denoiser: Tower, teacher: Tower, mask_token: int, examples: Examples) -> Tensor:
    """The loss (n,) of each column, in nats and at least fp32.

    More than MAX_LOGITS logits are computed in chunks, which are recomputed in the backward pass.
    """

    def loss(hidden: Tensor, clean: Tensor, tokens: Tensor, known: Tensor, before: Tensor) -> Tensor:
        found = log_probabilities(denoiser, hidden, mask_token, before)
        by_token = F.nll_loss(found, tokens, reduction="none")
        if not targets.teacher:
            return by_token
        with torch.no_grad():
            wanted = log_probabilities(teacher, clean, mask_token)
        return torch.where(known, mixed_loss(targets, found, wanted, by_token), by_token)

    own = examples
    pieces = list(in_chunks(denoiser, own.hidden, own.clean, own.tokens, own.known, own.before))
    return torch.cat([run_unit(loss, len(pieces) > 1, *piece) for piece in pieces])


def loss_of(targets: Targets, noise: Corruption) -> Targets:
    """The mixture for these masks: of a recipe, or KL alone at stored states."""
    return ONLY_KL if noise.on_policy else targets


def mixed_loss(targets: Targets, found: Tensor, wanted: Tensor, by_token: Tensor) -> Tensor:
    """ln q (n, V), ln p (n, V) without gradient, −ln q(token) (n,) → (n,)."""
    loss = targets.tokens * by_token
    p = wanted.exp()
    if targets.kl:
        loss = loss + targets.kl * (p * (wanted - found)).sum(-1)
    if targets.tv or targets.acceptance:
        accepted = torch.minimum(p, found.exp()).sum(-1)  # = 1 − total variation
        loss = loss + targets.tv * (1 - accepted)
        if targets.acceptance:
            loss = loss - targets.acceptance * accepted.clamp(min=torch.finfo(accepted.dtype).tiny).log()
    return loss


def log_probabilities(tower: Tower, hidden: Tensor, mask_token: int, before: Tensor | None = None) -> Tensor:
    """Final hidden states (n, H) → ln p (n, V) without the mask token.

    before: see `logits_of`.
    """
    logits = logits_of(tower, hidden, before)
    mask = torch.full((1,), mask_token, device=logits.device)
    return logits.index_fill(-1, mask, BARRED).log_softmax(-1)
