"""Makes transformers' Auto classes tell a two-tower checkpoint from a plain `nemotron_h` one.

Both have `model_type: nemotron_h`; only `architectures` differs. Without this AutoModel would build transformers'
own class for ours and leave every weight random; plain checkpoints load as before.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_REGISTRY = "transformers.models.auto.modeling_auto"


def register() -> None:
    """Teaches transformers' registry now if it is loaded, else when it is: importing twotower stays light."""
    if _REGISTRY in sys.modules:
        _extend_registry()
    else:
        sys.meta_path.insert(0, _AfterImport())


def _extend_registry() -> None:
    """Any configuration whose `architectures` names the two-tower model gets our class.

    The rule stands where transformers picks a class, not in its table: the table knows configuration classes by
    name, and `trust_remote_code` brings in others of the same name.
    """
    from transformers.models.auto import auto_factory

    pick = auto_factory._get_model_class

    def pick_by_architecture(config: Any, mapping: Any) -> Any:
        from twotower.config import ARCHITECTURE

        if ARCHITECTURE not in (getattr(config, "architectures", None) or ()):
            return pick(config, mapping)
        from twotower.modeling_twotower import TwoTowerForCausalLM

        return TwoTowerForCausalLM

    auto_factory._get_model_class = pick_by_architecture


class _AfterImport(importlib.abc.MetaPathFinder):
    """Runs `_extend_registry` right after transformers' registry module has been executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _extend_registry()

            loader.exec_module = exec_module
        return spec
