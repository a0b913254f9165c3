"""The context tower against `nemotron_h` of transformers, with the same weights.

transformers computes norms, scan and router in fp32 in a model of any dtype, so float64 is not more exact. The tests
use the tolerances of fp32 for both. Experts of groups that are not selected score −∞ in transformers, and 0 here, as in
the public reference. The results differ only for negative biased scores; those of these tests are positive.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from runpy import run_path

import pytest
import torch
from conftest import build_random_model
from torch import Tensor
from transformers import NemotronHForCausalLM

from twotower import TwoTowerForCausalLM

MODELS = {
    "every kind": ("M*E-M", {}),
    "expert groups, one kept": ("EM*E", {"n_routed_experts": 12, "n_group": 4, "topk_group": 2}),
    "one expert group, no normalisation": ("ME*E", {"n_group": 1, "norm_topk_prob": False, "num_experts_per_tok": 1}),
    "no convolution bias, one Mamba group": ("M-M*", {"use_conv_bias": False, "n_groups": 1, "chunk_size": 5}),
    "latent experts with biases": ("ME*E", {"moe_latent_size": 20, "mlp_bias": True, "n_group": 1}),
    "attention without grouping": ("*-*M", {"num_key_value_heads": 4, "head_dim": 20}),
}


BASELINE = Path(__file__).parents[2] / "benchmarks" / "common" / "transformers_baseline.py"
theirs: Callable[[TwoTowerForCausalLM], NemotronHForCausalLM] = run_path(str(BASELINE))["transformers_baseline"]


def agree(ours: Tensor, other: Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert other.std() > 1  # so that the tolerance is meaningful
    torch.testing.assert_close(ours.float(), other.float(), rtol=0, atol=1e-4 if dtype == torch.float64 else 3e-4)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def some_tokens(rows: int, length: int) -> Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_whole_sequences(name: str, dtype: torch.dtype) -> None:
    pattern, overrides = MODELS[name]
    model = build_random_model(pattern, dtype=dtype, **overrides)
    for rows, length in ((1, 1), (2, 3), (2, 45)):
        tokens = some_tokens(rows, length)
        agree(model(tokens).logits, theirs(model)(tokens).logits, dtype)


@pytest.mark.parametrize("name", MODELS)
def test_logits_after_prefill_and_extend(name: str) -> None:
    """transformers in one pass; twotower in chunks of many widths, with rows at different positions."""
    pattern, overrides = MODELS[name]
    model = build_random_model(pattern, seed=1, **overrides)
    tokens = some_tokens(3, 60)
    expected = theirs(model)(tokens).logits
    state = model.new_state(3, 60)
    lengths = torch.tensor([9, 1, 20])
    rows = torch.arange(3)
    agree(model.prefill(tokens[:, :20], lengths, state), expected[rows, lengths - 1])
    for width in (1, 2, 3, 16, 17, 1):
        at = lengths[:, None] + torch.arange(width)
        agree(model.extend(tokens.gather(1, at), state), expected[rows[:, None], at])
        lengths = lengths + width
    assert state.lengths.tolist() == [49, 41, 60]


def test_logits_with_padding_on_either_side() -> None:
    """With `attention_mask`, the logits of real tokens equal those of the row alone."""
    model = build_random_model()
    hf, tokens = theirs(model), some_tokens(2, 20)
    for kept in (slice(0, 13), slice(7, 20)):
        mask = torch.zeros(2, 20, dtype=torch.long)
        mask[0, kept], mask[1] = 1, 1
        logits = model(tokens, attention_mask=mask).logits
        agree(logits[0, kept], hf(tokens[:1, kept]).logits[0])
        agree(logits[1], hf(tokens[1:]).logits[0])


def test_loss_is_the_next_token_loss() -> None:
    model = build_random_model()
    tokens = some_tokens(2, 20)
    labels = tokens.clone()
    labels[0, :5] = -100
    ours, other = model(tokens, labels=labels).loss, theirs(model)(tokens, labels=labels).loss
    torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)


def test_greedy_text_is_the_same() -> None:
    model = build_random_model(dtype=torch.float64)
    prompt = some_tokens(1, 11)
    other = theirs(model).generate(prompt, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert model.generate_ar(prompt, max_new_tokens=30).tolist() == other.tolist()
