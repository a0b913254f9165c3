"""One tower over one text, position by position, without cache or batch. `oracle` decodes with it.

It shares with the model the weights and the `TowerSpec`, which say what to compute. It calls no module and no operation
of the package. A text is a list of tokens, and every array has one row a position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.model.conditioning import TimeConditioning
from twotower.model.tower import Tower
from twotower.specs import (
    AttentionSpec,
    DeltaNetSpec,
    LayerSpec,
    Mamba2Spec,
    MLPSpec,
    MoESpec,
    ParallelSpec,
    RopeSpec,
    TowerSpec,
)

Modulation = tuple[Tensor, Tensor, Tensor]  # shift, scale, gate
# The fields that this file reads. A new field of a spec must come into the oracle.
KNOWN_FIELDS: dict[type, str] = {
    TowerSpec: "layers hidden_size vocab_size max_position_embeddings norm_eps norm_offset embedding_factor "
    "logit_factor logit_softcap tied_head residual_in_fp32 initializer_range ropes counterparts",
    LayerSpec: "mixer source pre_norm post_norm residual_factor",
    AttentionSpec: "num_heads num_kv_heads head_dim qkv_bias output_bias rope window qk_norm scale softcap clip "
    "output_gate",
    RopeSpec: "inverse_frequencies factor interleaved",
    MLPSpec: "width activation gated bias gate_factor",
    MoESpec: "experts top_k expert shared shared_gate scores normalise factor num_groups top_groups correction_bias "
    "latent latent_bias",
    Mamba2Spec: "num_heads head_dim state_size num_groups conv_kernel conv_bias input_bias output_bias "
    "chunk_size time_step_limit time_step_init norm factors",
    DeltaNetSpec: "num_heads head_dim state_size num_groups conv_kernel grouped_projections chunk_size",
    ParallelSpec: "attention mamba attention_input_factor attention_factor mamba_input_factor mamba_factor",
}


class Context(NamedTuple):
    """What a later block sees of a text of `tokens` tokens. layers: of each layer.

    Attention: keys and values (T, heads, D) of all tokens. Mamba and DeltaNet: the last inputs of the convolution, and
    the state.
    Both side by side: both.
    """

    layers: list[Any]
    tokens: int


class Pass(NamedTuple):
    """One pass of a tower over tokens start, start + 1, …. The first `causal` of them attend causally."""

    spec: TowerSpec
    start: int
    causal: float


def read(
    tower: Tower,
    tokens: Sequence[int],
    past: Context | None = None,
    causal: float = math.inf,
    time: list[Modulation] | None = None,
) -> tuple[Tensor, Context]:
    """Returns logits (L, V) in the model's dtype, and what a later block sees.

    causal: so many first tokens attend causally, the others to the whole pass.
    """
    spec = tower.spec
    this = Pass(spec, past.tokens if past else 0, causal)
    x = tower.embeddings.weight[list(tokens)] * torch.tensor(spec.embedding_factor, dtype=tower.embeddings.weight.dtype)
    seen = []
    for i, layer in enumerate(tower.layers):
        shift, scale, gate = time[i] if time else (0.0, 0.0, 1.0)
        before = past.layers[i] if past else None
        hidden = x
        if layer.kind in "M*PD" or not layer.spec.pre_norm:
            hidden = hidden * (1 + scale) + shift
        if layer.spec.pre_norm:
            hidden = _norm(hidden, layer.norm.weight, spec)
        if layer.kind in "E-" and layer.spec.pre_norm:
            hidden = hidden * (1 + scale) + shift
        out, after = _mix(layer.mixer, layer.spec.mixer, hidden, before, this)
        if layer.spec.post_norm:
            out = _norm(out, layer.post_norm.weight, spec)
        x = x + gate * layer.spec.residual_factor * out
        seen.append(after)
    head = tower.embeddings.weight if spec.tied_head else tower.head.weight
    logits = _norm(x, tower.norm_f.weight, spec) @ head.T * spec.logit_factor
    return _capped(logits, spec.logit_softcap), Context(seen, this.start + len(tokens))


def conditioning(time: TimeConditioning, t: float) -> list[Modulation]:
    """Shift, scale and gate (H,) of each layer when the fraction t of a block is masked."""
    tables = list(time.scale_shift_tables)
    angles = [1000 * t * math.exp(-math.log(10000) * k / 128) for k in range(128)]
    wave = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)], dtype=tables[0].dtype)
    first, second, third = time.t_embedder.mlp[0], time.t_embedder.mlp[2], time.t_block[1]
    inner = F.silu(wave @ first.weight.T + first.bias)
    inner = F.silu(inner @ second.weight.T + second.bias)
    shared = (inner @ third.weight.T + third.bias).view(3, -1)
    return [tuple(shared + table) for table in tables]


def _mix(mixer: Any, spec: Any, hidden: Tensor, before: Any, this: Pass) -> tuple[Tensor, Any]:
    match spec:
        case AttentionSpec():
            return _attention(mixer, spec, hidden, before, this)
        case Mamba2Spec():
            return _mamba(mixer, spec, hidden, before, this)
        case DeltaNetSpec():
            return _delta_net(mixer, spec, hidden, before, this)
        case ParallelSpec():
            old = before or (None, None)
            attended, keys = _attention(
                mixer.attention, spec.attention, hidden * spec.attention_input_factor, old[0], this
            )
            scanned, state = _mamba(mixer.mamba, spec.mamba, hidden * spec.mamba_input_factor, old[1], this)
            return attended * spec.attention_factor + scanned * spec.mamba_factor, (keys, state)
        case MoESpec():
            return torch.stack([_experts(mixer, spec, token) for token in hidden]), None
        case MLPSpec():
            return _mlp(mixer, spec, hidden), None
    raise NotImplementedError(spec)


def _linear(module: Any, x: Tensor) -> Tensor:
    return x @ module.weight.T if module.bias is None else x @ module.weight.T + module.bias


def _norm(x: Tensor, weight: Tensor, spec: TowerSpec) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + spec.norm_eps).sqrt() * (spec.norm_offset + weight)


def _capped(x: Tensor, most: float | None) -> Tensor:
    return x if most is None else most * torch.tanh(x / most)


# --- attention ------------------------------------------------------------------------------------------------------


def visible(query: int, length: int, start: int, causal: bool, window: int | None) -> slice:
    """The positions that the query of position `query` attends to; a pass reads positions start … length − 1.

    Causal: itself and those before it, `window` in all. Otherwise: the whole pass and window − 1 positions before it.
    """
    first = 0 if window is None else max(0, (query if causal else start) - window + 1)
    return slice(first, query + 1 if causal else length)


def _attention(mixer: Any, spec: AttentionSpec, hidden: Tensor, before: Any, this: Pass) -> tuple[Tensor, Any]:
    q, k, v = (_linear(module, hidden) for module in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    gates = 1.0
    if spec.output_gate:
        each = q.unflatten(-1, (spec.num_heads, 2 * spec.head_dim))
        q, gates = each[..., : spec.head_dim].flatten(1), torch.sigmoid(each[..., spec.head_dim :].flatten(1))
    if spec.qk_norm == "width":
        q, k = _norm(q, mixer.q_norm.weight, this.spec), _norm(k, mixer.k_norm.weight, this.spec)
    if spec.clip is not None:
        q, k, v = (part.clamp(-spec.clip, spec.clip) for part in (q, k, v))
    q, k, v = (part.unflatten(-1, (-1, spec.head_dim)) for part in (q, k, v))
    if spec.qk_norm == "head":
        q, k = _norm(q, mixer.q_norm.weight, this.spec), _norm(k, mixer.k_norm.weight, this.spec)
    if spec.rope is not None:
        q, k = (_turned(part, this.start, this.spec.ropes[spec.rope]) for part in (q, k))
    if before:
        k, v = torch.cat([before[0], k]), torch.cat([before[1], v])
    groups = spec.num_heads // spec.num_kv_heads
    scale = 1 / math.sqrt(spec.head_dim) if spec.scale is None else spec.scale
    out = torch.empty_like(q)
    for i in range(len(q)):
        keys = visible(this.start + i, len(k), this.start, i < this.causal, spec.window)
        for h in range(spec.num_heads):
            scores = _capped(k[keys, h // groups] @ q[i, h] * scale, spec.softcap)
            out[i, h] = scores.softmax(-1) @ v[keys, h // groups]
    return _linear(mixer.o_proj, out.flatten(1) * gates), (k, v)


def _turned(x: Tensor, start: int, rope: RopeSpec) -> Tensor:
    """Row i of x (L, heads, D) turned to position start + i: a pair (a, b) is the complex number a + ib."""
    turned, pairs = x.clone(), len(rope.inverse_frequencies)
    first, second = (
        (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2))
        if rope.interleaved
        else (slice(0, pairs), slice(pairs, 2 * pairs))
    )
    frequencies = x.new_tensor(rope.inverse_frequencies)
    for i in range(len(x)):
        by = torch.polar(x.new_full((pairs,), rope.factor), (start + i) * frequencies)
        numbers = torch.complex(x[i, :, first], x[i, :, second]) * by
        turned[i, :, first], turned[i, :, second] = numbers.real, numbers.imag
    return turned


# --- Mamba-2 --------------------------------------------------------------------------------------------------------


def _mamba(mixer: Any, spec: Mamba2Spec, hidden: Tensor, before: Any, this: Pass) -> tuple[Tensor, Any]:
    """From left to right also in a denoiser's block."""
    inputs, state = before or (
        hidden.new_zeros(spec.conv_kernel - 1, spec.conv_dim),
        hidden.new_zeros(spec.num_heads, spec.head_dim, spec.state_size),
    )
    size, each = spec.num_groups * spec.state_size, spec.num_heads // spec.num_groups
    parts = _linear(mixer.in_proj, hidden).split([spec.inner, spec.inner, size, size, spec.num_heads], dim=-1)
    z, *new, step = (part * by for part, by in zip(parts, spec.factors or (1.0,) * 5, strict=True))
    inputs = torch.cat([inputs, torch.cat(new, dim=-1)])
    taps, bias = mixer.conv1d.weight[:, 0].T, mixer.conv1d.bias
    step = F.softplus(step + mixer.dt_bias).clamp(*spec.time_step_limit)
    rates, outs = mixer.A_log.exp(), []
    for i in range(len(hidden)):
        active = (inputs[i : i + spec.conv_kernel] * taps).sum(0) + (0 if bias is None else bias)
        x, B, C = F.silu(active).split([spec.inner, size, size])
        x = x.view(spec.num_heads, spec.head_dim)
        B, C = (part.view(spec.num_groups, -1).repeat_interleave(each, 0) for part in (B, C))
        decay = torch.exp(-rates * step[i])
        state = decay[:, None, None] * state + (step[i, :, None] * x)[:, :, None] * B[:, None]
        outs.append(((state * C[:, None]).sum(-1) + mixer.D[:, None] * x).flatten())
    mixed = _gated(mixer, spec, torch.stack(outs), z, this.spec.norm_eps)
    return _linear(mixer.out_proj, mixed), (inputs[len(hidden) :], state)


