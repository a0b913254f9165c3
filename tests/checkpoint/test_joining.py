"""twotower join: several denoisers over one context tower in a checkpoint, and one of them alone again, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Result, assert_one_line_error
from safetensors.torch import load_file, save_file
from tiny_backbones import save, save_tokenizer
from torch import Tensor

from twotower import GenericTwoTowerConfig, TwoTowerForCausalLM
from twotower.checkpoint import names
from twotower.checkpoint.convert import convert
from twotower.checkpoint.denoiser_choices import DenoiserChoices
from twotower.checkpoint.join import export_denoiser, join
from twotower.checkpoint.quantized_copy import quantize_checkpoint
from twotower.errors import ArgumentError, CheckpointError, ConfigError

PROMPT = torch.tensor([[5, 6, 7, 8]])
Folders = dict[str, Path]


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def draw(folder: Path, seed: int) -> None:
    """Gives the denoiser of a new checkpoint random weights."""
    model = TwoTowerForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if names.of_adapters(name) or not name.startswith("context."):
                tensor.normal_(std=0.3)
    model.save_pretrained(folder)


@pytest.fixture(scope="module", params=["nemotron_h", "llama"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Checkpoints of one autoregressive model with a full tower, adapters with a draft head, and a shorter tower."""
    folder = tmp_path_factory.mktemp(request.param)
    save(request.param, folder / "source", vocab_size=259)
    save_tokenizer(folder / "source")
    made = {name: folder / name for name in ("full", "adapters", "short")}
    convert(folder / "source", made["full"], mask_token=3)
    convert(folder / "source", made["adapters"], mask_token=3, denoiser_lora=4, choices=DenoiserChoices(draft_head=5))
    convert(folder / "source", made["short"], mask_token=3, denoiser_layers="first:2")
    for seed, path in enumerate(made.values()):
        draw(path, seed)
    return made


@pytest.fixture(scope="module")
def joined(made: Folders) -> Path:
    path = made["full"].parent / "joined"
    join(made, path, modes={"verified": "adapters"}, max_shard_size="100KB")
    return path


def test_the_context_tower_is_stored_once_and_each_denoiser_behind_its_prefix(made: Folders, joined: Path) -> None:
    config = json.loads((joined / "config.json").read_text())
    assert (config["model_type"], config["format"], config["architectures"]) == (
        "two_tower",
        2,
        ["TwoTowerForCausalLM"],
    )
    assert config["denoiser_for"] == {"diffusion": "full", "verified": "adapters", "mock_ar": "full"}
    assert config["denoisers"]["full"] == {}
    assert config["denoisers"]["adapters"]["draft_head"] == {"rank": 5}
    assert config["denoisers"]["short"] == {"denoiser_layers": [0, 1]}
    found = tensors(joined)
    sources = {name: tensors(path) for name, path in made.items()}
    context = {name for name in found if not name.startswith("denoisers.")}
    assert context == {name for name in sources["full"] if name.startswith("context_")}
    for name, tensor in found.items():
        _, own, disk = name.split(".", 2) if name not in context else ("", "full", name)
        assert torch.equal(tensor, sources[own][disk])
    assert len(found) == len(context) + sum(len(each) - len(context) for each in sources.values())
    assert len(list(joined.glob("*.safetensors"))) > 1
    assert (joined / "tokenizer.json").read_bytes() == (made["full"] / "tokenizer.json").read_bytes()


def test_one_denoiser_alone_is_its_source_bit_for_bit(made: Folders, joined: Path) -> None:
    for name, path in made.items():
        out = joined.parent / f"alone-{name}"
        export_denoiser(joined, out, name)
        assert (out / "config.json").read_bytes() == (path / "config.json").read_bytes()
        assert sorted(file.name for file in out.iterdir()) == sorted(file.name for file in path.iterdir())
        own, source = tensors(out), tensors(path)
        assert own.keys() == source.keys()
        assert all(own[key].dtype == source[key].dtype and torch.equal(own[key], source[key]) for key in source)


