"""Validation: equal to a slow count, the same for any number of processes, and without effect on training."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_random_model
from tiny_backbones import two_tower

from twotower import TwoTowerForCausalLM
from twotower.errors import ArgumentError
from twotower.training import fsdp
from twotower.training.data import Batch, Document, collate, to_piece
from twotower.training.fsdp import World
from twotower.training.objective import AutoregressiveObjective, DenoisingObjective, DenoisingOptions
from twotower.training.optimizer import Schedule
from twotower.training.trainer import Stage, TrainerOptions, train
from twotower.training.validation import AutoregressiveValidation, DenoisingValidation
from twotower.training.validation.denoising import LEVELS, _at_level, _uniform
from twotower.training.validation.samples import cut_prompts

BOS, EOS, MASK, BLOCK, LENGTH = 1, 2, 3, 4, 32
PATTERN = "M*E-"  # no denoiser layer reads the last two context layers


def held_out(world: World, rows: int = 4) -> list[Batch]:
    """Two batches of `rows` rows over all processes; each row has a document with a prompt and one without."""
    rng = np.random.default_rng(0)
    batches = []
    for first in (0, rows):
        packed = []
        for _ in range(rows):
            words = rng.integers(4, 64, 12 + 8)
            prompted = Document(np.append(words[:11], EOS).astype(np.int32), context=6, prompted=True)
            plain = Document(np.concatenate([[BOS], words[12:], [EOS]]).astype(np.int32), context=1)
            packed.append([to_piece(prompted, BLOCK, "fixed"), to_piece(plain, BLOCK, "fixed")])
        own = range(world.rank, rows, world.size)
        batches.append(collate([packed[i] for i in own], [first + i for i in own], LENGTH, BLOCK, eos=EOS, pad=0))
    return batches


def build(
    world: World, tie: bool = False, backbone: str | None = None, **options: Any
) -> tuple[DenoisingObjective, DenoisingValidation]:
    model = build_random_model(PATTERN) if backbone is None else two_tower(backbone)
    model.denoiser = model.context if tie else model.denoiser
    assert model.denoiser is not None
    assert model.time is not None
    given = DenoisingOptions(mask_token_id=MASK, **options)
    objective = DenoisingObjective(model.context, model.denoiser, model.time, given)
    validation = DenoisingValidation(
        model, objective, {"a": held_out(world)}, world, block_size=BLOCK, eos_token_id=EOS,
        prompts=3, max_new_tokens=10,
    )  # fmt: skip
    return objective, validation


class Endless:
    """A loader that repeats the same rows."""

    def __init__(self, world: World) -> None:
        self.batch = held_out(world)[0]

    def set_block_size(self, block_size: int) -> None: ...

    def next(self) -> Batch:
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def run(directory: Path, world: World, validated: bool, **options: Any) -> tuple[list[dict[str, Any]], float]:
    """Trains three steps; returns the log and the trained weights."""
    directory.mkdir(parents=True, exist_ok=True)
    objective, validation = build(world, **options)
    course = TrainerOptions(
        directory=directory, schedule=Schedule(steps=3, peak_lr=1e-2, warmup=1), stages=(Stage(BLOCK, 3),),
        checkpoint_every=3, validate_every=2, tensorboard=False,
    )  # fmt: skip
    fsdp.shard(objective, objective.units, world, torch.float32)
    train(course, objective, Endless(world), world, validation if validated else None)
    learned = sum(fsdp.full(p.detach()).double().square().sum().item() for p in objective.parameters())
    world.barrier()
    lines = (directory / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], learned


@pytest.fixture(scope="module")
def alone() -> World:
    return fsdp.start("cpu")


@pytest.mark.parametrize("backbone", [None, "gemma2", "granite"])  # the last two: caps and factors of logits
def test_a_slow_count_agrees(backbone: str | None, alone: World) -> None:
    """Counts block by block with the model's verbs, one document at a time."""
    _, validation = build(alone, backbone=backbone)
    record = validation(1)
    model, batches = validation.model, held_out(alone)
    sums = {level: [0.0, 0] for level in LEVELS}
    ar, agreed, compared = [0.0, 0], 0, 0
    for batch in batches:
        uniform = _uniform(batch, 0)
        masks = {level: _at_level(level, batch, uniform, BLOCK, 0).masked for level in LEVELS}
        for row in range(len(batch)):
            for number in (0, 1):
                columns = (batch.document[row] == number).nonzero()[:, 0]
                tokens, text = batch.tokens[row, columns], batch.text[row, columns]
                logits = model(tokens[None]).logits[0].detach()
                for start in range(len(tokens) % BLOCK, len(tokens), BLOCK):
                    block = slice(start, start + BLOCK)
                    if not batch.denoised[row, columns[start]]:
                        continue
                    before = logits[start - 1 : start + BLOCK - 1]
                    own = text[block]
                    ar[0] -= before.log_softmax(-1).gather(1, tokens[block, None])[own].sum().item()
                    ar[1] += int(own.sum())
                    state = model.new_state(1, 64)
                    with torch.no_grad():
                        model.prefill(tokens[None, :start], torch.tensor([start]), state)
                    for level, mask in masks.items():
                        hidden = mask[row, columns[block]]
                        noisy = tokens[block].masked_fill(hidden, MASK)[None]
                        with torch.no_grad():
                            out = model.denoise(noisy, torch.tensor([level]), model.reader(state).view())[0]
                        sums[level][0] -= out.log_softmax(-1).gather(1, tokens[block, None])[hidden].sum().item()
                        sums[level][1] += int(hidden.sum())
                        if level < 1:
                            out[:, MASK] = -torch.inf
                            agreed += int((out.argmax(-1) == before.argmax(-1))[hidden & own].sum())
                            compared += int((hidden & own).sum())
    assert record["masked_nll_by_t"] == pytest.approx({str(t): n / k for t, (n, k) in sums.items()}, rel=1e-4)
    below = [sums[level] for level in LEVELS[:-1]]
    assert record["masked_nll"] == pytest.approx(sum(n for n, _ in below) / sum(k for _, k in below), rel=1e-4)
    assert record["ar_nll"] == pytest.approx(ar[0] / ar[1], rel=1e-4)
    assert record["agreement"] == pytest.approx(agreed / compared)
    assert validation(2) == record


