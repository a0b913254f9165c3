"""Checkpoints whose denoiser is adapters: made by twotower init, trained, saved, loaded, exported, refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Result, assert_one_line_error
from safetensors.torch import load_file
from tiny_backbones import save, save_tokenizer

from twotower import GenericTwoTowerConfig, TwoTowerForCausalLM
from twotower.checkpoint.convert import convert
from twotower.checkpoint.denoiser_choices import DenoiserChoices
from twotower.denoiser_fields import AdapterConfig, DenoiserConfig, DraftHeadConfig
from twotower.errors import ArgumentError, ConfigError

MASKS = {"prediction_shift": 1, "block_attention": "prefix_causal"}
PROMPT = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module", params=["nemotron_h", "llama"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A one-tower checkpoint, and the checkpoint with adapters that is made from it."""
    folder = tmp_path_factory.mktemp(request.param)
    save(request.param, folder / "source")
    convert(folder / "source", folder / "two", mask_token=3, denoiser_lora=4, choices=DenoiserChoices(draft_head=5))
    return folder / "source", folder / "two"


def test_new_adapters_add_nothing_and_the_context_tower_is_the_source(made: tuple[Path, Path]) -> None:
    source, two = made
    plain = convert(source, two.parent / "full", mask_token=3, overwrite=True)
    model, full = (TwoTowerForCausalLM.from_pretrained(path, dtype=torch.float64) for path in (two, plain.directory))
    assert model.denoiser is None
    assert model.time is None
    assert model.has_adapters
    config = json.loads((two / "config.json").read_text())
    assert (config["model_type"], config["format"]) == ("two_tower", 1)
    assert config["adapters"] == {"rank": 4, "gate": "masks"}
    assert (config["prediction_shift"], config["block_attention"]) == (1, "prefix_causal")
    assert config["draft_head"] == {"rank": 5}
    expected = full.generate_ar(PROMPT, max_new_tokens=12)
    assert torch.equal(model.generate_ar(PROMPT, max_new_tokens=12), expected)
    verified = model.generate_verified(PROMPT, max_new_tokens=12, draft_steps=1)
    assert torch.equal(verified, expected)
    assert sum(file.stat().st_size for file in two.glob("*.safetensors")) < 0.7 * plain.bytes


def test_saved_and_loaded_again_and_exported(made: tuple[Path, Path], cli: Callable[..., Result]) -> None:
    source, two = made
    model = TwoTowerForCausalLM.from_pretrained(two)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapter." in name or "mask_embedding" in name or "draft_head" in name:
                parameter.normal_()
    model.save_pretrained(two.parent / "again")
    again = TwoTowerForCausalLM.from_pretrained(two.parent / "again")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    context = TwoTowerForCausalLM.from_pretrained(two, towers="context")
    assert not context.has_denoiser
    done = cli("export", two.parent / "again", "--to", "one-tower", "-o", two.parent / "one", "--overwrite")
    assert done.code == 0, done.err
    exported, original = load_file(two.parent / "one/model.safetensors"), load_file(source / "model.safetensors")
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"adapters": {"rank": 0}}, "adapters.rank is 0; it must be a positive integer"),
        ({"adapters": {"rank": 4, "alpha": 2}}, "adapters is .* it must be an object such as"),
        ({"adapters": 4}, "adapters is 4"),
        (
            {**MASKS, "adapters": {"rank": 4}, "draft_head": {"rank": -1}},
            "draft_head.rank is -1; it must be a positive integer",
        ),
        ({**MASKS, "adapters": {"rank": 4}, "draft_head": 8}, "draft_head is 8; it must be an object such as"),
        ({"adapters": {"rank": 4}, "format": 3}, "format is 3; this version reads up to 2, so update twotower"),
        ({"adapters": {"rank": 4}, "format": 2}, "format 2 needs denoisers, which are missing; remove format"),
        ({"adapters": {"rank": 4, "gate": "left"}}, "adapters.gate is 'left'; it must be one of masks, everywhere"),
        ({"adapters": {"rank": 4}}, 'gate "masks" need prediction_shift 1 .* "prefix_causal", not 0 and \'full\''),
        (
            {"adapters": {"rank": 4, "gate": "everywhere"}, "block_attention": "prefix_causal"},
            'gate "everywhere" need block_attention "full", not \'prefix_causal\'',
        ),
        ({"prediction_shift": 2}, "prediction_shift is 2; it must be 0 or 1"),
        ({"prediction_shift": True}, "prediction_shift is True; it must be 0 or 1"),
        ({"block_attention": "causal"}, "block_attention is 'causal'; it must be one of full, prefix_causal"),
        ({"first_from_ar": 1}, "first_from_ar is 1; it must be true or false"),
        ({"first_from_ar": True, "prediction_shift": 1}, "first_from_ar needs prediction_shift 0"),
    ],
)
def test_wrong_fields_are_one_error(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        GenericTwoTowerConfig(mask_token_id=3, **fields)


def test_released_configs_with_such_fields_are_refused(tmp_path: Path) -> None:
    save("nemotron_h", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"adapters": {"rank": 4}}))
    with pytest.raises(ConfigError, match="adapters needs model_type 'two_tower', and it is 'nemotron_h'"):
        TwoTowerForCausalLM.from_pretrained(tmp_path)


