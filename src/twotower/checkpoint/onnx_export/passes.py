"""The passes of a model as functions of tensors alone: what an ONNX graph computes, for one text.

A pass takes the state of the text before it as tensors; a pass of the context tower returns the state after it. All
modules are those of the model, with its weights. A state has, of each context layer i with a cache:

    key_i, value_i (1, Hkv, T, D)       attention, of the T tokens so far
    window_i (1, K−1, C), ssm_i (1, H, P, N)    Mamba-2
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from twotower.cache.layer_cache import CacheUpdate, LayerCache, MambaCache, ParallelCache, keys_of, step_inputs_of
from twotower.model.conditioning import TimeConditioning
from twotower.model.denoisers import shared
from twotower.model.layer_io import AttentionMetadata
from twotower.model.moe import Experts, MoE
from twotower.model.tower import Tower
from twotower.ops.reference.attention import CachedKV
from twotower.ops.reference.experts import experts_at_once
from twotower.ops.reference.mamba_block import state_update
from twotower.specs import AttentionSpec, LayerSpec, Mamba2Spec, TowerSpec

KEYS, SCAN = ("key", "value"), ("window", "ssm")
PARTS_OF = {"*": KEYS, "M": SCAN, "P": KEYS + SCAN}  # kind of layer → the parts of its state
GROWS = 2  # the dimension of keys and values that is the number of tokens
State = dict[str, Tensor]


def empty_shapes(spec: TowerSpec, layers: Sequence[int] | None = None) -> dict[str, tuple[int, ...]]:
    """The name and shape of each tensor of the state of an empty text. layers: the context layers; None: all."""
    return {
        f"{part}_{number}": _shape(spec.layers[number], part)
        for number in (range(spec.num_layers) if layers is None else sorted(set(layers)))
        for part in PARTS_OF.get(spec.layers[number].kind, ())
    }


def _shape(layer: LayerSpec, part: str) -> tuple[int, ...]:
    if part in KEYS:
        keys = next(own for own in layer.parts if isinstance(own, AttentionSpec))
        return 1, keys.num_kv_heads, 0, keys.head_dim
    scan = next(own for own in layer.parts if isinstance(own, Mamba2Spec))
    if part == "window":
        return 1, scan.conv_kernel - 1, scan.conv_dim
    return 1, scan.num_heads, scan.head_dim, scan.state_size


class GatheredExperts(nn.Module):
    """Routed experts by products of fixed shapes: a graph cannot loop over the experts that tokens have chosen."""

    __call__: Callable[..., Tensor]

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden: Tensor, choice: Tensor, weight: Tensor) -> Tensor:
        own = self.experts
        gate = own.gate_proj if own.gated else None
        return experts_at_once(hidden, choice, weight, gate, own.up_proj, own.down_proj, own.activation)


def traceable(tower: Tower) -> Tower:
    """A tower with the same weights, without runners, whose experts have static shapes."""
    out = shared(tower)
    out.runners = ()
    for module in list(out.modules()):
        if isinstance(module, MoE):
            module.add_module("experts", GatheredExperts(module.experts))
    return out


class ContextPass(nn.Module):
    """A pass of the context tower: the prompt, the next token, or the commit of a block.

    With adapters the same pass denoises: `prefix` says which tokens are before the first mask. They are computed as the
    autoregressive model computes them, and they alone enter the state.
    """

    __call__: Callable[..., tuple[Tensor, ...]]

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = traceable(tower)
        self.names = tuple(empty_shapes(tower.spec))

    def forward(self, tokens: Tensor, prefix: Tensor | None, state: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """tokens (1, L), state in the order of `names` → logits (1, L, V) in fp32, and the state after the tokens.

        prefix: (1,), of a tower with adapters: the tokens that enter the state. None: all, and adapters do not act.
        """
        before = dict(zip(self.names, state, strict=True))
        meta = AttentionMetadata(prefix=prefix, start=_length(before))
        past = [_cache(before, number) for number in range(self.tower.spec.num_layers)]
        hidden, updates = self.tower.layer_by_layer(tokens, meta, past)
        count = tokens.shape[1]
        if prefix is None:
            appended = torch.ones(1, dtype=torch.long) * count
        else:
            appended, kept = prefix, cast(int, prefix.item())  # `int` would fix its value
            torch._check(kept >= 0)
            torch._check(kept <= count)
            count = kept
        after = _after(before, updates, appended, count)
        return self.tower.logits(hidden), *(after[name] for name in self.names)


class DenoiserPass(nn.Module):
    """A pass of a denoiser tower over a block. It changes no state, and reads that of the layers in `names`."""

    __call__: Callable[..., Tensor]

    def __init__(self, tower: Tower, time: TimeConditioning, context: TowerSpec) -> None:
        super().__init__()
        self.tower, self.time = traceable(tower), time
        self.names = tuple(empty_shapes(context, tower.spec.context_layers))

    def forward(self, tokens: Tensor, t: Tensor, prefix: Tensor | None, state: Sequence[Tensor]) -> Tensor:
        """tokens (1, L), t (1,): the masked fraction → logits (1, L, V) in fp32.

        prefix: (1,), with prefix-causal attention: the tokens before the first mask; None: the block sees itself whole.
        """
        before = dict(zip(self.names, state, strict=True))
        meta = AttentionMetadata(causal=False, prefix=prefix, start=_length(before))
        past = [_cache(before, number) for number in self.tower.spec.context_layers]
        hidden, _ = self.tower.layer_by_layer(tokens, meta, past, self.time(t), keep_step_inputs=False)
        return self.tower.logits(hidden)


def _length(state: State) -> Tensor | None:
    """(1,), the tokens of the text so far; None if no layer has keys, whose positions count."""
    keys = next((tensor for name, tensor in state.items() if name.startswith("key_")), None)
    return None if keys is None else torch.ones(1, dtype=torch.long) * keys.shape[GROWS]


def _cache(state: State, layer: int) -> LayerCache:
    """The cache of a context layer."""
    keys, scan = ([state[f"{part}_{layer}"] for part in parts if f"{part}_{layer}" in state] for parts in (KEYS, SCAN))
    mamba = MambaCache(*scan) if scan else None
    if not keys:
        return mamba
    own = _cached(*keys)
    return own if mamba is None else ParallelCache(own, mamba)


def _cached(key: Tensor, value: Tensor) -> CachedKV:
    length = key.shape[GROWS]
    first = torch.zeros(1, dtype=torch.long)
    return CachedKV(key.flatten(0, 2), value.flatten(0, 2), first, first + length, first + length, length, length)


def _after(before: State, updates: Sequence[CacheUpdate], appended: Tensor, count: int) -> State:
    """The state with the updates of the first `count` tokens; appended (1,): the same number."""
    after: State = {}
    for layer, update in enumerate(updates):
        if f"key_{layer}" in before:
            for part, new in zip(KEYS, keys_of(update), strict=True):
                name = f"{part}_{layer}"
                after[name] = torch.cat([before[name], new[:, :, :count]], dim=GROWS)
        if f"ssm_{layer}" in before:
            own = [f"{part}_{layer}" for part in SCAN]
            found = state_update(before[own[0]], before[own[1]], step_inputs_of(update), appended)
            after.update(zip(own, found, strict=True))
    return after
