"""Runs of `twotower train` on backbones of other families than Nemotron-H, from `twotower init` to a text."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from safetensors.torch import load_file
from test_resume import assert_same_end, partial, steps_logged
from test_train_cli import complaint
from test_two_processes import deviation, difference, run_two
from tiny_backbones import SHAPES, hf_config
from tiny_run import column, launch, run_cli
from transformers import AutoModelForCausalLM

from twotower import TwoTowerForCausalLM

# Tied head; tied head with caps and factors; experts; gated attention, gated DeltaNet and experts.
FAMILIES = ("llama", "gemma2", "mixtral", "qwen3_next:options")


@cache
def two_towers(name: str) -> Path:
    """The two-tower checkpoint that `twotower init` makes of a tiny model of transformers, with a tokenizer."""
    folder = tiny_run.folder() / f"backbone-{name}"
    torch.manual_seed(0)
    options = SHAPES[name] | {"vocab_size": tiny_run.VOCABULARY, "initializer_range": 0.05}
    AutoModelForCausalLM.from_config(hf_config(name, options)).save_pretrained(folder / "ar")
    tiny_run.tokenizer().save_pretrained(folder / "ar")
    assert run_cli(["init", "--from", str(folder / "ar"), "-o", str(folder / "two"), "--denoiser", "tower"]) == 0
    return folder / "two"


@cache
def whole_run(name: str) -> Path:
    """An uninterrupted run; do not change it."""
    output = tiny_run.folder() / f"backbone-{name}" / "run"
    assert run_cli(tiny_run.given().train(output, model=two_towers(name))) == 0
    return output


def config(directory: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return read


@pytest.mark.parametrize("name", FAMILIES)
def test_from_init_to_a_text(name: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """The loss falls; the result has the format of its source, the frozen context tower, and generates."""
    run, source = whole_run(name), two_towers(name)
    losses = column(run, "loss")
    assert losses[-4:].mean() < losses[:4].mean() - 0.5
    assert config(run / "model") == config(source)
    assert config(run / "model")["model_type"] == "two_tower"
    before, after = load_file(source / "model.safetensors"), load_file(run / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    assert "denoiser_tower.layers.0.self_attn.q_proj.weight" in after
    tied = SHAPES[name].get("tie_word_embeddings", name.startswith("gemma"))
    assert ("lm_head.weight" in after) != tied
    assert {key for key in after if after[key].equal(before[key])} == {
        key for key in after if key.startswith("context")
    }
    capfd.readouterr()
    options = ["--model", str(run / "model"), "--max-new-tokens", "16", "--dtype", "float32"]
    assert run_cli(["generate", *options, "Ada and Bo"]) == 0
    model = TwoTowerForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == after.keys()
    assert all(again[key].equal(after[key]) for key in after)
    assert config(tmp_path / "again") == config(run / "model")


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_run_in_bf16_keeps_the_frozen_tower_of_an_fp32_source(name: str, tmp_path: Path) -> None:
    """Training computes with rounded weights, but writes those of its source: the export is the source's model."""
    source = two_towers(name)
    assert (
        run_cli([*tiny_run.given().train(tmp_path / "run", model=source), "--dtype", "bfloat16", "--steps", "2"]) == 0
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "run" / "model"))
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype
        assert after[key].equal(tensor) == key.startswith("context")


@pytest.mark.parametrize("name", [FAMILIES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES[1:])])
def test_a_killed_run_ends_as_one_that_was_not(name: str, tmp_path: Path) -> None:
    """Killed after some steps, and while a checkpoint is written."""
    args, output = tiny_run.given().train(tmp_path / "run", model=two_towers(name)), tmp_path / "run"
    assert launch(args, tmp_path / "said").kill_when(lambda: steps_logged(output) >= 5)
    assert launch(args, tmp_path / "said").kill_when(lambda: steps_logged(output) >= 12 and bool(partial(output)))
    last = launch(args, tmp_path / "said")
    assert last.codes() == [0]
    assert any(line.startswith("resuming after step") for line in last.stderr())
    assert_same_end(output, whole_run(name))


