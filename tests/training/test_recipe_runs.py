"""Runs with recipes: of adapters and of a full denoiser, resumed, in two processes, and refused."""

from __future__ import annotations

import functools
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_run
import torch
from tiny_backbones import two_tower
from tiny_run import checkpoints, column, launch, log, log_text, model_bytes, run_cli, two_towers, weights

from twotower.denoiser_fields import DenoiserConfig, DraftHeadConfig

SLOW = pytest.mark.slow
EVERYTHING = (
    "--patterns", "levels+clipped+draft+prefix+complementary:2", "--clip-levels", "0.2,0.9",
    "--targets", "tokens:0.3+kl:0.3+tv:0.2+acceptance:0.2", "--position-decay", "4", "--alignment", "0.5",
    "--block-starts", "anywhere",
)  # fmt: skip
SHORT = (
    "--stages", "16:3,8:3", "--dtype", "float64", "--validate-every", "0", "--generate", "--checkpoint-every", "3",
)  # fmt: skip


DENOISERS = {
    "adapters": DenoiserConfig.with_adapters(3),
    "everywhere": replace(DenoiserConfig.with_adapters(3, "everywhere"), prediction_shift=1),
    "shifted": DenoiserConfig(prediction_shift=1, block_attention="prefix_causal", draft_head=DraftHeadConfig(4)),
}


@functools.cache
def source(kind: str) -> Path:
    """A float64 checkpoint with a tokenizer, and a denoiser of a kind of DENOISERS, or a full one as released."""
    directory = tiny_run.folder() / f"recipes-{kind}"
    if kind == "full":
        return two_towers(directory, "M*E", torch.float64)
    vocabulary = {"vocab_size": tiny_run.VOCABULARY}
    model = two_tower("nemotron_h", torch.float64, seed=3, denoiser=DENOISERS[kind], **vocabulary)
    own = tiny_run.tokenizer()
    for name in ("bos", "eos", "pad", "mask"):
        setattr(model.config, f"{name}_token_id", getattr(own, f"{name}_token_id"))
    model.save_pretrained(directory)
    own.save_pretrained(directory)
    return directory


@functools.cache
def whole_run(kind: str) -> Path:
    output = tiny_run.folder() / f"recipes-run-{kind}"
    assert run_cli(tiny_run.given().train(output, *SHORT, *EVERYTHING, model=source(kind))) == 0
    return output


@pytest.mark.parametrize(
    "kind", ["adapters", "shifted", *(pytest.param(k, marks=SLOW) for k in ("full", "everywhere"))]
)
def test_a_resumed_run_ends_with_the_same_bits(kind: str, tmp_path: Path) -> None:
    whole, output = whole_run(kind), tmp_path / "run"
    found = log(whole)[-1]["validation"]
    if kind == "adapters":
        assert 1 <= found["draft_tokens"] <= 8
        assert 0 <= found["texts_kept"] <= 1
        assert found["free_tokens"] > 0
        assert 0 <= found["ar_accuracy"] <= 1
    else:
        assert found["tokens_per_pass"] > 0
        assert found["masked_nll"] > 0
        assert 0 <= found["agreement"] <= 1
    shutil.copytree(whole, output)
    shutil.rmtree(output / "model")
    shutil.rmtree(output / "checkpoints" / checkpoints(output)[-1])
    assert run_cli(tiny_run.given().train(output, *SHORT, *EVERYTHING, model=source(kind))) == 0
    assert log_text(output) == log_text(whole)
    assert model_bytes(output) == model_bytes(whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", *DENOISERS])
def test_two_processes_give_the_losses_of_one(kind: str, tmp_path: Path) -> None:
    one, two = whole_run(kind), tmp_path / "run"
    hard = ("--micro-batch-size", "1", "--activation-checkpointing")
    launched = launch(tiny_run.given().train(two, *SHORT, *EVERYTHING, *hard, model=source(kind)), tmp_path / "said", 2)
    assert launched.codes() == [0, 0], launched.stderr()
    for name in ("step", "targets", "tokens", "block_size"):
        assert column(one, name).equal(column(two, name)), name
    for name in ("loss", "grad_norm"):
        torch.testing.assert_close(column(one, name), column(two, name), rtol=1e-9, atol=0)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(two)[name], rtol=0, atol=1e-8)
    a, b = (log(run)[-1]["validation"] for run in (one, two))
    assert a.get("texts_kept") == b.get("texts_kept")


def test_only_other_choices_are_other_settings(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    whole, output = whole_run("adapters"), tmp_path / "run"
    shutil.copytree(whole, output)
    other = [*EVERYTHING, "--targets", "kl"]
    assert run_cli(tiny_run.given().train(output, *SHORT, *other, model=source("adapters"))) == 2
    said = capfd.readouterr().err
    assert "contains a run with targets 'tokens:0.3+kl:0.3+tv:0.2+acceptance:0.2', and this command has 'kl'" in said


BAD = {
    "unknown pattern": (("--patterns", "draft:0.5+half"), "the mixture of patterns is 'draft:0.5+half', with the part"),
    "unknown target": (("--targets", "l2"), "names among tokens, kl, tv, acceptance"),
    "limits": (("--clip-levels", "0.3"), "clip_levels is '0.3'; give LOW,HIGH, like 0.3,0.8"),
    "the bound with patterns": (("--elbo", "--patterns", "draft"), "is for random levels only; leave out the patterns"),
    "the bound with a teacher": (("--elbo", "--targets", "kl"), "is the likelihood of tokens, with equal weights"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_choice_without_meaning_is_one_line(name: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    options, message = BAD[name]
    assert run_cli(tiny_run.given().train(tmp_path / "run", *options)) == 2
    said = capfd.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("option", ["--elbo", "--tie"])
def test_what_a_draft_head_excludes_is_one_line(option: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    given = tiny_run.given().train(tmp_path / "run", *SHORT, option, model=source("shifted"))
    assert run_cli(given) == 2
    said = capfd.readouterr().err
    assert "its denoiser has a draft head" in said
    assert f"leave out {option}" in said
    assert said.count("\n") == 1
