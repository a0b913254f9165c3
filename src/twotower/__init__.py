"""twotower: run, train, measure and serve two-tower diffusion language models.

    from twotower import TwoTowerForCausalLM
    model = TwoTowerForCausalLM.from_pretrained("path/to/checkpoint")

Importing the package is light: torch and transformers are loaded when a name below is first used. The import has one
effect: transformers' Auto classes recognise two-tower checkpoints (`twotower.auto`).
"""

from __future__ import annotations

from twotower.auto import register
from twotower.version import VERSION as __version__

TYPE_CHECKING = False  # `typing` would double the time before the command can handle Ctrl-C

_HOMES = {
    "GenericTwoTowerConfig": "twotower.config",
    "TwoTowerConfig": "twotower.config",
    "TwoTowerForCausalLM": "twotower.modeling_twotower",
    "Generation": "twotower.engine.generation",
    "GenerationParams": "twotower.engine.generation",
    "BlockEvent": "twotower.engine.generation",
    "Constraint": "twotower.decoding.structured",
    "generate": "twotower.engine.generation",
    "AsyncLLM": "twotower.engine",
    "LLM": "twotower.engine",
    "Request": "twotower.engine",
    "register_policy": "twotower.decoding.unmasking",
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
    "GenericTwoTowerConfig",
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
    from twotower.config import GenericTwoTowerConfig, TwoTowerConfig
    from twotower.decoding.output import BlockEvent, Generation
    from twotower.decoding.params import GenerationParams
    from twotower.decoding.structured import Constraint
    from twotower.decoding.unmasking import register_policy
    from twotower.engine import LLM, AsyncLLM, Request
    from twotower.engine.generation import generate
    from twotower.errors import TwoTowerError
    from twotower.modeling_twotower import TwoTowerForCausalLM


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'twotower' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


register()
