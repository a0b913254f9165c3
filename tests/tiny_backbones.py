"""Tiny models of every family, made on the fly from transformers' classes with random weights, and their oracle.

`SHAPES` has the options of each family that change the computation. `in_float64` runs transformers' code in float64:
its norms, routers and rotary embeddings otherwise compute in fp32 whatever the dtype of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_two_tower
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from twotower import TwoTowerForCausalLM
from twotower.config import MODEL_TYPE, GenericTwoTowerConfig, TwoTowerConfig
from twotower.denoiser_fields import DenoiserConfig, DraftHeadConfig

VOCAB = 160
BASE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.3,
}  # fmt: skip
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8, "mamba_d_head": 12, "mamba_n_groups": 2, "mamba_d_state": 10, "mamba_chunk_size": 16,
}  # fmt: skip
MAMBA_ALONE: dict[str, Any] = {"num_heads": 8, "head_dim": 12, "n_groups": 2, "state_size": 10, "chunk_size": 16}
# The norm of a head's output multiplies rounding errors where a query is orthogonal to all keys; the eps limits this.
DELTA_NET: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "head_dim": 16, "rms_norm_eps": 1e-4,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 12, "linear_value_head_dim": 10,
}  # fmt: skip
NEMOTRON_H: dict[str, Any] = {
    "head_dim": 16, "mamba_num_heads": 8, "mamba_head_dim": 12, "n_groups": 2, "ssm_state_size": 10, "chunk_size": 16,
    "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "routed_scaling_factor": 1.5,
    "moe_shared_expert_intermediate_size": 28, "time_step_limit": [1e-3, float("inf")],
}  # fmt: skip
FACTORS = {
    "embedding_multiplier": 2.0, "logits_scaling": 0.5, "residual_multiplier": 0.4, "attention_multiplier": 0.2,
}  # fmt: skip
# model_type → what differs from `BASE`. Names with a colon are variants of a family.
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16, "tie_word_embeddings": True},
    "llama:biases": {
        "attention_bias": True, "mlp_bias": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "llama:llama3": {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}},
    "llama:yarn": {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}},
    "mistral": {"head_dim": 16, "sliding_window": 24},
    "ministral": {
        "head_dim": 16, "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "qwen2": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "smollm3": {"num_hidden_layers": 4, "tie_word_embeddings": True},
    "smollm3:windows": {
        "no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 20, "attention_bias": True,
        "mlp_bias": True, "tie_word_embeddings": False},
    "phi3": {"partial_rotary_factor": 0.5, "num_attention_heads": 3, "num_key_value_heads": 1},
    "phi3:window": {"sliding_window": 24, "original_max_position_embeddings": 512},
    "phi3:longrope": {"partial_rotary_factor": 0.5, "original_max_position_embeddings": 64, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
        "short_factor": [1.0, 1.3, 1.1], "long_factor": [1.0, 2.5, 9.0]}},
    "gemma": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma:options": {
        "head_dim": 8, "attention_bias": True, "hidden_act": "silu",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "gemma2": {
        "head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 8.0},
    "gemma2:options": {
        "head_dim": 8, "attention_bias": True, "hidden_activation": "gelu", "attn_logit_softcapping": None,
        "final_logit_softcapping": None, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "sliding_window": 30, "tie_word_embeddings": False},
    "gemma3_text": {
        "head_dim": 16, "num_hidden_layers": 4, "sliding_window": 24, "query_pre_attn_scalar": 24,
        "sliding_window_pattern": 3},
    "gemma3_text:options": {
        "head_dim": 16, "final_logit_softcapping": 8.0, "attn_logit_softcapping": 3.0, "attention_bias": True,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 20,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e3}}},
    "olmo2": {},
    "olmo2:bias": {"attention_bias": True, "num_key_value_heads": None, "tie_word_embeddings": True},
    "olmo3": {"num_hidden_layers": 4, "sliding_window": 24},
    "olmo3:yarn": {
        "num_hidden_layers": 4, "sliding_window": 20, "attention_bias": True, "rope_parameters": {
            "full_attention": {
                "rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 128,
                "attention_factor": 1.2, "beta_fast": 32.0, "beta_slow": 1.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e5}}},
    "granite": {
        "embedding_multiplier": 12.0, "logits_scaling": 4.0, "residual_multiplier": 0.22,
        "attention_multiplier": 0.125, "tie_word_embeddings": True},
    "granite:biases": {
        "attention_bias": True, "mlp_bias": True, "head_dim": 16, "residual_multiplier": 0.3,
        "attention_multiplier": 0.4},
    "glm4": {"head_dim": 16},
    "glm4:options": {"head_dim": 16, "partial_rotary_factor": 0.25, "attention_bias": False, "hidden_act": "gelu"},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 24, "sliding_window": None},
    "qwen3_moe": {"head_dim": 16, "num_experts": 6, "moe_intermediate_size": 24, "num_experts_per_tok": 3},
    "qwen3_moe:mixed": {
        "num_experts": 5, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "norm_topk_prob": True,
        "attention_bias": True, "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1],
        "use_sliding_window": True, "sliding_window": 20, "tie_word_embeddings": True},
    "qwen2_moe": {
        "num_experts": 6, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 32, "num_experts_per_tok": 3},
    "qwen2_moe:mixed": {
        "num_experts": 5, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 32, "num_experts_per_tok": 2,
        "norm_topk_prob": True, "mlp_only_layers": [2], "qkv_bias": False, "use_sliding_window": True,
        "sliding_window": 20, "max_window_layers": 1},
    "olmoe": {"num_experts": 6, "intermediate_size": 24, "num_experts_per_tok": 3},
    "olmoe:clipped": {
        "num_experts": 5, "intermediate_size": 24, "num_experts_per_tok": 2, "norm_topk_prob": True, "clip_qkv": 0.8,
        "attention_bias": True},
    "granitemoehybrid": {
        **MAMBA, **FACTORS, "num_hidden_layers": 4, "num_local_experts": 5, "num_experts_per_tok": 2,
        "intermediate_size": 24, "shared_intermediate_size": 40, "tie_word_embeddings": True,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"]},
    "granitemoehybrid:rope": {
        **MAMBA, "mamba_n_groups": 1, "mamba_conv_bias": False, "mamba_proj_bias": True, "num_local_experts": 4,
        "num_experts_per_tok": 4, "intermediate_size": 16, "shared_intermediate_size": 24, "attention_bias": True,
        "position_embedding_type": "rope", "time_step_limit": [0.02, 0.3],
        "layer_types": ["full_attention", "linear_attention", "full_attention"]},
    "granitemoehybrid:dense": {
        **MAMBA, **FACTORS, "num_local_experts": 0, "shared_intermediate_size": 40, "position_embedding_type": "rope",
        "layer_types": ["full_attention"] * 3},
    "nemotron_h": {**NEMOTRON_H, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    "nemotron_h:latent": {
        **NEMOTRON_H, "moe_latent_size": 24, "mlp_bias": True, "norm_topk_prob": False,
        "layers_block_type": ["moe", "linear_attention", "moe", "full_attention"]},
    "bamba": {**MAMBA, "num_hidden_layers": 4, "attn_layer_indices": [1]},
    "bamba:biases": {
        **MAMBA, "attn_layer_indices": [0, 2], "mamba_conv_bias": False, "mamba_proj_bias": True, "mlp_bias": True,
        "attention_bias": True, "tie_word_embeddings": True, "mamba_n_groups": 4, "time_step_limit": [0.02, 0.3]},
    "falcon_h1": {
        **MAMBA, "mamba_d_ssm": 96, "embedding_multiplier": 3.0, "lm_head_multiplier": 0.3, "key_multiplier": 0.7,
        "attention_in_multiplier": 1.3, "attention_out_multiplier": 0.6, "ssm_in_multiplier": 1.4,
        "ssm_out_multiplier": 0.8, "mlp_multipliers": [0.7, 0.9], "ssm_multipliers": [0.9, 1.2, 0.7, 1.1, 0.6]},
    "falcon_h1:norm": {
        **MAMBA, "mamba_d_ssm": None, "mamba_rms_norm": True, "mamba_norm_before_gate": False,
        "mamba_conv_bias": False, "attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True,
        "tie_word_embeddings": True, "time_step_limit": [0.02, 0.3],
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "falcon_h1:norm_first": {
        **MAMBA, "mamba_d_ssm": 96, "mamba_rms_norm": True, "mamba_n_groups": 1, "projectors_bias": True,
        "head_dim": 16, "ssm_multipliers": [0.3, 0.4, 0.5, 0.6, 0.7]},
    "qwen3_next": {
        **DELTA_NET, "num_experts": 5, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 32,
        "num_experts_per_tok": 2, "mlp_only_layers": [1]},
    "qwen3_next:options": {
        **DELTA_NET, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24,
        "num_experts_per_tok": 3, "norm_topk_prob": False, "decoder_sparse_step": 2, "attention_bias": True,
        "linear_num_key_heads": 4, "linear_conv_kernel_dim": 3, "tie_word_embeddings": True,
        "layer_types": ["full_attention", "linear_attention", "linear_attention"]},
    "qwen3_5_text": {**DELTA_NET},
    "qwen3_5_moe_text": {
        **DELTA_NET, "num_experts": 5, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 32,
        "num_experts_per_tok": 2, "attention_bias": True, "linear_num_key_heads": 1, "tie_word_embeddings": True},
    "mamba2": {**MAMBA_ALONE, "num_hidden_layers": 4},
    "mamba2:biases": {
        **MAMBA_ALONE, "use_bias": True, "use_conv_bias": False, "n_groups": 1, "residual_in_fp32": False,
        "tie_word_embeddings": True, "time_step_limit": [0.02, 0.3]},
}  # fmt: skip


# Shapes that together have every kind of layer, cache and order of norms: the short form of tests of a kind, not of an
# option. Every shape is compared with transformers in the short form of `test_families.py`.
CORE = (
    "llama", "ministral", "phi3:longrope", "gemma3_text", "olmo2", "granitemoehybrid", "mamba2", "falcon_h1",
    "qwen3_next",
)  # fmt: skip
FAMILY_NAMES = tuple(name for name in SHAPES if ":" not in name)


def slow_but(fast: Collection[str], names: Iterable[str] = tuple(SHAPES)) -> list[Any]:
    """Names for `parametrize`; all but the fast ones are slow."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