@torch.no_grad()
def test_drafts_of_a_shifted_denoiser_are_counted_block_by_block(alone: World) -> None:
    """The first token of each block is visible, and output i predicts token i + 1, as AR's output i does."""
    _, validation = build(alone, shift=1)
    model, found = validation.model, []
    for tower in (model.context, model.denoiser):
        assert tower is not None
        tower.head.weight[6:] = 0  # few tokens can win, so some drafts agree
    for batch in held_out(alone):
        for row in range(len(batch)):
            for number in (0, 1):
                columns = (batch.document[row] == number).nonzero()[:, 0]
                tokens = batch.tokens[row, columns]
                ar = model(tokens[None]).logits[0].argmax(-1)
                for start in range(len(tokens) % BLOCK, len(tokens), BLOCK):
                    if not batch.denoised[row, columns[start]]:
                        continue
                    state = model.new_state(1, 64)
                    model.prefill(tokens[None, :start], torch.tensor([start]), state)
                    noisy = torch.tensor([[int(tokens[start]), *[MASK] * (BLOCK - 1)]])
                    out = model.denoise(noisy, torch.tensor([1.0]), model.reader(state).view())[0]
                    out[:, MASK] = -torch.inf
                    block = slice(start, start + BLOCK - 1)
                    known = batch.text[row, columns[start] + 1 : columns[start] + BLOCK]
                    agrees = (out.argmax(-1)[:-1] == ar[block]) & known
                    found.append(int(agrees.long().cumprod(0).sum()))
    assert validation(1)["draft_tokens"] == pytest.approx(1 + sum(found) / len(found))
    assert sum(found) > 0