@cache
def without_layers() -> Path:
    """A denoiser with two of four layers of a hybrid, and dense MLPs instead of experts."""
    source, target = two_towers("granitemoehybrid").parent / "ar", tiny_run.folder() / "without-layers"
    shape = ["--denoiser-layers", "1,3", "--denoiser-feed-forward", "dense:40", "--calibration-tokens", "4000"]
    data = ["--calibrate", str(tiny_run.given().data)]
    assert run_cli(["init", "--from", str(source), "-o", str(target), *shape, *data]) == 0
    return target


@cache
def run_without_layers() -> Path:
    output = tiny_run.folder() / "run-without-layers"
    assert run_cli(tiny_run.given().train(output, model=without_layers())) == 0
    return output


def test_a_denoiser_that_lacks_layers_from_init_to_export(tmp_path: Path) -> None:
    """The loss falls; the source is exported again bit for bit; a run that is stopped ends as one that was not."""
    run, source = run_without_layers(), without_layers()
    losses = column(run, "loss")
    assert losses[-4:].mean() < losses[:4].mean() - 0.5
    assert config(run / "model") == config(source)
    before, after = load_file(source / "model.safetensors"), load_file(run / "model" / "model.safetensors")
    assert {key for key in after if after[key].equal(before[key])} == {
        key for key in after if key.startswith("context")
    }
    exported = []
    for model in (run / "model", two_towers("granitemoehybrid")):
        target = tmp_path / f"{len(exported)}"
        assert run_cli(["export", str(model), "--to", "one-tower", "-o", str(target)]) == 0
        exported.append((target / "model.safetensors").read_bytes())
    assert exported[0] == exported[1]
    args, output = tiny_run.given().train(tmp_path / "run", model=source), tmp_path / "run"
    assert launch(args, tmp_path / "said").kill_when(lambda: steps_logged(output) >= 9)
    assert launch(args, tmp_path / "said").codes() == [0]
    assert_same_end(output, run)


def test_tying_a_denoiser_that_lacks_layers_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    args = tiny_run.given().train(tmp_path / "run", "--tie", model=without_layers())
    assert complaint(args, capfd).endswith("its denoiser has other layers than the context tower; leave out --tie")


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--train-context",)])
def test_two_processes_and_a_denoiser_that_lacks_layers(more: tuple[str, ...], tmp_path: Path) -> None:
    one = tmp_path / "one"
    assert run_cli(tiny_run.given().train(one, *more, model=without_layers())) == 0
    hard = ("--micro-batch-size", "1", "--activation-checkpointing", "--checkpoint-every", "100")
    run_two(tiny_run.given().train(tmp_path / "two", *more, *hard, model=without_layers()), tmp_path / "said")
    assert deviation(one, tmp_path / "two") < 1e-5
    assert difference(one, tmp_path / "two") < 2e-5


@pytest.mark.slow
def test_two_processes_with_a_tied_head(tmp_path: Path) -> None:
    """The embedding, which cannot be shared evenly, is one sharded parameter with both gradients."""
    args = tiny_run.given().train(
        tmp_path / "two", "--micro-batch-size", "1", "--activation-checkpointing", "--checkpoint-every", "100",
        model=two_towers("gemma2"),
    )  # fmt: skip
    run_two(args, tmp_path / "said")
    assert deviation(whole_run("gemma2"), tmp_path / "two") < 1e-5
    assert difference(whole_run("gemma2"), tmp_path / "two") < 2e-5


@pytest.mark.parametrize("option", ["--tie", "--train-context"])
def test_a_tied_backbone_trains_its_context_too(option: str, tmp_path: Path) -> None:
    args = tiny_run.given().train(
        tmp_path / "run", option, "--ar-weight", "0.5", "--stages", "16:3", model=two_towers("llama")
    )
    assert run_cli(args) == 0
    before, after = (load_file(p / "model.safetensors") for p in (two_towers("llama"), tmp_path / "run" / "model"))
    assert before.keys() == after.keys()
    for name in after:
        assert not after[name].equal(before[name]), name
        if name.startswith("context_tower."):
            other = after[name.replace("context_tower.", "denoiser_tower.")]
            assert after[name].equal(other) == (option == "--tie")


