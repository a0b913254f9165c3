"""Runs groups of requests in an engine, and compares two engines in turns.

Two engines differ in the placement of the towers (one device or two), or in async scheduling (whether the denoiser's
next pass is launched before or after the results of the last pass). The copy of the model on two devices has the same
weights and makes the same passes.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from common.models import BLOCK, DECODING
from common.timing import synchronize
from twotower import LLM, Request, TwoTowerForCausalLM
from twotower.cache.replica import DeviceTransfer
from twotower.decoding.params import GenerationParams

KINDS = DECODING | {"diffusion, 4 passes a block": {"mode": "diffusion", "policy": "top-k", "policy_value": BLOCK // 4}}


@dataclass
class Group:
    """Figures of some requests at once. tokens, seconds: of the period in which all rows write."""

    tokens: int = 0
    seconds: float = 0.0
    all_tokens: int = 0
    all_seconds: float = 0.0
    latency: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    texts: list[tuple[int, ...]] = field(default_factory=list)
    denoiser_passes: int = 0
    context_passes: int = 0

    @property
    def rate(self) -> float | None:
        """Tokens a second while all rows write; None if rows end before all have begun."""
        return self.tokens / self.seconds if self.tokens else None


def run_group(llm: LLM, prompts: Sequence[list[int]], params: GenerationParams) -> Group:
    """Runs all requests of a group at once, to their ends."""
    device = llm.model.device
    synchronize(device)
    started = time.perf_counter()
    numbers = [llm.add_request(Request(prompt, params)) for prompt in prompts]
    first: dict[int, float] = {}
    ended: dict[int, Any] = {}
    out, opened = Group(), 0.0
    while len(ended) < len(numbers):
        events = llm.step()
        now = time.perf_counter()  # events hold tokens on the host, so their passes are finished
        if opened and not ended:
            out.tokens += sum(len(event.tokens) for event in events)
            out.seconds = now - opened
        for event in events:
            if event.tokens:
                first.setdefault(event.row, now - started)
            if event.result is not None:
                ended[event.row] = event.result
                out.latency.append(now - started)
        if not opened and len(first) == len(numbers):
            opened = now
    out.all_seconds = time.perf_counter() - started
    results = [ended[number] for number in numbers]
    out.all_tokens = sum(len(result.tokens) for result in results)
    out.first = [first[number] for number in numbers]
    out.texts = [tuple(result.tokens) for result in results]
    out.denoiser_passes = sum(result.denoiser_passes for result in results)
    out.context_passes = sum(result.context_passes for result in results)
    return out


def join(groups: Sequence[Group]) -> Group:
    """Concatenates groups."""
    out = Group()
    for group in groups:
        for name in vars(out):
            setattr(out, name, getattr(out, name) + getattr(group, name))
    return out


# --- two engines ------------------------------------------------------------------------------------------------------


def spread(model: TwoTowerForCausalLM, device: torch.device) -> TwoTowerForCausalLM:
    """The model with a copy of its denoiser on another device; the context tower is shared."""
    with torch.device("meta"):
        other = TwoTowerForCausalLM(model.config)
    other.context, other.tokenizer = model.context, model.tokenizer
    other.denoiser, other.time = moved(model.denoiser, device), moved(model.time, device)
    if device == model.device:  # one device only: still uses the transfers of two devices
        other.transfer = DeviceTransfer()
    return other.eval()


def moved(module: nn.Module | None, device: torch.device) -> Any:
    """A copy on another device, with new tensors."""
    assert module is not None
    there: dict[int, Any] = {id(b): b.to(device, copy=True) for b in module.buffers()}
    for own in module.parameters():
        there[id(own)] = nn.Parameter(own.detach().to(device, copy=True), requires_grad=False)
    return copy.deepcopy(module, there)


def compare_devices(model: TwoTowerForCausalLM, device: torch.device, **asked: Any) -> list[dict[str, Any]]:
    """Compares an engine on one device with an engine whose denoiser is on `device`."""
    models = {"one device": model, "two devices": spread(model, device)}
    return in_turns(lambda **sizes: {name: LLM(own, **sizes) for name, own in models.items()}, **asked)


def compare_async_scheduling(model: TwoTowerForCausalLM, **asked: Any) -> list[dict[str, Any]]:
    """Compares an engine without and with async scheduling."""

    def engines(**sizes: int) -> dict[str, LLM]:
        both = {"sync": LLM(model, **sizes), "async": LLM(model, **sizes)}
        for name, engine in both.items():
            engine.core.async_scheduling = name == "async"
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
    """Tokens per second of the first prompts at each number at once, in two engines.

    Medians over rounds, and medians of ratios within a round.
    """
    length = max(map(len, prompts)) + tokens
    found = []
    for rows in at_once:
        engines = engines_of(rows=rows, length=length, block_size=BLOCK)
        model = next(iter(engines.values())).model
        shared = {"max_new_tokens": tokens, "mask_token_id": model.config.mask_token, "seed": 0}
        for kind in kinds:
            params = GenerationParams.of(**{"block_size": BLOCK} | KINDS[kind] | shared)
            runs: dict[str, list[Group]] = {name: [] for name in engines}
            for number in range(rounds + 1):
                for name, engine in engines.items():
                    group = run_group(engine, prompts[:rows], params)
                    if number:  # the first round is a warm-up
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
