"""A naive reference of the denoiser, with which the fast pass is compared.

It has the same weights and mathematics, written like the public reference: `F.linear` on weights as they are stored, a
Python loop over all experts, keys and values repeated and concatenated, and a context cache that is copied for every
block. It uses only the model's config and cache, none of its code. `begin` is a cost per block, a call is one pass.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower import TwoTowerForCausalLM
from twotower.cache.layer_cache import KeyValue, MambaCache
from twotower.cache.pools import ContextView
from twotower.ops.reference.attention import CachedKV


class NaiveDenoiser:
    """The naive denoiser of a model. It keeps a copy of the denoiser's weights, by the names of the state dict."""

    def __init__(self, model: TwoTowerForCausalLM) -> None:
        assert model.denoiser is not None
        assert model.time is not None
        self.config = model.config.layer_fields
        self.dtype = model.dtype
        self.weights = {name: tensor.detach().clone() for name, tensor in model.denoiser.state_dict().items()}
        self.time = {name: tensor.detach().clone() for name, tensor in model.time.state_dict().items()}
        self.past: list[KeyValue | MambaCache | None] = []

    def begin(self, view: ContextView) -> None:
        """Begins a block: copies the whole cache of one text, at its current length."""
        length = int(view.lengths[0])
        self.past = []
        for past in view.past:
            if isinstance(past, CachedKV):
                k, v, _ = past.dense(self.config.num_key_value_heads)
                self.past.append(KeyValue(k[:, :, :length].clone(), v[:, :, :length].clone()))
            elif isinstance(past, MambaCache):
                self.past.append(MambaCache(*(part.clone() for part in past.gathered())))
            else:
                self.past.append(None)

    def __call__(self, block: Tensor, t: Tensor) -> Tensor:
        """Logits (1, L, V) of a block (1, L)."""
        x = F.embedding(block, self.weights["embeddings.weight"])
        shared = self._time(t)
        for i, kind in enumerate(self.config.hybrid_override_pattern):
            shift, scale, gate = (shared + self.time[f"scale_shift_tables.{i}"])[:, :, None].unbind(1)
            norm = self.weights[f"layers.{i}.norm.weight"]
            if kind in "M*":
                hidden = self._rms(x * (1 + scale) + shift, norm)
            else:
                hidden = self._rms(x, norm) * (1 + scale) + shift
            name, past = f"layers.{i}.mixer.", self.past[i]
            if isinstance(past, MambaCache):
                out = self._mamba(hidden, name, past)
            elif kind == "*":
                out = self._attention(hidden, name, past if isinstance(past, KeyValue) else None)
            elif kind == "E":
                out = self._moe(hidden, name)
            else:
                out = self._mlp(hidden, name)
            x = x + out * gate
        return F.linear(self._rms(x, self.weights["norm_f.weight"]), self.weights["head.weight"]).float()

    def _time(self, t: Tensor) -> Tensor:
        w = self.time
        k = torch.arange(128, device=t.device, dtype=torch.float32)
        angles = (t.float() * 1000)[:, None] * torch.exp(-math.log(10000) * k / 128)
        x = torch.cat([angles.cos(), angles.sin()], -1).to(self.dtype)
        x = F.silu(F.linear(x, w["t_embedder.mlp.0.weight"], w["t_embedder.mlp.0.bias"]))
        x = F.silu(F.linear(x, w["t_embedder.mlp.2.weight"], w["t_embedder.mlp.2.bias"]))
        return F.linear(x, w["t_block.1.weight"], w["t_block.1.bias"]).unflatten(-1, (3, -1))

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.config.layer_norm_epsilon)
        return (wide * weight.float()).to(self.dtype)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))

    def _mlp(self, hidden: Tensor, name: str) -> Tensor:
        return self._linear(F.relu(self._linear(hidden, name + "up_proj")).square(), name + "down_proj")

    def _attention(self, hidden: Tensor, name: str, past: KeyValue | None) -> Tensor:
        config, length = self.config, hidden.shape[1]
        q, k, v = (
            self._linear(hidden, f"{name}{part}_proj").view(1, length, -1, config.head_dim).transpose(1, 2)
            for part in "qkv"
        )
        if past is not None:
            k, v = torch.cat([past.k, k], 2), torch.cat([past.v, v], 2)
        groups = config.num_attention_heads // config.num_key_value_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out = F.scaled_dot_product_attention(q, k, v)
        return self._linear(out.transpose(1, 2).reshape(1, length, -1), name + "o_proj")

    def _moe(self, hidden: Tensor, name: str) -> Tensor:
        config, w, x = self.config, self.weights, hidden[0]
        scores = F.linear(x.float(), w[name + "gate.weight"].float()).sigmoid()
        biased = scores + w[name + "gate.e_score_correction_bias"]
        if config.n_group > 1:
            grouped = biased.view(len(x), config.n_group, -1)
            best = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1).topk(config.topk_group, -1).indices
            kept = torch.zeros(len(x), config.n_group, device=x.device).scatter(1, best, 1.0)
            biased = (grouped * kept[..., None]).flatten(1)
        choice = biased.topk(config.num_experts_per_tok, -1).indices
        weight = scores.gather(1, choice)
        if config.norm_topk_prob:
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
        weight = weight * config.routed_scaling_factor
        out = torch.zeros(len(x), x.shape[1], device=x.device)
        chosen = F.one_hot(choice, config.n_routed_experts).permute(2, 0, 1)
        for expert in range(config.n_routed_experts):
            tokens, places = torch.where(chosen[expert])
            if tokens.numel():
                inner = F.relu(F.linear(x[tokens], w[name + "experts.up_proj"][expert])).square()
                part = F.linear(inner, w[name + "experts.down_proj"][expert])
                out.index_add_(0, tokens, part.float() * weight[tokens, places, None].float())
        return out.to(self.dtype)[None] + self._mlp(hidden, name + "shared_experts.")

    def _mamba(self, hidden: Tensor, name: str, past: MambaCache) -> Tensor:
        config, w, length = self.config, self.weights, hidden.shape[1]
        heads, inner, groups = config.mamba_num_heads, config.mamba_inner, config.n_groups
        z, xBC, dt = self._linear(hidden, name + "in_proj").split([inner, config.conv_dim, heads], -1)
        seen = torch.cat([past.conv_window.to(self.dtype), xBC], 1).transpose(1, 2).float()
        bias = w.get(name + "conv1d.bias")
        weight = w[name + "conv1d.weight"].float()
        xBC = F.silu(F.conv1d(seen, weight, None if bias is None else bias.float(), groups=config.conv_dim))
        x, B, C = xBC.transpose(1, 2).split([inner, groups * config.ssm_state_size, groups * config.ssm_state_size], -1)
        x = x.reshape(length, heads, -1)
        B, C = (v.reshape(length, groups, -1).repeat_interleave(heads // groups, 1) for v in (B, C))
        dt = F.softplus(dt[0].float() + w[name + "dt_bias"].float()).clamp(*config.time_step_limit)  # (L, heads)
        decay = (dt * -w[name + "A_log"].float().exp()).cumsum(0)
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        between = (decay[:, None] - decay[None]).masked_fill(later[..., None], -torch.inf).exp()  # (L, L, heads)
        scores = torch.einsum("lhn,mhn->lmh", C, B) * between * dt[None]
        y = torch.einsum("lmh,mhp->lhp", scores, x)
        y = y + torch.einsum("lhn,hpn->lhp", C * decay.exp()[..., None], past.ssm_state[0])
        y = (y + x * w[name + "D"].float()[:, None]).reshape(1, length, inner) * F.silu(z.float())
        grouped = y.view(1, length, groups, -1)
        grouped = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + config.layer_norm_epsilon)
        normed = (grouped.flatten(2) * w[name + "norm.weight"].float()).to(self.dtype)
        return self._linear(normed, name + "out_proj")
