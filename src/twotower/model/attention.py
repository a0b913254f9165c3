"""Grouped-query attention, with or without rotary position embedding, windows and norms of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from twotower.cache.layer_cache import KeyValue
from twotower.model.layer_io import AttentionMetadata
from twotower.model.linear import Linear, linears
from twotower.model.norm import RMSNorm
from twotower.ops.reference.attention import AttentionOptions, CachedKV
from twotower.ops.reference.rope import HeadNorms, Rotation
from twotower.ops.registry import select
from twotower.specs import AttentionSpec, TowerSpec


class Attention(nn.Module):
    """Attention of a pass over [cached keys ; keys of the pass], with one softmax. Cached keys are turned (RoPE)."""

    def __init__(self, spec: AttentionSpec, tower: TowerSpec) -> None:
        super().__init__()
        hidden, width = tower.hidden_size, spec.head_dim
        self.spec = spec
        self.head_dim = width
        self.rope = None if spec.rope is None else tower.ropes[spec.rope]
        self.heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        self.options = AttentionOptions(spec.scale, spec.window, spec.softcap)
        per_head = 2 * width if spec.output_gate else width  # queries, and the gate of the output
        self.q_proj = Linear(hidden, spec.num_heads * per_head, bias=spec.qkv_bias)
        self.k_proj = Linear(hidden, spec.num_kv_heads * width, bias=spec.qkv_bias)
        self.v_proj = Linear(hidden, spec.num_kv_heads * width, bias=spec.qkv_bias)
        self.o_proj = Linear(spec.num_heads * width, hidden, bias=spec.output_bias)
        if spec.qk_norm != "none":
            heads = (1, 1) if spec.qk_norm == "head" else (spec.num_heads, spec.num_kv_heads)
            self.q_norm, self.k_norm = (RMSNorm(count * width, tower.norm_eps, tower.norm_offset) for count in heads)

    def project(self, hidden: Tensor, turn: Rotation | None) -> tuple[Tensor, KeyValue, Tensor | None]:
        """hidden (B, L, H) → queries (B, Hq, L, D), the keys and values of the pass, and the gate (B, L, Hq·D).

        turn: of the rotary position embedding, applied to queries and keys; None: none. The gate is None without one.
        """
        q, k, v = linears(hidden, self.q_proj, self.k_proj, self.v_proj)
        gate = None
        if self.spec.output_gate:
            q, gate = (part.flatten(-2) for part in q.unflatten(-1, (self.spec.num_heads, -1)).chunk(2, dim=-1))
        if self.spec.qk_norm == "width":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.spec.clip is not None:
            q, k, v = (part.clamp(-self.spec.clip, self.spec.clip) for part in (q, k, v))
        q, k, v = (
            part.unflatten(-1, (heads, self.head_dim)) for part, heads in zip((q, k, v), self.heads, strict=True)
        )
        norms = None
        if self.spec.qk_norm == "head":
            norms = HeadNorms(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps, self.q_norm.offset)
        if norms is not None or turn is not None:
            q, k = select("norm_and_rotate", q.device, q.dtype).function(q, k, norms, turn)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return q, KeyValue(k, v), gate

    def output(self, heads: Tensor, gate: Tensor | None) -> Tensor:
        """Heads (B, L, Hq, D) and their gate → output projection (B, L, H)."""
        out = heads.flatten(2)
        return self.o_proj(out if gate is None else out * torch.sigmoid(gate))

    def forward(self, hidden: Tensor, past: CachedKV | None, meta: AttentionMetadata) -> tuple[Tensor, KeyValue]:
        """hidden (B, L, H) → output (B, L, H), and the keys and values to append to the cache."""
        q, own, gate = self.project(hidden, None if self.spec.rope is None else meta.rotations[self.spec.rope])
        q, k, v = (part.transpose(1, 2) for part in (q, *own))
        attend = select("attention", hidden.device, hidden.dtype).function
        heads = attend(q, k, v, meta.token_mask, meta.causal, past, self.options, meta.prefix)
        return self.output(heads, gate), own
