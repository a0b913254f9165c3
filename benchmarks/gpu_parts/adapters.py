"""Part 7: rounds of a model with adapters beside plain passes of the same width; at most 1.15 times their time.

Adapters act at all tokens but the first, the most that they can. Tokens are random, as in all passes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common.models import BLOCK, Texts, random_model, random_tokens

from gpu_parts.choices import chosen
from gpu_parts.clock import timed
from gpu_parts.profile import profiled
from gpu_parts.record import Figures, Record
from gpu_parts.setting import Setting, release, single_tower
from twotower import TwoTowerForCausalLM

RANK = 16
WANTED = 1.15
K = 1024
SHAPES = ((1, K, BLOCK), (1, K, 8), (8, K, 8), (64, K, 4), (1, 32 * K, BLOCK))  # rows, tokens before, width
SMALL = ((1, 64, 8), (2, 64, 4))


@torch.no_grad()
def run(setting: Setting, record: Record) -> None:
    model, text = model_with_adapters(setting)
    record.add("the model", note=f"{text}; rank {RANK}")
    shapes = SMALL if setting.small else SHAPES
    seconds = setting.budget(record, 3 * len(shapes) + 4)
    for number, shape in enumerate(shapes):
        compare(setting, record, model, shape, seconds, profiles=number == 0)
    with chosen(model, {"graphs": False}):
        compare(setting, record, model, shapes[0], seconds, ", graphs False")


def model_with_adapters(setting: Setting) -> tuple[TwoTowerForCausalLM, str]:
    """The published shape, or the tiny one: the context tower alone, with random adapters."""
    torch.manual_seed(0)
    config, text = single_tower(setting)
    model = random_model(config, setting.dtype, setting.device, shared=True)
    model.denoiser = model.time = None
    tower = model.context
    with setting.device:
        tower.add_adapters(RANK, config.mask_token)
    tower.to(setting.dtype)
    for name, weight in tower.named_parameters():
        if ".adapter." in name or name.startswith("mask_embedding."):
            weight.normal_(0, 0.02)
    return model, text


def compare(
    setting: Setting,
    record: Record,
    model: TwoTowerForCausalLM,
    shape: tuple[int, int, int],
    seconds: float,
    side: str = "",
    profiles: bool = False,
) -> None:
    """A plain pass and a round of `width` tokens after texts of `length` tokens, both with logits and stored."""
    rows, length, width = shape
    what = f"{rows} × {width} tokens after {length}{side}"
    texts, tokens = Texts.random(model, rows, length + 2 * width), random_tokens(model, rows, width)
    first = torch.ones(rows, dtype=torch.long, device=setting.device)
    found: dict[str, float] = {}
    for name, prefix in (("plain pass", None), ("round", first)):

        def call(prefix: torch.Tensor | None = prefix) -> None:
            model.extend(tokens, texts.state, upcast_logits=False, prefix=prefix)

        def before() -> None:
            texts.set_length(length)

        def figures(call: Callable[[], object] = call) -> Figures:
            return timed(call, setting.device, seconds, before)

        measured = record.measure(f"{what}: {name}", figures, least=seconds)
        if measured is not None:
            found[name] = measured["ms"]
        if profiles:
            before()
            record.measure(f"{what}: profile of {name}", lambda call=call: profiled(call, setting.device))
    if len(found) == 2:
        ratio = found["round"] / found["plain pass"]
        record.add(f"{what}: round ÷ plain pass", ratio=ratio, wanted=WANTED)
    release(model)
