"""int8 and int4 weights of families: a model computes what one with the dequantized weights computes, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from backbone_models import MASK, some_text
from test_int4 import as_meant
from tiny_backbones import FAMILY_NAMES, save, slow_but
from torch import nn

from twotower import TwoTowerForCausalLM
from twotower.checkpoint.convert import convert
from twotower.model.conditioning import TimeConditioning
from twotower.model.linear import Int8Linear, Linear, TiedHead
from twotower.model.moe import Experts

PROMPT = some_text(40)
OF_INT4 = ("llama", "phi3", "gemma2", "granitemoehybrid", "qwen2_moe", "nemotron_h:latent", "falcon_h1", "qwen3_next")


def plain_products(model: nn.Module) -> list[str]:
    """Names of the large products that are not in int8."""
    kept = [name for name, part in model.named_modules() if isinstance(part, TimeConditioning)]
    plain = [name for name, part in model.named_modules() if isinstance(part, Linear | Experts | TiedHead)]
    return [name for name in plain if not name.startswith(tuple(kept))]


@pytest.mark.proves("int8")
@pytest.mark.parametrize("name", slow_but(FAMILY_NAMES))
def test_a_model_loaded_in_int8_has_the_dequantized_weights(name: str, tmp_path: Path) -> None:
    check(name, "int8", tmp_path)


@pytest.mark.parametrize("name", OF_INT4)
def test_a_model_loaded_in_int4_has_the_dequantized_weights(name: str, tmp_path: Path) -> None:
    check(name, "int4", tmp_path)


@torch.no_grad()
def check(name: str, plan: str, tmp_path: Path) -> None:
    """Both towers, logits and texts. A tied head is in int8, its embedding is not."""
    save(name, tmp_path / "ar")
    convert(tmp_path / "ar", tmp_path / "two", mask_token=MASK)
    model = TwoTowerForCausalLM.from_pretrained(tmp_path / "two", dtype=torch.float64, quantization=plan).eval()
    assert all(isinstance(tower.head, Int8Linear) for tower in model.towers())
    assert not plain_products(model)
    plain, full = as_meant(model), TwoTowerForCausalLM.from_pretrained(tmp_path / "two", dtype=torch.float64)
    ids, steps = torch.tensor([PROMPT]), torch.tensor([0.3], dtype=torch.float64)
    outs = []
    for each in (model, plain, full):
        state = each.new_state(1, 64)
        read = each.extend(ids, state)
        outs.append((read, each.denoise(ids[:, :6], steps, each.reader(state).view())))
    for ours, expected, unrounded in zip(*outs, strict=True):
        assert (ours - expected).abs().max() <= 1e-9 * expected.abs().max()
        assert (ours - unrounded).abs().max() > 1e-6 * expected.abs().max()
    texts = [mode(ids, max_new_tokens=12) for mode in (model.generate_ar, model.generate_verified, plain.generate_ar)]
    assert torch.equal(texts[0], texts[2])
    assert torch.equal(texts[0], texts[1])
