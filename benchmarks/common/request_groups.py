"""Runs groups of requests in an engine, and counts the tokens and the time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common.timing import synchronize
from twotower import LLM, Request
from twotower.decoding.params import GenerationParams


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
