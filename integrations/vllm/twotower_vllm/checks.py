"""Checks of vLLM's settings before it starts its workers, in the process that the user sees."""

from __future__ import annotations

from typing import Protocol

from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from twotower.errors import TwoTowerError
from twotower_vllm.backbone_config import SOURCE, two_tower_config
from twotower_vllm.draft_settings import DRAFTER, DraftSettings
from twotower_vllm.exits import refuse
from twotower_vllm.verified import VllmSettings, settings_refusal

_LOG = init_logger(__name__)


class ClassChecks(Protocol):
    """vLLM's own checks of a model class, which may change its settings."""

    def verify_and_update_config(self, vllm_config: VllmConfig) -> None: ...
    def verify_and_update_model_config(self, model_config: ModelConfig) -> None: ...


class Checks:
    """The checks of an architecture of this package. own: those that vLLM has for its class, or None."""

    def __init__(self, own: ClassChecks | None) -> None:
        self.own = own

    def verify_and_update_model_config(self, model_config: ModelConfig) -> None:
        """vLLM's own checks of the model's settings."""
        if self.own is not None:
            self.own.verify_and_update_model_config(model_config)

    def verify_and_update_config(self, vllm_config: VllmConfig) -> None:
        """vLLM's own checks, then those of the CPU and of verified decoding."""
        if self.own is not None:
            self.own.verify_and_update_config(vllm_config)
        speculative = vllm_config.speculative_config
        if speculative is not None and speculative.method == "custom_class" and speculative.model == DRAFTER:
            _check_verified(vllm_config)
        if current_platform.is_cpu():
            _adapt_to_cpu(vllm_config)


def _adapt_to_cpu(vllm_config: VllmConfig) -> None:
    cache, model = vllm_config.cache_config, vllm_config.model_config
    if cache.enable_prefix_caching and model.is_hybrid:
        _LOG.warning("Prefix caching is off: vLLM's Mamba-2 layers fail with it on a CPU.")
        cache.enable_prefix_caching = False
    if vllm_config.parallel_config.tensor_parallel_size > 1 and "moe" in getattr(model.hf_config, "layer_types", ()):
        refuse("--tensor-parallel-size: on a CPU the experts of Nemotron-H are not divided; use 1, or a GPU")


def _check_verified(vllm_config: VllmConfig) -> None:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    settings = VllmSettings(
        devices=parallel.world_size_across_dp,
        prefix_caching=bool(vllm_config.cache_config.enable_prefix_caching),
        cache_dtype=vllm_config.cache_config.cache_dtype,
        quantization=model.quantization,
        lora=vllm_config.lora_config is not None,
        attention=_attention(vllm_config),
    )
    try:
        own = DraftSettings.of(vllm_config.additional_config)
        reason = settings_refusal(settings, two_tower_config(getattr(model.hf_config, SOURCE)), own)
    except TwoTowerError as error:
        reason = str(error)
    if reason is not None:
        refuse(f"verified decoding: {reason}")


def _attention(vllm_config: VllmConfig) -> str | None:
    """The name of the attention backend that the user has chosen; None: vLLM chooses."""
    backend = vllm_config.attention_config.backend
    return None if backend is None else str(backend.name)
