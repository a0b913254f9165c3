"""twotower: run, train, measure and serve two-tower diffusion language models.

    from twotower import TwoTowerForCausalLM
    model = TwoTowerForCausalLM.from_pretrained("path/to/checkpoint")

Importing the package is light: torch and transformers are loaded when a name below is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from twotower.auto import register
from twotower.version import VERSION as __version__

_HOMES = {
    "TwoTowerConfig": "twotower.config",
    "TwoTowerForCausalLM": "twotower.model.two_tower",
    "Generation": "twotower.generation",
    "GenerationParams": "twotower.generation",
    "BlockEvent": "twotower.generation",
    "Constraint": "twotower.generation.constraints",
    "generate": "twotower.generation",
    "AsyncLLM": "twotower.engine",
    "LLM": "twotower.engine",
    "Request": "twotower.engine",
    "register_policy": "twotower.generation.unmasking",
    "TwoTowerError": "twotower.errors",
    "bundled_model": "twotower.assets",
}
__all__ = [
    "LLM",
    "AsyncLLM",
    "BlockEvent",
    "Constraint",
    "Generation",
    "GenerationParams",
    "Request",
    "TwoTowerConfig",
    "TwoTowerError",
    "TwoTowerForCausalLM",
    "__version__",
    "bundled_model",
    "generate",
    "register_policy",
]

if TYPE_CHECKING:
    from twotower.assets import bundled_model
    from twotower.config import TwoTowerConfig
    from twotower.engine import LLM, AsyncLLM, Request
    from twotower.errors import TwoTowerError
    from twotower.generation import BlockEvent, Generation, GenerationParams, generate
    from twotower.generation.constraints import Constraint
    from twotower.generation.unmasking import register_policy
    from twotower.model.two_tower import TwoTowerForCausalLM


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'twotower' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


register()
