"""Generation that recomputes everything: no cache, no batch, no state. Every fast path must equal it.

For each step the text so far is read again from its first token, position by position (the slow twins of the
kernels), one row at a time. It shares the weights, the layers' norms, the router and the time conditioning with the
model, which the golden values test, and nothing of `state.py` or `generation/`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower import TwoTowerForCausalLM
from twotower.model.tower import Tower
from twotower.ops.reference.conv import causal_conv_sequential
from twotower.ops.reference.experts import experts_dense
from twotower.ops.reference.ssd import ssd_sequential

MASK = 3
Pick = Callable[[Tensor, int, int], int]  # (logits (V,), absolute position, step) → token


def diffusion(
    model: TwoTowerForCausalLM,
    prompt: list[int],
    new: int,
    block_size: int,
    steps: int,
    threshold: float,
    pick: Pick | None = None,
) -> tuple[list[int], int]:
    """Masked diffusion of one prompt → its new tokens and the denoiser passes they took (spec §3)."""
    text, passes = list(prompt), 0
    while len(text) < len(prompt) + new:
        _, past = read(model.context, text)
        block: list[int | None] = [None] * block_size
        for step in range(steps):
            masked = [i for i, token in enumerate(block) if token is None]
            if not masked:
                break
            time = model.time(torch.tensor([len(masked) / block_size], dtype=torch.float64))
            noisy = [MASK if token is None else token for token in block]
            logits, _ = read(model.denoiser, noisy, past, causal=False, time=time)
            passes += 1
            logits[:, MASK] = -math.inf
            candidate = [(pick or greedy)(logits[i], len(text) + i, step) for i in range(block_size)]
            sure = [float(logits[i].softmax(-1)[candidate[i]]) for i in range(block_size)]
            above = sum(sure[i] > threshold for i in masked)
            count = min(len(masked), max(above, 1, math.ceil(len(masked) / (steps - step))))
            for i in sorted(masked, key=lambda i: -sure[i])[:count]:
                block[i] = candidate[i]
        text += block
    return text[len(prompt) :][:new], passes


def autoregressive(model: TwoTowerForCausalLM, prompt: list[int], new: int, pick: Pick | None = None) -> list[int]:
    """The context tower alone, one token at a time."""
    text = list(prompt)
    for _ in range(new):
        logits, _ = read(model.context, text)
        text.append((pick or greedy)(logits[-1], len(text), 0))
    return text[len(prompt) :]


def mock_autoregressive(model: TwoTowerForCausalLM, prompt: list[int], new: int, pick: Pick | None = None) -> list[int]:
    """The denoiser reads the last token after the context of all before it."""
    text = list(prompt)
    for _ in range(new):
        past = read(model.context, text[:-1])[1] if text[:-1] else None
        logits, _ = read(model.denoiser, text[-1:], past)
        text.append((pick or greedy)(logits[-1], len(text), 0))
    return text[len(prompt) :]


def greedy(logits: Tensor, position: int, step: int) -> int:
    return int(logits.argmax())


def sampler(seed: int, purpose: int, temperature: float) -> Pick:
    """Gumbel-max with noise that is a function of (seed, position, purpose, step): splitmix64 in Python integers."""
    golden, wrap = 0x9E3779B97F4A7C15, 2**64

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % wrap
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % wrap
        return z ^ (z >> 31)

    def pick(logits: Tensor, position: int, step: int) -> int:
        key = mix(seed)
        for part in (position, purpose, step):
            key = mix((key + golden * (part + 1)) % wrap)
        scores = []
        for token, logit in enumerate(logits.tolist(), start=1):
            uniform = ((mix((key + golden * token) % wrap) >> 11) + 0.5) * 2.0**-53
            scores.append(logit / temperature - math.log(-math.log(uniform)))
        return max(range(len(scores)), key=scores.__getitem__)

    return pick


# --- one tower over one text --------------------------------------------------------------------------------------


def read(
    tower: Tower, tokens: list[int], past: list | None = None, causal: bool = True, time: list | None = None
) -> tuple[Tensor, list]:
    """→ logits (L, V) in float64 or fp32, and per layer what a later block sees of this text."""
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
    config = mixer.config
    z, xBC, dt = mixer.in_proj(hidden).split([config.mamba_inner, config.conv_dim, config.mamba_num_heads], dim=-1)
    window, state = before or (xBC.new_zeros(1, config.conv_kernel - 1, config.conv_dim), None)
    active = F.silu(causal_conv_sequential(xBC, window, mixer.conv1d.weight, mixer.conv1d.bias))
    bc = config.n_groups * config.ssm_state_size
    x, B, C = active.split([config.mamba_inner, bc, bc], dim=-1)
    x = x.unflatten(-1, (config.mamba_num_heads, -1))
    B, C = (v.unflatten(-1, (config.n_groups, -1)) for v in (B, C))
    dt = F.softplus(dt + mixer.dt_bias).clamp(*config.time_step_limit)
    y, state = ssd_sequential(x, dt, -dt * mixer.A_log.exp(), B, C, state)
    y = (y + x * mixer.D[:, None]).flatten(2)
    inputs = torch.cat([window, xBC], dim=1)
    gated = (y * F.silu(z)).unflatten(-1, (config.n_groups, -1))
    rms = (gated.square().mean(-1, keepdim=True) + config.layer_norm_epsilon).sqrt()
    return mixer.out_proj((gated / rms).flatten(-2) * mixer.norm.weight), (inputs[:, xBC.shape[1] :], state)


def _moe(mixer, hidden, before, causal):
    choice, weight = mixer.gate(hidden[0])
    routed = experts_dense(hidden[0], choice, weight, mixer.experts.up_proj, mixer.experts.down_proj)
    return routed[None] + _mlp(mixer.shared_experts, hidden, before, causal)[0], None


def _mlp(mixer, hidden, before, causal):
    return mixer.down_proj(mixer.up_proj(hidden).relu() ** 2), None
