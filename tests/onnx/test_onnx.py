"""ONNX files in onnxruntime, by `make test-onnx`: texts of `examples/onnx/decode.py` beside those of this package."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from dialogues import dialogues
from onnx_driver import SCRIPT, load_driver
from tiny_backbones import two_tower

from twotower import TwoTowerForCausalLM, bundled_model
from twotower.assets import bundled_names
from twotower.checkpoint.export import export_one_tower
from twotower.checkpoint.onnx_export.export import export_onnx
from twotower.denoiser_fields import DenoiserConfig

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason="`make test-onnx` compares with onnxruntime: it installs the packages")

PROMPTS, NEW, THRESHOLD = 96, 64, 0.9
SHIFTED = DenoiserConfig(prediction_shift=1, block_attention="prefix_causal")
FAMILIES = {
    "windows": ("gemma3_text", DenoiserConfig()),
    "Mamba-2, experts, shift": ("nemotron_h", SHIFTED),
    "Mamba-2 alone": ("mamba2", DenoiserConfig()),
    "side by side": ("falcon_h1", DenoiserConfig()),
    "adapters everywhere, experts": ("mixtral", DenoiserConfig.with_adapters(3, "everywhere")),
    "adapters": ("granitemoehybrid:rope", DenoiserConfig.with_adapters(3)),
}


def compare(model: TwoTowerForCausalLM, folder: Path, prompts: list[list[int]], new: int) -> dict[str, int]:
    """How many texts of onnxruntime equal those of the model in fp32, in AR and in diffusion."""
    driver = load_driver()
    passes, equal = driver.Passes.load(folder), {"ar": 0, "diffusion": 0}
    ends = passes.info["eos_token_ids"]
    for prompt in prompts:
        ids = torch.tensor([prompt])
        expected: dict[str, Callable[[], torch.Tensor]] = {
            "ar": lambda ids=ids: model.generate_ar(ids, max_new_tokens=new, eos_token_id=ends or None),
            "diffusion": lambda ids=ids: model.generate_mask_diffusion(
                ids, max_new_tokens=new, confidence_threshold=THRESHOLD, eos_token_id=ends or None
            ),
        }
        for mode, text in expected.items():
            found = getattr(driver, mode)(passes, prompt, new)
            wanted = text()[0, len(prompt) :].tolist()
            equal[mode] += found == wanted[: len(found)] and (len(found) == new or found[-1] in ends)
    print(f"{folder.name}: of {len(prompts)} texts of {new} tokens {equal} equal")
    return equal


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", bundled_names())
def test_the_bundled_models(name: str, tmp_path: Path) -> None:
    made = export_onnx(bundled_model(name), tmp_path / name)
    model = TwoTowerForCausalLM.from_pretrained(bundled_model(name), dtype="float32")
    assert made.parameters == sum(weight.numel() for weight in model.parameters())
    assert model.tokenizer is not None
    prompts = [model.tokenizer(text)["input_ids"] for text in dialogues(PROMPTS)]
    assert compare(model, tmp_path / name, prompts, NEW) == {"ar": PROMPTS, "diffusion": PROMPTS}
    command = [sys.executable, str(SCRIPT), str(tmp_path / name), dialogues(1)[0], "diffusion", "24"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip()
    assert "24 tokens in" in done.stderr


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", FAMILIES)
def test_families_and_denoisers(name: str, tmp_path: Path) -> None:
    backbone, denoiser = FAMILIES[name]
    model = two_tower(backbone, denoiser=denoiser)
    model.save_pretrained(tmp_path / "model")
    folder = tmp_path / name.replace(", ", "-")
    export_onnx(tmp_path / "model", folder)
    check_logits(model, folder)
    prompts = torch.randint(4, 150, (8, 29), generator=torch.Generator().manual_seed(0)).tolist()
    equal = compare(model, folder, prompts, 24)
    assert equal["ar"] == 8
    assert equal["diffusion"] >= 7  # texts of random weights have near ties


def check_logits(model: TwoTowerForCausalLM, folder: Path) -> None:
    """Logits and state of onnxruntime at texts of every length to 40, read token by token and in passes."""
    passes = load_driver().Passes.load(folder)
    tokens = torch.randint(4, 150, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    single, state = [], passes.empty
    for token in tokens:
        logits, state = passes.read([token], state)
        single.append(logits[0])
    passes.longest = 7
    last, other = passes.read(tokens, passes.empty)
    for found, wanted in ((np.stack(single), expected), (last, expected[-len(last) :])):
        assert np.abs(found - wanted).max() < 1e-3
    for name, values in state.items():
        assert np.abs(values - other[name]).max() < 1e-3, name


def test_an_autoregressive_model(tmp_path: Path) -> None:
    """The context tower alone."""
    export_one_tower(bundled_model("small"), tmp_path / "ar")
    made = export_onnx(tmp_path / "ar", tmp_path / "out")
    assert made.files == ("context.onnx",)
    assert "no denoiser" in made.notes[0]
    info = json.loads((tmp_path / "out" / "passes.json").read_text())
    assert info["denoiser"] is None
    driver, model = load_driver(), TwoTowerForCausalLM.from_pretrained(bundled_model("small"), dtype="float32")
    prompt = [5, 6, 7, 8]
    expected = model.generate_ar(torch.tensor([prompt]), max_new_tokens=24, eos_token_id=None)
    assert driver.ar(driver.Passes.load(tmp_path / "out"), prompt, 24) == expected[0, 4:].tolist()