def _gated(mixer: Any, spec: Mamba2Spec, y: Tensor, z: Tensor, eps: float) -> Tensor:
    if spec.norm == "none":
        return y * F.silu(z)
    gated = y * F.silu(z) if spec.norm == "after_gate" else y
    groups = gated.unflatten(-1, (spec.num_groups, -1))
    normed = (groups / (groups.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * mixer.norm.weight
    return normed if spec.norm == "after_gate" else normed * F.silu(z)


# --- gated DeltaNet -------------------------------------------------------------------------------------------------


def _delta_net(mixer: Any, spec: DeltaNetSpec, hidden: Tensor, before: Any, this: Pass) -> tuple[Tensor, Any]:
    """From left to right also in a denoiser's block."""
    keys, each = spec.num_groups * spec.state_size, spec.num_heads // spec.num_groups
    inputs, state = before or (
        hidden.new_zeros(spec.conv_kernel - 1, spec.conv_dim),
        hidden.new_zeros(spec.num_heads, spec.head_dim, spec.state_size),
    )
    if spec.grouped_projections:
        rows = [_linear(mixer.in_proj_qkvz, hidden).chunk(spec.num_groups, -1), _linear(mixer.in_proj_ba, hidden)]
        sizes = [spec.state_size, spec.state_size, each * spec.head_dim, each * spec.head_dim]
        q, k, v, z = (torch.cat(parts, -1) for parts in zip(*(row.split(sizes, -1) for row in rows[0]), strict=True))
        pairs = rows[1].chunk(spec.num_groups, -1)
        b, a = (torch.cat([pair[:, at : at + each] for pair in pairs], -1) for at in (0, each))
        new = torch.cat([q, k, v], -1)
    else:
        modules = (mixer.in_proj_qkv, mixer.in_proj_z, mixer.in_proj_b, mixer.in_proj_a)
        new, z, b, a = (_linear(module, hidden) for module in modules)
    inputs, taps = torch.cat([inputs, new]), mixer.conv1d.weight[:, 0].T
    decays, strengths = torch.exp(-mixer.A_log.exp() * F.softplus(a + mixer.dt_bias)), torch.sigmoid(b)
    outs = []
    for i in range(len(hidden)):
        q, k, v = F.silu((inputs[i : i + spec.conv_kernel] * taps).sum(0)).split([keys, keys, spec.inner])
        q, k = (part.view(spec.num_groups, -1).repeat_interleave(each, 0) for part in (q, k))
        q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
        state = decays[i][:, None, None] * state
        lacking = v.view(spec.num_heads, spec.head_dim) - (state * k[:, None]).sum(-1)
        state = state + (strengths[i][:, None] * lacking)[:, :, None] * k[:, None]
        out = (state * q[:, None]).sum(-1) / math.sqrt(spec.state_size)
        normed = out / (out.square().mean(-1, keepdim=True) + this.spec.norm_eps).sqrt() * mixer.norm.weight
        outs.append(normed.flatten() * F.silu(z[i]))
    return _linear(mixer.out_proj, torch.stack(outs)), (inputs[len(hidden) :], state)


# --- MLP and experts ------------------------------------------------------------------------------------------------


def _activate(x: Tensor, spec: MLPSpec) -> Tensor:
    match spec.activation:
        case "relu2":
            return x.clamp(min=0) ** 2
        case "silu":
            return x / (1 + torch.exp(-x))
        case "gelu":
            return x * (1 + torch.erf(x / math.sqrt(2))) / 2
        case "gelu_tanh":
            return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def _mlp(mixer: Any, spec: MLPSpec, hidden: Tensor) -> Tensor:
    up = _linear(mixer.up_proj, hidden)
    if not spec.gated:
        return _linear(mixer.down_proj, _activate(up, spec))
    return _linear(mixer.down_proj, _activate(_linear(mixer.gate_proj, hidden) * spec.gate_factor, spec) * up)


def _experts(mixer: Any, spec: MoESpec, token: Tensor) -> Tensor:
    """One token (H,) through its experts, one after the other, and through the shared expert."""
    inner = token if spec.latent is None else _linear(mixer.fc1_latent_proj, token)
    routed, experts = torch.zeros_like(inner), mixer.experts
    for expert, weight in _chosen(mixer.gate, spec, token):
        up = experts.up_proj[expert] @ inner
        up = (
            _activate(experts.gate_proj[expert] @ inner, spec.expert) * up
            if spec.expert.gated
            else _activate(up, spec.expert)
        )
        routed = routed + weight * (experts.down_proj[expert] @ up)
    out = routed if spec.latent is None else _linear(mixer.fc2_latent_proj, routed)
    if spec.shared is not None:
        shared = _mlp(mixer.shared_experts, spec.shared, token)
        out = out + (shared * torch.sigmoid(_linear(mixer.shared_expert_gate, token)) if spec.shared_gate else shared)
    return out


def _chosen(gate: Any, spec: MoESpec, token: Tensor) -> list[tuple[int, Tensor]]:
    """The experts of a token with their weights."""
    logits = gate.weight @ token
    scores = torch.sigmoid(logits) if spec.scores == "sigmoid" else logits.softmax(-1)
    ranks = (scores + gate.e_score_correction_bias if spec.correction_bias else scores).tolist()
    if spec.num_groups > 1:
        each = spec.experts // spec.num_groups
        groups = [ranks[at : at + each] for at in range(0, spec.experts, each)]
        best = sorted(range(spec.num_groups), key=lambda g: -sum(sorted(groups[g])[-2:]))[: spec.top_groups]
        ranks = [rank if i // each in best else 0.0 for i, rank in enumerate(ranks)]
    chosen = sorted(range(spec.experts), key=lambda i: -ranks[i])[: spec.top_k]
    total = scores[chosen].sum() + 1e-20 if spec.normalise else 1.0
    return [(i, scores[i] / total * spec.factor) for i in chosen]
