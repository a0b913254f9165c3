"""Models of the decoding goldens: weights from numpy's PCG64, equal on all processors and torch versions.

Each weight is drawn in float64 from a seed that depends on its name, and rounded to fp32, so that both dtypes have the
same values. No weights are stored.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from conftest import EVERY_KIND, GOLDEN, SHAPE
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from twotower import GenericTwoTowerConfig, TwoTowerConfig, TwoTowerForCausalLM
from twotower.denoiser_fields import DenoiserConfig, DraftHeadConfig

SPECIAL = ("<pad>", "<s>", "</s>", "<mask>")
# Byte-level: Ġ is a space, Ċ a newline. ü, 世 and 👍 are single bytes, so most of their sequences are invalid.
PIECES = (
    *"etaoinshrdlucm",
    *("Ġa", "Ġthe", "Ġof", "Ġto", "Ġ", "Ċ", ".", ",", ":", "!", "ing", "er", "on", "and", "User", "Ġis", "re", "st"),
    *("Ã", "¼", "ä", "¸", "ĸ", "ð", "Ł", "ĳ", "į"),
    *("0", "1", "2", "7", "=", "+", "ab", "ba", "aa", "bb", "Ġx", "Ġy", "ĊĊ", "User:", "end", "en", "nd", "ed", "ly"),
)
assert len(SPECIAL) + len(PIECES) == SHAPE["vocab_size"]


class Kind(NamedTuple):
    """A kind of model. sharpness: scale of the logits; prior: share of the logits that is equal at every position,
    through `axis`, the common part of all embeddings; apart: distance of the denoiser's weights from the context
    tower's, at most 1. With a prior and similar towers, some drafted tokens agree with AR."""

    pattern: str
    sharpness: float
    prior: float
    axis: float
    apart: float
    options: dict[str, object]


KINDS = {
    "every-kind": Kind(EVERY_KIND, 3.0, 0.0, 0.0, 1.0, {}),
    "agreeing": Kind("*E-M", 1.0, 1.0, 3.0, 0.3, {"n_groups": 4, "conv_kernel": 3}),
    "biased": Kind("M*", 1.5, 3.0, 1.0, 0.3, {"use_bias": True, "attention_bias": True, "use_conv_bias": False}),
}
STORED = ("tiny-groups", "tiny-hybrid")  # checkpoints in `golden`, without a tokenizer
NAMES = (*KINDS, "tiny-groups")  # of the goldens


# Denoisers that are not the released one: `biased+shift` is the model "biased" with such a denoiser.
CHOICES = {
    "shift": DenoiserConfig(prediction_shift=1),
    "prefix": DenoiserConfig(block_attention="prefix_causal"),
    "shift-prefix": DenoiserConfig(prediction_shift=1, block_attention="prefix_causal"),
    "first": DenoiserConfig(first_from_ar=True),
    "first-prefix": DenoiserConfig(first_from_ar=True, block_attention="prefix_causal"),
    "everywhere": DenoiserConfig.with_adapters(3, "everywhere"),
    "everywhere-shift": replace(DenoiserConfig.with_adapters(3, "everywhere"), prediction_shift=1),
}
HEADS = {  # with a draft head
    f"head-{name}": replace(choices, draft_head=DraftHeadConfig(3))
    for name, choices in {"released": DenoiserConfig(), **CHOICES}.items()
    if name != "first-prefix"
}
CHOICES |= HEADS


