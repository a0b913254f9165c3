"""The two losses: next-token prediction for a backbone, masked diffusion for its denoiser (spec §4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.kernels.precision import accumulation_dtype
from twotower.model.blockwise import context_pass, denoise_all_blocks
from twotower.model.conditioning import TimeConditioning
from twotower.model.tower import Tower
from twotower.training.data import BOS, MASK, Batch

LOWEST_NOISE = 1e-3


def ar_loss(tower: Tower, batch: Batch, chunk: int) -> tuple[Tensor, int]:
    """Summed next-token cross-entropy (nats) over the documents' own tokens after the first, and their number."""
    hidden, _ = context_pass(tower, batch.tokens, batch.valid, chunk)
    wanted = batch.text[:, 1:] & batch.text[:, :-1]
    return _cross_entropy(tower, hidden[:, :-1][wanted], batch.tokens[:, 1:][wanted])


@dataclass(frozen=True)
class Corruption:
    """t (B,) noise level of each sequence; masked (B, S) positions replaced by the mask token."""

    t: Tensor
    masked: Tensor


def corrupt(batch: Batch, starts: Tensor, block_size: int, generator: torch.Generator) -> Corruption:
    """t ~ U(1e-3, 1] per sequence, spread evenly over the batch; each token masked with probability t.

    starts (B,): each row's first column that may be masked. A first block that does not begin at a block edge is
    context only, and so is everything before it; <bos> is never masked.
    """
    rows, length = batch.tokens.shape
    draws = (torch.rand(1, generator=generator) + torch.arange(rows) / rows) % 1.0
    t = 1.0 - draws * (1.0 - LOWEST_NOISE)
    first_full = -(-starts // block_size) * block_size
    eligible = batch.valid & (torch.arange(length) >= first_full[:, None]) & (batch.tokens != BOS)
    return Corruption(t, eligible & (torch.rand(rows, length, generator=generator) < t[:, None]))


def denoising_loss(
    context: Tower, denoiser: Tower, time: TimeConditioning, batch: Batch, noise: Corruption, block_size: int
) -> tuple[Tensor, int]:
    """Summed cross-entropy (nats) at masked positions, same-position targets, and their number.

    The context tower is frozen: its one pass runs without gradients and without its head.
    """
    with torch.no_grad():
        _, coupling = context_pass(context, batch.tokens, batch.valid, block_size)
    noisy = batch.tokens.masked_fill(noise.masked, MASK)
    hidden = denoise_all_blocks(denoiser, noisy, batch.valid, time(noise.t), coupling, block_size)
    return _cross_entropy(denoiser, hidden[noise.masked], batch.tokens[noise.masked])


def _cross_entropy(tower: Tower, hidden: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    logits = tower.head(hidden)
    loss = F.cross_entropy(logits.to(accumulation_dtype(logits.dtype)), targets, reduction="sum")
    return loss, targets.numel()
