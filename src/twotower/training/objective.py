"""The two objectives as modules that can be sharded: next-token prediction and masked diffusion.

Both return summed losses. The trainer divides by the number of targets over all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.model.conditioning import Modulation, TimeConditioning
from twotower.model.packed_forward import Layout
from twotower.model.tower import Tower
from twotower.training.data.batch import Batch
from twotower.training.layer_pair import AutoregressiveLayer, pair_layers, run_unit
from twotower.training.noise import Corruption, NoiseScope, corrupt

Result = TypeVar("Result")
MAX_LOGITS = 2**26  # 256 MB in fp32; more logits are computed in chunks, and recomputed in the backward pass


class Objective(Protocol):
    """What the trainer needs of an objective, which is also an `nn.Module`."""

    units: nn.ModuleList  # sharded one by one, in the order in which they run

    def draw_noise(self, batch: Batch, block_size: int) -> Corruption | None:
        """Draws the noise of a batch, on the CPU."""

    def targets(self, batch: Batch, noise: Corruption | None) -> int:
        """The number of targets, by which the trainer divides the summed loss."""

    def ar_targets(self, batch: Batch) -> int:
        """The number of targets of the additional next-token loss; 0: there is no such loss."""

    def __call__(self, batch: Batch, noise: Corruption | None, block_size: int, ratio: float | None = None) -> Tensor:
        """The summed loss. ratio: targets / AR targets of the global batch, over all processes; None: of this batch."""


class AutoregressiveObjective(nn.Module):
    """Next-token cross-entropy over the tokens of each document after its first.

    prompt_loss: False leaves out the tokens of prompts.
    """

    def __init__(self, tower: Tower, *, activation_checkpointing: bool = False, prompt_loss: bool = True) -> None:
        super().__init__()
        self._tower = (tower,)  # a tuple: not a submodule, so that each weight has one name
        self.embeddings, self.norm_f, self.head = tower.embeddings, tower.norm_f, tower.head
        self.units = nn.ModuleList(AutoregressiveLayer(layer) for layer in tower.all_layers())
        self.activation_checkpointing, self.prompt_loss = activation_checkpointing, prompt_loss

    @property
    def tower(self) -> Tower:
        """The tower that is trained, while its parts are unsharded."""
        return self._tower[0]

    def draw_noise(self, batch: Batch, block_size: int) -> None:
        return None

    def targets(self, batch: Batch, noise: Corruption | None = None) -> int:
        return int(next_tokens(batch, self.prompt_loss).sum())

    def ar_targets(self, batch: Batch) -> int:
        return 0

    def forward(self, batch: Batch, noise: Corruption | None, block_size: int, ratio: float | None = None) -> Tensor:
        """Summed loss in nats, a scalar."""
        layout = Layout(batch.document, block_size)
        x = self.tower.embed(batch.tokens)
        for unit in self.units:
            x = run_unit(unit, self.activation_checkpointing, x, layout)
        wanted = next_tokens(batch, self.prompt_loss)
        return negative_log_likelihood(self.tower, self.norm_f(x[:, :-1][wanted]), batch.tokens[:, 1:][wanted]).sum()


@dataclass(frozen=True, kw_only=True)
class DenoisingOptions:
    """How the denoiser is trained.

    scope: what shares a noise level. elbo: weight the loss by 1/t and divide by all trained tokens; this is the
    bound on −ln p instead of the mean over masked positions. train_context: the context tower is trained too, through
    its keys, values and Mamba states. ar_weight: with train_context, weight of the context tower's next-token loss.
    activation_checkpointing: keep only the two residual streams of each layer. time: the denoiser is conditioned on t.
    """

    mask_token_id: int
    scope: NoiseScope = "document"
    seed: int = 0
    elbo: bool = False
    train_context: bool = False
    ar_weight: float = 0.0
    activation_checkpointing: bool = False
    time: bool = True


class DenoisingObjective(nn.Module):
    """Cross-entropy of the true tokens at masked positions, over all blocks at once.

    The context tower reads the clean rows, without its head and, if frozen, without gradients. context and denoiser
    may be the same tower; then train_context must be set. Sets which parameters require gradients.
    """

    def __init__(self, context: Tower, denoiser: Tower, time: TimeConditioning, options: DenoisingOptions) -> None:
        super().__init__()
        assert options.train_context or (context is not denoiser and not options.ar_weight)
        context.requires_grad_(options.train_context)
        for part in (context.norm_f, context.head):  # only the next-token loss and validation use them
            part.requires_grad_(options.ar_weight > 0)  # a tied head has no weight of its own
        denoiser.requires_grad_(True)
        time.requires_grad_(options.time)
        self.context_embeddings, self.context_norm_f, self.context_head = (
            context.embeddings,
            context.norm_f,
            context.head,
        )
        self.embeddings, self.norm_f, self.head, self.time = denoiser.embeddings, denoiser.norm_f, denoiser.head, time
        pairs = pair_layers(
            list(context.all_layers()),
            list(denoiser.all_layers()),
            train_context=options.train_context,
            all_context_layers=options.ar_weight > 0,
        )
        self.units = nn.ModuleList(pairs)
        self.options = options
        self._towers = context, denoiser  # a tuple: not submodules, so that each weight has one name

    @property
    def context(self) -> Tower:
        """The context tower. Under FSDP its parts are sharded outside of a forward pass."""
        return self._towers[0]

    @property
    def denoiser(self) -> Tower:
        """The denoiser tower, likewise."""
        return self._towers[1]

    def draw_noise(self, batch: Batch, block_size: int) -> Corruption:
        return corrupt(batch, block_size, self.options.seed, self.options.scope)

    def targets(self, batch: Batch, noise: Corruption | None) -> int:
        assert noise is not None
        return int((batch.denoised if self.options.elbo else noise.masked).sum())

    def ar_targets(self, batch: Batch) -> int:
        return int(next_tokens(batch).sum()) if self.options.ar_weight else 0

    def forward(self, batch: Batch, noise: Corruption | None, block_size: int, ratio: float | None = None) -> Tensor:
        """Summed loss in nats, a scalar."""
        assert noise is not None
        nll, clean = self.denoise(batch, noise, block_size)
        if self.options.elbo:
            nll = nll / noise.t.repeat_interleave(block_size, 1)[noise.masked]
        loss = nll.sum()
        if self.options.ar_weight:
            wanted = next_tokens(batch)
            hidden = self.context_norm_f(clean[:, :-1][wanted])
            ar = negative_log_likelihood(self.context, hidden, batch.tokens[:, 1:][wanted]).sum()
            # The ratio makes the weight relative to the mean denoising loss, however many positions are masked.
            if ratio is None:
                ratio = self.targets(batch, noise) / max(self.ar_targets(batch), 1)
            loss = loss + self.options.ar_weight * ratio * ar
        return loss

    def denoise(self, batch: Batch, noise: Corruption, block_size: int) -> tuple[Tensor, Tensor]:
        """→ −ln p (N,) of the true tokens at masked positions, row by row; and the context tower's residual stream."""
        hidden, clean = self.hidden(batch, noise, block_size)
        return negative_log_likelihood(self.denoiser, hidden[noise.masked], batch.tokens[noise.masked]), clean

    def hidden(self, batch: Batch, noise: Corruption, block_size: int) -> tuple[Tensor, Tensor]:
        """→ the denoiser's final hidden states (B, S, H), and the context tower's residual stream (B, S, H).

        The hidden states of blocks without a masked position are 0.
        """
        layout = Layout(batch.document, block_size, chosen=blocks_with_masks(noise, block_size))
        change = self._modulations(noise, layout)
        with torch.set_grad_enabled(self.options.train_context and torch.is_grad_enabled()):
            clean = self.context.embed(batch.tokens)
        noisy = self._embed_corrupted(batch, noise, layout)
        for i, unit in enumerate(self.units):
            read, noisy = run_unit(unit, self.options.activation_checkpointing, clean, noisy, change[i], layout)
            clean = clean if read is None else read
        return layout.to_rows(self.norm_f(noisy)), clean

    def with_hidden(
        self, batch: Batch, noise: Corruption, block_size: int, function: Callable[[Tensor, Tensor], Result]
    ) -> Result:
        """Returns function(hidden, clean) of the results of `hidden`, while norms and heads are unsharded.

        Register this method with `register_fsdp_forward_method`: FSDP then treats it as a forward pass.
        """
        return function(*self.hidden(batch, noise, block_size))

    def _embed_corrupted(self, batch: Batch, noise: Corruption, layout: Layout) -> Tensor:
        tokens = batch.tokens.masked_fill(noise.masked, self.options.mask_token_id)
        return self.denoiser.embed(layout.to_blocks(tokens))

    def _modulations(self, noise: Corruption, layout: Layout) -> Sequence[Modulation | None]:
        return self.time(layout.select_blocks(noise.t.flatten())) if self.options.time else [None] * len(self.units)