def test_a_joined_checkpoint_is_loaded_saved_and_quantised(made: Folders, joined: Path) -> None:
    model = TwoTowerForCausalLM.from_pretrained(joined, dtype=torch.float64)
    for name, path in made.items():
        alone = TwoTowerForCausalLM.from_pretrained(path, dtype=torch.float64)
        loaded = TwoTowerForCausalLM.from_pretrained(joined, dtype=torch.float64, denoiser=name)
        assert all(
            torch.equal(a, b) for a, b in zip(alone.state_dict().values(), loaded.state_dict().values(), strict=True)
        )
        expected = alone.generate_mask_diffusion(PROMPT, max_new_tokens=12)
        for other in (loaded, model.with_denoiser(name)):
            assert torch.equal(other.generate_mask_diffusion(PROMPT, max_new_tokens=12), expected)
        assert torch.equal(model.generate_mask_diffusion(PROMPT, max_new_tokens=12, denoiser=name), expected)
    again = joined.parent / "again"
    TwoTowerForCausalLM.from_pretrained(joined).save_pretrained(again)
    assert (again / "config.json").read_text() == (joined / "config.json").read_text()
    found, stored = tensors(again), tensors(joined)
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], stored[name]) for name in stored)
    context = TwoTowerForCausalLM.from_pretrained(joined, towers="context", dtype=torch.float64)
    assert not context.has_denoiser
    assert torch.equal(context.generate_ar(PROMPT, max_new_tokens=9), model.generate_ar(PROMPT, max_new_tokens=9))
    with pytest.raises(ArgumentError, match="only the context tower is loaded"):
        context.generate_verified(PROMPT, max_new_tokens=9)
    quantize_checkpoint(joined, joined.parent / "int8", "int8", overwrite=True)
    texts = []
    for source, plan in ((joined.parent / "int8", None), (joined, "int8")):
        whole = TwoTowerForCausalLM.from_pretrained(source, quantization=plan)
        one = TwoTowerForCausalLM.from_pretrained(source, quantization=plan, denoiser="short")
        assert whole.quantization == one.quantization == "int8"
        texts += [
            each.generate_mask_diffusion(PROMPT, max_new_tokens=12) for each in (whole.with_denoiser("short"), one)
        ]
    assert all(torch.equal(text, texts[0]) for text in texts)
    with pytest.raises(CheckpointError, match="twotower export needs the original checkpoint"):
        export_denoiser(joined.parent / "int8", joined.parent / "none", "short")


def test_the_commands(made: Folders, joined: Path, cli: Callable[..., Result]) -> None:
    out = joined.parent / "by-command"
    done = cli("join", *(f"{name}={path}" for name, path in made.items()), "--for", "verified=adapters", "-o", out)
    assert done.code == 0, done.err
    assert "denoiser adapters: " in done.out
    assert ", for mode verified" in done.out
    assert (out / "config.json").read_text() == (joined / "config.json").read_text()
    done = cli("export", out, "--to", "denoiser", "--denoiser", "short", "-o", joined.parent / "short-again", "--json")
    assert done.code == 0, done.err
    assert tensors(joined.parent / "short-again").keys() == tensors(made["short"]).keys()
    done = cli("export", out, "--to", "one-tower", "-o", joined.parent / "one")
    assert done.code == 0, done.err
    one, source = tensors(joined.parent / "one"), tensors(joined.parent / "source")
    assert one.keys() == source.keys()
    assert all(torch.equal(one[name], source[name]) for name in source)
    facts = json.loads(cli("info", out, "--json").out)
    by_name = {each["name"]: each for each in facts["denoisers"]}
    assert by_name["adapters"]["modes"] == ["verified", "auto"]
    assert by_name["adapters"]["adapters"]["rank"] == 4
    assert by_name["short"]["denoiser"]["layers"] == [0, 1]
    memory = facts["memory"]["float32"]
    assert memory["both"] == memory["context"] + sum(each["bytes"]["float32"] for each in by_name.values())
    assert memory["context"] < by_name["adapters"]["read_bytes"]["float32"] + 4 * 259 * 48 * 2
    assert by_name["short"]["read_bytes"]["float32"] < by_name["full"]["read_bytes"]["float32"]
    page = cli("info", out).out
    for words in ("full: for mode diffusion, mock_ar", "short: used by its name only", "adapters: its own weights"):
        assert words in page
    lines = [json.dumps({"prompt": "ab", "denoiser": name, "mode": "diffusion"}) for name in (*made, "none")]
    (joined.parent / "prompts.jsonl").write_text("\n".join(lines))
    assert cli("batch", joined.parent / "prompts.jsonl", "-m", out, "-o", out / "answers", "-n", 6).code == 0
    answers = [json.loads(line) for line in (out / "answers").read_text().splitlines()]
    assert "denoiser is 'none'; this model has the denoisers" in answers.pop()["error"]
    texts = [cli("generate", "ab", "-m", out, "-n", 6, "--denoiser", name, "--dtype", "float32").out for name in made]
    alone = [cli("generate", "ab", "-m", path, "-n", 6, "--dtype", "float32").out for path in made.values()]
    assert texts == alone == [answer["text"] + "\n" for answer in answers]


