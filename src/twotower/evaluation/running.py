"""`generate_all`: all generation of the evaluation goes through this function."""

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
    """Outputs in the order of the requests. An output does not depend on the other requests of a batch.

    rows: the largest number of sequences in a batch; progress: called with the number of requests that have ended.
    """
    return LLM.fitting(model, requests, rows).generate(requests, progress) if requests else []
