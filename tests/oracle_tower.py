"""One tower over one text, position by position, without cache or batch. `oracle` decodes with it.

It shares with the model the weights, norms, router and time conditioning, which golden values test, and the reference
operations; it shares no state.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.model.tower import Tower
from twotower.ops.reference.conv import causal_conv_sequential
from twotower.ops.reference.experts import experts_dense
from twotower.ops.reference.ssd import ssd_sequential


def read(
    tower: Tower, tokens: list[int], past: list | None = None, causal: bool = True, time: list | None = None
) -> tuple[Tensor, list]:
    """Returns logits (L, V) in float64 or fp32, and for each layer the state that a later block sees."""
    x = tower.embeddings(torch.tensor([tokens]))
    seen = []
    for i, layer in enumerate(tower.layers):
        shift, scale, gate = time[i] if time else (0.0, 0.0, 1.0)
        before = past[i] if past else None
        hidden = layer.norm(x * (1 + scale) + shift) if layer.kind in "M*" else layer.norm(x) * (1 + scale) + shift
        out, after = {"M": _mamba, "*": _attention, "E": _moe, "-": _mlp}[layer.kind](
            layer.mixer, hidden, before, causal
        )
        x = x + gate * out
        seen.append(after)
    return tower.head(tower.norm_f(x))[0], seen


def _attention(mixer, hidden, before, causal):
    q, k, v = (p(hidden)[0].unflatten(-1, (-1, mixer.head_dim)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    if before:
        k, v = torch.cat([before[0], k]), torch.cat([before[1], v])
    groups = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for i in range(len(q)):
        end = len(k) - len(q) + i + 1 if causal else len(k)
        for h in range(q.shape[1]):
            scores = k[:end, h // groups] @ q[i, h] / math.sqrt(mixer.head_dim)
            out[i, h] = scores.softmax(-1) @ v[:end, h // groups]
    return mixer.o_proj(out.flatten(1))[None], (k, v)


def _mamba(mixer, hidden, before, causal):
    spec = mixer.spec
    z, xBC, dt = mixer.in_proj(hidden).split([spec.inner, spec.conv_dim, spec.num_heads], dim=-1)
    window, state = before or (xBC.new_zeros(1, spec.conv_kernel - 1, spec.conv_dim), None)
    active = F.silu(causal_conv_sequential(xBC, window, mixer.conv1d.weight, mixer.conv1d.bias))
    bc = spec.num_groups * spec.state_size
    x, B, C = active.split([spec.inner, bc, bc], dim=-1)
    x = x.unflatten(-1, (spec.num_heads, -1))
    B, C = (v.unflatten(-1, (spec.num_groups, -1)) for v in (B, C))
    dt = F.softplus(dt + mixer.dt_bias).clamp(*spec.time_step_limit)
    y, state = ssd_sequential(x, dt, -dt * mixer.A_log.exp(), B, C, state)
    y = (y + x * mixer.D[:, None]).flatten(2)
    inputs = torch.cat([window, xBC], dim=1)
    gated = (y * F.silu(z)).unflatten(-1, (spec.num_groups, -1))
    rms = (gated.square().mean(-1, keepdim=True) + mixer.eps).sqrt()
    return mixer.out_proj((gated / rms).flatten(-2) * mixer.norm.weight), (inputs[:, xBC.shape[1] :], state)


def _moe(mixer, hidden, before, causal):
    choice, weight = mixer.gate(hidden[0])
    routed = experts_dense(hidden[0], choice, weight, mixer.experts.up_proj, mixer.experts.down_proj)
    return routed[None] + _mlp(mixer.shared_experts, hidden, before, causal)[0], None


def _mlp(mixer, hidden, before, causal):
    return mixer.down_proj(mixer.up_proj(hidden).relu() ** 2), None
