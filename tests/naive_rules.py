"""The rules of `decoding/logit_rules.py` in plain Python, one position at a time, for the oracle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from twotower import GenerationParams


def changed(
    logits: Tensor, params: GenerationParams, prompt: Sequence[int], before: Sequence[int], place: int, tokenizer: Any
) -> Tensor:
    """Logits (V,) of the new token `place`, after the prompt and the new tokens `before` (in a block, in any order)."""
    values = logits.tolist()
    forbidden = list(params.end_tokens) if place < params.min_tokens else []
    for word in params.bad_words:
        for text in (word.lstrip(" "), " " + word.lstrip(" ")):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if list(before[len(before) - len(ids) + 1 :]) == ids[:-1] and len(before) >= len(ids) - 1:
                forbidden.append(ids[-1])
    for token in forbidden:
        values[token] = -math.inf
    for token, bias in params.logit_bias:
        values[token] += bias
    for token in {*prompt, *before}:
        value, penalty = values[token], params.repetition_penalty
        values[token] = value / penalty if value > 0 else value * penalty
    for token in set(before):
        values[token] -= params.frequency_penalty * list(before).count(token) + params.presence_penalty
    return torch.tensor(values, dtype=logits.dtype)
