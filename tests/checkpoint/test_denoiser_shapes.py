"""Denoiser towers that lack layers or have another feed-forward: `twotower init`, files, copies, and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Result, assert_one_line_error
from safetensors.torch import load_file, save_file
from shaped_models import MASK, config_of, shaped
from tiny_backbones import save, save_tokenizer

from twotower import TwoTowerForCausalLM
from twotower.checkpoint.convert import ConversionResult, convert
from twotower.checkpoint.export import export_one_tower
from twotower.checkpoint.quantize import quantize_
from twotower.checkpoint.quantized_copy import quantize_checkpoint
from twotower.config import GenericTwoTowerConfig, TwoTowerConfig
from twotower.denoiser_fields import DenoiserConfig
from twotower.denoiser_shape import parse_layers
from twotower.errors import ArgumentError, ConfigError
from twotower.evaluation.feed_forward import TextFeedForward
from twotower.families import tower_spec
from twotower.families.denoiser import denoiser_of

Cli = Callable[..., Result]


def source_of(folder: Path, name: str) -> Path:
    save(name, folder)
    save_tokenizer(folder, "<mask>")
    return folder


def text_file(folder: Path) -> Path:
    file = folder / "text.jsonl"
    file.write_text("".join(json.dumps({"text": f"{i}: " + "some words of a text, " * 9}) + "\n" for i in range(40)))
    return file


def made(source: Path, target: Path, **shape: Any) -> tuple[ConversionResult, TwoTowerForCausalLM]:
    if "denoiser_feed_forward" in shape:
        shape["calibration"] = TextFeedForward(data=[str(text_file(target.parent))], tokens=2000)
    result = convert(source, target, mask_token=MASK, **shape)
    return result, TwoTowerForCausalLM.from_pretrained(target)


# --- the layers that a text names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        ("every:4", (0, 4, 8)),
        ("first:2+last:2", (0, 1, 8, 9)),
        ("0,3,7-9", (0, 3, 7, 8, 9)),
        ("every:5+ 1-2 +last:1", (0, 1, 2, 5, 9)),
        ("first:10", tuple(range(10))),
    ],
)
def test_texts_name_layers(spec: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(spec, 10) == layers


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("3,1", "1 does not come after 3"),
        ("2-1", "2-1 is empty"),
        ("4,10", "the model has layers 0 to 9"),
        ("last:11", "the model has 10 layers"),
        ("every:0", "every:0 names no layer"),
        ("half", "give every:N"),
        ("", "give every:N"),
    ],
)
def test_other_texts_are_refused(spec: str, reason: str) -> None:
    with pytest.raises(ArgumentError, match=reason):
        parse_layers(spec, 10)


HYBRID = config_of("hybrid").backbone
BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"denoiser_layers": [2, 1]}, "denoiser_layers has 1 after 2; the numbers must increase"),
    ({"denoiser_layers": [0, 7]}, "denoiser_layers has 7; the autoregressive model has layers 0 to 6"),
    ({"denoiser_layers": []}, "denoiser_layers is []; it must be a list of numbers"),
    ({"denoiser_layers": "every:2"}, "denoiser_layers is 'every:2'; it must be a list of numbers"),
    ({"denoiser_layers": [1, 3, 5]}, "no layer reads the context; add a layer with attention"),
    ({"denoiser_layers": [0], **DenoiserConfig.with_adapters(2).to_json()}, "adapters have none; remove one"),
    ({"denoiser_layers": [0, 5], "denoiser_feed_forward": {"kind": "dense", "size": 8}}, "has no MoE layers"),
    ({"denoiser_feed_forward": {"kind": "sparse", "size": 8}}, "it must be an object such as"),
    ({"denoiser_feed_forward": {"kind": "experts", "size": 1}}, "2 are selected for a token; keep at least that"),
    ({"denoiser_feed_forward": {"kind": "experts", "size": 3}}, "groups of 2 are kept whole; give a multiple"),
    ({"denoiser_feed_forward": {"kind": "experts", "size": 8}}, "a MoE layer has 6; keep at most that"),
    ({"denoiser_feed_forward": {"kind": "dense", "size": 173}}, "have 172 units together; give at most that"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "reason"), BAD_FIELDS)
def test_fields_that_no_denoiser_can_have(fields: dict[str, Any], reason: str) -> None:
    def make() -> None:
        config = GenericTwoTowerConfig(backbone=HYBRID, mask_token_id=MASK, **fields)
        denoiser_of(config, tower_spec(config))

    with pytest.raises(ConfigError) as error:
        make()
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


# --- twotower init ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layers", "numbers", "counterparts"),
    [
        ("nemotron_h", "1-2", (1, 2), (1, 2)),
        ("granitemoehybrid", "every:2+last:1", (0, 2, 3), (0, 1, 4, 5, 6, 7)),
        ("phi3", "first:1+last:1", (0, 2), (0, 1, 4, 5)),  # packed projections
    ],
)
def test_init_copies_the_layers(
    name: str, layers: str, numbers: tuple[int, ...], counterparts: tuple[int, ...], tmp_path: Path
) -> None:
    result, model = made(source_of(tmp_path / "ar", name), tmp_path / "two", denoiser_layers=layers)
    config = TwoTowerConfig.read(tmp_path / "two")
    assert (result.denoiser_layers, config.denoiser.denoiser_layers) == (numbers, numbers)
    raw = json.loads((tmp_path / "two" / "config.json").read_text())
    assert (raw["model_type"], raw["architectures"]) == ("two_tower", ["TwoTowerForCausalLM"])
    assert (raw["denoiser_layers"], raw["format"]) == (list(numbers), 1)
    assert model.denoiser is not None
    assert model.denoiser.spec.counterparts == counterparts
    for place, layer in enumerate(counterparts):
        own, its = (tower.layers[i].state_dict() for tower, i in ((model.denoiser, place), (model.context, layer)))
        assert own.keys() == its.keys()
        assert all(torch.equal(own[key], its[key]) for key in own), layer
    names = load_file(tmp_path / "two" / "model.safetensors")
    stored = {int(key.split(".")[2]) for key in names if key.startswith("denoiser_tower.layers.")}
    assert stored == set(range(len(numbers)))
    assert len([key for key in names if key.startswith("scale_shift_tables.")]) == len(counterparts)


def test_all_layers_are_the_released_denoiser(tmp_path: Path) -> None:
    source = source_of(tmp_path / "ar", "nemotron_h")
    result, _ = made(source, tmp_path / "two", denoiser_layers="every:1")
    convert(source, tmp_path / "plain", mask_token=MASK)
    assert result.denoiser_layers is None
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_files_shards_copies_and_export(tmp_path: Path) -> None:
    """Saved in shards and loaded again, as a quantised copy, and exported: all bit for bit."""
    source = source_of(tmp_path / "ar", "granitemoehybrid")
    _, model = made(source, tmp_path / "two", denoiser_layers="1,3", denoiser_feed_forward="experts:3")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20kB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    again = TwoTowerForCausalLM.from_pretrained(tmp_path / "shards").state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in model.state_dict().items())
    quantize_checkpoint(tmp_path / "two", tmp_path / "int4", "int4")
    copy = TwoTowerForCausalLM.from_pretrained(tmp_path / "int4").state_dict()
    expected = quantize_(model, "int4").state_dict()
    assert copy.keys() == expected.keys()
    assert all(torch.equal(copy[key], tensor) for key, tensor in expected.items())
    export_one_tower(tmp_path / "two", tmp_path / "back")
    convert(source, tmp_path / "plain", mask_token=MASK)
    export_one_tower(tmp_path / "plain", tmp_path / "expected")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        tmp_path / "expected" / "model.safetensors"
    ).read_bytes()


def test_a_context_tower_alone_is_loaded(tmp_path: Path) -> None:
    model = shaped("two mixers", torch.float32)
    model.save_pretrained(tmp_path)
    alone = TwoTowerForCausalLM.from_pretrained(tmp_path, towers="context")
    assert alone.denoiser is None
    assert torch.equal(alone.context.norm_f.weight, model.context.norm_f.weight)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_one_line_for_each_mistake_of_a_command(tmp_path: Path, cli: Cli) -> None:
    moe, dense = source_of(tmp_path / "moe", "mixtral"), source_of(tmp_path / "dense", "llama")
    text = text_file(tmp_path)
    bare = tmp_path / "bare"
    save("mixtral", bare)
    for source, options, reason in (
        (bare, ["--denoiser-feed-forward", "dense:9", "--calibrate", text], "contains no tokenizer, which calibration"),
        (moe, ["--denoiser-layers", "2,1"], "denoiser_layers is '2,1': 1 does not come after 2"),
        (moe, ["--denoiser-feed-forward", "experts:2"], "give text with --calibrate DATA"),
        (moe, ["--calibrate", text], "none is given; leave out --calibrate"),
        (moe, ["--denoiser-feed-forward", "experts:x", "--calibrate", text], "give experts:K"),
        (moe, ["--denoiser-feed-forward", "experts:1", "--calibrate", text], "2 are selected for a token"),
        (moe, ["--denoiser-feed-forward", "dense:9", "--calibrate", tmp_path / "none.jsonl"], "none.jsonl"),
        (dense, ["--denoiser-feed-forward", "dense:9", "--calibrate", text], "the denoiser has no MoE layers"),
        (dense, ["--denoiser-layers", "0", "--denoiser-lora", "4"], "the denoiser is adapters"),
    ):
        result = cli("init", "--from", source, "-o", tmp_path / "out", "--mask-token", str(MASK), *options)
        assert_one_line_error(result, reason)
        assert not (tmp_path / "out").exists()


def test_a_checkpoint_whose_denoiser_is_not_what_its_config_names(tmp_path: Path, cli: Cli) -> None:
    _, _ = made(source_of(tmp_path / "ar", "nemotron_h"), tmp_path / "two", denoiser_layers="0,2")
    file, weights = tmp_path / "two" / "config.json", tmp_path / "two" / "model.safetensors"
    values = json.loads(file.read_text())
    for layers, reason in (
        ([0, 1, 2], "the denoiser tower has 2 layers, but config.json has denoiser_layers [0, 1, 2]"),
        ([0, 1], "layer 1 of the denoiser tower is of another kind than config.json says"),
    ):
        file.write_text(json.dumps({**values, "denoiser_layers": layers}))
        assert_one_line_error(cli("generate", "x", "--model", tmp_path / "two"), reason)
    file.write_text(json.dumps({**values, "denoiser_layers": [0, 7]}))
    assert_one_line_error(cli("info", tmp_path / "two"), "layers 0 to 3")
    file.write_text(json.dumps(values))
    kept = load_file(weights)
    save_file({key: tensor for key, tensor in kept.items() if "denoiser_tower.layers.1" not in key}, weights)
    assert_one_line_error(cli("generate", "x", "--model", tmp_path / "two"), "the denoiser tower has 1 layers")


def test_the_page_shows_the_numbers_and_the_denoiser(tmp_path: Path, cli: Cli) -> None:
    name = "hybrid, fewer experts"
    shaped(name, torch.float32).save_pretrained(tmp_path)
    page = cli("info", tmp_path)
    assert (page.code, page.err) == (0, "")
    for words in (
        "numbers     M  0, 4",
        "E  1, 3",
        "*  2, 6",
        "denoiser    3 layers: ME*",
        "for layers 0, 1, 6 of the backbone",
        "the 4 most used experts of each MoE layer",
    ):
        assert words in page.out
    facts = json.loads(cli("info", tmp_path, "--json").out)
    assert facts["layer_numbers"]["*"] == [2, 6]
    assert facts["denoiser"]["layers"] == [0, 1, 6]
    assert facts["memory"]["float32"]["denoiser"] < facts["memory"]["float32"]["context"]
