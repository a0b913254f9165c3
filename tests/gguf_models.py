"""Tiny models that are exported as GGUF, with a tokenizer that a GGUF file can have."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny_backbones import MAMBA, MAMBA_ALONE, NEMOTRON_H, SHAPES, VOCAB, hf_model
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

FREE = {"time_step_limit": [0.0, math.inf]}
YARN: dict[str, Any] = {
    "rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 128,
}  # fmt: skip
DELTA: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "head_dim": 16, "rms_norm_eps": 1e-6,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 5e3}
# Name → model_type, and what differs from `BASE` of `tiny_backbones`: together, what llama.cpp computes of a family.
EXPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        name: (name.partition(":")[0], SHAPES[name])
        for name in (
            "llama", "llama:biases", "llama:llama3", "llama:yarn", "mistral", "qwen2", "qwen3", "smollm3", "phi3",
            "phi3:longrope", "gemma", "olmo2", "olmo3", "granite", "granite:biases", "mixtral", "qwen2_moe",
            "granitemoehybrid", "mamba2", "falcon_h1",
        )
    },
    "gemma2": ("gemma2", SHAPES["gemma2"] | {"query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", SHAPES["gemma3_text"] | {"query_pre_attn_scalar": 16}),
    "gemma3, scaled": ("gemma3_text", {
        "head_dim": 16, "query_pre_attn_scalar": 16, "final_logit_softcapping": 8.0, "sliding_window": 20,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"], "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": PLAIN_ROPE}}),
    "olmo3, scaled": ("olmo3", {
        "num_hidden_layers": 5, "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2
        + ["sliding_attention"], "rope_parameters": {
            "full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 5e5}}}),
    "olmoe": ("olmoe", SHAPES["olmoe"] | {"num_key_value_heads": 4}),
    "qwen3_moe": ("qwen3_moe", SHAPES["qwen3_moe"] | {"norm_topk_prob": True}),
    "glm4": ("glm4", {"head_dim": 16, "partial_rotary_factor": 0.5}),
    "granite, experts": ("granitemoehybrid", SHAPES["granitemoehybrid"] | {
        "layer_types": ["full_attention"] * 4, "position_embedding_type": "rope"}),
    "bamba": ("bamba", {**MAMBA, "num_hidden_layers": 4, "attn_layer_indices": [1]}),
    "mamba2, tied": ("mamba2", {**MAMBA_ALONE, "tie_word_embeddings": True}),
    "falcon_h1, norm": ("falcon_h1", {
        **MAMBA, "mamba_d_ssm": None, "mamba_rms_norm": True, "mamba_norm_before_gate": False, "mlp_bias": True,
        "tie_word_embeddings": True, "lm_head_multiplier": 0.5, "embedding_multiplier": 2.0,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "qwen3_next": ("qwen3_next", {
        **DELTA, "num_experts": 5, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 32,
        "num_experts_per_tok": 2, "norm_topk_prob": True}),
    "qwen3_5": ("qwen3_5_text", DELTA | {"num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3
                                         + ["full_attention"]}),
    "qwen3_5, experts": ("qwen3_5_moe_text", {
        **DELTA, "num_experts": 5, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 32,
        "num_experts_per_tok": 2, "linear_num_key_heads": 1, "tie_word_embeddings": True}),
    "nemotron_h": ("nemotron_h", {
        **NEMOTRON_H, **FREE, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]}),
    "nemotron_h, groups": ("nemotron_h", {
        **NEMOTRON_H, **FREE, "n_group": 3, "topk_group": 2,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]}),
    "nemotron_h, dense": ("nemotron_h", {
        **NEMOTRON_H, **FREE, "mlp_bias": True,
        "layers_block_type": ["linear_attention", "mlp", "full_attention"]}),
    "nemotron_h, latent": ("nemotron_h", {
        **NEMOTRON_H, **FREE, "moe_latent_size": 24, "norm_topk_prob": False,
        "layers_block_type": ["moe", "linear_attention", "moe", "full_attention", "mlp"]}),
}  # fmt: skip


def save_exported(name: str, directory: Path) -> None:
    """Writes the autoregressive checkpoint of a name of `EXPORTED`, in fp32."""
    kind, options = EXPORTED[name]
    hf_model(kind, options=options).save_pretrained(directory)
    save_merging_tokenizer(directory)


def save_merging_tokenizer(directory: Path, vocab: int = VOCAB, **backend: Any) -> PreTrainedTokenizerFast:
    """Writes a BPE of bytes with a few merges and <pad> <s> </s> <mask>. backend: parts of the tokenizer to replace."""
    added = ["<pad>", "<s>", "</s>", "<mask>"]
    merges = [("a", "b"), ("c", "ab"), ("e", "r")]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: vocab - 16]
    words = [*added, *letters, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for part, value in backend.items():
        setattr(tokenizer, part, value)
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in added])
    roles = dict(zip(("pad_token", "bos_token", "eos_token", "mask_token"), added, strict=True))
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    made.save_pretrained(directory)
    return made


def sentencepiece_tokenizer(texts: Sequence[str], directory: Path, prefix: bool = True) -> PreTrainedTokenizerFast:
    """Writes a tokenizer as transformers converts one of SentencePiece, trained on texts.

    prefix: whether a space comes before the first word. The merges are all pairs of tokens that make a token, in the
    order of the tokens' scores.
    """
    first = Tokenizer(models.BPE())
    first.pre_tokenizer = pre_tokenizers.Metaspace()
    first.train_from_iterator(texts, BpeTrainer(vocab_size=500, show_progress=False))
    learned = json.loads(first.to_str())["model"]["vocab"]
    special = ["<unk>", "<s>", "</s>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [*special, *sorted(learned, key=learned.get)]
    vocab = {word: i for i, word in enumerate(words)}
    merges = [
        (word[:cut], word[cut:])
        for word in words[len(special) :]
        for cut in range(1, len(word))
        if {word[:cut], word[cut:]} <= vocab.keys()
    ]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = normalizers.Replace(" ", "\u2581")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if prefix else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip,
    ])  # fmt: skip
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special[:4]])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", mask_token="<mask>"
    )
    made.save_pretrained(directory)
    return made
