"""The choices that only a measurement on a GPU can decide: both sides of each, for a model that is already made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from gpu_parts.setting import changed, release
from twotower import TwoTowerForCausalLM
from twotower.ops import registry

Side = Callable[[TwoTowerForCausalLM], AbstractContextManager[None]]


@contextmanager
def experts_by(model: TwoTowerForCausalLM, name: str) -> Iterator[None]:
    """Experts of plain weights by the backend `name`, if it supports the device."""
    before = registry.REGISTRY["experts"]
    release(model)
    registry.REGISTRY["experts"] = tuple(sorted(before, key=lambda backend: backend.name != name))
    registry._select.cache_clear()
    try:
        yield
    finally:
        registry.REGISTRY["experts"] = before
        registry._select.cache_clear()
        release(model)


def supported(op: str, model: TwoTowerForCausalLM) -> list[str]:
    """The backends of an operation that this device and dtype allow, the reference left out."""
    backends = registry.REGISTRY[op][:-1]
    return [one.name for one in backends if one.unsupported_reason(model.device, model.dtype) is None]


def sides(model: TwoTowerForCausalLM) -> dict[str, Side]:
    """The sides of all choices for passes of a model, by name."""
    found: dict[str, Side] = {"without graphs": lambda model: changed(model, graphs=False)}
    for name in supported("experts", model):
        found[f"experts by {name}"] = lambda model, name=name: experts_by(model, name)
    return found