def test_a_short_training_run_lowers_the_loss_and_changes_only_adapters(
    tmp_path: Path, cli: Callable[..., Result]
) -> None:
    save("nemotron_h", tmp_path / "source", vocab_size=259)
    save_tokenizer(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "two", mask_token=4, denoiser_lora=4, choices=DenoiserChoices(draft_head=4))
    lines = [json.dumps({"prompt": "a b c", "text": f" {'d e f g ' * 6}{i}"}) for i in range(60)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    options = ("--block-size", 4, "--batch-size", 4, "--row-length", 128, "--dtype", "float32", "--held-out", 0.1)
    command = ("train", tmp_path / "two", "-o", tmp_path / "run", "--data", tmp_path / "data.jsonl", *options)
    done = cli(*map(str, (*command, "--steps", 40, "--lr", 2e-2, "--warmup", 2, "--validate-every", 20)))
    assert done.code == 0, done.err
    records = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert records[-1]["loss"] < 0.7 * records[0]["loss"]
    found = records[-1]["validation"]
    assert 0 <= found["agreement"] <= 1  # the draft head learns the text faster than this random AR model's choices
    assert 1 <= found["draft_tokens"] <= 4
    assert found["tokens_per_pass"] >= 1
    assert found["free_tokens"] >= 1
    assert 0 <= found["texts_kept"] <= 1
    before, after = (load_file(tmp_path / path / "model.safetensors") for path in ("two", "run/model"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"adapters.draft_head.previous", "adapters.draft_head.following"} < changed
    assert changed <= {name for name in before if name.startswith("adapters.")}
    for option in ("--tie", "--train-context", "--elbo"):
        refused = cli(*map(str, (*command[:2], "-o", tmp_path / "other", *command[4:], option)))
        assert refused.code == 2
        assert f"is adapters on the context tower, which is not trained; leave out {option}" in refused.err


def test_init_and_info_describe_adapters(made: tuple[Path, Path], cli: Callable[..., Result]) -> None:
    source, two = made
    for options, rank in ((("--denoiser-lora", "4"), 4), ((), 16), (("--denoiser", "adapters"), 16)):
        where = ("-o", two.parent / f"rank-{rank}", "--overwrite")
        done = cli("init", "--from", source, *where, "--mask-token", "3", *options)
        assert done.code == 0, done.err
        assert "one tower of" in done.out
        assert f"adapters of rank {rank}" in done.out
        assert "two towers" not in done.out
    for options in (("--denoiser", "tower"), ("--denoiser-layers", "every:2")):
        done = cli("init", "--from", source, "-o", two.parent / "tower", "--overwrite", "--mask-token", "3", *options)
        assert done.code == 0, done.err
        assert "adapters" not in done.out
    page = cli("info", two)
    assert page.code == 0, page.err
    assert "one network in memory" in page.out
    assert "two devices" not in page.out
    facts = json.loads(cli("info", two, "--json").out)
    model = TwoTowerForCausalLM.from_pretrained(two, dtype=torch.float32)
    parts = ".adapter.", "mask_embedding", "draft_head"
    own = [p for name, p in model.named_parameters() if any(part in name for part in parts)]
    assert model.draft_head is not None
    head = sum(p.nbytes for p in model.draft_head.parameters())
    assert facts["blocks"]["draft_head_rank"] == 5
    assert "a draft head of rank 5" in page.out
    assert ((adapters := facts["adapters"])["rank"], adapters["parameters"]) == (4, sum(p.numel() for p in own))
    assert adapters["bytes"]["float32"] == sum(p.nbytes for p in own) == facts["memory"]["float32"]["denoiser"]
    assert facts["parameters"]["both_towers"] == facts["parameters"]["per_tower"] + adapters["parameters"]
    active = facts["parameters"]["active_without_embedding"]
    assert (active == facts["parameters"]["active"]) == model.spec.tied_head
    assert adapters["read_bytes"]["float32"] == 4 * active + adapters["bytes"]["float32"] - head


def test_longrope_is_refused(tmp_path: Path, cli: Callable[..., Result]) -> None:
    save("phi3:longrope", tmp_path / "source")
    done = cli(
        "init", "--from", tmp_path / "source", "-o", tmp_path / "two", "--denoiser-lora", "4", "--mask-token", "3"
    )
    assert done.code == 2
    assert "adapters are not supported with LongRoPE" in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("mode", ["verified", "diffusion"])
def test_generate_watches_and_traces(made: tuple[Path, Path], cli: Callable[..., Result], mode: str) -> None:
    _, two = made
    save_tokenizer(two)
    picture = two.parent / "trace.svg"
    asked = ["generate", "-m", two, "a b c", "--mode", mode, "-n", "8", "--watch", "--trace", picture]
    done = cli(*asked, "--policy-value", "0.01") if mode == "diffusion" else cli(*asked)
    assert done.code == 0, done.err
    assert "block  1" in done.err
    assert "denoiser and" not in done.err
    assert picture.stat().st_size


def test_two_devices_are_refused(made: tuple[Path, Path]) -> None:
    _, two = made
    with pytest.raises(ArgumentError, match=r"denoiser device is meta and context device cpu, .* give one device"):
        TwoTowerForCausalLM.from_pretrained(two, denoiser_device="meta")
    model = TwoTowerForCausalLM.from_pretrained(two)
    with pytest.raises(ArgumentError, match="give one device"):
        model.place_towers_on_devices("cpu", "meta")
    assert model.place_towers_on_devices("cpu", "cpu") is model


@pytest.mark.parametrize("plan", ["denoiser=int4", "context=int8,denoiser=int4", "denoiser.experts=int8"])
def test_quantization_of_the_denoiser_is_refused(
    made: tuple[Path, Path], cli: Callable[..., Result], plan: str, tmp_path: Path
) -> None:
    """Adapters keep their dtype. A plan for both towers quantises the context tower."""
    said = ("quantization: ", "names the denoiser, which is adapters", "leave denoiser=… out")
    assert_one_line_error(cli("generate", "-m", made[1], "a", "-n", "2", "--quantization", plan), *said)
    assert_one_line_error(cli("quantize", made[1], "-o", tmp_path / "made", "--scheme", plan), *said)
    assert not (tmp_path / "made").exists()
    for allowed in ("int8", "context=int4", "experts=int4,rest=int8"):
        assert TwoTowerForCausalLM.from_pretrained(made[1], quantization=allowed).quantization != "none"


def test_a_plan_of_adapters(made: tuple[Path, Path], cli: Callable[..., Result]) -> None:
    done = cli("train", made[1], "--plan", "--gpus", "1")
    assert done.code == 0, done.err
    assert "fits" in done.out
    words = "adapters of rank 4, draft head of rank 5, context tower frozen; targets of"
    assert words in " ".join(done.out.split())
    assert_one_line_error(cli("train", made[1], "--plan", "--tie"), "adapters", "frozen context tower")


TOWER = ("--denoiser", "tower")
CHOICES = {
    "shift": (
        (*TOWER, "--prediction-shift", "1", "--block-attention", "prefix_causal"),
        DenoiserConfig(prediction_shift=1, block_attention="prefix_causal"),
        ("prediction shift 1: each output", "prefix-causal attention:"),
    ),
    "first": (
        (*TOWER, "--first-from-ar"),
        DenoiserConfig(first_from_ar=True),
        ("chooses the first token of each block",),
    ),
    "everywhere": (
        ("--denoiser-lora", "4", "--adapter-gate", "everywhere", "--prediction-shift", "1"),
        DenoiserConfig(prediction_shift=1, adapters=AdapterConfig(4, "everywhere")),
        ("prediction shift 1: each output", "they act at every position of a block"),
    ),
    "head": (
        (*TOWER, "--prediction-shift", "1", "--draft-head", "5"),
        DenoiserConfig(prediction_shift=1, draft_head=DraftHeadConfig(5)),
        ("prediction shift 1: each output", "a draft head of rank 5"),
    ),
    "head, fewer layers": (
        ("--denoiser-layers", "first:2", "--draft-head", "5", "--first-from-ar"),
        DenoiserConfig(first_from_ar=True, denoiser_layers=(0, 1), draft_head=DraftHeadConfig(5)),
        ("chooses the first token of each block", "a draft head of rank 5"),
    ),
    "head, everywhere": (
        ("--denoiser-lora", "4", "--adapter-gate", "everywhere", "--draft-head", "5"),
        DenoiserConfig(adapters=AdapterConfig(4, "everywhere"), draft_head=DraftHeadConfig(5)),
        ("they act at every position of a block", "a draft head of rank 5"),
    ),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_init_writes_choices_and_info_shows_them(
    made: tuple[Path, Path], choice: str, cli: Callable[..., Result]
) -> None:
    """They are read again, and other readers refuse the checkpoint by its model_type."""
    options, expected, words = CHOICES[choice]
    where = made[0].parent / choice
    done = cli("init", "--from", made[0], "-o", where, "--mask-token", "3", *options)
    assert done.code == 0, done.err
    config = json.loads((where / "config.json").read_text())
    assert (config["model_type"], config["architectures"], config["format"]) == (
        "two_tower",
        ["TwoTowerForCausalLM"],
        1,
    )
    model = TwoTowerForCausalLM.from_pretrained(where, dtype=torch.float64)
    assert model.config.denoiser == expected
    page = cli("info", where)
    assert all(each in page.out for each in words), page.out
    facts = json.loads(cli("info", where, "--json").out)
    assert facts["blocks"]["prediction_shift"] == expected.prediction_shift
    if expected.draft_head is not None:
        assert model.draft_head is not None
        assert f"draft head of rank {expected.draft_head.rank}" in done.out
        assert facts["blocks"]["draft_head_rank"] == model.draft_head.previous.shape[1] == expected.draft_head.rank
        assert not model.draft_head.following.any()  # no effect before training
    ar = model.generate_ar(PROMPT, max_new_tokens=9)
    assert torch.equal(model.generate_verified(PROMPT, max_new_tokens=9, draft_steps=1), ar)
    model.save_pretrained(where.parent / f"{choice}-again")
    assert TwoTowerForCausalLM.from_pretrained(where.parent / f"{choice}-again").config.denoiser == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((*TOWER, "--adapter-gate", "everywhere"), "adapter_gate is 'everywhere', and the denoiser is a second tower"),
        (("--prediction-shift", "0"), "--prediction-shift 0 does not go with adapters at masks"),
        (("--first-from-ar",), "--first-from-ar does not go with adapters at masks"),
        (("--block-attention", "full"), "leave it out, or give --adapter-gate everywhere or --denoiser tower"),
        ((*TOWER, "--first-from-ar", "--prediction-shift", "1"), "first_from_ar needs prediction_shift 0"),
        ((*TOWER, "--denoiser-lora", "4"), "--denoiser is tower, and --denoiser-lora makes adapters"),
        ((*TOWER, "--adapters", "x"), "--denoiser is tower, and --adapters makes adapters"),
    ],
)
def test_choices_that_exclude_each_other_are_one_line(
    made: tuple[Path, Path], options: tuple[str, ...], words: str, cli: Callable[..., Result]
) -> None:
    done = cli("init", "--from", made[0], "-o", made[0].parent / "none", "--mask-token", "3", *options)
    assert done.code == 2
    assert words in done.err
    assert done.err.count("\n") == 1
    assert not (made[0].parent / "none").exists()
