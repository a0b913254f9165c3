"""The training loop: schedule, stages, log, trained and frozen parameters, and divergence."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_run
import torch
from tiny_run import checkpoints, column, log, run_cli, texts, two_towers, uninterrupted, weights, write_data
from torch import nn

from twotower import TwoTowerForCausalLM
from twotower.model.moe import Router
from twotower.specs import MLPSpec, MoESpec
from twotower.training import checkpoints as saving
from twotower.training import fsdp
from twotower.training.balance import LoadBalance
from twotower.training.fsdp import World
from twotower.training.optimizer import Schedule, ShardedAdamW

CONTEXT = ("context_tower.", "context_lm_head.")
LITTLE = ("--stages", "16:8", "--held-out", "0", "--checkpoint-every", "100")


@pytest.fixture
def world() -> Iterator[World]:
    yield fsdp.start("cpu")
    fsdp.stop()


# --- the optimizer -------------------------------------------------------------------------------------------------


def test_schedule_warms_up_stays_and_decays() -> None:
    schedule = Schedule(steps=1000, peak_lr=1e-3, warmup=100, decay=0.3, final_lr_ratio=0.01)
    rates = [schedule.lr(step) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-5)
    assert rates[:100] == sorted(rates[:100])
    assert rates[99:701] == pytest.approx([1e-3] * 602)
    assert rates[700:] == sorted(rates[700:], reverse=True)
    assert rates[850] == pytest.approx(1e-3 * (0.01 + 0.99 / 2))
    assert rates[-1] == pytest.approx(1e-5, rel=0.35)  # one step before the final learning rate
    assert min(rates) >= 1e-5


def test_the_norm_is_that_of_the_whole_gradient_and_large_ones_are_clipped(world: World) -> None:
    layer = nn.Linear(2, 2)
    optimizer = ShardedAdamW(layer, world, weight_decay=0.0, clip=1.0)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.tensor([[30.0, 40.0], [0.0, 0.0]])
    layer.bias.grad = torch.tensor([120.0, 0.0])
    norm = optimizer.gradient_norm()
    assert norm == pytest.approx(130.0)
    optimizer.step(0.1, norm)
    moments = optimizer.moments(layer.weight)
    torch.testing.assert_close(moments["exp_avg"], 0.1 * torch.tensor([[30.0, 40.0], [0.0, 0.0]]) / 130)
    assert layer.weight.grad is None  # cleared for the next step
    assert not layer.weight.equal(before)


def test_only_matrices_decay(world: World) -> None:
    layer = nn.Linear(3, 3)
    nn.init.ones_(layer.weight), nn.init.ones_(layer.bias)
    layer.weight.grad, layer.bias.grad = torch.zeros(3, 3), torch.zeros(3)
    optimizer = ShardedAdamW(layer, world, weight_decay=0.1, clip=0.0)
    optimizer.step(0.5, optimizer.gradient_norm())
    torch.testing.assert_close(layer.weight, torch.full((3, 3), 0.95))
    torch.testing.assert_close(layer.bias, torch.ones(3))


# --- load balance --------------------------------------------------------------------------------------------------


def skewed_router() -> Router:
    """A router that prefers the first of eight experts for any input."""
    expert = MLPSpec(width=8, activation="relu2", gated=False)
    router = Router(MoESpec(experts=8, top_k=2, expert=expert, scores="sigmoid", correction_bias=True), 8)
    with torch.no_grad():
        router.weight.normal_(0.0, 0.3)
        router.weight[0] += 1.0
    return router


def test_load_balance_moves_each_bias_towards_an_even_load(world: World) -> None:
    torch.manual_seed(0)
    router = skewed_router()
    balance = LoadBalance(router, rate=0.01, world=world)
    choice, _ = router(torch.rand(500, 8))
    load = torch.bincount(choice.flatten(), minlength=8)
    balance.step()
    torch.testing.assert_close(router.e_score_correction_bias, 0.01 * torch.sign(load.float().mean() - load))
    for _ in range(300):
        choice, _ = router(torch.rand(500, 8))
        balance.step()
    loads = torch.bincount(choice.flatten(), minlength=8)
    assert load.max() > 3 * load.float().mean()
    assert loads.max() < 1.5 * loads.float().mean()
    before = router.e_score_correction_bias.clone()
    with torch.no_grad():
        router(torch.rand(500, 8))  # validation does not count
    balance.step()
    assert router.e_score_correction_bias.equal(before)


# --- the log -------------------------------------------------------------------------------------------------------


def test_the_log_holds_every_step(capfd: pytest.CaptureFixture) -> None:
    records = log(uninterrupted("train"))
    assert [record["step"] for record in records] == list(range(1, 23))
    assert [record["block_size"] for record in records] == [32] * 8 + [16] * 14
    schedule = Schedule(steps=22, peak_lr=1e-3, warmup=3)
    assert [record["lr"] for record in records] == [schedule.lr(step) for step in range(22)]
    for record in records:
        assert 0 < record["loss"] < 2 * math.log(tiny_run.VOCABULARY)
        assert 0 < record["grad_norm"] < 100
        assert 0 < record["targets"] < 256
        assert 64 < record["tokens"] <= 256
        assert ("validation" in record) == (record["step"] in (11, 22))
    lines = (uninterrupted("train") / "log.jsonl").read_text().splitlines()
    assert all(json.loads(line)["timing"].keys() == {"seconds", "tokens_per_second"} for line in lines)


def test_training_learns() -> None:
    """The mean loss over the last steps is far below that of the first steps; so is the held-out loss."""
    loss = column(uninterrupted("train"), "loss")
    assert loss[-5:].mean() < loss[:5].mean() - 1
    held_out = [r["validation"]["masked_nll"] for r in log(uninterrupted("train")) if "validation" in r]
    assert held_out[-1] < held_out[0] - 0.3
    loss = column(uninterrupted("pretrain"), "loss")
    assert loss[-1] < loss[0] - 0.5


def test_tensorboard_reads_the_curves(tmp_path: Path) -> None:
    """A run is resumed; the repeated steps occur once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = tiny_run.given().train(tmp_path, *LITTLE, "--validate-every", "4", "--held-out", "0.05", "--tensorboard")
    args += ["--checkpoint-every", "5"]
    assert run_cli(args) == 0
    latest = saving.latest(tmp_path / "checkpoints", 8)
    assert latest is not None
    (latest / "manifest.json").unlink()
    assert run_cli(args) == 0
    curves = EventAccumulator(str(tmp_path / "tensorboard"))
    curves.Reload()
    assert {"train/loss", "train/grad_norm", "train/lr", "validation/masked_nll"} <= set(curves.Tags()["scalars"])
    for name in ("loss", "grad_norm", "lr"):
        events = curves.Scalars(f"train/{name}")
        assert [event.step for event in events] == list(range(1, 9))
        assert torch.tensor([event.value for event in events], dtype=torch.float64).allclose(column(tmp_path, name))


