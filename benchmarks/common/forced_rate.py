"""Diffusion against AR at a forced number of tokens per pass, so that random weights give honest timings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from common.models import BLOCK, random_for_masks, random_tokens
from common.timing import medians, ratio
from twotower import Generation, GenerationParams, TwoTowerForCausalLM, generate
from twotower.decoding.unmasking import POLICIES, Pass, Verdict, ranks, register_policy

RATES = (1.5, 3.0, 5.0)


class Schedule:
    """A policy that commits `rate` positions a pass on average over the blocks of one text.

    After P passes, ⌊rate · P⌋ positions are committed, or the block ends. Idle passes, which asynchronous scheduling
    launches over finished blocks, do not count. The host reads nothing of the device. Call `begin` before each text.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.blocks = 0
        self.passes: torch.Tensor | int = 0  # on the device, after the first pass

    def __call__(self, seen: Pass, value: torch.Tensor) -> Verdict:
        if seen.memory is None:
            self.blocks += 1
        size = seen.masked.shape[1]
        open_ = seen.masked.sum(1, keepdim=True)
        self.passes = self.passes + (open_ > 0)
        due = (value.double() * self.passes).floor() - size * (self.blocks - 1)
        return Verdict(ranks(seen.confidence, seen.masked) < due - (size - open_), seen.confidence, True)


@contextmanager
def forced() -> Iterator[Schedule]:
    """Registers the schedule as policy "forced"."""
    schedule = Schedule()
    register_policy("forced", schedule, value_meaning="tokens a pass", default=1.0, low=1.0)
    try:
        yield schedule
    finally:
        del POLICIES["forced"]


def diffusion_against_ar(
    model: TwoTowerForCausalLM, *, context: int, tokens: int, rounds: int, per_pass: tuple[float, ...] = RATES
) -> list[dict[str, Any]]:
    """Generates one text at each rate and with AR, in turn. Figures: tokens per second after the prefill."""
    prompt = [random_tokens(model, 1, context, seed=3)[0].tolist()]
    shared: dict[str, Any] = {"max_new_tokens": tokens, "mask_token_id": model.config.mask_token, "seed": 0}
    outputs: dict[str, Generation] = {}
    launched: dict[str, int] = {}
    with forced() as schedule, random_for_masks(model, BLOCK) as counted:
        asked = {"ar": GenerationParams.of(mode="ar", **shared)}
        for rate in per_pass:
            asked[f"{rate:g}"] = GenerationParams.of(
                mode="diffusion", block_size=BLOCK, steps_per_block=BLOCK, policy="forced", policy_value=rate, **shared
            )
        seconds: dict[str, list[float]] = {name: [] for name in asked}
        for number in range(rounds + 1):
            for name, params in asked.items():
                schedule.begin()
                counted["passes"] = 0
                (outputs[name],) = generate(model, prompt, params)
                launched[name] = counted["passes"]
                if number:
                    seconds[name].append(outputs[name].decode_seconds)
    speed = {name: tokens / value for name, value in medians(seconds).items()}
    return [
        {
            "asked": rate,
            "tokens per pass": outputs[f"{rate:g}"].tokens_per_pass,
            "passes launched": launched[f"{rate:g}"],
            "tokens/s": speed[f"{rate:g}"],
            "AR tokens/s": speed["ar"],
            "times AR": ratio(seconds["ar"], seconds[f"{rate:g}"]),
        }
        for rate in per_pass
    ]
