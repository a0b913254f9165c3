"""Names: vLLM's class of each family of backbones, and what the tensors of a context tower are called for it."""

from __future__ import annotations

RELEASED = "NemotronHTwoTowerForCausalLM"  # in the config.json of the released layout
NEMOTRON_H = "NemotronHForCausalLM"
PREFIX = "TwoTower"  # of the architectures of checkpoints with model_type two_tower

# The `model_type` of a backbone → vLLM's class. vLLM has no class for `bamba` and `ministral`.
CLASSES: dict[str, str] = {
    "nemotron_h": NEMOTRON_H,
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
    "falcon_h1": "FalconH1ForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
}
WITH_MAMBA = (NEMOTRON_H, "GraniteMoeHybridForCausalLM", "Mamba2ForCausalLM", "FalconH1ForCausalLM")
_ROOTS = {NEMOTRON_H: "backbone.", "Mamba2ForCausalLM": "backbone."}  # of all tensors but the head; else "model."


def served() -> dict[str, str]:
    """The architectures that this package adds to vLLM → vLLM's own class of each."""
    return {RELEASED: NEMOTRON_H, **{PREFIX + name: name for name in CLASSES.values()}}


def class_of(model_type: str) -> str | None:
    """vLLM's class for a backbone; None if it has none."""
    return CLASSES.get(model_type)


def family_refusal(model_type: str) -> str:
    """Why a backbone that vLLM has no class for is not served."""
    return (
        f"the backbone's model_type is {model_type!r}, which vLLM has no class for; supported are "
        f"{', '.join(sorted(CLASSES))}. `twotower serve` runs every model"
    )


def autoregressive_name(name: str, vllm_class: str) -> str | None:
    """What a tensor of a two-tower checkpoint is called in the autoregressive one; None if it is not part of that.

    name: such as `context_tower.layers.0.mixer.q_proj.weight`. The head of the checkpoint's own name, `lm_head`, is the
    denoiser's.
    """
    if name.startswith("context_lm_head."):
        return name.removeprefix("context_")
    if name.startswith("context_tower."):
        return _ROOTS.get(vllm_class, "model.") + name.removeprefix("context_tower.")
    return None