def test_the_sample_and_its_trace(alone: World) -> None:
    _, validation = build(alone)
    record = validation(1)
    sample = record["sample"]
    trace = sample["trace"]
    assert json.loads(json.dumps(record)) == record
    assert validation.params.max_new_tokens == 12  # whole blocks
    assert sample["prompt"] == " ".join(map(str, cut_prompts([held_out(alone)], 1, 99)[0]))
    assert sample["text"].split() == trace["tokens"]
    assert len(trace["tokens"]) == len(trace["step"]) == sample["tokens"] <= 12
    assert sum(trace["passes"]) == sample["passes"]
    assert all(step < trace["passes"][i // BLOCK] for i, step in enumerate(trace["step"]))
    ids = torch.tensor([validation.prompts[0]])
    out = validation.model.generate_mask_diffusion(
        ids, 12, BLOCK, BLOCK, MASK, confidence_threshold=0.8, eos_token_id=EOS
    )
    assert out[0, ids.shape[1] :].tolist() == list(map(int, trace["tokens"]))
    assert validation.model._last_nfe == sample["passes"]


def test_documents_are_cut_where_their_prompt_ends(alone: World) -> None:
    prompts = cut_prompts([held_out(alone)], 4, 99)
    assert [len(prompt) for prompt in prompts] == [6, 5, 6, 5]
    assert prompts[1][0] == BOS
    assert [len(prompt) for prompt in cut_prompts([held_out(alone)], 2, 5)] == [5, 5]
    one, two = held_out(alone)
    in_turn = cut_prompts([[one], [two]], 2, 99)
    assert in_turn == cut_prompts([[one]], 1, 99) + cut_prompts([[two]], 1, 99)


def test_training_does_not_notice(alone: World, tmp_path: Path) -> None:
    plain, learned = run(tmp_path / "plain", alone, False)
    watched, learned_watched = run(tmp_path / "watched", alone, True)
    assert learned == learned_watched
    assert [r["loss"] for r in plain] == [r["loss"] for r in watched]
    assert ["validation" in r for r in watched] == [False, True, True]
    first, last = (r["validation"] for r in watched[1:])
    assert first["ar_nll"] == last["ar_nll"]
    assert first["masked_nll"] != last["masked_nll"]


def test_a_context_that_learns_is_scored_anew(alone: World, tmp_path: Path) -> None:
    log, _ = run(tmp_path, alone, True, train_context=True, ar_weight=0.5)
    assert log[2]["validation"]["ar_nll"] < log[1]["validation"]["ar_nll"]


@pytest.mark.slow
def test_two_processes_say_the_same(alone: World, tmp_path: Path) -> None:
    """Sharded, with the same documents."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    paths = os.pathsep.join(filter(None, sys.path))  # so that the processes find the test helpers
    as_torchrun = {
        "PYTHONPATH": paths,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)],
            env=os.environ | as_torchrun | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [worker.communicate(timeout=300)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], said
    found = json.loads((tmp_path / "both.json").read_text())
    for name, expected in both(alone, tmp_path / "alone").items():
        assert found[name].pop("sample", None) == expected.pop("sample", None)
        by_t = expected.pop("masked_nll_by_t")
        assert found[name].pop("masked_nll_by_t") == pytest.approx(by_t, rel=1e-4)
        assert found[name] == pytest.approx(expected, rel=1e-4)


def both(world: World, directory: Path) -> dict[str, dict[str, Any]]:
    """The validation before any training, and (without the sample) after some steps."""
    said = {}
    cases: dict[str, dict[str, Any]] = {
        "frozen": {},
        "learning": {"train_context": True, "ar_weight": 0.5},
        "tied": {"train_context": True, "tie": True},
    }
    for name, options in cases.items():
        objective, validation = build(world, **options)
        fsdp.shard(objective, objective.units, world, torch.float32)
        said[name] = validation(0)
    log, learned = run(directory, world, True)
    after = {key: value for key, value in log[2]["validation"].items() if key not in ("sample", "tokens_per_pass")}
    return said | {"trained": after | {"learned": learned}}


def test_nothing_to_denoise_is_said(alone: World) -> None:
    model = build_random_model(PATTERN)
    assert model.denoiser is not None
    assert model.time is not None
    objective = DenoisingObjective(model.context, model.denoiser, model.time, DenoisingOptions(mask_token_id=MASK))
    short = [
        collate([[to_piece(Document(np.array([BOS, 9, EOS], np.int32), 1), 4, "fixed")]], [0], 4, 4, eos=EOS, pad=0)
    ]
    with pytest.raises(ArgumentError, match=r"no held-out document has a whole block of 4 .*--held-out 0"):
        DenoisingValidation(model, objective, {"a": short}, alone, block_size=4, eos_token_id=EOS)


class Letters:
    """A tokenizer whose tokens are é, two bytes each."""

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return "".join("é" for token in tokens if not (skip_special_tokens and token in (BOS, EOS)))


def test_autoregressive(alone: World) -> None:
    model = TwoTowerForCausalLM(build_random_model(PATTERN).config, towers="context")
    model.context.load_state_dict(build_random_model(PATTERN).context.state_dict())
    model.tokenizer = Letters()
    objective = AutoregressiveObjective(model.context)
    first, second = held_out(alone)
    validation = AutoregressiveValidation(
        model, objective, {"a": [first], "b": [second]}, alone, block_size=BLOCK, eos_token_id=EOS, max_new_tokens=5
    )
    fsdp.shard(objective, objective.units, alone, torch.float32)
    record = validation(1)
    assert validation(2) == record
    nats, tokens = 0.0, 0
    for row in range(4):
        for number in (0, 1):
            ids = first.tokens[row][first.text[row] & (first.document[row] == number)]
            nats += build_random_model(PATTERN)(ids[None], labels=ids[None]).loss.item() * (len(ids) - 1)
            tokens += len(ids) - 1
    assert record["nll_by_source"]["a"] == pytest.approx(nats / tokens, rel=1e-4)
    assert record["nll"] == pytest.approx(sum(record["nll_by_source"].values()) / 2, rel=1e-6)
    letters = 4 * (10 + 8)  # without each document's first token, BOS and EOS
    assert record["bits_per_byte_by_source"]["a"] == pytest.approx(nats / np.log(2) / (2 * letters), rel=1e-4)
    assert record["sample"]["tokens"] <= 5


if __name__ == "__main__":  # on each of two processes: `test_two_processes_say_the_same`
    torch.set_num_threads(1)
    here = fsdp.start("cpu")
    everything = both(here, Path(sys.argv[1]) / "two")
    if here.is_main:
        (Path(sys.argv[1]) / "both.json").write_text(json.dumps(everything))
    fsdp.stop()
