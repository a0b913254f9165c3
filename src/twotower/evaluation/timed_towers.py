"""A model whose passes are timed, tower by tower."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, ParamSpec, TypeVar

from twotower.modeling_twotower import TwoTowerForCausalLM

TowerName = Literal["context", "denoiser"]
Given = ParamSpec("Given")
Result = TypeVar("Result")


@dataclass
class PassTimes:
    """The number of passes of each tower, and the seconds that they took."""

    seconds: dict[TowerName, float] = field(default_factory=lambda: {"context": 0.0, "denoiser": 0.0})
    passes: dict[TowerName, int] = field(default_factory=lambda: {"context": 0, "denoiser": 0})

    def means(self) -> dict[TowerName, float]:
        """Seconds of each tower's mean pass, 0 for a tower without passes."""
        return {tower: seconds / max(self.passes[tower], 1) for tower, seconds in self.seconds.items()}


class TimedTowers:
    """The towers of `model` for an engine, with every pass added to `times`.

    Only `extend` and `denoise` differ from the model's. Both wait for the device before they start the clock and
    before they stop it: without waiting, only the launch of a pass on an accelerator would be timed.
    """

    def __init__(self, model: TwoTowerForCausalLM) -> None:
        self._model = model
        self.times = PassTimes()

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)

    @property
    def extend(self) -> Callable[..., object]:
        """The model's `extend`, timed as a pass of the context tower."""
        return self._timed("context", self._model.extend)

    @property
    def denoise(self) -> Callable[..., object]:
        """The model's `denoise`, timed as a pass of the denoiser."""
        return self._timed("denoiser", self._model.denoise)

    def _timed(self, tower: TowerName, verb: Callable[Given, Result]) -> Callable[Given, Result]:
        def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
            self._model.synchronize()
            started = time.perf_counter()
            out = verb(*args, **kwargs)
            self._model.synchronize()
            self.times.seconds[tower] += time.perf_counter() - started
            self.times.passes[tower] += 1
            return out

        return call
