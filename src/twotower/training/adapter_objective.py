"""The objective of adapters (`model.adapters`): predict, at the masks of a block, what the frozen AR model says there.

Column c of a block predicts token c + 1 of the document, across the edge of the block too. The tokens before the first
mask are computed as AR computes them, so only the columns from the first mask on are trained. Their target is a mixture
of AR's own distribution on the clean text, at the same column, and the text's token:

    loss = w · KL(AR ‖ adapters) + (1 − w) · −ln p(token)

EOS repeated after the end of a document is no text of AR, so its target is the token alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.model.packed_forward import Layout
from twotower.model.tower import Tower
from twotower.ops.precision import upcast
from twotower.training.data.batch import Batch
from twotower.training.layer_pair import LayerPair, run_unit
from twotower.training.noise import Corruption, generator_of
from twotower.training.objective import in_chunks

BARRED = -1e4  # logit of the mask token: its probability is 0, and its logarithm is finite


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """How adapters are trained. draft_share: blocks with one token before the masks, as after a refused draft; the
    others have 1 to L − 1, drawn uniformly. distillation: the weight w of AR's distribution."""

    mask_token_id: int
    seed: int = 0
    draft_share: float = 0.4
    distillation: float = 0.7
    activation_checkpointing: bool = False


class AdapterObjective(nn.Module):
    """Sets which parameters of a tower with adapters require gradients: the adapters and the mask's embedding."""

    def __init__(self, tower: Tower, options: AdapterOptions) -> None:
        super().__init__()
        assert tower.mask_embedding is not None
        tower.requires_grad_(False)
        for name, parameter in tower.named_parameters():
            parameter.requires_grad_(".adapter." in name or name.startswith("mask_embedding."))
        self.embeddings, self.norm_f, self.head = tower.embeddings, tower.norm_f, tower.head
        self.mask_embedding = tower.mask_embedding
        layers = list(tower.all_layers())
        self.units = nn.ModuleList(LayerPair(own, own, train_context=False, runs_context=True) for own in layers)
        self.options = options
        self._tower = (tower,)  # a tuple: not a submodule, so that each weight has one name

    @property
    def tower(self) -> Tower:
        """The tower, while its parts are unsharded."""
        return self._tower[0]

    def draw_noise(self, batch: Batch, block_size: int) -> Corruption:
        """Draws the first mask of each block, on the CPU; t is the share of masks."""
        rows, length = batch.tokens.shape
        prefix = torch.empty(rows, length // block_size, dtype=torch.long)
        for i, index in enumerate(batch.index.tolist()):
            drawn = torch.rand(2, length // block_size, generator=generator_of(self.options.seed, index))
            spread = 1 + (drawn[1] * max(block_size - 1, 1)).long()
            prefix[i] = torch.where(drawn[0] < self.options.draft_share, 1, spread)
        masked = torch.arange(block_size) >= prefix[..., None]
        return Corruption(masked.float().mean(-1), masked.flatten(1) & batch.denoised)

    def targets(self, batch: Batch, noise: Corruption | None) -> int:
        assert noise is not None
        return int(self._wanted(batch, noise).sum())

    def ar_targets(self, batch: Batch) -> int:
        return 0

    def forward(self, batch: Batch, noise: Corruption | None, block_size: int, ratio: float | None = None) -> Tensor:
        """Summed loss in nats, a scalar."""
        assert noise is not None
        hidden, clean, wanted = self.hidden(batch, noise, block_size)
        tokens = batch.tokens.roll(-1, 1)[wanted]
        own = batch.text.roll(-1, 1)[wanted]
        pieces = list(in_chunks(self.tower, hidden, clean, tokens, own))
        return torch.stack([run_unit(self._loss, len(pieces) > 1, *piece) for piece in pieces]).sum()

    def hidden(self, batch: Batch, noise: Corruption, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """→ final hidden states at the trained columns (n, H), of the adapted and of the plain tower, and these columns
        (B, S)."""
        wanted = self._wanted(batch, noise)
        blocks = noise.masked.unflatten(1, (-1, block_size)).flatten(0, 1)
        chosen = blocks.any(-1).nonzero()[:, 0]
        prefix = (~blocks[chosen]).long().cumprod(1).sum(1)
        layout = Layout(batch.document, block_size, chosen, prefix)
        tokens = batch.tokens.masked_fill(noise.masked, self.options.mask_token_id)
        with torch.no_grad():
            clean = self.tower.embed(batch.tokens)
        noisy = self.tower.embed(layout.to_blocks(tokens), layout.adapted)
        for unit in self.units:
            read, noisy = run_unit(unit, self.options.activation_checkpointing, clean, noisy, None, layout)
            clean = read if read is not None else clean
        return self.norm_f(layout.to_rows(noisy)[wanted]), self.norm_f(clean[wanted]), wanted

    def agreement(self, batch: Batch, noise: Corruption, block_size: int) -> tuple[Tensor, Tensor]:
        """→ (B, S) trained columns whose most likely token is that of the AR model, and (B, S) all trained columns.

        Register this method with `register_fsdp_forward_method`: FSDP then treats it as a forward pass.
        """
        hidden, clean, wanted = self.hidden(batch, noise, block_size)
        agrees = torch.zeros_like(wanted)
        agrees[wanted] = torch.cat(
            [
                self._log_probabilities(own).argmax(-1) == self._log_probabilities(teacher).argmax(-1)
                for own, teacher in in_chunks(self.tower, hidden, clean)
            ]
        )
        return agrees, wanted

    def _wanted(self, batch: Batch, noise: Corruption) -> Tensor:
        """(B, S), the trained columns: masks with a next token in their document."""
        same = batch.document == batch.document.roll(-1, 1)
        same[:, -1] = False
        return noise.masked & same

    def _loss(self, hidden: Tensor, clean: Tensor, tokens: Tensor, own: Tensor) -> Tensor:
        """Final hidden states (n, H), target tokens (n,), whether they are text (n,) → the summed loss."""
        found = self._log_probabilities(hidden)
        token_loss = F.nll_loss(found, tokens, reduction="none")
        with torch.no_grad():
            teacher = self._log_probabilities(clean)
        distance = (teacher.exp() * (teacher - found)).sum(-1)
        weight = self.options.distillation * own.to(found.dtype)
        return (weight * distance + (1 - weight) * token_loss).sum()

    def _log_probabilities(self, hidden: Tensor) -> Tensor:
        """Final hidden states (n, H) → ln p (n, V) without the mask token."""
        logits = upcast(self.tower.logits(hidden))
        mask = torch.tensor([self.options.mask_token_id], device=logits.device)
        return logits.index_fill(-1, mask, BARRED).log_softmax(-1)
