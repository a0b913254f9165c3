"""Adds two-tower checkpoints to vLLM's tables."""

from __future__ import annotations

from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.models.registry import ModelRegistry
from vllm.transformers_utils.config import _CONFIG_FORMAT_TO_CONFIG_PARSER

from twotower_vllm.architectures import served
from twotower_vllm.checks import Checks
from twotower_vllm.config_parser import ConfigParser


def add_architectures() -> None:
    """Adds every architecture, with vLLM's own checks of its class. A second call has no effect."""
    _CONFIG_FORMAT_TO_CONFIG_PARSER["hf"] = ConfigParser
    for name, vllm_class in served().items():
        if name not in MODELS_CONFIG_MAP:
            ModelRegistry.register_model(name, f"twotower_vllm.models:{name}")
            MODELS_CONFIG_MAP[name] = Checks(MODELS_CONFIG_MAP.get(vllm_class))
