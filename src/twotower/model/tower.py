"""One tower: embedding, layers, final norm, head. Both the context tower and the denoiser tower are a `Tower`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from twotower.cache.layer_cache import CacheUpdate, LayerCache
from twotower.model.adapters import LowRank, MaskEmbedding, adapting
from twotower.model.attention import Attention
from twotower.model.conditioning import Modulation, modulated_norm
from twotower.model.delta_net import GatedDeltaNet
from twotower.model.draft_head import DraftHead
from twotower.model.layer_io import AttentionMetadata
from twotower.model.linear import Linear, TiedHead
from twotower.model.mamba2 import Mamba2
from twotower.model.moe import MLP, Experts, MoE, Router
from twotower.model.norm import RMSNorm
from twotower.model.parallel import ParallelMixer
from twotower.ops.precision import accumulation_dtype, upcast
from twotower.specs import (
    AttentionSpec,
    DeltaNetSpec,
    LayerSpec,
    Mamba2Spec,
    MLPSpec,
    MoESpec,
    ParallelSpec,
    TowerSpec,
)


def build_mixer(layer: LayerSpec, tower: TowerSpec) -> nn.Module:
    """The mixer of a layer."""
    match layer.mixer:
        case Mamba2Spec():
            return Mamba2(layer.mixer, tower)
        case AttentionSpec():
            return Attention(layer.mixer, tower)
        case DeltaNetSpec():
            return GatedDeltaNet(layer.mixer, tower)
        case ParallelSpec():
            return ParallelMixer(layer.mixer, tower)
        case MoESpec():
            return MoE(layer.mixer, tower.hidden_size)
        case MLPSpec():
            return MLP(layer.mixer, tower.hidden_size)


class Layer(nn.Module):
    """A residual layer: x + gate · factor · post_norm(mixer(norm(x))), without modulation x + factor · post_norm(…).

    norm, post_norm: None if the backbone has no norm there.
    """

    def __init__(self, layer: LayerSpec, tower: TowerSpec) -> None:
        super().__init__()
        self.spec, self.kind = layer, layer.kind
        norms = (
            RMSNorm(tower.hidden_size, tower.norm_eps, tower.norm_offset) if there else None
            for there in (layer.pre_norm, layer.post_norm)
        )
        self.norm, self.post_norm = norms
        self.mixer = build_mixer(layer, tower)

    def forward(
        self,
        x: Tensor,
        past: LayerCache,
        meta: AttentionMetadata,
        modulation: Modulation | None = None,
        keep_step_inputs: bool = True,
    ) -> tuple[Tensor, CacheUpdate]:
        """x (B, L, H) → the residual stream after the layer and the layer's cache update.

        keep_step_inputs: whether a Mamba layer returns its step inputs; if not, its update is None.
        """
        hidden = modulated_norm(x, self.norm, self.kind, modulation)
        update: CacheUpdate = None
        if self.kind in "MPD":
            out, update = self.mixer(hidden, past, meta, keep_step_inputs)
        elif self.kind == "*":
            out, update = self.mixer(hidden, past, meta)
        elif self.kind == "E":
            out = self.mixer(hidden, meta)
        else:
            out = self.mixer(hidden)
        return self.residual(x, out, modulation), update

    def residual(self, x: Tensor, out: Tensor, modulation: Modulation | None) -> Tensor:
        """The residual stream x with the mixer's output: post-norm, the backbone's factor, then the time gate."""
        if self.post_norm is not None:
            out = self.post_norm(out)
        if self.spec.residual_factor != 1.0:
            out = out * self.spec.residual_factor
        return x + out if modulation is None else x + out * modulation.gate


class PassInputs(NamedTuple):
    """All inputs of one pass of a tower; see `Tower.forward`."""

    tokens: Tensor
    meta: AttentionMetadata
    past: Sequence[LayerCache] | None = None
    modulation: Sequence[Modulation] | None = None
    keep_step_inputs: bool = True
    appended: Tensor | None = None


PassResult = tuple[Tensor, list[CacheUpdate]]


_STEADY: ContextVar[object | None] = ContextVar("steady weights", default=None)


@contextmanager
def steady_weights() -> Iterator[None]:
    """The caller promises that no module or weight of any tower changes before the end of this context.

    A runner then checks a tower only in the tower's first pass: comparing hundreds of weights takes as long as a tenth
    of a small model's pass.
    """
    before = _STEADY.set(object())
    try:
        yield
    finally:
        _STEADY.reset(before)


def steady_period() -> object | None:
    """The current period without changes; None: anything may have changed since the last pass."""
    return _STEADY.get()


_REPEATED: ContextVar[frozenset[int] | None] = ContextVar("repeated lengths", default=None)


@contextmanager
def repeated_lengths(lengths: frozenset[int]) -> Iterator[None]:
    """The caller repeats passes of these lengths; a runner should prepare nothing for passes of other lengths."""
    before = _REPEATED.set(lengths)
    try:
        yield
    finally:
        _REPEATED.reset(before)


def lengths_that_repeat() -> frozenset[int] | None:
    """The lengths of `repeated_lengths`; None: any may repeat."""
    return _REPEATED.get()


class Runner(Protocol):
    """Runs a whole pass of one tower at once, with the result of `Tower.layer_by_layer`.

    A runner belongs to one tower and caches prepared data for it. A copy of a runner (deepcopy, pickle) is empty.
    """

    def run(self, tower: Tower, inputs: PassInputs) -> PassResult | None:
        """The result of the pass; None if the runner does not support the pass."""

    def prefill_chunk(self, tower: Tower) -> int | None:
        """The number of prompt tokens to read in one pass; None: no preference."""

    def release(self) -> None:
        """Frees all data prepared for the tower."""


class Tower(nn.Module):
    """Tokens (B, L) → final hidden states (B, L, H); `logits` applies the head.

    runners: tried in order for each pass; set by `runners.attach.attach_runners`. mask_embedding: of a tower with
    adapters (`add_adapters`); draft_head: of its drafts (`add_draft_head`), which the forward pass does not use.
    """

    __call__: Callable[..., PassResult]
    runners: tuple[Runner, ...] = ()

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embeddings = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(Layer(layer, spec) for layer in spec.layers)
        self.norm_f = RMSNorm(spec.hidden_size, spec.norm_eps, spec.norm_offset)
        self.head = TiedHead(self.embeddings) if spec.tied_head else Linear(spec.hidden_size, spec.vocab_size, False)
        self.mask_embedding: MaskEmbedding | None = None
        self.draft_head: DraftHead | None = None

    def add_adapters(self, rank: int, mask_token: int) -> None:
        """Adds an adapter to every linear layer of the mixers, and an embedding of the mask token.

        Routed experts, routers and gates of one value have no adapter.
        """
        for module in self.layers.modules():
            if isinstance(module, Linear) and module.out_features > 1:
                module.adapter = LowRank(module.in_features, module.out_features, rank)
        self.mask_embedding = MaskEmbedding(self.spec.hidden_size, mask_token)

    def add_draft_head(self, rank: int) -> None:
        """Adds a draft head to a denoiser."""
        self.draft_head = DraftHead(self.spec.vocab_size, rank)

    @property
    def device(self) -> torch.device:
        return self.embeddings.weight.device

    def all_layers(self) -> Iterator[Layer]:
        """The layers, with their type."""
        for layer in self.layers:
            assert isinstance(layer, Layer)
            yield layer

    def embed(self, tokens: Tensor, adapted: Tensor | None = None) -> Tensor:
        """tokens (B, L) → the residual stream before the first layer (B, L, H). adapted: where adapters act."""
        x: Tensor = self.embeddings(tokens)
        if adapted is not None and self.mask_embedding is not None:
            x = self.mask_embedding(x, tokens, adapted)
        if self.spec.embedding_factor != 1.0:
            x = x * torch.tensor(self.spec.embedding_factor, dtype=x.dtype)  # rounded first, as in transformers
        return upcast(x) if self.spec.residual_in_fp32 else x

    def forward(
        self,
        tokens: Tensor,
        meta: AttentionMetadata,
        past: Sequence[LayerCache] | None = None,
        modulation: Sequence[Modulation] | None = None,
        keep_step_inputs: bool = True,
        appended: Tensor | None = None,
    ) -> PassResult:
        """One pass over tokens (B, L) that follow `past` → hidden (B, L, H) and one cache update a layer.

        past: one cache a layer. modulation: one a layer; None: no time conditioning.
        keep_step_inputs: whether the pass will be stored. If not, layers may have no update.
        appended: (B,), how many tokens of each row will be stored in the state that `past` views. A runner may store
        their keys and values itself; the updates of these layers are then `STORED`. An update may have surplus tokens
        at the end, which `TowerState.append` does not store.
        """
        inputs = PassInputs(tokens, meta, past, modulation, keep_step_inputs, appended)
        for runner in self.runners:
            result = runner.run(self, inputs)
            if result is not None:
                return result
        return self.layer_by_layer(*inputs)

    def layer_by_layer(
        self,
        tokens: Tensor,
        meta: AttentionMetadata,
        past: Sequence[LayerCache] | None = None,
        modulation: Sequence[Modulation] | None = None,
        keep_step_inputs: bool = True,
        appended: Tensor | None = None,
    ) -> PassResult:
        """Reference forward; every runner must match it. It stores nothing, so it ignores `appended`."""
        adapted = meta.adapted_positions(tokens.shape[1])
        x = self.embed(tokens, adapted)
        meta = meta.with_representative().with_rotations(self.spec.ropes, tokens, accumulation_dtype(x.dtype))
        updates: list[CacheUpdate] = []
        with adapting(adapted):
            for i, layer in enumerate(self.layers):
                own = past[i] if past else None, meta, modulation[i] if modulation else None, keep_step_inputs
                x, new = layer(x, *own)
                updates.append(new)
        return self.norm_f(x), updates

    def logits(self, hidden: Tensor, upcast_logits: bool = True) -> Tensor:
        """hidden (…, H) → logits (…, V), in at least fp32 unless upcast_logits is False."""
        logits = self.head(hidden)
        spec = self.spec
        if spec.logit_factor != 1.0 or spec.logit_softcap is not None:
            logits = upcast(logits) * spec.logit_factor
            if spec.logit_softcap is not None:
                logits = spec.logit_softcap * torch.tanh(logits / spec.logit_softcap)
        return upcast(logits) if upcast_logits else logits

    def release(self) -> None:
        """Frees the data that the runners have prepared; they prepare it again on demand."""
        for runner in self.runners:
            runner.release()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Tower:
        self.release()  # prepared data holds addresses of the old weights
        super()._apply(fn, recurse)
        if isinstance(self.head, TiedHead):
            self.head.packed.get(self.head.weight)  # as in `Linear`
        return self

    def reset_parameters(self) -> None:
        """Initialises the weights for training from scratch: N(0, initializer_range).

        The projections into the residual stream are divided by √layers (`rescale_prenorm_residual`).
        """
        std, spread = self.spec.initializer_range, self.spec.num_layers**0.5
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                into_residual = name.endswith(("out_proj", "o_proj", "down_proj"))
                nn.init.normal_(module.weight, std=std / spread if into_residual else std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding | Router):
                nn.init.normal_(module.weight, std=std)
            elif isinstance(module, Experts):
                for weight in (module.gate_proj, module.up_proj) if module.gated else (module.up_proj,):
                    nn.init.normal_(weight, std=std)
                nn.init.normal_(module.down_proj, std=std / spread)
            elif isinstance(module, MaskEmbedding):
                nn.init.normal_(module.weight, std=std)
            elif isinstance(module, Mamba2 | GatedDeltaNet | LowRank | DraftHead):
                module.reset_parameters()
