"""What well-known families have that this package does not implement: the end of the error for their config.json."""

from __future__ import annotations

_REASONS: dict[str, tuple[str, ...]] = {
    "LayerNorm with learned positions": ("biogpt", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "openai-gpt", "opt"),
    "LayerNorm and ALiBi": ("bloom", "mpt"),
    "LayerNorm and a parallel residual": ("codegen", "cohere", "cohere2", "falcon", "gpt_neox", "gptj", "phi"),
    "LayerNorm": ("dbrx", "nemotron", "olmo", "persimmon", "phimoe", "stablelm", "starcoder2"),
    "latent attention (MLA)": (
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "glm4_moe_lite",
        "kimi_linear",
        "longcat_flash",
        "minicpm3",
        "youtu",
    ),
    "attention sinks": ("gpt_oss", "mimo_v2_flash"),
    "short convolutions": ("lfm2", "lfm2_moe"),
    "Mamba-1 layers": ("falcon_mamba", "jamba", "mamba"),
    "blocks that several layers share": ("zamba", "zamba2"),
    "DeltaNet layers with negative eigenvalues": ("olmo_hybrid",),
    "linear recurrent units": ("recurrent_gemma",),
    "RWKV layers": ("rwkv",),
    "xLSTM layers": ("xlstm",),
    "lightning attention": ("minimax",),
    "differential attention": ("diffllama",),
    "experts of attention heads": ("jetmoe",),
    "chunked attention with a temperature": ("llama4", "llama4_text"),
    "embeddings of every layer and parallel streams": ("gemma3n", "gemma3n_text"),
    "the activation xIELU": ("apertus",),
    "ternary weights": ("bitnet",),
    "an encoder": ("bart", "marian", "mbart", "pegasus", "t5", "whisper"),
    "attention in both directions": ("bert", "electra", "roberta", "xlm-roberta"),
}
WHAT: dict[str, str] = {name: what for what, names in _REASONS.items() for name in names}


def reason(model_type: str) -> str:
    """Why a model type is not supported, as a clause."""
    what = WHAT.get(model_type)
    return "no family describes its layers" if what is None else f"it has {what}, which this package lacks"
