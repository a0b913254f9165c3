"""Launches AR steps that are one CUDA graph each, if the option `graph_steps` is on (`runners/captured_step.py`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from twotower import options
from twotower.cache.hybrid_cache import TowerState
from twotower.decoding.output import BlockEvent
from twotower.engine import context_step
from twotower.engine.context_step import PendingContext
from twotower.engine.scheduled import ScheduledTokens
from twotower.engine.sequence import Phase
from twotower.engine.towers import Towers
from twotower.model.towers import TwoTowerModel
from twotower.ops.host_transfer import AsyncHostCopy, to_device_async
from twotower.runners.cuda_graph import CUDAGraphRunner


def launch(
    model: Towers, state: TowerState, scheduled: Sequence[ScheduledTokens]
) -> Callable[[], list[BlockEvent]] | None:
    """Launches one AR step of every entry → the function that records it; None if a pass of the layers is needed."""
    if not options.current().graph_steps or not isinstance(model, TwoTowerModel) or not all(map(_fits, scheduled)):
        return None
    tower, started, device = model.context, time.perf_counter(), state.lengths.device
    runner = next((runner for runner in tower.runners if isinstance(runner, CUDAGraphRunner)), None)
    if runner is None:
        return None
    sequences = [entry.sequence for entry in scheduled]
    rows = [sequence.slot for sequence in sequences]
    state.max_seq_len = max(sequence.read for sequence in sequences)
    tokens, slots = (to_device_async(own, device) for own in ([entry.tokens for entry in scheduled], rows))
    choice = runner.step(tower, state, tokens, slots, rows)
    if choice is None:
        return None
    for sequence in sequences:
        sequence.read += 1
        sequence.output.context_passes += 1
    pending = PendingContext(list(scheduled), AsyncHostCopy(*choice), [], None, started)
    return partial(context_step.collect, pending)


def _fits(entry: ScheduledTokens) -> bool:
    """Whether an entry is a greedy step of one token, without rules of its own."""
    sequence = entry.sequence
    return (
        entry.width == 1
        and not entry.masks
        and entry.sampled
        and not entry.wants_logprobs
        and sequence.phase is Phase.STEP
        and sequence.rule.temperature <= 0
        and sequence.matcher is None
        and not sequence.changes_logits
    )