def test_a_router_without_biases_is_not_balanced(capfd: pytest.CaptureFixture, tmp_path: Path) -> None:
    """One line says so, unless no balancing is asked for."""
    for rate, said in (("0.001", 1), ("0", 0)):
        capfd.readouterr()
        args = tiny_run.given().train(
            tmp_path / rate, "--balance-rate", rate, "--stages", "16:1", "--held-out", "0", model=two_towers("mixtral")
        )
        assert run_cli(args) == 0
        lines = capfd.readouterr().err.splitlines()
        assert sum("the routers of this model have no selection biases" in line for line in lines) == said


def test_another_configuration_under_the_same_name_is_named(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    model = tmp_path / "two"
    model.mkdir()
    for file in two_towers("llama").iterdir():
        (model / file.name).symlink_to(file)
    args = tiny_run.given().train(tmp_path / "run", "--stages", "16:1", "--held-out", "0", model=model)
    assert run_cli(args) == 0
    changed = config(model)
    changed["backbone"]["rope_parameters"]["rope_theta"] = 2e4
    (model / "config.json").unlink()
    (model / "config.json").write_text(json.dumps(changed))
    assert "contains a run with config.rope_parameters" in complaint(args, capfd)


@pytest.mark.parametrize("model_type", ["llama", "two_tower"])
def test_pretrain_is_for_nemotron_h(model_type: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": model_type, "backbone": {"model_type": "llama"}, "mask_token_id": 3}))
    args = tiny_run.given().pretrain(tmp_path / "run", "--config", str(file))
    assert complaint(args, capfd) == (
        f"{file}: model_type is '{model_type}'; twotower pretrain trains only 'nemotron_h' from scratch. "
        "Make two towers of a trained model with twotower init"
    )


# --- train --plan --------------------------------------------------------------------------------------------------


def plan(*options: str, capfd: pytest.CaptureFixture) -> dict[str, Any]:
    capfd.readouterr()
    assert run_cli(["train", str(two_towers("gemma2")), "--plan", "--json", "--row-length", "64", *options]) == 0
    read: dict[str, Any] = json.loads(capfd.readouterr().out)
    return read


def test_the_plan_has_the_parameters_of_the_checkpoint(capfd: pytest.CaptureFixture) -> None:
    """A tied head counts once."""
    model = TwoTowerForCausalLM.from_pretrained(two_towers("gemma2"))
    assert model.denoiser is not None
    assert model.time is not None
    sizes = {
        name: sum(p.numel() for p in part.parameters()) for name, part in (("d", model.denoiser), ("t", model.time))
    }
    counted = plan(capfd=capfd)["parameters"]
    assert counted["per_tower"] == sizes["d"]
    assert counted["trained"] == sizes["d"] + sizes["t"]


def test_the_plan_honours_batch_size_dtype_and_stages(capfd: pytest.CaptureFixture) -> None:
    usual = plan(capfd=capfd)
    assert (usual["setup"]["batch_size"], usual["setup"]["dtype"]) == (None, "bfloat16")
    chosen = plan("--batch-size", "32", "--dtype", "float32", "--stages", "8:3,8:4", "--gpus", "4", capfd=capfd)
    setup = chosen["setup"]
    assert (setup["batch_size"], setup["dtype"], setup["block_size"], setup["gpus"]) == (32, "float32", 8, 4)
    assert chosen["memory"]["root"] == 2 * usual["memory"]["root"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--dtype", "float64"), "dtype is 'float64'; choose one of bfloat16, float32"),
        (("--batch-size", "4"), "batch_size is 4, fewer than 8 GPUs; give at least one row a GPU"),
        (("--stages", "32:1,16:1"), "--plan plans one block size, and --stages has 16, 32; give --block-size instead"),
        (("--ar-weight", "1", "--tie"), "--plan does not count the next-token loss of --ar-weight"),
    ],
)
def test_the_plan_refuses_what_it_cannot_plan(
    options: tuple[str, ...], said: str, capfd: pytest.CaptureFixture
) -> None:
    assert said in complaint(["train", str(two_towers("gemma2")), "--plan", *options], capfd)