def blocks_with_masks(noise: Corruption, block_size: int) -> Tensor:
    """(N,) numbers of the blocks with a masked position, counted through all rows."""
    return torch.unflatten(noise.masked, 1, (-1, block_size)).any(-1).flatten().nonzero()[:, 0]


def next_tokens(batch: Batch, prompts: bool = True) -> Tensor:
    """(B, S − 1) True where position i + 1 is the next token of the document at position i.

    prompts: False leaves out next tokens inside a prompt.
    """
    same = batch.document[:, 1:] == batch.document[:, :-1]
    wanted = batch.text[:, 1:] & batch.text[:, :-1] & same
    return wanted if prompts else wanted & ~batch.prompt[:, 1:]


def negative_log_likelihood(tower: Tower, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Final hidden states (N, H) of a tower, tokens (N,) → −ln p (N,) in nats, at least fp32.

    More than MAX_LOGITS logits are computed in chunks, which are recomputed in the backward pass.
    """
    chunks = list(in_chunks(tower, hidden, tokens))
    if len(chunks) == 1:
        return _nll(tower, hidden, tokens)
    return torch.cat([run_unit(_nll, True, tower, h, y) for h, y in chunks])


def in_chunks(tower: Tower, *parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Splits tensors of N positions, such as hidden (N, H), into chunks, at least one, of at most MAX_LOGITS logits."""
    at_once = positions_at_once(tower.spec.vocab_size)
    yield from zip(*(part.split(at_once) for part in parts), strict=True)


def positions_at_once(vocab_size: int) -> int:
    """The number of positions whose logits are in memory at once."""
    return max(MAX_LOGITS // vocab_size, 1)


def _nll(tower: Tower, hidden: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(tower.logits(hidden), tokens, reduction="none")
