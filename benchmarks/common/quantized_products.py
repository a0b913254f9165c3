"""Products with plain, int8 and int4 weights: milliseconds, and bytes of weights read a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from common.timing import TimedCall, interleaved, medians
from twotower.model.linear import Int4Linear, Int8Linear, Linear
from twotower.model.moe import Experts, Int4Experts, Int8Experts
from twotower.nemotron_h_fields import NemotronHFields
from twotower.specs import MLPSpec, MoESpec

LINEARS: dict[str, Callable[[Linear], nn.Module]] = {"none": lambda x: x, "int8": Int8Linear, "int4": Int4Linear}
EXPERTS: dict[str, Callable[[Experts], nn.Module]] = {"none": lambda x: x, "int8": Int8Experts, "int4": Int4Experts}
TOKENS = (1, 16, 96)


@torch.no_grad()
def measure(config: NemotronHFields, dtype: torch.dtype, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """A row for each of the layer's experts and `out_proj`, each scheme and number of tokens; random weights."""
    hidden, inner = config.hidden_size, config.mamba_inner
    expert = MLPSpec(width=config.moe_intermediate_size, activation="relu2", gated=False)
    spec = MoESpec(experts=config.n_routed_experts, top_k=config.num_experts_per_tok, expert=expert)
    with device:
        experts = Experts(spec, hidden).to(dtype)
        for weight in experts.parameters():
            weight.normal_(0, 0.02)
        linear = Linear(inner, hidden, bias=False).to(dtype)
    runs, read = {}, {}
    for scheme in LINEARS:
        routed, dense = EXPERTS[scheme](experts), LINEARS[scheme](linear)
        for tokens in TOKENS:
            x = torch.randn(tokens, hidden, device=device).to(dtype)
            share, choice = torch.rand(tokens, spec.experts, device=device).topk(spec.top_k, -1)
            wide = torch.randn(tokens, inner, device=device).to(dtype)
            key = "experts", scheme, tokens
            runs[str(key)] = TimedCall(lambda m=routed, x=x, choice=choice, share=share: m(x, choice, share))
            read[key] = nbytes(routed) * choice.unique().numel() // spec.experts
            key = "out_proj", scheme, tokens
            runs[str(key)] = TimedCall(lambda m=dense, x=wide: m(x))
            read[key] = nbytes(dense)
    seconds = medians(interleaved(runs, device, repeats, least=0.001))
    return [
        {
            "weights": name,
            "scheme": scheme,
            "tokens": tokens,
            "MB": count / 1e6,
            "ms": seconds[str((name, scheme, tokens))] * 1e3,
            "GB/s": count / seconds[str((name, scheme, tokens))] / 1e9,
        }
        for (name, scheme, tokens), count in read.items()
    ]


def nbytes(module: nn.Module) -> int:
    """Bytes of the parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
