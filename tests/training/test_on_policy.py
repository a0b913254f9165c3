"""On-policy stages: rollouts are what the engine decodes, their states what it computes, and runs repeat exactly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
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
from twotower.cache.pools import ContextView
from twotower.decoding.block_rule import BlockRule
from twotower.decoding.params import GenerationParams
from twotower.denoiser_fields import DenoiserConfig
from twotower.engine.generation import generate
from twotower.training.adapter_objective import AdapterObjective, AdapterOptions
from twotower.training.data import Batch
from twotower.training.noise import Corruption
from twotower.training.objective import DenoisingObjective, DenoisingOptions
from twotower.training.on_policy.rollouts import Prompt, Rollout, State, decode
from twotower.training.on_policy.states import collate_states, fit, pack, places

SIZE, ROW = 8, 96


def params(mode: str, **options: Any) -> GenerationParams:
    given = {"max_new_tokens": 40, "block_size": SIZE, "mask_token_id": MASK, "eos_token_id": 2} | options
    given |= {"draft_steps": 1} if mode == "verified" else {"confidence_threshold": 0.3}
    return GenerationParams.of(mode=mode, **given)


SHIFTED = DenoiserConfig(prediction_shift=1)
CHOICES = {
    "adapters": DenoiserConfig.with_adapters(3),
    "everywhere": DenoiserConfig.with_adapters(3, "everywhere"),
    "everywhere, shift": replace(DenoiserConfig.with_adapters(3, "everywhere"), prediction_shift=1),
    "tower": DenoiserConfig(),
    "first from AR": DenoiserConfig(first_from_ar=True),
    "shift": SHIFTED,
    "shift, causal, 2 layers": replace(SHIFTED, block_attention="prefix_causal", denoiser_layers=(0, 2)),
}


@cache
def model_of(name: str, choice: str) -> TwoTowerForCausalLM:
    return two_tower(name, torch.float64, seed=8, denoiser=CHOICES[choice])


def prompts(count: int = 6) -> list[Prompt]:
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randint(4, 60, (3 + 2 * i,), generator=generator).tolist() for i in range(count)]
    return [Prompt(row=i // 2, document=i % 2, tokens=tuple(tokens)) for i, tokens in enumerate(drawn)]


@cache
def rollouts(name: str, choice: str, mode: str) -> tuple[Rollout, ...]:
    with torch.no_grad():
        return tuple(decode(model_of(name, choice), prompts(), params(mode), 5, 4))


KINDS = [
    ("nemotron_h", "adapters", "verified"),
    ("llama", "adapters", "diffusion"),
    ("llama", "everywhere", "verified"),
    ("nemotron_h", "everywhere, shift", "diffusion"),
    ("nemotron_h", "tower", "verified"),
    ("nemotron_h", "tower", "diffusion"),
    ("llama", "first from AR", "diffusion"),
    ("nemotron_h", "shift", "diffusion"),
    ("gemma2", "shift", "verified"),
    ("nemotron_h", "shift, causal, 2 layers", "verified"),
    ("qwen3_next", "shift, causal, 2 layers", "diffusion"),
]
each_kind = pytest.mark.parametrize(("name", "choice", "mode"), KINDS)
OWN_PASSES = [kind for kind in KINDS if kind[1] != "adapters"]  # whose denoiser does not run within AR's pass
DRAFTING = [kind for kind in KINDS if kind[2] == "verified"]


@each_kind
def test_rollouts_are_texts_of_the_engine(name: str, choice: str, mode: str) -> None:
    """Their states do not overlap, begin with visible tokens of the text, and have masks."""
    found = rollouts(name, choice, mode)
    with torch.no_grad():
        texts = generate(model_of(name, choice), [list(prompt.tokens) for prompt in prompts()], params(mode))
    for prompt, rollout, text in zip(prompts(), found, texts, strict=True):
        assert rollout.tokens == (*prompt.tokens, *text.tokens)
        assert rollout.given == len(prompt.tokens)
        assert rollout.ended == (text.finish_reason == "eos")
        for state, following in zip(rollout.states, rollout.states[1:], strict=False):
            assert state.end <= following.start
        assert all(any(state.masked) and len(state.masked) <= SIZE for state in rollout.states)
        least = rollout.given - (choice != "tower" or mode == "verified")
        assert all(state.start >= least for state in rollout.states)
    assert sum(len(rollout.states) for rollout in found) > len(found)


def test_states_depend_on_their_row_alone() -> None:
    """Alone and in another company, a prompt gives the same rollout; another seed picks other states."""
    model, (name, choice, mode) = model_of(*KINDS[0][:2]), KINDS[0]
    with torch.no_grad():
        (alone,) = decode(model, prompts()[4:5], params(mode), 5, 1)
        other = decode(model, prompts(), params(mode), 6, 4)
    assert alone == rollouts(name, choice, mode)[4]
    assert [rollout.tokens for rollout in other] == [rollout.tokens for rollout in rollouts(name, choice, mode)]
    assert [rollout.states for rollout in other] != [rollout.states for rollout in rollouts(name, choice, mode)]


@pytest.mark.parametrize(("name", "choice", "mode"), DRAFTING)
def test_refused_drafts_come_first(name: str, choice: str, mode: str) -> None:
    """Where a draft was refused, AR's text differs from what the state predicts at its masks."""
    model, refused = model_of(name, choice), 0
    shift = CHOICES[choice].prediction_shift
    for rollout in rollouts(name, choice, mode):
        for state in rollout.states:
            first = state.masked.index(True)
            gated = choice == "adapters"  # a mask of adapters predicts the token after it
            predicted = state_logits(model, rollout, state).argmax(-1)
            predicted = predicted[first:] if gated else predicted[first - shift : len(predicted) - shift]
            text = list(rollout.tokens[state.start + first + gated :][: len(predicted)])
            differs = predicted[: len(text)].tolist() != text
            assert differs if state.refused else gated or not differs  # a check of adapters may end before the draft
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
    shift = model.config.denoiser.prediction_shift
    t = (
        None
        if model.time is None
        else torch.tensor([sum(state.masked) / (len(state.masked) - shift)], dtype=torch.float64)
    )
    logits = model.denoise(block, t, context.view())[0].clone()
    logits[:, MASK] = -1e4
    return logits


