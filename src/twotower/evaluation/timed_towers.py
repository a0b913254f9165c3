"""Wrapper of a model that times the passes of each tower."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, ParamSpec, TypeVar

from twotower.modeling_twotower import TwoTowerForCausalLM

TowerName = Literal["context", "denoiser"]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass
class PassTimes:
    """Number of passes of each tower, and their total seconds."""

    seconds: dict[TowerName, float] = field(default_factory=lambda: {"context": 0.0, "denoiser": 0.0})
    passes: dict[TowerName, int] = field(default_factory=lambda: {"context": 0, "denoiser": 0})

    def means(self) -> dict[TowerName, float]:
        """Mean seconds of a pass of each tower; 0 for a tower without passes."""
        return {tower: seconds / max(self.passes[tower], 1) for tower, seconds in self.seconds.items()}


class TimedTowers:
    """The towers of `model` for an engine; the time of every pass is added to `times`.

    Only `extend` and `denoise` are wrapped. Both synchronize the device before and after the pass, so that the whole
    pass is timed and not only its launch.
    """

    def __init__(self, model: TwoTowerForCausalLM) -> None:
        self._model = model
        self.times = PassTimes()

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)

    def with_denoiser(self, name: str) -> TimedTowers:
        """The model with one of its denoisers, whose passes count here too."""
        timed = TimedTowers(self._model.with_denoiser(name))
        timed.times = self.times
        return timed

    @property
    def extend(self) -> Callable[..., object]:
        """The model's `extend`, timed as a context pass."""
        return self._timed("context", self._model.extend)

    @property
    def denoise(self) -> Callable[..., object]:
        """The model's `denoise`, timed as a denoising pass."""
        return self._timed("denoiser", self._model.denoise)

    def _timed(self, tower: TowerName, verb: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            self._model.synchronize()
            started = time.perf_counter()
            out = verb(*args, **kwargs)
            self._model.synchronize()
            self.times.seconds[tower] += time.perf_counter() - started
            self.times.passes[tower] += 1
            return out

        return call
