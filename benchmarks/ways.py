"""The engine in two ways, in turns: its towers on one device and on two; waiting for each pass, or a pass ahead.

Parts of `gpu.py`. The copy on two devices has the same weights, so it makes the same passes.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from models import BLOCK
from throughput import Group, run_group
from torch import nn

from twotower import LLM, TwoTowerForCausalLM
from twotower.cache.replica import Transport
from twotower.decoding.params import GenerationParams

KINDS: dict[str, dict[str, Any]] = {
    "verified": {"mode": "verified", "draft_steps": 1},
    "diffusion": {"mode": "diffusion", "confidence_threshold": 0.8},
    "diffusion, 4 passes a block": {"mode": "diffusion", "policy": "top-k", "knob": BLOCK // 4},
}


def spread(model: TwoTowerForCausalLM, device: torch.device) -> TwoTowerForCausalLM:
    """The model with a copy of its denoiser on another device; the context tower is the same one."""
    with torch.device("meta"):
        other = TwoTowerForCausalLM(model.config)
    other.context, other.tokenizer = model.context, model.tokenizer
    other.denoiser, other.time = moved(model.denoiser, device), moved(model.time, device)
    if device == model.device:  # tried out where there is only one
        other.transport = Transport()
    return other.eval()


def moved(module: nn.Module | None, device: torch.device) -> Any:
    """A copy whose tensors were never anywhere else."""
    assert module is not None
    there: dict[int, Any] = {id(b): b.to(device, copy=True) for b in module.buffers()}
    for own in module.parameters():
        there[id(own)] = nn.Parameter(own.detach().to(device, copy=True), requires_grad=False)
    return copy.deepcopy(module, there)


def apart(model: TwoTowerForCausalLM, device: torch.device, **asked: Any) -> list[dict[str, Any]]:
    """The context tower where it is and the denoiser beside it, or on `device`."""
    models = {"one device": model, "two devices": spread(model, device)}
    return in_turns(lambda **sizes: {name: LLM(own, **sizes) for name, own in models.items()}, **asked)


def ahead(model: TwoTowerForCausalLM, **asked: Any) -> list[dict[str, Any]]:
    """The denoiser's next pass launched after the last one's results are here, or before."""

    def engines(**sizes: int) -> dict[str, LLM]:
        both = {"waiting": LLM(model, **sizes), "ahead": LLM(model, **sizes)}
        for name, engine in both.items():
            engine.async_scheduling = name == "ahead"
        return both

    return in_turns(engines, **asked)


def in_turns(
    engines_of: Callable[..., dict[str, LLM]],
    prompts: Sequence[list[int]],
    *,
    at_once: Sequence[int],
    kinds: Sequence[str],
    tokens: int,
    rounds: int,
) -> list[dict[str, Any]]:
    """Tokens a second of the prompts' first so many at once, in two engines; medians over rounds, ratios within a
    round."""
    length = max(map(len, prompts)) + tokens
    found = []
    for rows in at_once:
        engines = engines_of(rows=rows, length=length, block_size=BLOCK)
        model = next(iter(engines.values())).model
        shared = {"max_new_tokens": tokens, "block_size": BLOCK, "mask_token_id": model.config.mask_token, "seed": 0}
        for kind in kinds:
            params = GenerationParams.of(**KINDS[kind], **shared)
            runs: dict[str, list[Group]] = {name: [] for name in engines}
            for number in range(rounds + 1):
                for name, engine in engines.items():
                    group = run_group(engine, prompts[:rows], params)
                    if number:  # the first round warms up
                        runs[name].append(group)
            rate = {name: [group.all_tokens / group.all_seconds for group in own] for name, own in runs.items()}
            (first, before), (second, after) = rate.items()
            found.append(
                {
                    "decoding": kind,
                    "at once": rows,
                    f"{first}, tokens/s": statistics.median(before),
                    f"{second}, tokens/s": statistics.median(after),
                    "ratio": statistics.median(b / a for a, b in zip(before, after, strict=True)),
                    "same texts": runs[first][0].texts == runs[second][0].texts,
                }
            )
    return found
