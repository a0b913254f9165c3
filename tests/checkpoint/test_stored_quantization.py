"""Quantised checkpoints on disk: saved and loaded bit for bit, the format of their tensors, errors in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_models import MASK, some_text
from command import Result
from conftest import EVERY_KIND, build_random_model
from safetensors.torch import load_file, save_file
from tiny_backbones import save

from twotower import TwoTowerForCausalLM
from twotower.checkpoint.convert import convert
from twotower.checkpoint.quantize import quantize_
from twotower.checkpoint.reader import INDEX_FILE, SINGLE_FILE
from twotower.errors import ArgumentError, CheckpointError, ConfigError
from twotower.model.fp32_tensors import named_tensors
from twotower.ops.reference import int4, int8

PLANS = ("int8", "int4", "experts=int4,rest=int8", "context=int8,denoiser=int4", "context=int4")


def same(first: TwoTowerForCausalLM, second: TwoTowerForCausalLM) -> bool:
    """Whether two models have the same tensors, bit for bit."""
    a, b = dict(named_tensors(first)), dict(named_tensors(second))
    assert a.keys() == b.keys()
    return all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_a_saved_model_is_loaded_bit_for_bit(golden_dir: Path, tmp_path: Path, plan: str, dtype: str) -> None:
    made = TwoTowerForCausalLM.from_pretrained(golden_dir / "tiny-hybrid", dtype=dtype, quantization=plan)
    made.save_pretrained(tmp_path)
    loaded = TwoTowerForCausalLM.from_pretrained(tmp_path)
    assert loaded.quantization == made.quantization
    assert same(made, loaded)
    loaded.save_pretrained(tmp_path / "again", max_shard_size=20_000)  # parts of a weight lie in several files
    assert (tmp_path / "again" / INDEX_FILE).exists()
    assert same(made, TwoTowerForCausalLM.from_pretrained(tmp_path / "again", quantization=plan))
    alone = TwoTowerForCausalLM.from_pretrained(tmp_path, towers="context")
    tensors = dict(named_tensors(made))
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in named_tensors(alone))


def test_nothing_is_quantised_while_a_stored_model_is_loaded(
    golden_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = TwoTowerForCausalLM.from_pretrained(golden_dir / "tiny-hybrid", quantization="experts=int4,rest=int8")
    made.save_pretrained(tmp_path)
    monkeypatch.setattr(int4, "_rounded", None)
    monkeypatch.setattr(int8, "QMAX", None)
    assert same(made, TwoTowerForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize("name", ["phi3", "granitemoehybrid", "mixtral", "qwen2", "qwen2_moe", "qwen3_next"])
def test_packed_projections_stacked_experts_and_tied_heads(name: str, tmp_path: Path) -> None:
    """Several weights of a model may be rows of one tensor on disk, and a tied head is a tensor of its own."""
    save(name, tmp_path / "ar")
    convert(tmp_path / "ar", tmp_path / "two", mask_token=MASK)
    made = TwoTowerForCausalLM.from_pretrained(tmp_path / "two", dtype="float32", quantization="int4")
    made.save_pretrained(tmp_path / "saved")
    loaded = TwoTowerForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert same(made, loaded)
    assert loaded.quantization == "int4"
    ids = torch.tensor([some_text(20)])
    assert torch.equal(loaded.generate_ar(ids, max_new_tokens=8), loaded.generate_verified(ids, max_new_tokens=8))


def test_the_tensors_are_those_of_compressed_tensors(tmp_path: Path) -> None:
    """Unpacked here by the definition: the first input in the lowest bits, q + 8 or q + 128."""
    model = quantize_(build_random_model(EVERY_KIND), "int4")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / SINGLE_FILE)
    layer = EVERY_KIND.index("M")
    for name, module, bits in (
        (f"context_tower.layers.{layer}.mixer.in_proj", model.context.layers[layer].mixer.in_proj, 4),
        ("context_lm_head", model.context.head, 8),
    ):
        packed, scale = stored[f"{name}.weight_packed"], stored[f"{name}.weight_scale"]
        out, width = stored[f"{name}.weight_shape"].tolist()
        assert (packed.dtype, len(packed), len(scale)) == (torch.int32, out, out)
        each = 32 // bits
        bits_of = [packed.long() >> bits * i & 2**bits - 1 for i in range(each)]
        q = torch.stack(bits_of, -1).flatten(1)[:, :width] - 2 ** (bits - 1)
        wide = scale.double().repeat_interleave(32 if bits == 4 else width, 1)[:, :width]
        if bits == 4:
            expected = int4.dequantize(module.weight, out, width, torch.float64)
        else:
            expected = int8.unpack(module.weight, module.weight_scale, torch.float64) * module.weight_scale[:, None]
        assert torch.equal(q * wide, expected)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    assert config["config_groups"]["context.heads"]["targets"] == ["re:^context_lm_head$"]
    assert config["config_groups"]["denoiser.experts"]["weights"]["group_size"] == 32


@pytest.fixture
def saved(golden_dir: Path, tmp_path: Path) -> Path:
    """An int4 checkpoint."""
    TwoTowerForCausalLM.from_pretrained(golden_dir / "tiny-hybrid", quantization="int4").save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_info_shows_the_plan(saved: Path, cli: Callable[..., Result]) -> None:
    facts = json.loads(cli("info", saved, "--json").out)
    assert facts["weights"]["quantization"] == "int4"
    assert facts["weights"]["problem"] is None
    assert facts["memory"]["stored"] == facts["memory"]["int4"]
    assert "stored in int4: loaded as they are" in cli("info", saved).out


def test_another_plan_is_refused(saved: Path) -> None:
    assert TwoTowerForCausalLM.from_pretrained(saved, quantization="int4").quantization == "int4"
    for plan in ("int8", "none", "experts=int4"):
        with pytest.raises(ArgumentError, match=f"quantization is '{plan}', and the checkpoint is stored in 'int4'"):
            TwoTowerForCausalLM.from_pretrained(saved, quantization=plan)


def test_uses_that_need_the_original_weights_are_refused(
    saved: Path, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    result = cli("export", saved, "--to", "one-tower", "-o", tmp_path / "ar")
    assert result.code == 2
    assert "the weights are stored in int4; twotower export needs the original checkpoint" in result.err
    model = TwoTowerForCausalLM.from_pretrained(saved)
    with pytest.raises(ArgumentError, match="int4 weights cannot be trained"):
        model.train()


def test_damaged_checkpoints_are_refused(saved: Path) -> None:
    config, weights = (saved / "config.json").read_text(), load_file(saved / SINGLE_FILE)
    name = next(name for name in weights if name.endswith("in_proj.weight_packed"))
    shape = name.replace("_packed", "_shape")
    changes: dict[str, Any] = {
        name: weights[name][1:].clone(),
        name.replace("_packed", "_scale"): weights[name].clone(),
        shape: weights[shape] + 1,
    }
    for changed, value in changes.items():
        save_file(weights | {changed: value}, saved / SINGLE_FILE)
        with pytest.raises(CheckpointError, match=changed):
            TwoTowerForCausalLM.from_pretrained(saved)
    save_file(weights | {name: weights[name].float()}, saved / SINGLE_FILE)
    with pytest.raises(CheckpointError, match="is stored as F32; I32 is expected"):
        TwoTowerForCausalLM.from_pretrained(saved)
    save_file({key: value for key, value in weights.items() if key != shape}, saved / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=f"{shape} is missing"):
        TwoTowerForCausalLM.from_pretrained(saved)
    save_file(weights, saved / SINGLE_FILE)
    other = ("compressed-tensors", "gptq"), ('"num_bits": 4', '"num_bits": 3'), ("context.projections", "group_0")
    for old, new in other:
        (saved / "config.json").write_text(config.replace(old, new))
        with pytest.raises(ConfigError, match="quantization_config is not one that save_pretrained writes"):
            TwoTowerForCausalLM.from_pretrained(saved)


def test_a_part_with_several_schemes_cannot_be_saved(tmp_path: Path) -> None:
    model = build_random_model(EVERY_KIND)
    quantize_(model.context.layers[EVERY_KIND.index("M")], "int4")
    with pytest.raises(ArgumentError, match="quantise the whole part"):
        model.save_pretrained(tmp_path / "made")
    assert not (tmp_path / "made").exists()