def test_wrong_commands_are_one_line_each(made: Folders, joined: Path, cli: Callable[..., Result]) -> None:
    full, out = made["full"], joined.parent / "none"
    for arguments, words in (
        (("join", f"a={full}", "-o", out), "one denoiser needs no joining"),
        (("join", f"a={full}", f"a={full}", "-o", out), "a is given twice"),
        (("join", f"a={full}", str(full), "-o", out), "is not of the form NAME=MODEL"),
        (("join", f"a={full}", f"b.c={full}", "-o", out), "the name 'b.c'; a name has 1 to 64 letters"),
        (("join", f"a={full}", f"b={full}", "--for", "ar=a", "-o", out), "denoiser_for has 'ar'; the modes with"),
        (("join", f"a={full}", f"b={full}", "--for", "auto=c", "-o", out), "denoiser_for.auto is 'c'; it must be one"),
        (("join", f"a={full}", f"b={joined}", "-o", out), "the model has the denoisers adapters, full and short"),
        (("export", joined, "--to", "denoiser", "-o", out), "--denoiser NAME and --to denoiser belong together"),
        (("export", joined, "--to", "denoiser", "--denoiser", "x", "-o", out), "denoiser is 'x'; this model has the"),
        (("export", full, "--to", "denoiser", "--denoiser", "x", "-o", out), "has one denoiser already"),
        (("export", joined, "--to", "peft", "-o", out), "and one is needed; name it"),
        (
            ("train", joined, "-o", out, "--data", "none.jsonl"),
            f"write it alone: twotower export {joined} --to denoiser --denoiser adapters -o DIR",
        ),
        (
            ("generate", "ab", "-m", joined, "--denoiser", "x"),
            "denoiser is 'x'; this model has the denoisers adapters,",
        ),
        (("generate", "ab", "-m", full, "--denoiser", "x"), "denoiser is 'x', and this model has one denoiser"),
    ):
        assert_one_line_error(cli(*arguments), words)
        assert not out.exists()
    done = cli("serve", "-m", joined, "--port", 0, "--setting", "verified:denoiser=x")  # it says first what is missing
    assert done.code == 2
    assert "Error: denoiser is 'x'; this model has the denoisers adapters, full and short" in done.err


