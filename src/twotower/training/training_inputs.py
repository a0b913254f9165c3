"""What a pass over a micro-batch reads beside the weights: made on the host, then sent to the device of the weights.

The masks decide the shapes of a pass: which blocks the denoiser reads, and at which columns there is a loss. Where the
masks lie on a GPU, the host would wait for the GPU at each of these shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.model.packed_layout import Layout
from twotower.ops.host_transfer import send
from twotower.training.columns import TrainedColumns, next_tokens, trained_columns
from twotower.training.data.batch import Batch
from twotower.training.noise import Corruption


@dataclass(frozen=True)
class NextTokens:
    """m columns with a next-token loss: at (m,), their places among B·S; token (m,), the tokens that follow."""

    at: Tensor
    token: Tensor

    @classmethod
    def of(cls, batch: Batch, prompts: bool, device: torch.device) -> NextTokens:
        """Those of a batch, on the device. prompts: False leaves out next tokens inside a prompt."""
        row, column = next_tokens(batch, prompts).nonzero(as_tuple=True)
        at = row * batch.tokens.shape[1] + column
        return cls(send(at, device), send(batch.tokens.flatten()[at + 1], device))


@dataclass(frozen=True)
class TrainingInputs:
    """The inputs of a denoising pass, on one device.

    tokens: (B, S), the clean rows. noisy: (N, L), the chosen blocks with masks. t: (N,), their noise levels. columns:
    the n trained columns. levels: (n,), the noise level at each of them. weights: (n,), the weights of their losses.
    """

    tokens: Tensor
    noisy: Tensor
    t: Tensor
    layout: Layout
    columns: TrainedColumns
    levels: Tensor
    weights: Tensor

    @classmethod
    def of(
        cls,
        batch: Batch,
        noise: Corruption,
        chosen: Tensor,
        prefix: Tensor | None,
        wanted: Tensor,
        weights: Tensor,
        *,
        shift: int,
        mask_token: int,
        device: torch.device,
    ) -> TrainingInputs:
        """Computes the inputs where the batch is, and sends them to the device.

        chosen: the blocks that are read. prefix: see `Layout`. wanted, weights: (copies·B, S), of `columns`.
        """
        masks = noise.stacked
        size = batch.tokens.shape[1] // noise.t.shape[1]
        layout = Layout(batch.document, size, chosen, prefix, noise.copies, batch.filler)
        noisy = layout.repeat(batch.tokens).masked_fill(masks.masked, mask_token)
        columns = trained_columns(batch, wanted, shift)
        parts = (
            batch.tokens,
            layout.to_blocks(noisy),
            layout.select_blocks(masks.t.flatten()),
            masks.t.repeat_interleave(size, 1).flatten()[columns.at],
            weights.flatten()[columns.at],
        )
        tokens, noisy, t, levels, own = (send(part, device) for part in parts)
        return cls(tokens, noisy, t, layout.to(device), columns.to(device), levels, own)