def naive(model: TwoTowerForCausalLM, rollout: Rollout) -> tuple[Tensor, int]:
    """Σ KL(AR ‖ denoiser) at the open predictions of the states of a rollout that the text has, and their number."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    shift, gated = model.config.denoiser.prediction_shift, BlockRule.of(model.config.denoiser).one_pass
    with torch.no_grad():
        teacher = model(torch.tensor([rollout.tokens])).logits[0]
        teacher[:, MASK] = -1e4
        teacher = teacher.log_softmax(-1)
    for number, state in enumerate(rollout.states):
        found = state_logits(model, rollout, state).log_softmax(-1)
        # The last mask of adapters predicts the token after the block, which a row has if another state follows.
        last = number + 1 == len(rollout.states)
        end = state.end + (gated and not last and len(state.masked) == SIZE)
        for place, hidden in enumerate(state.masked):
            target = state.start + place + gated
            if not hidden or target >= end:
                continue
            output = found[place - (shift and not gated)]
            if target < len(rollout.tokens):
                p = teacher[target - 1]
                total = total + (p.exp() * (p - output)).sum()
            else:  # EOS after the end of the text
                total = total - output[2]
            count += 1
    return total, count


def rows_of(name: str, choice: str, mode: str) -> tuple[list[list[Rollout]], Batch, Corruption]:
    rows = pack([rollout for rollout in rollouts(name, choice, mode) if rollout.states], ROW, SIZE)
    return rows, *collate_states(rows, ROW, SIZE, shift=CHOICES[choice].prediction_shift, eos=2, pad=0)


@each_kind
def test_loss_and_gradient_of_stored_states_are_those_of_the_verbs(name: str, choice: str, mode: str) -> None:
    model, (rows, batch, noise) = model_of(name, choice), rows_of(name, choice, mode)
    objective = objective_of(model)
    loss = objective(batch, noise, SIZE)
    parts = [naive(model, rollout) for row in rows for rollout in row]
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
    choices = model.config.denoiser
    if BlockRule.of(choices).one_pass:
        return AdapterObjective(model.context, AdapterOptions(mask_token_id=MASK))
    options = DenoisingOptions(
        mask_token_id=MASK,
        on_policy=True,
        time=model.time is not None,
        shift=choices.prediction_shift,
        prefix_causal=choices.block_attention == "prefix_causal",
    )
    denoiser = model.context if model.has_adapters else model.denoiser
    assert denoiser is not None
    return DenoisingObjective(model.context, denoiser, model.time, options)


def blocks_of_states(rows: list[list[Rollout]]) -> Iterator[tuple[Rollout, State, int, int]]:
    """Each state of packed rows, with its rollout, its row and the first column of its block."""
    for number, row in enumerate(rows):
        begin = 0
        for rollout in row:
            found = places(rollout, SIZE)
            for state, (first, _) in zip(rollout.states, found, strict=True):
                yield rollout, state, number, begin + first
            begin += found[-1][1]


@pytest.mark.parametrize(("name", "choice", "mode"), OWN_PASSES)
@torch.no_grad()
def test_training_computes_the_logits_of_decoding(
    name: str, choice: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kept state is the input of a pass of the decoder, and gives its logits at the open predictions."""
    model, (rows, batch, noise) = model_of(name, choice), rows_of(name, choice, mode)
    objective = objective_of(model)
    assert isinstance(objective, DenoisingObjective)
    hidden = objective.hidden(batch, noise, SIZE)[0]
    shift, seen = CHOICES[choice].prediction_shift, {}
    denoise = model.denoise

    def spy(tokens: Tensor, t: Tensor, view: ContextView, **options: Any) -> Tensor:
        logits: Tensor = denoise(tokens, t, view, **options)
        seen[current, int(view.lengths[0]), tuple((tokens[0] == MASK).tolist())] = logits[0].clone()
        return logits

    monkeypatch.setattr(model, "denoise", spy)
    for prompt in prompts():
        current = prompt.tokens
        decode(model, [prompt], params(mode), 5, 1)
    compared = 0
    for rollout, state, row, first in blocks_of_states(rows):
        found = objective.denoiser.logits(hidden[row, first : first + SIZE])
        decoded = seen[rollout.tokens[: rollout.given], state.start, state.masked]
        for place in [place for place, masked in enumerate(state.masked) if masked]:
            torch.testing.assert_close(found[place - shift], decoded[place - shift], rtol=1e-10, atol=1e-10)
            compared += 1
    assert compared > 50


