"""The passes with explicit state (`checkpoint/onnx_export`) and the script that drives them write the model's texts.

`tests/onnx` compares the files themselves in onnxruntime (`make test-onnx`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dialogues import dialogues
from onnx_driver import eager_passes, load_driver
from several_denoisers import joined, with_one_each
from shaped_models import shaped
from tiny_backbones import two_tower

from twotower import TwoTowerForCausalLM, bundled_model
from twotower.assets import bundled_names
from twotower.checkpoint.onnx_export import limits
from twotower.checkpoint.onnx_export.export import export_onnx
from twotower.checkpoint.quantized_copy import quantize_checkpoint
from twotower.denoiser_fields import DenoiserConfig, DraftHeadConfig
from twotower.errors import ArgumentError, TwoTowerError

MASKS, HEAD = DenoiserConfig.with_adapters(3), DraftHeadConfig(5)
CASES: dict[str, Any] = {
    # kinds of layers
    "llama": ("llama", DenoiserConfig()),
    "windows": ("gemma3_text", DenoiserConfig()),
    "experts": ("mixtral", DenoiserConfig()),
    "Mamba-2, experts": ("nemotron_h", DenoiserConfig()),
    "Mamba-2 alone": ("mamba2", DenoiserConfig()),
    "side by side": ("falcon_h1", DenoiserConfig()),
    # kinds of denoisers
    "shift": ("llama", DenoiserConfig(prediction_shift=1)),
    "shift, prefix-causal": ("nemotron_h", DenoiserConfig(prediction_shift=1, block_attention="prefix_causal")),
    "first token from AR": ("llama", DenoiserConfig(first_from_ar=True)),
    "adapters": ("nemotron_h", MASKS),
    "adapters, windows": ("gemma3_text", MASKS),
    "adapters everywhere": ("nemotron_h", DenoiserConfig.with_adapters(3, "everywhere")),
    # with a draft head
    "released, head": ("llama", DenoiserConfig(draft_head=HEAD)),
    "shift, head": ("nemotron_h", DenoiserConfig(prediction_shift=1, draft_head=HEAD)),
    "first token from AR, head": ("llama", DenoiserConfig(first_from_ar=True, draft_head=HEAD)),
    "adapters everywhere, head": ("llama", replace(DenoiserConfig.with_adapters(3, "everywhere"), draft_head=HEAD)),
}
PROMPT = torch.randint(4, 150, (1, 37), generator=torch.Generator().manual_seed(0))


def check(model: TwoTowerForCausalLM, prompt: torch.Tensor = PROMPT, new: int = 20) -> None:
    """AR and diffusion by the script equal `generate_ar` and `generate_mask_diffusion`."""
    driver = load_driver()
    passes, tokens = eager_passes(driver, model), prompt[0].tolist()
    passes.longest = 16
    with torch.inference_mode():
        expected = model(prompt).logits[0]
    logits, _ = passes.read(tokens, passes.empty)
    torch.testing.assert_close(torch.from_numpy(logits).to(expected.dtype), expected[-len(logits) :])
    expected = model.generate_ar(prompt, max_new_tokens=new)
    assert driver.ar(passes, tokens, new) == expected[0, len(tokens) :].tolist()
    expected = model.generate_mask_diffusion(prompt, max_new_tokens=new, confidence_threshold=0.3)
    assert driver.diffusion(passes, tokens, new, 0.3) == expected[0, len(tokens) :].tolist()


@pytest.mark.parametrize("name", CASES)
def test_texts_are_those_of_the_model(name: str) -> None:
    backbone, denoiser = CASES[name]
    check(two_tower(backbone, torch.float64, denoiser=denoiser))


def test_a_denoiser_with_fewer_layers() -> None:
    check(shaped("hybrid"))


@pytest.mark.parametrize("name", bundled_names())
def test_texts_of_the_bundled_models(name: str) -> None:
    """In fp32, with the draft head of `bundled/adapters`."""
    model = TwoTowerForCausalLM.from_pretrained(bundled_model(name), dtype="float32")
    assert model.tokenizer is not None
    check(model, torch.tensor([model.tokenizer(dialogues(1)[0])["input_ids"]]), 48)


# --- bad input ------------------------------------------------------------------------------------------------------


def refused_with(source: Path, target: Path) -> str:
    with pytest.raises(TwoTowerError) as error:
        export_onnx(source, target)
    assert "\n" not in str(error.value)
    assert not target.exists()
    assert not target.with_name(target.name + ".partial").exists()
    return str(error.value)


@pytest.mark.parametrize(("name", "words"), [("qwen3_5_text", "gated DeltaNet layers"), ("phi3:longrope", "LongRoPE")])
def test_layers_that_have_no_graph_are_refused(name: str, words: str, tmp_path: Path) -> None:
    two_tower(name).save_pretrained(tmp_path / "model")
    assert words in refused_with(tmp_path / "model", tmp_path / "out")


def test_several_denoisers_are_refused(tmp_path: Path) -> None:
    joined(with_one_each("llama", {"a": "full", "b": "masks"}, torch.float32)).save_pretrained(tmp_path / "model")
    assert "has the denoisers a, b, and an ONNX export has one" in refused_with(tmp_path / "model", tmp_path / "out")


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    quantize_checkpoint(bundled_model("small"), tmp_path / "int8", "int8")
    assert "the weights are stored in int8" in refused_with(tmp_path / "int8", tmp_path / "out")


def test_a_file_of_more_than_2_gib_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LARGEST_FILE", 10_000_000)
    message = refused_with(bundled_model("small"), tmp_path / "out")
    assert "denoiser.onnx would have 10.2 MiB of fp32 weights, and an ONNX file has less than 2 GiB" in message


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PACKAGES", ("no_such_package",))
    message = refused_with(bundled_model("small"), tmp_path / "out")
    assert message.startswith("--to onnx needs the package `no_such_package`: pip install 'twotower[onnx]'")


def test_the_output_must_be_a_new_directory(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"the output is a directory with several files; give .*small$"):
        export_onnx(bundled_model("small"), tmp_path / "small.onnx")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(ArgumentError, match="is not empty"):
        export_onnx(bundled_model("small"), tmp_path / "out")
    with pytest.raises(ArgumentError, match="is not just an ONNX export"):
        export_onnx(bundled_model("small"), tmp_path / "out", overwrite=True)
