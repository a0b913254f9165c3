"""`generate_all(requests) → outputs`: the one function with which evaluation generates."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from twotower.decoding.output import Generation
from twotower.engine import LLM, Request
from twotower.modeling_twotower import TwoTowerForCausalLM


def generate_all(
    model: TwoTowerForCausalLM,
    requests: Sequence[Request],
    rows: int = 64,
    progress: Callable[[int], object] | None = None,
) -> list[Generation]:
    """Outputs in the order of the requests, each what it would be alone. rows: at work at once, at most; progress is
    told how many requests have ended."""
    return LLM.fitting(model, requests, rows).generate(requests, progress) if requests else []
