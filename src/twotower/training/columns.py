"""Which columns of packed rows are trained, what they predict, and which column of the AR model predicts the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.denoiser_fields import DenoiserConfig
from twotower.model.packed_layout import Layout
from twotower.ops.host_transfer import send
from twotower.training.data.batch import Batch
from twotower.training.noise import Corruption
from twotower.training.patterns import open_predictions


@dataclass(frozen=True)
class TrainedColumns:
    """n trained columns, row by row. The rows are those of all copies of a corruption (`Corruption.stacked`).

    at: (n,) place of each column among copies·B·S columns. token: (n,) the token that it predicts. clean_at: (n,) the
    column, among B·S clean ones, whose AR output predicts this token. known: (n,) whether there is such a column; not
    for the first token of a document, nor for EOS repeated after its end. before: (n,) the token before the predicted
    one in its document; −1 where there is none.
    """

    at: Tensor
    token: Tensor
    clean_at: Tensor
    known: Tensor
    before: Tensor

    def to(self, device: torch.device) -> TrainedColumns:
        parts = (self.at, self.token, self.clean_at, self.known, self.before)
        return TrainedColumns(*(send(part, device) for part in parts))


def trained_columns(batch: Batch, wanted: Tensor, shift: int) -> TrainedColumns:
    """wanted: (copies·B, S) from `wanted_columns`, on any device."""
    at = wanted.flatten().nonzero()[:, 0]
    own = token_at = at % batch.tokens.numel()
    if shift:  # the last EOS of a document predicts itself
        token_at = token_at + followed(batch).flatten()[token_at]
    clean_at = (token_at - 1).clamp(min=0)
    predicted = F.pad(next_tokens(batch), (1, 0)).flatten()[token_at]
    tokens = batch.tokens.flatten()
    return TrainedColumns(at, tokens[token_at], clean_at, predicted, _tokens_before(batch, shift)[own])


def _tokens_before(batch: Batch, shift: int) -> Tensor:
    """(B·S,), the token before the one that each column predicts, in the same document; −1 where there is none."""
    if shift:
        return batch.tokens.flatten()
    same = F.pad(batch.document[:, 1:] == batch.document[:, :-1], (1, 0))
    return torch.where(same, batch.tokens.roll(1, 1), -1).flatten()


def wanted_columns(batch: Batch, noise: Corruption, block_size: int, shift: int = 0, gated: bool = False) -> Tensor:
    """(copies·B, S), the trained columns: those that predict an open token of their document.

    Past the end of a document that ends with repeated EOS, the token is EOS again. gated: only from the first mask of a
    block on, where adapters act, and only tokens that the document has.
    """
    masked = noise.stacked.masked
    wanted = open_predictions(masked, block_size, shift)
    if gated:
        wanted = wanted & (masked.unflatten(1, (-1, block_size)).cumsum(-1) > 0).flatten(1)
    if shift:
        known = followed(batch)
        if not gated:
            known = known | (~batch.text & (batch.document >= 0))
        wanted = wanted & known.repeat(noise.copies, 1)
    return wanted


def followed(batch: Batch) -> Tensor:
    """(B, S), whether the next column is one of the same document, and may be predicted."""
    same = (batch.document[:, 1:] == batch.document[:, :-1]) & (batch.document[:, 1:] >= 0)
    if batch.target is not None:
        same = same & batch.target[:, 1:]
    return F.pad(same, (0, 1))


def inside_blocks(wanted: Tensor, block_size: int, shift: int) -> Tensor:
    """The trained columns (B, S) that predict a position of their own block, as in generation."""
    inside = torch.arange(wanted.shape[1], device=wanted.device) % block_size < block_size - shift
    return wanted & inside


def position_weights(wanted: Tensor, block_size: int, decay: float) -> Tensor:
    """exp(−(k − 1) / decay) at the k-th trained column of a block (DSpark), 0 elsewhere; (copies·B, S), float64.

    decay 0: all weights are 1.
    """
    if not decay:
        return wanted.double()
    number = wanted.unflatten(1, (-1, block_size)).cumsum(-1).flatten(1)
    return torch.where(wanted, torch.exp((1 - number.double()) / decay), 0.0)


def blocks_with_masks(noise: Corruption, block_size: int) -> Tensor:
    """(N,) numbers of the blocks with a masked position, counted through all rows."""
    return torch.unflatten(noise.masked, 1, (-1, block_size)).any(-1).flatten().nonzero()[:, 0]


def before_masks(masks: Corruption, chosen: Tensor, block_size: int) -> Tensor:
    """(N,), the positions of each chosen block before its first mask."""
    found: Tensor = (~masks.masked.unflatten(1, (-1, block_size)).flatten(0, 1)[chosen]).long().cumprod(1).sum(1)
    return found


def tower_layout(batch: Batch, masks: Corruption, block_size: int, choices: DenoiserConfig) -> Layout:
    """The layout of the blocks with masks, for a denoiser tower."""
    chosen = blocks_with_masks(masks, block_size)
    prefix = before_masks(masks, chosen, block_size) if choices.block_attention == "prefix_causal" else None
    return Layout(batch.document, block_size, chosen, prefix, filler=batch.filler)


def next_tokens(batch: Batch, prompts: bool = True) -> Tensor:
    """(B, S − 1) True where position i + 1 is the next token of the document at position i, and a target.

    prompts: False leaves out next tokens inside a prompt.
    """
    same = batch.document[:, 1:] == batch.document[:, :-1]
    wanted = batch.text[:, 1:] & batch.text[:, :-1] & same
    if batch.target is not None:
        wanted = wanted & batch.target[:, 1:]
    return wanted if prompts else wanted & ~batch.prompt[:, 1:]
