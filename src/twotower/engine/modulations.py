"""Time conditioning for compiled passes over blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from twotower.decoding.block_rule import noise_level
from twotower.model.conditioning import TimeConditioning
from twotower.model.tower import steady_period


class Modulations:
    """The time conditioning at each number of masked positions of a block, as long as its weights stay the same."""

    def __init__(self) -> None:
        self._period: object | None = None
        self._weights: list[tuple[int, int]] = []
        self._by_size: dict[int, Tensor] = {}

    def of(
        self, conditioning: TimeConditioning | None, sizes: set[int], shift: int, dtype: torch.dtype
    ) -> dict[int, int] | None:
        """Addresses (size − shift, 3·layers, H) for blocks of these sizes; none without conditioning.

        shift: of the denoiser's predictions. None: not supported.
        """
        if conditioning is None:
            return {}
        period = steady_period()
        if period is None or period is not self._period:
            if type(conditioning) is not TimeConditioning or _is_hooked(conditioning):
                return None
            weights = [(weight.data_ptr(), weight._version) for weight in conditioning.parameters()]
            if weights != self._weights:
                self._weights, self._by_size = weights, {}
            self._period = period
        for size in sizes - self._by_size.keys():
            t = noise_level(torch.arange(1, size - shift + 1).to(dtype), torch.tensor(size), shift)
            parts = [part for modulation in conditioning(t) for part in modulation]
            self._by_size[size] = torch.cat(parts, 1).contiguous()
        return {size: self._by_size[size].data_ptr() for size in sizes}


def _is_hooked(module: torch.nn.Module) -> bool:
    parts = module.modules()
    return any(part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__ for part in parts)