def _chosen(name: str, dtype: torch.dtype, choices: DenoiserConfig) -> TwoTowerForCausalLM:
    """The model of a name in KINDS with another denoiser, whose weights are the same where it has them."""
    model = decoding_model(name, dtype)
    backbone = {**model.config.to_dict(), "model_type": "nemotron_h"}
    other = TwoTowerForCausalLM(GenericTwoTowerConfig(backbone=backbone, mask_token_id=3, **choices.to_json()))
    other.to(dtype).load_state_dict(model.state_dict(), strict=choices.adapters is None and choices.draft_head is None)
    with torch.no_grad():
        for key, tensor in other.state_dict().items():
            if ".draft_head." in key:
                drawn = 1.5 * numbers(f"{name}/{key}").standard_normal(tuple(tensor.shape))
                tensor.copy_(torch.from_numpy(drawn.astype(np.float32)))
            elif ".adapter." in key or key.endswith("mask_embedding.weight"):
                scale = KINDS[name].apart if ".adapter." in key else 1.0
                drawn = scale * numbers(f"{name}/{key}").standard_normal(tuple(tensor.shape)) * tensor.shape[-1] ** -0.5
                tensor.copy_(torch.from_numpy(drawn.astype(np.float32)))
    other.eval().tokenizer = tokenizer()
    return other


@cache
def decoding_model(name: str, dtype: torch.dtype) -> TwoTowerForCausalLM:
    """The model of a name in KINDS or STORED, or of a name in KINDS with one in CHOICES, as `biased+shift`."""
    if "+" in name:
        kind_name, choice = name.split("+")
        return _chosen(kind_name, dtype, CHOICES[choice])
    if name in STORED:
        return TwoTowerForCausalLM.from_pretrained(GOLDEN / name, dtype=dtype).eval()
    kind = KINDS[name]
    config = TwoTowerConfig(hybrid_override_pattern=kind.pattern, **{**SHAPE, **kind.options})
    model = TwoTowerForCausalLM(config)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            own, shared = (
                _drawn(key, tuple(tensor.shape), numbers(f"{name}/{source}"), kind)
                for source in (key, key.replace("denoiser.", "context."))
            )
            drawn = kind.apart * own + (1 - kind.apart) * shared if key.startswith("denoiser.") else own
            tensor.copy_(torch.from_numpy(drawn.astype(np.float32)))
    model = model.to(dtype).eval()
    model.tokenizer = tokenizer()
    return model


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for decoding only; prompts are token ids."""
    vocabulary = {piece: i for i, piece in enumerate((*SPECIAL, *PIECES))}
    whole = Tokenizer(models.BPE(vocabulary, []))
    whole.decoder = decoders.ByteLevel()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=whole, clean_up_tokenization_spaces=False, **names)


def _drawn(key: str, shape: tuple[int, ...], rng: np.random.Generator, kind: Kind) -> NDArray[np.float64]:
    """Values of a weight, at a scale that keeps activations near 1."""
    normal = rng.standard_normal(shape)
    part = key.rsplit("mixer.", 1)[-1]
    if key.endswith("head.weight"):
        logits = kind.sharpness * normal * shape[1] ** -0.5
        return logits + kind.prior * _common("words", shape[0])[:, None] * _common("axis", shape[1]) / shape[1]
    if key.endswith("embeddings.weight"):
        if not kind.prior:
            return normal
        normal[3] = 0.0  # for a mask token the denoiser has only the prior
        return normal + kind.axis * _common("axis", shape[1])
    if key.endswith("norm.weight") or key.endswith("norm_f.weight"):
        return 1.0 + 0.2 * normal
    if "scale_shift_tables" in key:
        return 0.3 * normal + np.array([0.0, 0.0, 1.0])[:, None]  # the gates
    match part:
        case "A_log":
            return rng.uniform(0.0, math.log(8.0), shape)
        case "dt_bias":
            return normal - 2.0
        case "D":
            return 1.0 + 0.3 * normal
        case "gate.e_score_correction_bias":
            return rng.uniform(0.0, 0.3, shape)
        case "conv1d.weight":
            return 0.5 * normal
    if len(shape) == 1:
        return 0.2 * normal  # biases
    return normal * shape[-1] ** -0.5


def _common(what: str, size: int) -> NDArray[np.float64]:
    """A vector that is equal in both towers."""
    return numbers(what).standard_normal(size)


def numbers(name: str) -> np.random.Generator:
    """Random values from a seed that depends on the name."""
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
