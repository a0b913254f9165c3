"""Part 10: the midsize shape beside its roofline, the naive reference and transformers."""

from __future__ import annotations

import importlib.util

import passes
import torch
from common.models import MIDSIZE, config_of, random_model

from gpu_parts.record import Record
from gpu_parts.setting import Setting


def run(setting: Setting, record: Record) -> None:
    torch.manual_seed(0)
    model = random_model(config_of(None if setting.small else MIDSIZE), setting.dtype, setting.device)
    rates = setting.rates(record)
    repeats, tokens, rounds = (2, 16, 1) if setting.small else (20, 96, 2)
    costs: list[dict[str, float]] = []

    def against_naive() -> dict[str, object]:
        found = passes.costs(model, rates, context=256, repeats=repeats, naive=True)
        costs.extend(one | {"what": f"{name}"} for name, one in found["passes"].items())
        return found["naive"] | {"logits differ by": found["naive logits differ by"]["largest"]}

    record.measure("denoiser pass against the naive reference", against_naive)
    for one in costs:
        figures = {"ms": one["seconds"] * 1e3, "× roofline": one["times roofline"], "AR steps": one["AR steps"]}
        record.add(str(one["what"]), **figures)
    if importlib.util.find_spec("transformers") is None:
        record.add("AR against transformers", skipped="transformers is not installed")
    else:
        record.measure(
            "AR against transformers",
            lambda: passes.against_transformers(model, context=32, tokens=tokens, rounds=rounds),
        )
    given = {"context": 64, "tokens": tokens, "rounds": rounds, "per_pass": (3.0,)}
    record.measure("diffusion against AR", lambda: passes.diffusion_against_ar(model, **given)[0])
