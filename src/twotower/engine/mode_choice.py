"""Resolves `mode="auto"` for a batch, from measured costs of passes and from recent drafts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from twotower.decoding.auto_mode import Costs
from twotower.decoding.draft_controller import round_up_to_power_of_two
from twotower.decoding.modes import AUTO
from twotower.decoding.params import GenerationParams
from twotower.engine.towers import Towers, block_rule, denoiser_name, model_for

CONTEXT = 64  # tokens before the passes that are timed
REPEATS = 3


def resolve(model: Towers, params: GenerationParams, rows: int) -> tuple[GenerationParams, str]:
    """Returns parameters with a definite mode, and the reason ("" if the mode was given). rows: rows of the batch."""
    if params.mode != AUTO:
        return params, ""
    model, params = model_for(model, params), replace(params, denoiser=denoiser_name(model, params))
    if block_rule(model).one_pass:
        return replace(params, mode="verified"), "the denoiser is adapters: a pass checks a draft and makes the next"
    if not model.has_denoiser:
        return replace(params, mode="ar"), "only the context tower is loaded"
    if params.deterministic:
        return replace(params, mode="verified"), "deterministic: verified decoding, without measuring any pass"
    chooser = model.workspace.mode_chooser
    key = round_up_to_power_of_two(rows), params.block_size
    if key not in chooser.costs:
        chooser.costs[key] = measure(model, *key)
    choice = chooser.choose(chooser.costs[key], params.block_size)
    return replace(params, mode=choice.mode), choice.reason


@torch.no_grad()
def measure(model: Towers, rows: int, block_size: int) -> Costs:
    """Times each kind of pass: the fastest of REPEATS, after one warm-up."""
    context = min(CONTEXT, model.spec.max_position_embeddings - block_size)
    device = model.device
    state = model.new_state(rows, context + block_size)
    lengths = torch.full((rows,), context, device=device)
    model.prefill(torch.zeros(rows, context, dtype=torch.long, device=device), lengths, state)
    reader = model.reader(state)
    block = torch.full((rows, block_size), model.config.mask_token, device=device)

    def extend(width: int) -> Callable[[], None]:
        def run() -> None:
            model.extend(block[:, :width], state, logits=True)
            state.rollback(lengths)
            state.lower_max_seq_len(context)

        return run

    def draft() -> None:
        view = reader.view()
        away = view.lengths.device
        model.denoise(block.to(away), torch.ones(rows, device=away), view)

    def fastest(run: Callable[[], None]) -> float:
        seconds = []
        for _ in range(REPEATS + 1):
            model.synchronize()
            started = time.perf_counter()
            run()
            model.synchronize()
            seconds.append(time.perf_counter() - started)
        return min(seconds[1:])

    return Costs(step=fastest(extend(1)), draft=fastest(draft), check=fastest(extend(block_size)))
