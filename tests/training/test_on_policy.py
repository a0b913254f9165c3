"""On-policy stages: rollouts are what the engine decodes, their states what it computes, and runs repeat exactly."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
import tiny_run
import torch
from packed import MASK
from test_resume import assert_same_end, steps_logged
from test_train_cli import complaint
from test_two_processes import deviation, difference, run_two
from tiny_backbones import two_tower
from tiny_run import launch, log, run_cli
from torch import Tensor

from twotower import TwoTowerForCausalLM
from twotower.decoding.params import GenerationParams
from twotower.engine.generation import generate
from twotower.training.adapter_objective import AdapterObjective, AdapterOptions
from twotower.training.objective import DenoisingObjective, DenoisingOptions
from twotower.training.on_policy.rollouts import Prompt, Rollout, State, decode
from twotower.training.on_policy.states import collate_states, fit, pack, places

SIZE, ROW = 8, 96


def params(mode: str, **options: Any) -> GenerationParams:
    given = {"max_new_tokens": 40, "block_size": SIZE, "mask_token_id": MASK, "eos_token_id": 2} | options
    given |= {"draft_steps": 1} if mode == "verified" else {"confidence_threshold": 0.3}
    return GenerationParams.of(mode=mode, **given)


@cache
def model_of(name: str, rank: int | None) -> TwoTowerForCausalLM:
    return two_tower(name, torch.float64, seed=8, rank=rank)


def prompts(count: int = 6) -> list[Prompt]:
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randint(4, 60, (3 + 2 * i,), generator=generator).tolist() for i in range(count)]
    return [Prompt(row=i // 2, document=i % 2, tokens=tuple(tokens)) for i, tokens in enumerate(drawn)]


@cache
def rollouts(name: str, rank: int | None, mode: str) -> tuple[Rollout, ...]:
    with torch.no_grad():
        return tuple(decode(model_of(name, rank), prompts(), params(mode), 5, 4))


KINDS = [("nemotron_h", 3, "verified"), ("llama", 3, "diffusion"), ("nemotron_h", None, "diffusion")]
each_kind = pytest.mark.parametrize(("name", "rank", "mode"), KINDS)


@each_kind
def test_rollouts_are_texts_of_the_engine(name: str, rank: int | None, mode: str) -> None:
    """Their states do not overlap, begin with visible tokens of the text, and have masks."""
    found = rollouts(name, rank, mode)
    with torch.no_grad():
        texts = generate(model_of(name, rank), [list(prompt.tokens) for prompt in prompts()], params(mode))
    for prompt, rollout, text in zip(prompts(), found, texts, strict=True):
        assert rollout.tokens == (*prompt.tokens, *text.tokens)
        assert rollout.given == len(prompt.tokens)
        assert rollout.ended == (text.finish_reason == "eos")
        for state, following in zip(rollout.states, rollout.states[1:], strict=False):
            assert state.end <= following.start
        assert all(any(state.masked) and len(state.masked) <= SIZE for state in rollout.states)
        least = rollout.given - 1 if rank else rollout.given
        assert all(state.start >= least for state in rollout.states)
    assert sum(len(rollout.states) for rollout in found) > len(found)


def test_states_depend_on_their_row_alone() -> None:
    """Alone and in another company, a prompt gives the same rollout; another seed picks other states."""
    model, (name, rank, mode) = model_of(*KINDS[0][:2]), KINDS[0]
    with torch.no_grad():
        (alone,) = decode(model, prompts()[4:5], params(mode), 5, 1)
        other = decode(model, prompts(), params(mode), 6, 4)
    assert alone == rollouts(name, rank, mode)[4]
    assert [rollout.tokens for rollout in other] == [rollout.tokens for rollout in rollouts(name, rank, mode)]
    assert [rollout.states for rollout in other] != [rollout.states for rollout in rollouts(name, rank, mode)]


def test_refused_drafts_come_first() -> None:
    """Where a draft was refused, AR's text differs from what the state predicts at its masks."""
    name, rank, mode = KINDS[0]
    model, refused = model_of(name, rank), 0
    for rollout in rollouts(name, rank, mode):
        for state in rollout.states:
            first = state.masked.index(True)
            predicted = state_logits(model, rollout, state).argmax(-1)[first:].tolist()
            text = list(rollout.tokens[state.start + first + 1 :][: len(predicted)])
            assert not state.refused or predicted[: len(text)] != text
            refused += state.refused
    assert refused > 2


