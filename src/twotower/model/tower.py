"""One tower: embedding, layers, final norm, head. The same class serves as context and as denoiser."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from twotower.cache.layer_cache import Added, Past
from twotower.config import BackboneConfig, LayerKind
from twotower.model.attention import Attention
from twotower.model.conditioning import Modulation, normed_input
from twotower.model.layer_io import Visibility
from twotower.model.linear import Linear
from twotower.model.mamba2 import Mamba2
from twotower.model.moe import MLP, Experts, MoE, Router
from twotower.model.norm import RMSNorm
from twotower.ops.precision import widened
from twotower.runners import cuda_graph, fused_cpu


def build_mixer(kind: LayerKind, config: BackboneConfig) -> nn.Module:
    """The module behind each letter of `hybrid_override_pattern`."""
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
    """x + gate · mixer(norm(x)); without modulation plainly x + mixer(norm(x))."""

    def __init__(self, kind: LayerKind, config: BackboneConfig) -> None:
        super().__init__()
        self.kind = kind
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = build_mixer(kind, config)

    def forward(
        self, x: Tensor, past: Past, sees: Visibility, modulation: Modulation | None = None, trace: bool = True
    ) -> tuple[Tensor, Added]:
        """x (B, L, H) → the residual stream after the layer, and what the pass adds to the layer's state.

        trace: whether a Mamba layer's trace is wanted; without, it adds None.
        """
        hidden = normed_input(x, self.norm, self.kind, modulation)
        if self.kind == "M":
            out, added = self.mixer(hidden, past, sees, trace)
        elif self.kind == "*":
            out, added = self.mixer(hidden, past, sees)
        elif self.kind == "E":
            out, added = self.mixer(hidden, sees), None
        else:
            out, added = self.mixer(hidden), None
        return self.residual(x, out, modulation), added

    @staticmethod
    def residual(x: Tensor, out: Tensor, modulation: Modulation | None) -> Tensor:
        return x + out if modulation is None else x + out * modulation.gate


class Tower(nn.Module):
    """Tokens (B, L) in, final hidden states (B, L, H) out; `head` turns those into logits (B, L, V)."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(kind, config) for kind in config.hybrid_override_pattern)  # type: ignore[arg-type]
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        return self.embeddings.weight.device

    def all_layers(self) -> Iterator[Layer]:
        """The layers, typed."""
        for layer in self.layers:
            assert isinstance(layer, Layer)
            yield layer

    def embed(self, tokens: Tensor) -> Tensor:
        x = self.embeddings(tokens)
        return widened(x) if self.config.residual_in_fp32 else x

    def forward(
        self,
        tokens: Tensor,
        sees: Visibility,
        past: list[Past] | None = None,
        modulation: list[Modulation] | None = None,
        trace: bool = True,
    ) -> tuple[Tensor, list[Added]]:
        """One pass over tokens (B, L), after `past` → hidden (B, L, H) and, layer by layer, what it adds.

        trace: whether the Mamba layers' traces are wanted; a pass that nothing is to remember does without.
        """
        at_once = cuda_graph.run(self, cuda_graph.Reads(tokens, sees, past, modulation, trace))
        if at_once is None:
            at_once = fused_cpu.run(self, self.embed(tokens), sees, past, modulation, trace)
        return self.layer_by_layer(tokens, sees, past, modulation, trace) if at_once is None else at_once

    def layer_by_layer(
        self,
        tokens: Tensor,
        sees: Visibility,
        past: list[Past] | None = None,
        modulation: list[Modulation] | None = None,
        trace: bool = True,
    ) -> tuple[Tensor, list[Added]]:
        """`forward` as it is defined; what does all of a pass at once gives the same."""
        x, sees = self.embed(tokens), sees.with_counting()
        added: list[Added] = []
        for i, layer in enumerate(self.layers):
            x, new = layer(x, past[i] if past else None, sees, modulation[i] if modulation else None, trace)
            added.append(new)
        return self.norm_f(x), added

    def reset_parameters(self) -> None:
        """Random weights for training from scratch: N(0, initializer_range), projections into the residual
        stream divided by √layers (`rescale_prenorm_residual`)."""
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