def hf_config(name: str, options: Mapping[str, Any] | None = None) -> Any:
    """transformers' configuration of a tiny model. options: in place of `SHAPES[name]`."""
    values = BASE | (SHAPES[name] if options is None else options)
    return CONFIG_MAPPING[name.partition(":")[0]](**deepcopy(values))  # transformers changes nested dictionaries


def hf_model(name: str, seed: int = 0, options: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """A tiny model in fp32, with weights that give peaked distributions and norms away from 1."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        hf_config(name, options), attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        for part, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if part.endswith("norm.weight") or part.endswith(("_norm.weight", "layernorm.weight")):
                tensor.add_(torch.randn_like(tensor) * 0.2)
            elif part.endswith(".dt_bias"):
                tensor.copy_(torch.randn_like(tensor) - 2)  # steps near 0.1: the state depends on tens of tokens
            elif part.endswith(".A_log"):
                tensor.copy_(torch.rand_like(tensor) * 2)
            elif part.endswith(".D"):
                tensor.add_(torch.randn_like(tensor) * 0.3)
            elif part.endswith("bias") and tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * 0.1)
        rope = getattr(model.config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":  # keeps its long frequencies in fp32, also in `in_float64`
            model(torch.ones(1, rope["original_max_position_embeddings"] + 1, dtype=torch.long))
    return model.eval()


def hub_spelling(config: Mapping[str, Any], type_key: str = "rope_type") -> dict[str, Any]:
    """config.json in the spelling of files before transformers 5, which most files on the hub have.

    type_key: the key of the type of RoPE scaling, `rope_type` or the still older `type`.
    """
    out = dict(config) | {"torch_dtype": config["dtype"]}
    del out["dtype"]
    if "rope_parameters" not in out:
        return out
    out["rope_scaling"], rope = None, out.pop("rope_parameters")
    if "full_attention" in rope:  # layers with a window have a frequency of their own, and no scaling
        out["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            out[key] = rope[key]
    if rope.get("rope_type", "default") != "default":
        scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
        out["rope_scaling"] = {type_key if key == "rope_type" else key: value for key, value in scaling.items()}
    return out


def save(name: str, directory: Path, **options: Any) -> PreTrainedModel:
    """Saves a tiny model as transformers does; returns it."""
    model = hf_model(name)
    model.save_pretrained(directory, **options)
    return model


def two_tower(
    name: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    rank: int | None = None,
    denoiser: DenoiserConfig | None = None,
    draft_rank: int | None = None,
    **overrides: object,
) -> TwoTowerForCausalLM:
    """A tiny two-tower model with random weights in both towers, without a checkpoint.

    rank: of adapters gated to masks, which take the place of the denoiser tower; None: no such adapters. draft_rank: of
    their draft head; None: none. denoiser: what the denoiser is instead. overrides: keys of the backbone's config.json.
    """
    backbone = hf_config(name).to_dict() | overrides
    choices = (
        (DenoiserConfig() if rank is None else DenoiserConfig.with_adapters(rank)) if denoiser is None else denoiser
    )
    if backbone["model_type"] == MODEL_TYPE and choices == DenoiserConfig():
        return random_two_tower(TwoTowerConfig.of(hf_config(name)), seed, dtype)
    if draft_rank is not None:
        choices = replace(choices, draft_head=DraftHeadConfig(draft_rank))
    config = GenericTwoTowerConfig(backbone=backbone, mask_token_id=3, **choices.to_json())
    return random_two_tower(config, seed, dtype)


def save_tokenizer(directory: Path, *special: str, **roles: str) -> PreTrainedTokenizerFast:
    """Writes a tokenizer of bytes: <pad> <s> </s>, then `special`, then the 256 bytes; returns it.

    roles: further arguments of `PreTrainedTokenizerFast`, such as mask_token="…". Ids of bytes beyond `VOCAB` are left
    out, so that every token has an embedding.
    """
    added = ["<pad>", "<s>", "</s>", *special]
    words = [*added, *sorted(pre_tokenizers.ByteLevel.alphabet())][:VOCAB]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(word, special=True) for word in added])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | roles
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.save_pretrained(directory)
    return tokenizer


class _Float64(TorchFunctionMode):
    """Replaces conversions to fp32 by conversions to float64."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        values = dict(kwargs or {})
        if func is Tensor.float:
            return args[0].double()
        if func is Tensor.to or func is Tensor.type:
            args = tuple(torch.float64 if each is torch.float32 else each for each in args)
        if values.get("dtype") is torch.float32:
            values["dtype"] = torch.float64
        return func(*args, **values)


@contextmanager
def in_float64(model: nn.Module) -> Iterator[nn.Module]:
    """The model in float64, in a `with` block in which no operation rounds to fp32."""
    with _Float64(), torch.autocast("cpu", enabled=False):
        yield model.double()


def greedy(model: PreTrainedModel, prompt: list[int], new: int) -> tuple[list[int], list[float]]:
    """Greedy tokens of the model without a cache, and the distance of the two best logits at each."""
    tokens, margins = list(prompt), []
    for _ in range(new):
        best = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].topk(2)
        tokens.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
    return tokens[len(prompt) :], margins
