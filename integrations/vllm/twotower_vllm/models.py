"""The context tower as vLLM's own class of the backbone. The names of the tensors are the only difference.

The classes are made when they are read, by the names of `architectures.served`, because vLLM imports a class of a
backbone only if it is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from vllm.model_executor.models.registry import ModelRegistry
from vllm.platforms import current_platform

from twotower_vllm.architectures import NEMOTRON_H, WITH_MAMBA, autoregressive_name, served

_MADE: dict[str, type[torch.nn.Module]] = {}


def __getattr__(name: str) -> type[torch.nn.Module]:
    vllm_class = served().get(name)
    if vllm_class is None:
        raise AttributeError(name)
    if name not in _MADE:
        if current_platform.is_cpu() and vllm_class in WITH_MAMBA:
            from twotower_vllm import cpu_experts, cpu_rollback

            cpu_rollback.install()
            if vllm_class == NEMOTRON_H:
                cpu_experts.install()
        _MADE[name] = context_tower(name, vllm_class)
    return _MADE[name]


def context_tower(name: str, vllm_class: str) -> type[torch.nn.Module]:
    """A subclass of vLLM's class of a backbone that loads the context tower of a two-tower checkpoint."""
    base = ModelRegistry.models[vllm_class].load_model_cls()

    def load_weights(self: torch.nn.Module, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded: set[str] = base.load_weights(self, context_weights(weights, vllm_class))
        return loaded

    made: type[torch.nn.Module] = type(name, (base,), {"__module__": __name__, "load_weights": load_weights})
    return made


def context_weights(weights: Iterable[tuple[str, Tensor]], vllm_class: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the context tower under their names in the autoregressive checkpoint; others are left out."""
    for name, tensor in weights:
        renamed = autoregressive_name(name, vllm_class)
        if renamed is not None:
            yield renamed, tensor
