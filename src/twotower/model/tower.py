"""One tower: embedding, layers, final norm, head. Both the context tower and the denoiser tower are a `Tower`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from twotower.cache.layer_cache import CacheUpdate, LayerCache
from twotower.config import BackboneConfig, LayerKind
from twotower.model.attention import Attention
from twotower.model.conditioning import Modulation, modulated_norm
from twotower.model.layer_io import AttentionMetadata
from twotower.model.linear import Linear
from twotower.model.mamba2 import Mamba2
from twotower.model.moe import MLP, Experts, MoE, Router
from twotower.model.norm import RMSNorm
from twotower.ops.precision import upcast


def build_mixer(kind: LayerKind, config: BackboneConfig) -> nn.Module:
    """The mixer of a layer of this kind, a letter of `hybrid_override_pattern`."""
    match kind:
        case "M":
            return Mamba2(config)
        case "*":
            return Attention(config)
        case "E":
            return MoE(config)
        case "-":
            return MLP(config.hidden_size, config.intermediate_size, config.mlp_bias)


class Layer(nn.Module):
    """A residual layer: x + gate · mixer(norm(x)), or x + mixer(norm(x)) without modulation."""

    def __init__(self, kind: LayerKind, config: BackboneConfig) -> None:
        super().__init__()
        self.kind = kind
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = build_mixer(kind, config)

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
        if self.kind == "M":
            out, update = self.mixer(hidden, past, meta, keep_step_inputs)
        elif self.kind == "*":
            out, update = self.mixer(hidden, past, meta)
        elif self.kind == "E":
            out = self.mixer(hidden, meta)
        else:
            out = self.mixer(hidden)
        return self.residual(x, out, modulation), update

    @staticmethod
    def residual(x: Tensor, out: Tensor, modulation: Modulation | None) -> Tensor:
        return x + out if modulation is None else x + out * modulation.gate


class PassInputs(NamedTuple):
    """All inputs of one pass of a tower; see `Tower.forward`."""

    tokens: Tensor
    meta: AttentionMetadata
    past: list[LayerCache] | None = None
    modulation: list[Modulation] | None = None
    keep_step_inputs: bool = True


PassResult = tuple[Tensor, list[CacheUpdate]]


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

    runners: tried in order for each pass; set by `runners.attach.attach_runners`.
    """

    __call__: Callable[..., PassResult]
    runners: tuple[Runner, ...] = ()

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(kind, config) for kind in config.layer_kinds)
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        return self.embeddings.weight.device

    def all_layers(self) -> Iterator[Layer]:
        """The layers, with their type."""
        for layer in self.layers:
            assert isinstance(layer, Layer)
            yield layer

    def embed(self, tokens: Tensor) -> Tensor:
        x = self.embeddings(tokens)
        return upcast(x) if self.config.residual_in_fp32 else x

    def forward(
        self,
        tokens: Tensor,
        meta: AttentionMetadata,
        past: list[LayerCache] | None = None,
        modulation: list[Modulation] | None = None,
        keep_step_inputs: bool = True,
    ) -> PassResult:
        """One pass over tokens (B, L) that follow `past` → hidden (B, L, H) and one cache update a layer.

        past: one cache a layer. modulation: one a layer; None: no time conditioning.
        keep_step_inputs: whether Mamba layers return their step inputs, which only a pass that is stored needs.
        """
        inputs = PassInputs(tokens, meta, past, modulation, keep_step_inputs)
        for runner in self.runners:
            result = runner.run(self, inputs)
            if result is not None:
                return result
        return self.layer_by_layer(*inputs)

    def layer_by_layer(
        self,
        tokens: Tensor,
        meta: AttentionMetadata,
        past: list[LayerCache] | None = None,
        modulation: list[Modulation] | None = None,
        keep_step_inputs: bool = True,
    ) -> PassResult:
        """Reference forward; every runner must match it."""
        x, meta = self.embed(tokens), meta.with_representative()
        updates: list[CacheUpdate] = []
        for i, layer in enumerate(self.layers):
            x, new = layer(x, past[i] if past else None, meta, modulation[i] if modulation else None, keep_step_inputs)
            updates.append(new)
        return self.norm_f(x), updates

    def logits(self, hidden: Tensor, upcast_logits: bool = True) -> Tensor:
        """hidden (…, H) → logits (…, V), in at least fp32 unless upcast_logits is False."""
        logits = self.head(hidden)
        return upcast(logits) if upcast_logits else logits

    def release(self) -> None:
        """Frees the data that the runners have prepared; they prepare it again on demand."""
        for runner in self.runners:
            runner.release()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Tower:
        self.release()  # prepared data holds addresses of the old weights
        super()._apply(fn, recurse)
        return self

    def reset_parameters(self) -> None:
        """Initialises the weights for training from scratch: N(0, initializer_range).

        The projections into the residual stream are divided by √layers (`rescale_prenorm_residual`).
        """
        std = self.config.initializer_range
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                into_residual = name.endswith(("out_proj", "o_proj", "down_proj"))
                nn.init.normal_(module.weight, std=std / self.config.num_layers**0.5 if into_residual else std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding | Router):
                nn.init.normal_(module.weight, std=std)
            elif isinstance(module, Experts):
                nn.init.normal_(module.up_proj, std=std)
                nn.init.normal_(module.down_proj, std=std / self.config.num_layers**0.5)
            elif isinstance(module, Mamba2):
                module.reset_parameters()
