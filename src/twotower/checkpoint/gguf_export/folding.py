"""Factors of activations that become factors of weights, where llama.cpp's architecture has none (Falcon-H1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from twotower.specs import LayerSpec, Mamba2Spec, MLPSpec, ParallelSpec, TowerSpec

Change = Callable[[Tensor], Tensor]


def table_factors(spec: TowerSpec) -> dict[str, float]:
    """The factors of the embedding and of the head, by the names of their tensors."""
    return {"embeddings.weight": spec.embedding_factor, "head.weight": spec.logit_factor}


def layer_changes(layer: LayerSpec) -> dict[str, Change]:
    """The changes of the tensors of a layer, by their names in it. A bias has no factor of the input."""
    mixer = layer.mixer
    if isinstance(mixer, MLPSpec):
        gate, down = times(mixer.gate_factor), times(layer.residual_factor)
        both = {"gate_proj": gate, "down_proj": down}
        return {f"mixer.{name}.{leaf}": change for name, change in both.items() for leaf in ("weight", "bias")}
    assert isinstance(mixer, ParallelSpec)
    attention, scale = mixer.attention, mixer.attention.scale
    keys = 1.0 if scale is None else scale * attention.head_dim**0.5
    inward = mixer.attention_input_factor
    return {
        "mixer.attention.q_proj.weight": times(inward),
        "mixer.attention.k_proj.weight": times(inward * keys),
        "mixer.attention.k_proj.bias": times(keys),
        "mixer.attention.v_proj.weight": times(inward),
        "mixer.attention.o_proj.weight": times(mixer.attention_factor),
        "mixer.mamba.in_proj.weight": _rows(mixer.mamba, mixer.mamba_input_factor),
        "mixer.mamba.out_proj.weight": times(mixer.mamba_factor),
    }


def times(factor: float) -> Change:
    """The values times a factor, in fp32."""
    return (lambda weight: weight) if factor == 1.0 else (lambda weight: weight.float() * factor)


def _rows(mamba: Mamba2Spec, factor: float) -> Change:
    """The rows of z, x, B, C and dt, each times its own factor and a common one."""
    if mamba.factors is None:
        return times(factor)
    bc = mamba.num_groups * mamba.state_size
    sizes = torch.tensor([mamba.inner, mamba.inner, bc, bc, mamba.num_heads])
    rows = torch.repeat_interleave(torch.tensor(mamba.factors) * factor, sizes)[:, None]
    return lambda weight: weight.float() * rows
