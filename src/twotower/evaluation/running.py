"""`run(requests) → outputs`: the one way in which evaluation generates."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from twotower.engine.request import Request
from twotower.generation import Generation, generate
from twotower.model.two_tower import TwoTowerForCausalLM


def run(
    model: TwoTowerForCausalLM,
    requests: Sequence[Request],
    rows: int = 64,
    progress: Callable[[int], object] | None = None,
) -> list[Generation]:
    """Outputs in the order of the requests, whatever batches they went through: a row of a batch gets what it would get
    alone. rows: of a batch, at most; progress is told how many requests have ended, after each batch."""
    # Equal parameters next to each other, like lengths in one batch.
    order = sorted(range(len(requests)), key=lambda i: (repr(requests[i].params), len(requests[i].prompt)))
    outputs: dict[int, Generation] = {}
    start = 0
    while start < len(order):
        first = requests[order[start]].params
        part = [i for i in order[start : start + rows] if requests[i].params == first]
        outputs |= zip(part, generate(model, [list(requests[i].prompt) for i in part], first), strict=True)
        start += len(part)
        if progress is not None:
            progress(len(outputs))
    return [outputs[i] for i in range(len(requests))]