# --- a stored state gives the logits of the verbs ------------------------------------------------------------------


def state_logits(model: TwoTowerForCausalLM, rollout: Rollout, state: State) -> Tensor:
    """The logits (W, V) of a state, from the verbs of generation, without the mask token."""
    tokens = torch.tensor([rollout.tokens])
    context = model.new_state(1, 256)
    if state.start:
        model.extend(tokens[:, : state.start], context)
    block = torch.full((1, len(state.masked)), 2)
    own = tokens[:, state.start : state.end]
    block[:, : own.shape[1]] = own
    block = block.masked_fill(torch.tensor([state.masked]), MASK)
    t = None if model.has_adapters else torch.tensor([sum(state.masked) / len(state.masked)])
    logits = model.denoise(block, t, context.view())[0].clone()
    logits[:, MASK] = -1e4
    return logits


def naive(model: TwoTowerForCausalLM, rollout: Rollout) -> tuple[Tensor, int]:
    """Σ KL(AR ‖ denoiser) at the open predictions of the states of a rollout that the text has, and their number."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    shift = int(model.has_adapters)
    with torch.no_grad():
        teacher = model(torch.tensor([rollout.tokens])).logits[0]
        teacher[:, MASK] = -1e4
        teacher = teacher.log_softmax(-1)
    for number, state in enumerate(rollout.states):
        found = state_logits(model, rollout, state).log_softmax(-1)
        last = number + 1 == len(rollout.states)
        for place, hidden in enumerate(state.masked):
            target = state.start + place + shift
            beyond = target >= (state.end if last or len(state.masked) < SIZE else state.end + 1)
            if hidden and target < len(rollout.tokens) and not beyond:
                p = teacher[target - 1]
                total = total + (p.exp() * (p - found[place])).sum()
                count += 1
            elif hidden and target < state.end:  # EOS after the end of the text
                total = total - found[place, 2]
                count += 1
    return total, count


@each_kind
def test_loss_and_gradient_of_stored_states_are_those_of_the_verbs(name: str, rank: int | None, mode: str) -> None:
    model, found = model_of(name, rank), [rollout for rollout in rollouts(name, rank, mode) if rollout.states]
    rows = pack(found, ROW, SIZE)
    shift = int(rank is not None)
    batch, noise = collate_states(rows, ROW, SIZE, shift=shift, eos=2, pad=0)
    objective = objective_of(model)
    loss = objective(batch, noise, SIZE)
    kept = [rollout for row in rows for rollout in row]
    parts = [naive(model, rollout) for rollout in kept]
    expected = torch.stack([part for part, _ in parts]).sum()
    assert objective.targets(batch, noise) == sum(count for _, count in parts)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    own = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    wanted = torch.autograd.grad(expected, list(trained.values()), allow_unused=True)
    compared = 0
    for key, one, other in zip(trained, own, wanted, strict=True):
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8, msg=key)
            compared += 1
    assert compared > 10


def objective_of(model: TwoTowerForCausalLM) -> AdapterObjective | DenoisingObjective:
    if model.has_adapters:
        return AdapterObjective(model.context, AdapterOptions(mask_token_id=MASK))
    assert model.denoiser is not None
    assert model.time is not None
    options = DenoisingOptions(mask_token_id=MASK, on_policy=True)
    return DenoisingObjective(model.context, model.denoiser, model.time, options)


def test_rows_keep_the_states_that_they_hold() -> None:
    tokens = tuple(range(4, 44))
    states = tuple(State(start, (False, *(True,) * 7)) for start in (3, 11, 24))
    rollout = Rollout(row=0, document=0, given=4, tokens=tokens, ended=False, states=states)
    assert places(rollout, 8) == [(8, 16), (16, 24), (32, 40)]
    assert fit(rollout, 40, 8) == rollout
    assert [len(part.states) for part in (fit(rollout, 32, 8), fit(rollout, 16, 8)) if part] == [2, 1]
    assert fit(rollout, 8, 8) is None
    assert [len(row) for row in pack([rollout] * 3, 80, 8)] == [2, 1]
    batch, noise = collate_states([[rollout, rollout]], 80, 8, shift=1, eos=2, pad=0)
    for number in (0, 1):
        assert batch.tokens[batch.text & (batch.document == number)].tolist() == list(tokens[:32])
    assert noise.masked.sum() == 42
    assert noise.masked[:, ::8].sum() == 0


# --- runs ----------------------------------------------------------------------------------------------------------

ON_POLICY = ("--on-policy-every", "4", "--on-policy-prompts", "6", "--on-policy-tokens", "20", "--on-policy-rows", "2")


def training(output: Path, *more: str, rank: str | None = "3") -> list[str]:
    model = tiny_chat.two_towers("llama", *(() if rank is None else ("--denoiser-lora", rank)))
    options = ("--stages", "8:11", "--checkpoint-every", "3", "--validate-every", "6", *ON_POLICY, *more)
    return tiny_run.given().train(output, "--row-length", "96", *options, model=model)


@cache
def whole(rank: str | None = "3") -> Path:
    """An uninterrupted run; do not change it."""
    output = tiny_run.folder() / f"on-policy-{rank}"
    assert run_cli(training(output, rank=rank)) == 0
    return output


def stored(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((run / "rollouts").iterdir())}


@pytest.mark.parametrize("rank", ["3", pytest.param(None, marks=pytest.mark.slow)])
def test_stages_are_stored_before_they_are_used(rank: str | None) -> None:
    run = whole(rank)
    assert list(stored(run)) == ["step-00000004.json", "step-00000008.json"]
    found = json.loads(json.loads(stored(run)["step-00000004.json"])["rollouts"])
    assert len({(rollout["row"], rollout["document"]) for rollout in found}) == len(found) > 3
    assert any(rollout["states"] for rollout in found)
    trained = [record["step"] for record in log(run) if "on_policy_loss" in record]
    assert trained == [5, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("rank", ["3", pytest.param(None, marks=pytest.mark.slow)])
def test_a_killed_run_ends_as_one_that_was_not(rank: str | None, tmp_path: Path) -> None:
    """Killed in a stage, and after a stage was stored and before its first checkpoint."""
    args, output = training(tmp_path / "run", rank=rank), tmp_path / "run"
    assert launch(args, tmp_path / "said").kill_when(lambda: steps_logged(output) >= 6)
    second = output / "rollouts" / "step-00000008.json"
    assert launch(args, tmp_path / "said").kill_when(second.exists)
    assert launch(args, tmp_path / "said").codes() == [0]
    assert_same_end(output, whole(rank), 11)
    assert stored(output) == stored(whole(rank))


def test_two_processes_train_on_the_rollouts_of_one(tmp_path: Path) -> None:
    run_two(training(tmp_path / "two"), tmp_path / "said")
    assert json.loads(stored(tmp_path / "two")["step-00000004.json"]) == json.loads(
        stored(whole())["step-00000004.json"]
    )
    assert deviation(whole(), tmp_path / "two", 11) < 1e-5
    assert difference(whole(), tmp_path / "two") < 2e-5


def last_line(args: list[str], capfd: pytest.CaptureFixture) -> str:
    """The error of a command that fails after it has said that it resumes a run."""
    capfd.readouterr()
    assert run_cli(args) == 2
    resumed, error = capfd.readouterr().err.splitlines()
    assert "resuming after step 9" in resumed
    return str(error)


def test_lost_and_damaged_rollouts_are_named(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole(), run)
    for folder in sorted((run / "checkpoints").iterdir())[1:]:
        shutil.rmtree(folder)
    shutil.rmtree(run / "model")
    (last,) = (run / "checkpoints").iterdir()
    assert last.name == "step-00000009"
    file = run / "rollouts" / "step-00000008.json"
    text = file.read_text()
    file.write_text(text.replace("start", "stark"))
    assert "step-00000008.json: is damaged" in last_line(training(run), capfd)
    file.unlink()
    assert "step-00000008.json: is missing" in last_line(training(run), capfd)
    file.write_text(text)
    assert run_cli(training(run)) == 0
    assert_same_end(run, whole(), 11)


@pytest.mark.parametrize(
    ("options", "rank", "said"),
    [
        (("--on-policy-setting", "ar"), "3", "the mode must be verified or diffusion"),
        (("--on-policy-setting", "verified"), None, "the mode must be diffusion"),
        (("--on-policy-every", "0"), "3", "--on-policy-prompts has no effect without --on-policy-every"),
        (("--on-policy-tokens", "96"), "3", "leaves no room for a prompt"),
        (("--elbo",), None, "--elbo does not go with on-policy training"),
        (("--train-context",), None, "--train-context does not go with on-policy training"),
    ],
)
def test_bad_settings(
    options: tuple[str, ...], rank: str | None, said: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    assert said in complaint(training(tmp_path / "run", *options, rank=rank), capfd)
