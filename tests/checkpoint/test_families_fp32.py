"""Tiny models of every family against transformers in fp32: logits, and texts up to near ties."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_backbones import SHAPES, VOCAB, greedy, in_float64, save
from torch import Tensor
from transformers import PreTrainedModel

from twotower import TwoTowerForCausalLM
from twotower.checkpoint.convert import convert

NEAR_TIE = 1e-3  # distance of the two best logits up to which another token is no error
MOST_DIFFERENCES = 0.01  # of all positions
LOGITS = 1e-4  # largest difference, in standard deviations of the logits; see `own_error`
PROMPTS, NEW_TOKENS = (1, 7, 33, 70), 40

Generate = Callable[..., Tensor]


def differences(generate: Generate, prompt: list[int], text: list[int], margins: list[float]) -> int:
    """How many tokens of a text are chosen differently, each after the given ones.

    The text is generated anew after each difference, which must be at a near tie.
    """
    at, count = 0, 0
    while at < len(text):
        start = prompt + text[:at]
        out = generate(torch.tensor([start]), max_new_tokens=len(text) - at, eos_token_id=[])[0, len(start) :].tolist()
        same = next((i for i, (a, b) in enumerate(zip(out, text[at:], strict=True)) if a != b), None)
        if same is None:
            break
        at += same
        assert margins[at] <= NEAR_TIE, f"another token at position {at}, where the margin is {margins[at]:.2e}"
        at, count = at + 1, count + 1
    return count


def own_error(theirs: PreTrainedModel, ids: Tensor, expected: Tensor) -> float:
    """The largest error of transformers' own logits: some random models amplify the rounding of fp32."""
    with torch.inference_mode(), in_float64(copy.deepcopy(theirs)) as exact:
        return float((exact(ids, use_cache=False).logits - expected).abs().max())


def check(name: str, directory: Path, prompts: tuple[int, ...], new: int) -> None:
    """Compares a tiny model with transformers' on prompts of these lengths."""
    theirs = save(name, directory / "ar")
    convert(directory / "ar", directory / "two", mask_token=3)
    model = TwoTowerForCausalLM.from_pretrained(directory / "two", dtype=torch.float32)
    random = torch.Generator().manual_seed(1)
    found = {"generate_ar": 0, "generate_verified": 0}
    for length in prompts:
        prompt = torch.randint(4, VOCAB, (length,), generator=random).tolist()
        with torch.inference_mode():
            text, margins = greedy(theirs, prompt, new)
            ids = torch.tensor([prompt + text])
            expected, logits = theirs(ids, use_cache=False).logits, model(ids).logits
        found_error = float((logits - expected).abs().max())
        if found_error > LOGITS * float(expected.std()):
            assert found_error <= 2 * own_error(theirs, ids, expected), f"prompt of {length} tokens"
        for mode in found:
            found[mode] += differences(getattr(model, mode), prompt, text, margins)
    assert max(found.values()) <= MOST_DIFFERENCES * len(prompts) * new, found


@pytest.mark.proves("AR equal", "verified")
@pytest.mark.parametrize("name", SHAPES)
def test_fp32_text_and_logits(name: str, tmp_path: Path) -> None:
    check(name, tmp_path, prompts=(29,), new=8)


@pytest.mark.slow
@pytest.mark.proves("AR equal", "verified")
@pytest.mark.parametrize("name", SHAPES)
def test_fp32_texts_and_logits(name: str, tmp_path: Path) -> None:
    check(name, tmp_path, PROMPTS, NEW_TOKENS)
