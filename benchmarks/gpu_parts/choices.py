"""The options whose best value only a measurement on a GPU can tell: the values to measure beside the default."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gpu_parts.setting import release
from twotower import TwoTowerForCausalLM, options

PASSES: dict[str, tuple[object, ...]] = {"graphs": (False,), "grouped_pairs": (1 << 30,)}
AR_STEPS: dict[str, tuple[object, ...]] = {"graph_steps": (True,)}
TRAINING: dict[str, tuple[object, ...]] = {
    "training_attention": ("grouped", "padded", "stacked", "repeated"), "training_compile": (True,),
}  # fmt: skip


def sides(choices: dict[str, tuple[object, ...]]) -> Iterator[dict[str, Any]]:
    """Each value that is not the default, as keyword arguments of `options.override`."""
    fields = {one.name: one for one in dataclasses.fields(options.Options)}
    for name, values in choices.items():
        yield from ({name: value} for value in values if value != fields[name].default)


def title(side: dict[str, Any]) -> str:
    """A side in words, for the table."""
    return ", ".join(f"{name} {value}" for name, value in side.items())


@contextmanager
def chosen(model: TwoTowerForCausalLM, side: dict[str, Any]) -> Iterator[None]:
    """One side in this block; the model's runners forget their graphs before and after."""
    release(model)
    with options.override(**side):
        yield
    release(model)