@torch.no_grad()
def test_inputs_with_a_refused_token_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """With several passes for a draft, later passes read drafted tokens, which AR may refuse."""
    model = model_of("nemotron_h", "shift")
    denoise, inputs = model.denoise, {}

    def spy(tokens: Tensor, t: Tensor, view: ContextView, **options: Any) -> Tensor:
        masked = tokens[0] == MASK
        inputs[int(view.lengths[0]), tuple(masked.tolist())] = tokens[0, ~masked].tolist()
        return denoise(tokens, t, view, **options)

    monkeypatch.setattr(model, "denoise", spy)
    left_out = 0
    for prompt in prompts():
        inputs.clear()
        (rollout,) = decode(model, [prompt], replace(params("verified"), draft_steps=3), 5, 1)
        for (start, masked), visible in inputs.items():
            own = [rollout.tokens[start:][place : place + 1] for place, hidden in enumerate(masked) if not hidden]
            own = [token for found in own for token in found]
            kept = State(start, masked) in [replace(state, refused=False) for state in rollout.states]
            assert visible == own or not kept
            left_out += visible != own
    assert left_out > 5


@pytest.mark.parametrize(("name", "choice", "mode"), OWN_PASSES)
@torch.no_grad()
def test_no_prediction_of_a_state_reads_its_token_or_later_text(name: str, choice: str, mode: str) -> None:
    model, (rows, batch, noise) = model_of(name, choice), rows_of(name, choice, mode)
    objective, shift = objective_of(model), CHOICES[choice].prediction_shift
    assert isinstance(objective, DenoisingObjective)
    where = [(state, row, first) for _, state, row, first in blocks_of_states(rows) if first >= SIZE]
    state, row, first = where[len(where) // 2]
    columns = [first + place - shift for place, masked in enumerate(state.masked) if masked]
    tokens = batch.tokens.clone()
    unseen = torch.arange(ROW) >= first
    unseen[first : first + SIZE] &= noise.masked[row, first : first + SIZE]
    tokens[row, unseen] = (tokens[row, unseen] + 7) % 50 + 5
    changed = replace(batch, tokens=tokens)
    before, after = (objective.hidden(part, noise, SIZE)[0][row, columns] for part in (batch, changed))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)
    tokens[row, first - 1 if state.masked[0] else first] += 1
    assert not torch.allclose(objective.hidden(changed, noise, SIZE)[0][row, columns], before)