def test_other_context_towers_are_refused(made: Folders, tmp_path: Path) -> None:
    full, other = made["full"], tmp_path / "other"
    model = TwoTowerForCausalLM.from_pretrained(made["adapters"])
    with torch.no_grad():
        model.context.norm_f.weight[3] = torch.nextafter(model.context.norm_f.weight[3], torch.tensor(9.0))
    model.save_pretrained(other)
    with pytest.raises(CheckpointError, match=r"context_tower\.norm(_f)?\.weight differs from that of"):
        join({"a": full, "b": other}, tmp_path / "none")
    convert(full.parent / "source", other, mask_token=4, overwrite=True)
    with pytest.raises(ConfigError, match="mask_token_id is 4, and 3 in"):
        join({"a": full, "b": other}, tmp_path / "none")
    save("qwen3", tmp_path / "qwen", vocab_size=259)
    convert(tmp_path / "qwen", other, mask_token=3, overwrite=True)
    with pytest.raises(ConfigError, match="its context tower has other layers or options"):
        join({"a": full, "b": other}, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_differs_beside_the_weights_is_noted(made: Folders, tmp_path: Path) -> None:
    other = tmp_path / "other"
    export_like(made["adapters"], other, {"eos_token_id": 9})
    (other / "generation_config.json").write_text('{"temperature": 0.5}')
    done = join({"a": made["full"], "b": other}, tmp_path / "out")
    assert [note.split(";")[0] for note in done.notes] == [
        "eos_token_id of config.json differs",
        "generation_config.json differs",
    ]
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == 2


def export_like(source: Path, target: Path, changed: dict[str, Any]) -> None:
    """Copies a checkpoint with changed keys of config.json."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changed))


def test_tensors_that_do_not_fit_are_named(joined: Path, tmp_path: Path) -> None:
    whole = tensors(joined)
    config = json.loads((joined / "config.json").read_text())

    def error(found: dict[str, Tensor], changed: dict[str, Any]) -> str:
        save_file(found, tmp_path / "model.safetensors", {"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises((CheckpointError, ConfigError)) as caught:
            TwoTowerForCausalLM.from_pretrained(tmp_path)
        return str(caught.value)

    lost = next(name for name in whole if name.startswith("denoisers.adapters.adapters.0"))
    assert f"{lost} is missing" in error({name: t for name, t in whole.items() if name != lost}, {})
    without = {name: t for name, t in whole.items() if not name.startswith("denoisers.short.")}
    assert "the denoiser tower has 0 layers, but config.json has denoiser_layers [0, 1]" in error(without, {})
    extra = whole | {"denoisers.other.t_embedder.x": torch.zeros(1)}
    assert "denoisers.other.t_embedder.x is not a tensor of a model with this config" in error(extra, {})
    layers = {"short": {"denoiser_layers": [0, 99]}}
    assert "denoiser_layers has 99; the autoregressive model has layers 0 to" in error(
        whole, {"denoisers": config["denoisers"] | layers}
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"denoisers": {"a": {}}}, "denoisers is .* at least two denoisers by name"),
        ({"denoisers": []}, "denoisers is .* at least two denoisers by name"),
        ({"denoisers": {"a": {}, "b c": {}}}, "denoisers has the name 'b c'; a name has 1 to 64 letters"),
        ({"denoisers": {"a": {}, "b": 3}}, "denoisers.b is 3; it must be an object"),
        ({"denoisers": {"a": {}, "b": {"depth": 3}}}, "denoisers.b has 'depth'; the fields of a denoiser are"),
        ({"denoisers": {"a": {}, "b": {"format": 1}}}, "denoisers.b has 'format'"),
        (
            {"denoisers": {"a": {}, "b": {"block_size": 0}}},
            "denoisers.b.block_size is 0; it must be a positive integer",
        ),
        ({"denoisers": {"a": {}, "b": {"prediction_shift": 2}}}, "denoisers.b: prediction_shift is 2; it must be 0 or"),
        ({"denoisers": {"a": {}, "b": {"adapters": {"rank": 2}}}}, 'denoisers.b: adapters with gate "masks" need'),
        ({"denoiser_for": None}, "denoiser_for is None; it must be an object with the name of a denoiser for each of"),
        ({"denoiser_for": {"ar": "a"}}, "denoiser_for has 'ar'; the modes with a denoiser are"),
        ({"denoiser_for": {"diffusion": "a"}}, "denoiser_for has no verified; add the name of its denoiser"),
        (
            {"denoiser_for": {"diffusion": "a", "verified": "c", "mock_ar": "a"}},
            "denoiser_for.verified is 'c'; it must be one of the denoisers a, b",
        ),
        ({"prediction_shift": 1}, "prediction_shift stands beside denoisers; move it to the denoiser"),
        ({"block_size": 4}, "block_size stands beside denoisers; move it to the denoiser"),
        ({"format": 1}, "format is 1; a config with denoisers has format 2"),
        ({"format": 3}, "format is 3; this version reads up to 2, so update twotower"),
        ({"denoisers": None}, "denoiser_for needs denoisers, which are missing; remove denoiser_for"),
        ({"denoisers": None, "denoiser_for": None, "format": 2}, "format 2 needs denoisers, which are missing"),
    ],
)
def test_wrong_fields_are_one_error(fields: dict[str, Any], words: str) -> None:
    good: dict[str, Any] = {
        "denoisers": {"a": {}, "b": {"prediction_shift": 1}},
        "denoiser_for": {"diffusion": "a", "verified": "b", "mock_ar": "a"},
    }
    config = GenericTwoTowerConfig(mask_token_id=3, **good)
    assert config.denoisers is not None
    assert config.denoisers.of_mode("auto") == "b"
    assert config.with_denoiser("b").denoiser.prediction_shift == 1
    with pytest.raises(ConfigError, match=words):
        GenericTwoTowerConfig(mask_token_id=3, **(good | fields))
