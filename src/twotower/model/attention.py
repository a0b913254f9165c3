"""Grouped-query attention without positional encoding (Nemotron-H)."""

from __future__ import annotations

from torch import Tensor, nn

from twotower.cache.layer_cache import KeyValue
from twotower.config import BackboneConfig
from twotower.model.layer_io import AttentionMetadata
from twotower.model.linear import Linear
from twotower.ops.reference.attention import CachedKV
from twotower.ops.registry import select


class Attention(nn.Module):
    """Attention of a pass over [cached keys ; keys of the pass], with one softmax."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.head_dim
        self.head_dim = width
        self.heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        self.q_proj = Linear(hidden, config.num_attention_heads * width, bias=config.attention_bias)
        self.k_proj = Linear(hidden, config.num_key_value_heads * width, bias=config.attention_bias)
        self.v_proj = Linear(hidden, config.num_key_value_heads * width, bias=config.attention_bias)
        self.o_proj = Linear(config.num_attention_heads * width, hidden, bias=config.attention_bias)

    def project(self, hidden: Tensor) -> tuple[Tensor, KeyValue]:
        """hidden (B, L, H) → queries (B, Hq, L, D), and the keys and values of the pass."""
        q, k, v = (
            proj(hidden).unflatten(-1, (heads, self.head_dim)).transpose(1, 2)
            for proj, heads in zip((self.q_proj, self.k_proj, self.v_proj), self.heads, strict=True)
        )
        return q, KeyValue(k, v)

    def output(self, heads: Tensor) -> Tensor:
        """Heads (B, Hq, L, D) → output projection (B, L, H)."""
        return self.o_proj(heads.transpose(1, 2).flatten(2))

    def forward(self, hidden: Tensor, past: CachedKV | None, meta: AttentionMetadata) -> tuple[Tensor, KeyValue]:
        """hidden (B, L, H) → output (B, L, H), and the keys and values to append to the cache."""
        q, own = self.project(hidden)
        attend = select("attention", hidden.device, hidden.dtype).function
        heads = attend(*(part.transpose(1, 2) for part in (q, *own)), meta.token_mask, meta.causal, past)
        return self.o_proj(heads.flatten(2)), own