@pytest.mark.parametrize(("name", "choice"), [("llama", "tower"), ("llama", "shift, causal, 2 layers")])
def test_steps_on_refused_drafts_make_longer_drafts(name: str, choice: str) -> None:
    """The loss falls, and the same prompts then take fewer passes for the same text."""
    model = two_tower(name, torch.float64, seed=8, denoiser=CHOICES[choice])
    with torch.no_grad():
        first = decode(model, prompts(), params("verified"), 5, 4)
        slow = generate(model, [list(prompt.tokens) for prompt in prompts()], params("verified"))
    rows = pack([rollout.refused for rollout in first if rollout.refused.states], ROW, SIZE)
    batch, noise = collate_states(rows, ROW, SIZE, shift=CHOICES[choice].prediction_shift, eos=2, pad=0)
    objective, losses = objective_of(model), []
    optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(30):
        loss = objective(batch, noise, SIZE) / objective.targets(batch, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.release()
    with torch.no_grad():
        fast = generate(model, [list(prompt.tokens) for prompt in prompts()], params("verified"))
    assert losses[-1] < 0.5 * losses[0]
    assert [result.tokens for result in fast] == [result.tokens for result in slow]
    assert sum(result.passes for result in fast) < 0.8 * sum(result.passes for result in slow)


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


INITS = {
    "adapters": ("--denoiser-lora", "3"),
    "tower": (),
    "shift": ("--prediction-shift", "1", "--block-attention", "prefix_causal", "--denoiser-layers", "every:2"),
    "everywhere": ("--denoiser-lora", "3", "--adapter-gate", "everywhere"),
}
VERIFIED = ("--on-policy-setting", "verified")
each_run = pytest.mark.parametrize(
    "kind", ["adapters", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("tower", "shift", "everywhere"))]
)


def training(output: Path, *more: str, kind: str = "adapters") -> list[str]:
    model = tiny_chat.two_towers("llama", *INITS[kind])
    # In fp32 the loss of two processes differs by 2e-5 after 11 steps, because their sums have another order.
    options = ("--dtype", "float64", "--stages", "8:11", "--checkpoint-every", "3", "--validate-every", "6", *ON_POLICY)
    own = VERIFIED if kind in ("shift", "everywhere") else ()
    return tiny_run.given().train(output, "--row-length", "96", *options, *own, *more, model=model)


@cache
def whole(kind: str = "adapters") -> Path:
    """An uninterrupted run; do not change it."""
    output = tiny_run.folder() / f"on-policy-{kind}"
    assert run_cli(training(output, kind=kind)) == 0
    return output


def stored(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((run / "rollouts").iterdir())}


@pytest.mark.parametrize("kind", ["adapters", "shift", pytest.param("everywhere", marks=pytest.mark.slow)])
def test_stages_are_stored_before_they_are_used(kind: str) -> None:
    run = whole(kind)
    assert list(stored(run)) == ["step-00000004.json", "step-00000008.json"]
    found = json.loads(json.loads(stored(run)["step-00000004.json"])["rollouts"])
    assert len({(rollout["row"], rollout["document"]) for rollout in found}) == len(found) > 3
    assert any(state["refused"] for rollout in found for state in rollout["states"])
    trained = [record["step"] for record in log(run) if "on_policy_loss" in record]
    assert trained == [5, 6, 7, 8, 9, 10, 11]


@each_run
def test_a_killed_run_ends_as_one_that_was_not(kind: str, tmp_path: Path) -> None:
    """Killed in a stage, and after a stage was stored and before its first checkpoint."""
    args, output = training(tmp_path / "run", kind=kind), tmp_path / "run"
    assert launch(args, tmp_path / "said").kill_when(lambda: steps_logged(output) >= 6)
    second = output / "rollouts" / "step-00000008.json"
    assert launch(args, tmp_path / "said").kill_when(second.exists)
    assert launch(args, tmp_path / "said").codes() == [0]
    assert_same_end(output, whole(kind), 11)
    assert stored(output) == stored(whole(kind))


@each_run
def test_two_processes_train_on_the_rollouts_of_one(kind: str, tmp_path: Path) -> None:
    run_two(training(tmp_path / "two", kind=kind), tmp_path / "said")
    assert json.loads(stored(tmp_path / "two")["step-00000004.json"]) == json.loads(
        stored(whole(kind))["step-00000004.json"]
    )
    assert deviation(whole(kind), tmp_path / "two", 11) < 1e-9
    assert difference(whole(kind), tmp_path / "two") < 2e-5


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
    ("options", "kind", "said"),
    [
        (("--on-policy-setting", "ar"), "adapters", "the mode must be verified or diffusion"),
        (("--on-policy-setting", "mock_ar"), "tower", "the mode must be verified or diffusion"),
        (("--on-policy-setting", "verified:draft_steps=0"), "shift", "drafts nothing; give draft_steps=1"),
        (("--stages", "1:11"), "shift", "a block of 1 has no open prediction in mode verified; give --block-size 2"),
        (("--on-policy-every", "0"), "adapters", "--on-policy-prompts has no effect without --on-policy-every"),
        (("--on-policy-tokens", "96"), "adapters", "leaves no room for a prompt"),
        (("--elbo",), "tower", "--elbo does not go with on-policy training"),
        (("--train-context",), "tower", "--train-context does not go with on-policy training"),
    ],
)
def test_bad_settings(
    options: tuple[str, ...], kind: str, said: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    assert said in complaint(training(tmp_path / "run", *options, kind=kind), capfd)