# --- what trains ---------------------------------------------------------------------------------------------------


def test_a_frozen_context_stays_as_it_was_and_the_denoiser_learns() -> None:
    """The context tower is unchanged, bit for bit; every tensor of the denoiser and the time conditioning changes."""
    before, after = weights(tiny_run.given().model), weights(uninterrupted("train"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert after[name].equal(tensor) == name.startswith(CONTEXT), name


def test_the_trained_checkpoint_loads_and_has_its_tokenizer() -> None:
    model = TwoTowerForCausalLM.from_pretrained(uninterrupted("train") / "model")
    own = (tiny_run.given().model / "tokenizer.json").read_bytes()
    assert (uninterrupted("train") / "model" / "tokenizer.json").read_bytes() == own
    tokens = model.generate_mask_diffusion(torch.tensor([[1, 5, 6]]), max_new_tokens=16)
    assert tokens.shape[1] > 3


def test_a_tied_network_is_both_towers(tmp_path: Path) -> None:
    assert run_cli(tiny_run.given().train(tmp_path, *LITTLE, "--tie", "--ar-weight", "0.5")) == 0
    before, after = weights(tiny_run.given().model), weights(tmp_path)
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if name.startswith(CONTEXT):
            twin = name.replace("context_lm_head", "lm_head").replace("context_tower", "denoiser_tower")
            assert tensor.equal(after[twin]), name
            assert not tensor.equal(before[name]), name


def test_a_trained_context_learns_too(tmp_path: Path) -> None:
    assert run_cli(tiny_run.given().train(tmp_path, *LITTLE, "--train-context", "--ar-weight", "0.5")) == 0
    before, after = weights(tiny_run.given().model), weights(tmp_path)
    assert [name for name in before if before[name].equal(after[name])] == []
    assert column(tmp_path, "loss")[-1] < column(tmp_path, "loss")[0]


def test_bfloat16_learns_and_keeps_the_dtype_of_the_checkpoint(tmp_path: Path) -> None:
    """Small updates are not lost, because trained weights are fp32 until the end."""
    source = two_towers(tmp_path / "source", dtype=torch.bfloat16)
    args = tiny_run.given().train(tmp_path / "run", *LITTLE, "--dtype", "bfloat16", "--lr", "3e-3", model=source)
    assert run_cli(args) == 0
    before, after = weights(source), weights(tmp_path / "run")
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert after[name].equal(tensor) == name.startswith(CONTEXT), name
    loss = column(tmp_path / "run", "loss")
    assert loss[-3:].mean() < loss[:3].mean() - 0.3


# --- divergence ----------------------------------------------------------------------------------------------------


def poisoned(directory: Path) -> tuple[Path, Path]:
    """A checkpoint whose denoiser gives NaN for one letter, and data in which the letter is rare."""
    source = two_towers(directory / "poisoned")
    model = TwoTowerForCausalLM.from_pretrained(source)
    assert model.denoiser is not None
    records = texts(300)
    for record in records[::60]:
        record["text"] += " Q" * 12
    (letter,) = set(tiny_run.tokenizer()(" Q" * 3)["input_ids"][-1:])
    with torch.no_grad():
        model.denoiser.embeddings.weight[letter] = math.nan
    model.save_pretrained(source)
    return source, write_data(directory / "rare.jsonl", records)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """The error names the last checkpoint, which is intact and unchanged."""
    source, data = poisoned(tmp_path)
    args = tiny_run.given().train(
        tmp_path / "run", *LITTLE, "--stages", "16:60", "--checkpoint-every", "2", model=source
    )
    args[args.index("--data") + 1] = str(data)
    for _ in range(2):
        assert run_cli(args) == 2
        last = capfd.readouterr().err.splitlines()[-1]
        kept = tmp_path / "run" / "checkpoints" / checkpoints(tmp_path / "run")[-1]
        step = len(log(tmp_path / "run")) + 1
        assert last == (
            f"Error: loss is nan at step {step}; the last good checkpoint is {kept}; a lower learning rate or a longer "
            "warmup may help"
        )
        assert step > 2
    assert math.isfinite(column(tmp_path / "run", "loss").sum())
    assert not (tmp_path / "run" / "model").exists()


def test_a_loss_that_is_no_number_at_once(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    source = two_towers(tmp_path / "source")
    model = TwoTowerForCausalLM.from_pretrained(source)
    assert model.denoiser is not None
    with torch.no_grad():
        model.denoiser.norm_f.weight[0] = math.inf
    model.save_pretrained(source)
    assert run_cli(tiny_run.given().train(tmp_path / "run", *LITTLE, model=source)) == 2
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("Error: loss is nan at step 1; no checkpoint was written yet")


@pytest.mark.slow
def test_a_learning_rate_that_is_far_too_high(tmp_path: Path) -> None:
    """In bf16, without clipping: the run ends with a one-line error or a finite loss."""
    args = tiny_run.given().train(tmp_path, "--lr", "0.99", "--clip", "0", "--warmup", "0", "--dtype", "bfloat16")
    done = subprocess.run([sys.executable, "-m", "twotower", *args], capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert (done.returncode, len(errors)) in ((0, 0), (2, 1)), done.stderr
    assert "Traceback" not in done.stderr
    assert math.isfinite(column(tmp_path, "loss").sum())
