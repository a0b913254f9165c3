"""The metadata of a context tower in a GGUF file: sizes and options, below the name of the architecture."""

from __future__ import annotations

from twotower.checkpoint.gguf_export.architectures import Architecture
from twotower.checkpoint.gguf_export.rotation import Value
from twotower.specs import AttentionSpec, MLPSpec, MoESpec, TowerSpec

EMPTY_EXPERT = 1  # width of the experts, all zero, of a layer without experts beside layers with experts

_INTERVAL = 4  # each fourth layer of Qwen3-Next and Qwen 3.5 has attention


def model_keys(spec: TowerSpec, architecture: Architecture) -> tuple[dict[str, Value], list[str]]:
    """The metadata of a tower that the architecture computes, and notes for the user."""
    keys: dict[str, Value] = {
        "block_count": spec.layers[-1].source + 1,
        "embedding_length": spec.hidden_size,
        "vocab_size": spec.vocab_size,
        "attention.layer_norm_rms_epsilon": spec.norm_eps,
    }
    windows, length, notes = _window_keys(spec, architecture)
    keys["context_length"] = length
    keys |= (
        windows
        | _attention_keys(spec, architecture)
        | _mamba_keys(spec)
        | _delta_net_keys(spec)
        | _feed_forward_keys(spec, architecture)
    )
    if architecture.factors:
        keys["embedding_scale"] = spec.embedding_factor
        keys["logit_scale"] = 1.0 / spec.logit_factor
        keys["residual_scale"] = spec.layers[0].residual_factor
    if spec.logit_softcap is not None:
        keys["final_logit_softcapping"] = spec.logit_softcap
    if architecture.name.startswith("nemotron_h"):
        keys["attention.layer_norm_epsilon"] = spec.norm_eps
        keys["rope.scaling.finetuned"] = False
    return keys, notes


def needs_empty_experts(spec: TowerSpec, architecture: Architecture) -> bool:
    """Whether MLPs are written as layers with experts: llama.cpp has one kind of feed-forward in a model."""
    return not architecture.merged and {"-", "E"} <= set(spec.pattern)


def shared_width(spec: TowerSpec) -> int:
    """The width of all shared experts in the file: narrower ones get units that are zero. 0: there are none."""
    shared = [moe.shared.width for moe in _experts(spec) if moe.shared is not None]
    alone = [layer.mixer.width for layer in spec.layers if isinstance(layer.mixer, MLPSpec)]
    return max(*shared, *alone, 0) if shared else 0


def _experts(spec: TowerSpec) -> list[MoESpec]:
    return [layer.mixer for layer in spec.layers if isinstance(layer.mixer, MoESpec)]


def _window_keys(spec: TowerSpec, architecture: Architecture) -> tuple[dict[str, Value], int, list[str]]:
    """The metadata of windows, the longest text, and notes for the user."""
    length = spec.max_position_embeddings
    if not architecture.windows:
        if not spec.windows or spec.windows[0] >= length:
            return {}, length, []
        window = spec.windows[0]
        note = (
            f"llama.cpp's architecture {architecture.name!r} has no sliding windows; its context is limited to the "
            f"window, {window} tokens, up to which the texts are the same"
        )
        return {}, window, [note]
    if not spec.windows:  # the architecture may have a window by default
        return ({"attention.sliding_window": length} if architecture.caps else {}), length, []
    pattern = [spec.window_of(i) is not None for i, layer in enumerate(spec.layers) if layer.kind == "*"]
    assumed = [(i + 1) % architecture.windows != 0 for i in range(len(pattern))]
    keys: dict[str, Value] = {"attention.sliding_window": spec.windows[0]}
    if pattern != assumed:
        keys["attention.sliding_window_pattern"] = pattern
    return keys, length, []


def _attention_keys(spec: TowerSpec, architecture: Architecture) -> dict[str, Value]:
    attention = spec.attention
    if attention is None:
        return {"attention.head_count": 0}
    counts = [0] * (spec.layers[-1].source + 1)
    for layer in spec.layers:
        for part in layer.parts:
            if isinstance(part, AttentionSpec):
                counts[layer.source] = part.num_kv_heads
    keys: dict[str, Value] = {
        "attention.head_count": attention.num_heads,
        "attention.head_count_kv": counts if 0 in counts and not architecture.delta_net else attention.num_kv_heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
    }
    if architecture.factors and attention.scale is not None:
        keys["attention.scale"] = attention.scale
    if attention.softcap is not None:
        keys["attn_logit_softcapping"] = attention.softcap
    return keys


def _mamba_keys(spec: TowerSpec) -> dict[str, Value]:
    mamba = spec.mamba
    if mamba is None:
        return {}
    return {
        "ssm.conv_kernel": mamba.conv_kernel,
        "ssm.state_size": mamba.state_size,
        "ssm.group_count": mamba.num_groups,
        "ssm.inner_size": mamba.inner,
        "ssm.time_step_rank": mamba.num_heads,
    }


def _delta_net_keys(spec: TowerSpec) -> dict[str, Value]:
    mixer = spec.delta_net
    if mixer is None:
        return {}
    keys: dict[str, Value] = {
        "ssm.conv_kernel": mixer.conv_kernel,
        "ssm.state_size": mixer.state_size,
        "ssm.group_count": mixer.num_groups,
        "ssm.inner_size": mixer.inner,
        "ssm.time_step_rank": mixer.num_heads,
        "full_attention_interval": _INTERVAL,
    }
    recurrent = [layer.kind == "D" for layer in spec.layers if layer.kind in "D*"]
    if recurrent != [(i + 1) % _INTERVAL != 0 for i in range(len(recurrent))]:
        keys["attention.recurrent_layers"] = recurrent
    return keys


def _feed_forward_keys(spec: TowerSpec, architecture: Architecture) -> dict[str, Value]:
    blocks = spec.layers[-1].source + 1
    widths, expert_widths = [0] * blocks, [0] * blocks
    empty = needs_empty_experts(spec, architecture)
    for layer in spec.layers:
        if isinstance(layer.mixer, MoESpec):
            widths[layer.source] = expert_widths[layer.source] = layer.mixer.expert.width
        elif isinstance(layer.mixer, MLPSpec):
            widths[layer.source] = EMPTY_EXPERT if empty else layer.mixer.width
            expert_widths[layer.source] = EMPTY_EXPERT
    differ = empty or len(set(widths)) > 1
    keys: dict[str, Value] = {"feed_forward_length": widths if differ else widths[0]}
    experts = _experts(spec)
    if not experts:
        return keys
    moe = experts[0]
    keys |= {
        "expert_count": moe.experts,
        "expert_used_count": moe.top_k,
        "expert_feed_forward_length": expert_widths if empty else moe.expert.width,
    }
    if moe.shared is not None:
        keys["expert_shared_feed_forward_length"] = shared_width(spec)
    if moe.scores == "sigmoid":
        keys |= {
            "expert_shared_count": 1,
            "expert_weights_norm": moe.normalise,
            "expert_weights_scale": moe.factor,
            "expert_group_count": 1,
        }
        if moe.top_groups < moe.num_groups:
            keys |= {"expert_group_count": moe.num_groups, "expert_group_used_count": moe.top_groups}
    if moe.latent is not None:
        keys["moe_latent_size"] = moe.latent
    return keys
