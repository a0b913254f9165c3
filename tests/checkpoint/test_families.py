"""Backbones of every family against values that transformers computed (see the README of the fixtures)."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_backbones import SHAPES, VOCAB, greedy, in_float64, save

from twotower import TwoTowerForCausalLM
from twotower.checkpoint.convert import convert

ROOT = Path(__file__).parents[3] / "shared" / "fixtures" / "backbones"
NAMES = ("llama", "mistral", "mixtral", "granitemoehybrid")
needs_fixtures = pytest.mark.skipif(not ROOT.exists(), reason=f"the fixtures of backbones are not at {ROOT}")


@cache
def golden(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    values = json.loads((ROOT / name / "golden.json").read_text())
    return values, load_file(ROOT / name / "golden.safetensors")


@pytest.fixture(scope="module")
def two_towers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the two-tower checkpoint of a fixture, once."""

    @cache
    def make(name: str) -> Path:
        directory = tmp_path_factory.mktemp(name) / "model"
        convert(ROOT / name, directory, mask_token=golden(name)[0]["mask_token_id"])
        return directory

    return make


@needs_fixtures
@pytest.mark.parametrize("name", NAMES)
def test_autoregressive_logits_and_texts(name: str, two_towers: Callable[[str], Path]) -> None:
    values, tensors = golden(name)
    model = TwoTowerForCausalLM.from_pretrained(two_towers(name), dtype=torch.float64)
    with torch.inference_mode():
        logits = model(tensors["ids"]).logits
    assert (logits - tensors["logits"]).abs().max() < values["suggested_tolerance_float32"]
    for text in values["texts"]:
        for mode in (model.generate_ar, model.generate_verified):
            out = mode(torch.tensor([text["prompt"]]), max_new_tokens=40, eos_token_id=[])
            assert out[0, len(text["prompt"]) :].tolist() == text["continuation"]


@needs_fixtures
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("context", [0, 5, 40])
@torch.inference_mode()
def test_the_denoiser_reads_a_block_after_the_context(
    name: str, context: int, two_towers: Callable[[str], Path]
) -> None:
    """As a copy of the backbone, and with other weights than the context tower's."""
    values, tensors = golden(name)
    model = TwoTowerForCausalLM.from_pretrained(two_towers(name), dtype=torch.float64)
    assert model.denoiser is not None
    text, block = (tensors[f"denoiser/context{context}/{part}"] for part in ("context", "block"))
    state = model.new_state(1, 64)
    if context:
        model.prefill(text[None], torch.tensor([context]), state)
    for case in ("denoiser", "coupled"):
        if case == "coupled":
            turned = {name: tensor.flip(-1) for name, tensor in model.denoiser.state_dict().items()}
            model.denoiser.load_state_dict(turned)
        logits = model.denoise(block[None], None, model.reader(state).view())[0]
        expected = tensors[f"{case}/context{context}/logits"]
        assert (logits - expected).abs().max() < values["suggested_tolerance_float32"], case


@needs_fixtures
@pytest.mark.parametrize("name", NAMES)
def test_diffusion(name: str, two_towers: Callable[[str], Path]) -> None:
    model = TwoTowerForCausalLM.from_pretrained(two_towers(name), dtype=torch.float64)
    for run in golden(name)[0]["diffusion"]:
        prompt, new = run["prompt"], run["new_tokens"]
        out = model.generate_mask_diffusion(
            torch.tensor([prompt]),
            max_new_tokens=len(new),
            block_size=run["block_size"],
            steps_per_block=run["steps_per_block"],
            confidence_threshold=run["confidence_threshold"],
            mask_token_id=golden(name)[0]["mask_token_id"],
            eos_token_id=[],
        )
        assert out[0, len(prompt) :].tolist() == new


@pytest.mark.proves("AR equal", "verified")
@pytest.mark.parametrize("name", SHAPES)
def test_tiny_models_equal_transformers_in_float64(name: str, tmp_path: Path) -> None:
    """Logits over a batch, and 16 greedy tokens through the engine."""
    theirs = save(name, tmp_path / "ar")
    convert(tmp_path / "ar", tmp_path / "two", mask_token=3)
    model = TwoTowerForCausalLM.from_pretrained(tmp_path / "two", dtype=torch.float64)
    ids = torch.randint(4, VOCAB, (2, 70), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), in_float64(theirs) as exact:
        expected = exact(ids).logits
        tokens, _ = greedy(theirs, ids[0].tolist(), 16)
    with torch.inference_mode():
        logits = model(ids).logits
    assert (logits - expected).abs().max() <= 1e-9 * expected.abs().max()
    for mode in (model.generate_ar, model.generate_verified):
        assert mode(ids[:1], max_new_tokens=16, eos_token_id=[])[0, 70:].tolist() == tokens


WITH_EXPERTS = [
    name
    for name, options in SHAPES.items()
    if any(options.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
]


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_stacked_experts_on_disk_are_the_same_model(name: str, tmp_path: Path) -> None:
    """transformers 5 writes the original layout of each family, or one tensor for all experts of a layer."""
    converted = []
    for original in (True, False):
        source, target = tmp_path / f"ar-{original}", tmp_path / f"two-{original}"
        save(name, source, save_original_format=original)
        convert(source, target, mask_token=3)
        converted.append(load_file(target / "model.safetensors"))
    stored = [set(load_file(tmp_path / f"ar-{original}" / "model.safetensors")) for original in (True, False)]
    assert stored[0] != stored[1]
    assert converted[0].keys() == converted[1].keys()
    assert all(torch.equal(tensor, converted[1][part]) for part, tensor in converted[0].items())
