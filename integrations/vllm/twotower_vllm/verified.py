"""What verified decoding in vLLM supports. Everything else is refused by name, before vLLM starts its workers."""

from __future__ import annotations

from dataclasses import dataclass

from twotower.config import MODEL_TYPE, GenericTwoTowerConfig, TwoTowerConfig
from twotower.families import tower_spec
from twotower.specs import COUPLED_KINDS, KIND_NAMES, AttentionSpec, TowerSpec
from twotower_vllm.draft_settings import DraftSettings

ATTENTION = ("CPU_ATTN", "FLASH_ATTN")  # backends whose cache `kv_layouts` reads


@dataclass(frozen=True, kw_only=True)
class VllmSettings:
    """The settings of vLLM that matter to the drafter.

    devices: of all kinds of parallelism together. cache_dtype: of keys and values, "auto" for the model's. attention:
    the backend that the user has chosen, or None.
    """

    devices: int = 1
    prefix_caching: bool = False
    cache_dtype: str = "auto"
    quantization: str | None = None
    lora: bool = False
    attention: str | None = None


def settings_refusal(settings: VllmSettings, config: TwoTowerConfig, own: DraftSettings) -> str | None:
    """The reason why a model cannot be decoded verified with these settings; None if it can."""
    found = [
        (settings.devices > 1, f"it runs on one device, not {settings.devices}; leave out the options of parallelism"),
        (settings.prefix_caching, "it needs --no-enable-prefix-caching"),
        (
            settings.cache_dtype not in ("auto", "float32", "bfloat16", "float16"),
            f"--kv-cache-dtype is {settings.cache_dtype!r}, which the denoiser does not read; use auto",
        ),
        (
            settings.quantization is not None,
            f"--quantization is {settings.quantization!r}, and the denoiser reads states of unquantised weights only; "
            "leave it out",
        ),
        (settings.lora, "--enable-lora changes the context tower without the denoiser; leave it out"),
        (
            settings.attention not in (None, *ATTENTION),
            f"the attention backend is {settings.attention}, and the denoiser reads the caches of "
            f"{' and '.join(ATTENTION)}",
        ),
    ]
    return next((reason for refused, reason in found if refused), None) or model_refusal(config, own)


def model_refusal(config: TwoTowerConfig, own: DraftSettings) -> str | None:
    """The reason why the drafter does not support a checkpoint; None if it does."""
    several = config.denoisers
    if several is not None:
        assert isinstance(config, GenericTwoTowerConfig)
        config = config.with_denoiser(several.of_mode("verified"))
    if own.draft_passes > 1 and config.denoiser.acts_at_masks:
        return f"draft_passes is {own.draft_passes}, and adapters gated to masks draft in one pass; use 1"
    return backbone_refusal(tower_spec(config), _kind(config))


def backbone_refusal(spec: TowerSpec, model_type: str) -> str | None:
    """The reason why the drafter cannot read the caches of a backbone; None if it can."""
    remedy = "serve it without --speculative-config, or with `twotower serve`"
    name, readable = f"the backbone {model_type!r}", {"*", "M"} if model_type == MODEL_TYPE else {"*"}
    for layer in spec.layers:
        if layer.kind in COUPLED_KINDS - readable:
            return f"{name} has layers of {KIND_NAMES[layer.kind]}, whose caches the denoiser does not read; {remedy}"
        if isinstance(layer.mixer, AttentionSpec) and layer.mixer.window is not None:
            return f"{name} has sliding windows, whose keys vLLM frees; {remedy}"
    if spec.original_length is not None:
        return f"{name} has LongRoPE, whose keys change with the length of the text; {remedy}"
    return None


def _kind(config: TwoTowerConfig) -> str:
    return str(config.autoregressive.model_type) if isinstance(config, GenericTwoTowerConfig) else MODEL_TYPE
