"""Makes transformers' Auto classes tell a two-tower checkpoint from a plain `nemotron_h` one.

Both have `model_type: nemotron_h`; only `architectures` differs. transformers' registry takes several classes for
one configuration and picks by `architectures`, first one by default: ours goes second, so plain checkpoints load as
before. Without this AutoModel would build transformers' own class and leave every weight random.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_REGISTRY = "transformers.models.auto.modeling_auto"


def register() -> None:
    """Registers now if transformers' registry is loaded, else when it is: importing twotower stays light."""
    if _REGISTRY in sys.modules:
        _extend_registry(sys.modules[_REGISTRY])
    else:
        sys.meta_path.insert(0, _AfterImport())


def _extend_registry(registry: ModuleType) -> None:
    try:
        from transformers import NemotronHConfig
    except ImportError:  # a transformers without nemotron_h: nothing to tell apart
        return
    for auto in (registry.AutoModelForCausalLM, registry.AutoModel):
        own = auto._model_mapping[NemotronHConfig]
        if not isinstance(own, tuple):
            auto.register(NemotronHConfig, (own, _released_class()), exist_ok=True)


def _released_class() -> type:
    """Our class under the name the released config gives it."""
    from twotower.config import ARCHITECTURE
    from twotower.model.two_tower import TwoTowerForCausalLM

    return type(ARCHITECTURE, (TwoTowerForCausalLM,), {"__module__": TwoTowerForCausalLM.__module__})


class _AfterImport(importlib.abc.MetaPathFinder):
    """Runs `_extend_registry` right after transformers' registry module has been executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _extend_registry(module)

            loader.exec_module = exec_module
        return spec
