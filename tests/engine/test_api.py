"""The published API and its additions: signatures, prompts, rows, seeds, events, sampling, errors."""

from __future__ import annotations

import inspect
import itertools
import json
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from twotower import BlockEvent, Generation, GenerationParams, TwoTowerForCausalLM, generate
from twotower.decoding.sampling import AR_TOKEN, DIFFUSION_CANDIDATE, Sampling, confidence, filtered, noise, sample
from twotower.errors import ArgumentError, TwoTowerError

Factory = Callable[..., TwoTowerForCausalLM]
MODES = ("diffusion", "ar", "mock_ar")
VOCABULARY = 64
PAD = 0


@pytest.fixture(scope="module")
def model(random_model: Factory) -> TwoTowerForCausalLM:
    """float64, so that the batch size does not change a choice."""
    return random_model(seed=7, dtype=torch.float64, pad_token_id=PAD, max_position_embeddings=200)


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(4, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


ROWS = [prompt(n, n) for n in (1, 7, 30, 3)]


def call(model: TwoTowerForCausalLM, mode: str, prompts: Any, n: int = 20, **arguments: Any) -> Tensor:
    method = {
        "diffusion": model.generate_mask_diffusion,
        "ar": model.generate_ar,
        "mock_ar": model.generate_mock_ar,
    }[mode]
    if mode == "diffusion":
        arguments = {"block_size": 8, "steps_per_block": 8, "confidence_threshold": 0.6} | arguments
    return method(prompts, n, **arguments)


def new_tokens(out: Tensor, width: int) -> list[list[int]]:
    return out[:, width:].tolist()


# --- signatures of the release --------------------------------------------------------------------------------------

ONE_BY_ONE = [("input_ids",), ("max_new_tokens", 128), ("temperature", 0.0), ("top_k", None), ("top_p", None),
              ("eos_token_id", None)]  # fmt: skip
SIGNATURES = {
    "generate_ar": ONE_BY_ONE,
    "generate_mock_ar": ONE_BY_ONE,
    "generate_mask_diffusion": [
        ("input_ids",), ("max_new_tokens", 128), ("block_size", 16), ("steps_per_block", 16), ("mask_token_id", 3),
        ("temperature", 0.0), ("top_k", None), ("confidence_threshold", 0.9), ("eos_token_id", None),
        ("step_callback", None),
    ],
    "place_towers_on_devices": [("ctx_device", "cuda:0"), ("den_device", "cuda:1")],
    "forward": [("input_ids",), ("attention_mask", None), ("labels", None)],
}  # fmt: skip
KEYWORD_ONLY = {
    "generate_ar": {"attention_mask", "seed", "stop"},
    "generate_mock_ar": {"attention_mask", "seed", "stop", "denoiser"},
    "generate_mask_diffusion": {"attention_mask", "seed", "stop", "top_p", "policy", "policy_value", "denoiser"},
    "place_towers_on_devices": set(),
    "forward": set(),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_published_signatures(name: str) -> None:
    parameters = list(inspect.signature(getattr(TwoTowerForCausalLM, name)).parameters.values())[1:]
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    found = [(p.name,) if p.default is p.empty else (p.name, p.default) for p in positional]
    assert found == SIGNATURES[name]
    extra = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    switches = {"deterministic": False} if name.startswith("generate") else {}
    assert extra == dict.fromkeys(KEYWORD_ONLY[name]) | switches


def test_params_have_the_published_defaults() -> None:
    params = GenerationParams()
    for name, *default in [*ONE_BY_ONE, *SIGNATURES["generate_mask_diffusion"]]:
        if default and hasattr(params, name):
            assert getattr(params, name) == (() if name == "eos_token_id" else default[0]), name


# --- shape of the answer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 33])
@pytest.mark.parametrize("length", [1, 2, 17])
def test_prompt_and_new_tokens(model: TwoTowerForCausalLM, mode: str, n: int, length: int) -> None:
    ids = torch.tensor([prompt(length)])
    out = call(model, mode, ids, n)
    assert out.shape == (1, length + n)
    assert out.dtype == torch.long
    assert not out.requires_grad
    assert torch.equal(out[:, :length], ids)
    assert ((out >= 0) & (out < VOCABULARY)).all()


@pytest.mark.parametrize("mode", MODES)
def test_forms_of_a_prompt(model: TwoTowerForCausalLM, mode: str) -> None:
    ids = prompt(9)
    expected = call(model, mode, torch.tensor([ids]))
    for form in (ids, [ids], (tuple(ids),), [torch.tensor(ids)]):
        assert torch.equal(call(model, mode, form), expected)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(call(model, mode, torch.tensor([ids], dtype=dtype)).long(), expected)


def test_small_integer_types_do_not_narrow_the_answer(random_model: Factory) -> None:
    model = random_model(seed=1, vocab_size=1000)
    ids = torch.tensor([prompt(9)])
    for dtype in (torch.int8, torch.uint8):
        assert torch.equal(model.generate_ar(ids.to(dtype), 20), model.generate_ar(ids, 20))
    assert model.generate_ar(ids.int(), 20).dtype == torch.int32


@pytest.mark.parametrize("mode", MODES)
def test_shorter_request_is_a_prefix_of_a_longer_one(model: TwoTowerForCausalLM, mode: str) -> None:
    ids = torch.tensor([prompt(5)])
    for arguments in ({}, {"temperature": 1.0, "seed": 3}):
        longest = call(model, mode, ids, 40, **arguments)
        for n in (0, 1, 7, 8, 9, 23):
            assert torch.equal(call(model, mode, ids, n, **arguments), longest[:, : 5 + n])


def test_nfe_counts_denoiser_passes(model: TwoTowerForCausalLM) -> None:
    calls: list[int] = []
    hook = model.denoiser.register_forward_hook(lambda *_: calls.append(1))
    for mode in MODES:
        for ids in ([ROWS[1]], ROWS):
            calls.clear()
            call(model, mode, ids)
            assert model._last_nfe == len(calls)
    hook.remove()
    assert model._last_nfe == 20  # mock-AR: one pass per token
    call(model, "ar", ROWS)
    assert model._last_nfe == 0


# --- rows of a batch ----------------------------------------------------------------------------------------------


def padded(rows: list[list[int]], side: str, width: int = 33) -> tuple[Tensor, Tensor]:
    """Rows padded with arbitrary tokens → ids and mask."""
    ids = torch.randint(0, VOCABULARY, (len(rows), width), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        span = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, span], mask[i, span] = torch.tensor(row), 1
    return ids, mask


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arguments", [{}, {"temperature": 0.8, "seed": [5, 6, 7, 8], "top_k": 20, "top_p": 0.9}])
def test_each_row_gets_what_it_would_get_alone(model: TwoTowerForCausalLM, mode: str, arguments: dict) -> None:
    seeds = arguments.get("seed", [None] * 4)
    alone = [
        call(model, mode, [row], 18, **arguments | ({"seed": seed} if seed else {}))[0, len(row) :].tolist()
        for row, seed in zip(ROWS, seeds, strict=True)
    ]
    assert new_tokens(call(model, mode, ROWS, 18, **arguments), 30) == alone
    for side, dtype in (("left", torch.bool), ("right", torch.float32)):
        ids, mask = padded(ROWS, side)
        out = call(model, mode, ids, 18, attention_mask=mask.to(dtype), **arguments)
        assert torch.equal(out[:, :33], ids)  # the padded prompt is unchanged; new tokens start at S
        assert new_tokens(out, 33) == alone


@pytest.mark.parametrize("mode", MODES)
def test_rows_end_at_their_own_eos(model: TwoTowerForCausalLM, mode: str) -> None:
    free = new_tokens(call(model, mode, ROWS, 40, temperature=1.0, seed=2), 30)
    eos = [free[0][3], free[2][20]]
    ended = new_tokens(call(model, mode, ROWS, 40, temperature=1.0, seed=2, eos_token_id=eos), 30)
    lengths = []
    for before, after in zip(free, ended, strict=True):
        at = min((before.index(e) for e in eos if e in before), default=39)
        lengths.append(at + 1)
        assert after[: at + 1] == before[: at + 1]
        assert set(after[at + 1 :]) <= {PAD}
    assert len(set(lengths)) > 1
    assert len(ended[0]) == max(lengths)
    # one id, and the same id as a list, are the same
    single = call(model, mode, ROWS, 40, temperature=1.0, seed=2, eos_token_id=eos[0])
    assert torch.equal(single, call(model, mode, ROWS, 40, temperature=1.0, seed=2, eos_token_id=(eos[0],)))


def test_passes_and_step_are_per_row(model: TwoTowerForCausalLM) -> None:
    params = GenerationParams(max_new_tokens=24, block_size=8, steps_per_block=8, confidence_threshold=0.5)
    together = generate(model, ROWS, params)
    for row, result in zip(ROWS, together, strict=True):
        [alone] = generate(model, [row], params)
        assert result.tokens == alone.tokens
        assert result.committed_at == alone.committed_at
        assert result.denoiser_passes == alone.denoiser_passes
        assert result.context_passes == alone.context_passes
        assert result.confidence == pytest.approx(alone.confidence, abs=1e-9)


# --- seeds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_seeds(model: TwoTowerForCausalLM, mode: str) -> None:
    ids = [prompt(5)] * 3
    arguments = {"temperature": 1.0}
    one = new_tokens(call(model, mode, ids, seed=4, **arguments), 5)
    assert one[0] == one[1] == one[2]
    many = new_tokens(call(model, mode, ids, seed=[4, 9, 4], **arguments), 5)
    assert many[0] == many[2] == one[0]
    assert many[1] != many[0]
    generator = torch.get_rng_state()
    call(model, mode, ids, seed=4, **arguments)
    assert torch.equal(torch.get_rng_state(), generator)  # torch's generator is not touched
    torch.manual_seed(0)
    fresh = new_tokens(call(model, mode, ids, **arguments), 5)
    assert fresh[0] != fresh[1]
    assert fresh != new_tokens(call(model, mode, ids, **arguments), 5)
    torch.manual_seed(0)
    assert fresh == new_tokens(call(model, mode, ids, **arguments), 5)


# --- step_callback ------------------------------------------------------------------------------------------------


def test_step_callback(model: TwoTowerForCausalLM) -> None:
    seen: list[tuple[int, int, Tensor, float, Tensor | None, int]] = []

    def callback(step: int, steps: int, block: Tensor, t: float, logits: Tensor | None, block_idx: int) -> None:
        seen.append((step, steps, block.clone(), t, None if logits is None else logits.clone(), block_idx))
        if logits is not None:
            logits.fill_(0.0)  # the caller may change its copy

    ids = torch.tensor([prompt(6)])
    plain = call(model, "diffusion", ids, 20)
    out = call(model, "diffusion", ids, 20, step_callback=callback)
    assert torch.equal(out, plain)
    assert len(seen) == model._last_nfe + 3  # once per block, then once per pass
    blocks = [[s for s in seen if s[5] == i] for i in range(3)]
    assert sum(map(len, blocks)) == len(seen)
    for i, ((first_step, _, first, t, logits, _), *passes) in enumerate(blocks):
        assert (first_step, t, logits) == (0, 1.0, None)
        assert first.tolist() == [[3] * 8]
        assert [step for step, *_ in passes] == list(range(len(passes)))
        left = 8
        for _, steps, block, t, logits, _ in passes:
            assert steps == 8
            assert block.shape == (1, 8)
            assert logits.shape == (1, 8, VOCABULARY)
            assert isinstance(t, float)
            assert t == (block == 3).sum() / 8
            assert t * 8 <= left
            left = t * 8 - 1  # each pass commits at least one
        final = out[0, 6 + 8 * i : 14 + 8 * i]
        kept = passes[-1][2][0, : len(final)]
        assert torch.equal(torch.where(kept == 3, final, kept), final)


def test_a_callback_that_writes_to_its_tensors(model: TwoTowerForCausalLM) -> None:
    """The tensors are copies, so the text does not change."""

    def callback(step: int, steps: int, block: Tensor, *, t: float, logits: Tensor | None, block_idx: int) -> None:
        block.fill_(7)
        if logits is not None:
            logits.fill_(0)

    ids = torch.tensor([prompt(5)])
    assert torch.equal(call(model, "diffusion", ids, 20, step_callback=callback), call(model, "diffusion", ids, 20))


def test_step_callback_of_a_batch(model: TwoTowerForCausalLM) -> None:
    shapes = set()
    call(model, "diffusion", ROWS, 16, step_callback=lambda *a, t, logits, block_idx: shapes.add(tuple(a[2].shape)))
    assert shapes == {(4, 8)}


# --- events -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_stream(model: TwoTowerForCausalLM, mode: str) -> None:
    free = new_tokens(call(model, mode, ROWS, 30), 30)
    arguments = {"max_new_tokens": 30, "eos_token_id": free[1][11]}
    if mode == "diffusion":
        arguments |= {"block_size": 8, "steps_per_block": 8, "confidence_threshold": 0.6}
    results = generate(model, ROWS, GenerationParams.of(mode=mode, **arguments))
    rows: dict[int, list[BlockEvent]] = {i: [] for i in range(len(ROWS))}
    for event in model.stream(ROWS, mode, **arguments):
        assert isinstance(event, BlockEvent)
        assert rows[event.row] == [] or rows[event.row][-1].result is None  # no token after a row's end
        rows[event.row].append(event)
    size = 8 if mode == "diffusion" else 1
    for i, events in rows.items():
        result = events[-1].result
        assert isinstance(result, Generation)
        assert all(event.result is None for event in events[:-1])
        assert [event.start for event in events] == list(range(0, len(result.tokens), size))
        assert [event.block for event in events] == list(range(len(events)))
        assert all(len(event.tokens) == size for event in events[:-1])
        assert [token for event in events for token in event.tokens] == result.tokens == results[i].tokens
        assert [step for event in events for step in event.committed_at] == result.committed_at
        assert [c for event in events for c in event.confidence] == result.confidence
        assert all(0.0 < c <= 1.0 for c in result.confidence)
        assert all(0 <= step < size for step in result.committed_at)
        assert result.finish_reason == ("eos" if arguments["eos_token_id"] in result.tokens else "length")
        assert result.mode == mode
        assert result.prompt_tokens == len(ROWS[i])
        assert result.prefill_seconds > 0
        assert result.decode_seconds > 0
        assert result.tokens_per_pass == results[i].tokens_per_pass > 0
        assert result.context_passes == results[i].context_passes
        assert result.denoiser_passes == results[i].denoiser_passes
        # the context tower does not read a row's last block or token; AR reads to sample
        assert result.context_passes == (len(events) if mode == "ar" else len(events) - 1)
        if mode == "diffusion":  # the last block was cut: its last commits are not among the tokens
            least = sum(max(event.committed_at) + 1 for event in events)
            assert least <= result.denoiser_passes <= least + 7
        else:
            assert result.denoiser_passes == (len(events) if mode == "mock_ar" else 0)
    assert rows[1][-1].result.finish_reason == "eos"


@pytest.mark.parametrize("mode", MODES)
def test_a_stream_of_no_tokens_still_ends(model: TwoTowerForCausalLM, mode: str) -> None:
    events = list(model.stream(ROWS, mode, max_new_tokens=0))
    assert [event.row for event in events] == [0, 1, 2, 3]
    for event in events:
        assert (event.tokens, event.text, event.result.tokens, event.result.finish_reason) == ([], "", [], "length")
        assert event.result.denoiser_passes == event.result.context_passes == event.result.decode_seconds == 0


def test_a_row_is_timed_to_its_own_end(model: TwoTowerForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock counts its readings, so the times depend on passes alone."""
    readings = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(readings)))
    free = new_tokens(call(model, "ar", ROWS, 40), 30)
    results = generate(model, ROWS, GenerationParams.of(mode="ar", max_new_tokens=40, eos_token_id=free[1][2]))
    short, long = (f(results, key=lambda result: len(result.tokens)) for f in (min, max))
    assert len(short.tokens) < len(long.tokens)
    assert 0 < short.decode_seconds < long.decode_seconds


def test_arguments_of_a_stream_are_checked_at_the_call(model: TwoTowerForCausalLM) -> None:
    with pytest.raises(ArgumentError, match="block_size is 0"):
        model.stream(ROWS, block_size=0)
    with pytest.raises(ArgumentError, match="unknown argument blocks"):
        model.stream(ROWS, blocks=3)
    with pytest.raises(ArgumentError, match="mode is 'diffuse'"):
        model.stream(ROWS, "diffuse")


def test_a_stream_can_be_left(model: TwoTowerForCausalLM) -> None:
    events = model.stream(ROWS, max_new_tokens=100)
    assert next(iter(events)).block == 0
    assert torch.is_grad_enabled()
    del events
    call(model, "diffusion", ROWS)


def test_results_are_plain_data(model: TwoTowerForCausalLM) -> None:
    [result] = generate(model, [ROWS[1]], GenerationParams(max_new_tokens=5))
    values = json.loads(json.dumps(result.to_dict()))
    assert values["tokens"] == result.tokens
    assert values["tokens_per_pass"] == result.tokens_per_pass
    assert len(result.tokens) == len(result.committed_at) == len(result.confidence) == 5
    assert result.text == ""


# --- refusals -----------------------------------------------------------------------------------------------------

nan, inf = math.nan, math.inf
ANY_MODE = {
    "max_new_tokens": [-1, 1.0, True, "8", None],
    "temperature": [nan, inf, "hot", True, None],
    "top_k": [0, -3, 2.0, True, "all"],
    "top_p": [-0.1, 1.1, nan, True, "most"],
    "eos_token_id": [-1, VOCABULARY, 2.0, "</s>", True, [2, VOCABULARY]],
    "seed": [-1, 2**63, 1.5, True, "x", [1, 2], [], [None], {1}],
    "stop": ["", [""], [3], 7],
    "attention_mask": [torch.ones(1, 4), torch.ones(5), [[1] * 5], torch.tensor([[1, 0, 1, 1, 1]]), torch.zeros(1, 5)],
}
DIFFUSION = {
    "block_size": [0, -8, 8.0, True, None],
    "steps_per_block": [0, -1, 1.5, True],
    "mask_token_id": [-1, VOCABULARY, 10**9, 3.0, True, None],
    "confidence_threshold": [-0.01, 1.01, nan, inf, True, "0.9", None],
    "step_callback": [5, "print"],
}
BAD = [(mode, name, value) for mode in MODES for name, values in ANY_MODE.items() for value in values]
BAD += [("diffusion", name, value) for name, values in DIFFUSION.items() for value in values]
BAD_PROMPTS = {
    "empty row": [[]],
    "empty row among others": [[5], []],
    "no rows": [],
    "no columns": torch.zeros(1, 0, dtype=torch.long),
    "no rows in a tensor": torch.zeros(0, 4, dtype=torch.long),
    "one-dimensional": torch.tensor([5, 6]),
    "three-dimensional": torch.zeros(1, 1, 1, dtype=torch.long),
    "float tensor": torch.ones(1, 3),
    "bool tensor": torch.ones(1, 3, dtype=torch.bool),
    "float ids": [[5.0, 6.0]],
    "float ids, flat": [5.0, 6.0],
    "float row tensor": [torch.ones(3)],
    "bool ids": [[True, False]],
    "negative id": [[5, -1]],
    "id beyond the vocabulary": torch.tensor([[5, VOCABULARY]]),
    "enormous id": [[10**30]],
    "text without a tokenizer": "hello",
    "texts without a tokenizer": ["hello"],
    "nothing": None,
    "a number": 5,
    "a dict": {"input_ids": [[5]]},
    "mixed": [[5], 6],
    "strange": [object()],
    "beyond the window": [[5] * 201],
}


@pytest.fixture
def idle(model: TwoTowerForCausalLM) -> Any:
    """The model, with towers that fail the test if they run."""

    def refuse(*_: Any) -> None:
        raise AssertionError("work was done before the arguments were checked")

    hooks = [tower.register_forward_pre_hook(refuse) for tower in (model.context, model.denoiser)]
    yield model
    for hook in hooks:
        hook.remove()


def refused(function: Callable[[], Any], *parts: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 — the message is looked at here
        function()
    message = str(caught.value)
    assert isinstance(caught.value, TwoTowerError), message
    assert "\n" not in message
    assert len(message) < 450  # an unknown argument lists the known ones
    for part in parts:
        assert part in message


@pytest.mark.parametrize(("mode", "name", "value"), BAD, ids=lambda v: repr(v)[:30].replace("\n", ""))
def test_bad_arguments(idle: TwoTowerForCausalLM, mode: str, name: str, value: Any) -> None:
    arguments = {"max_new_tokens": 8} | {name: value}
    ids = torch.tensor([prompt(5)])
    said = "prompt" if isinstance(value, Tensor) and not value.any() else name.split("_")[0]
    refused(lambda: call(idle, mode, ids, arguments.pop("max_new_tokens"), **arguments), said)
    refused(lambda: idle.stream(ids, mode, **{name: value}), said)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_bad_prompts(idle: TwoTowerForCausalLM, mode: str, case: str) -> None:
    refused(lambda: call(idle, mode, BAD_PROMPTS[case], 0))


@pytest.mark.parametrize("mode", MODES)
def test_context_window(model: TwoTowerForCausalLM, mode: str) -> None:
    out = call(model, mode, torch.tensor([prompt(190)]), 10)
    assert out.shape == (1, 200)
    refused(lambda: call(model, mode, torch.tensor([prompt(190)]), 11), "190", "11", "200")
    refused(lambda: call(model, mode, [prompt(3), prompt(190)], 11), "190", "context window")


def test_other_refusals(idle: TwoTowerForCausalLM) -> None:
    refused(lambda: idle.generate_ar([[5]], stop="x"), "stop", "tokenizer")
    refused(lambda: idle.generate_ar([[5], [6]], seed=[1, 2, 3]), "3 seeds for 2 prompts")
    refused(lambda: idle.generate_ar([[5]], attention_mask=torch.ones(1, 1)), "attention_mask", "list")
    refused(lambda: GenerationParams(mode="fast"), "mode is 'fast'", "diffusion, ar, mock_ar")
    refused(lambda: GenerationParams.of(gamma=0.5), "unknown argument gamma", "confidence_threshold")
    with pytest.raises(TypeError):
        idle.generate_ar([[5]], 8, 0.0, None, None, None, torch.ones(1, 1))  # additions are keyword-only


def test_lone_values_are_meant_as_one() -> None:
    params = GenerationParams(eos_token_id=2, stop="User:")  # type: ignore[arg-type]
    assert (params.eos_token_id, params.stop) == ((2,), ("User:",))
    assert GenerationParams.of(eos_token_id=[2, 5], stop=["a", "b"], seed=[1, 2]) == GenerationParams(
        eos_token_id=(2, 5), stop=("a", "b"), seed=(1, 2)
    )


def test_whole_numbers_do_where_fractions_may_stand(model: TwoTowerForCausalLM) -> None:
    a = call(model, "diffusion", ROWS, temperature=1, top_p=1, confidence_threshold=1, seed=0)
    b = call(model, "diffusion", ROWS, temperature=1.0, top_p=1.0, confidence_threshold=1.0, seed=0)
    assert torch.equal(a, b)


# --- sampling -----------------------------------------------------------------------------------------------------


def kept(logits: list[float], top_k: int | None = None, top_p: float | None = None) -> list[int]:
    out = filtered(torch.tensor([[logits]], dtype=torch.float64), top_k, top_p)[0, 0]
    return (out > -inf).nonzero()[:, 0].tolist()


def test_top_k_keeps_ties() -> None:
    assert kept([1.0, 3.0, 2.0, 3.0, 2.0], top_k=1) == [1, 3]
    assert kept([1.0, 3.0, 2.0, 3.0, 2.0], top_k=2) == [1, 3]
    assert kept([1.0, 3.0, 2.0, 3.0, 2.0], top_k=3) == [1, 2, 3, 4]
    assert kept([1.0, 3.0, 2.0], top_k=9) == [0, 1, 2]
    assert kept([-inf, 3.0, 2.0], top_k=3) == [1, 2]


def test_top_p_keeps_the_smallest_set_whose_sum_exceeds_p() -> None:
    logits = [math.log(p) for p in (0.125, 0.5, 0.25, 0.125)]
    assert kept(logits, top_p=0.0) == [1]
    assert kept(logits, top_p=0.49) == [1]
    assert kept(logits, top_p=0.51) == [1, 2]
    assert kept(logits, top_p=0.76) == [0, 1, 2]  # equal probabilities: the lower id first
    assert kept(logits, top_p=0.88) == [0, 1, 2, 3]
    assert kept(logits, top_p=1.0) == [0, 1, 2, 3]
    # renormalised after top-k: 0.5 and 0.25 become 2/3 and 1/3
    assert kept(logits, top_k=2, top_p=0.6) == [1]
    assert kept(logits, top_k=2, top_p=0.7) == [1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_filters_against_the_definition(seed: int) -> None:
    logits = torch.randn(1, 1, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    probs = logits.softmax(-1)[0, 0]
    order = probs.argsort(descending=True).tolist()
    for p in (0.05, 0.3, 0.9, 0.99):
        sums = [sum(float(probs[i]) for i in order[:n]) for n in range(1, 41)]
        size = next(n for n, total in enumerate(sums, start=1) if total > p)
        assert kept(logits[0, 0].tolist(), top_p=p) == sorted(order[:size])
    assert kept(logits[0, 0].tolist(), top_k=7) == sorted(order[:7])


def draws(seeds: int = 64, positions: int = 64, size: int = 16, purpose: int = AR_TOKEN, step: int = 0) -> Tensor:
    where = torch.arange(positions).expand(seeds, -1)
    return noise(torch.arange(seeds), where, purpose, step, size)


def test_noise_is_uniform() -> None:
    values = draws().flatten()
    n = len(values)
    assert ((values > 0) & (values < 1)).all()
    distance = (values.sort().values - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance < 1.63 / n**0.5  # Kolmogorov–Smirnov, 1 %
    counts = torch.bincount((values * 256).long(), minlength=256).double()
    chi_square = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert abs(chi_square - 255) < 3 * (2 * 255) ** 0.5
    assert values.unique().numel() == n


def test_noise_is_independent_across_its_key() -> None:
    base = draws()

    def correlation(a: Tensor, b: Tensor) -> float:
        return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])

    bound = 4 / base[:, 1:].numel() ** 0.5
    assert abs(correlation(base[:, 1:], base[:, :-1])) < bound  # positions
    assert abs(correlation(base[1:], base[:-1])) < bound  # seeds
    assert abs(correlation(base[..., 1:], base[..., :-1])) < bound  # tokens
    assert abs(correlation(base, draws(step=1))) < bound
    assert abs(correlation(base, draws(purpose=DIFFUSION_CANDIDATE))) < bound
    # the noise of the next step differs from that of the next position; summed keys would give equal noise
    assert not torch.equal(draws(step=1)[:, :-1], base[:, 1:])
    assert not torch.equal(draws(purpose=DIFFUSION_CANDIDATE)[:, :-1], base[:, 1:])


def test_noise_is_a_function_of_its_key_alone() -> None:
    base = draws()
    rows, positions = torch.tensor([40, 2]), torch.tensor([[9], [63]])
    assert torch.equal(noise(rows, positions, AR_TOKEN, 0, 16), base[rows[:, None], positions])
    assert torch.equal(noise(rows, positions, AR_TOKEN, 0, 8), base[rows[:, None], positions][..., :8])
    large = noise(torch.tensor([2**62 + 1, 2**62]), torch.tensor([[10**6], [10**6]]), AR_TOKEN, 0, 4)
    assert not torch.equal(large[0], large[1])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_gumbel_max_draws_from_the_softmax(temperature: float) -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 1.5, -inf, 0.5, 0.2])
    many = 200
    sampling = Sampling(seeds=torch.arange(many), temperature=temperature)
    positions = torch.arange(many).expand(many, -1)
    tokens = sample(logits.expand(many, many, -1), sampling, positions, AR_TOKEN)
    counts = torch.bincount(tokens.flatten(), minlength=8).double()
    expected = (logits.double() / temperature).softmax(-1) * many**2
    assert counts[5] == 0
    real = expected > 0
    chi_square = ((counts - expected)[real] ** 2 / expected[real]).sum()
    assert chi_square < 18.5  # 6 degrees of freedom, 0.5 %


def test_filters_act_after_the_temperature() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(50, 50, -1)
    positions = torch.arange(50).expand(50, -1)

    def seen(**values: Any) -> set[int]:
        return set(sample(logits, Sampling(seeds=torch.arange(50), **values), positions, AR_TOKEN).flatten().tolist())

    assert seen(temperature=1.0, top_p=0.6) == {0}  # 0.64 of the mass at temperature 1 …
    assert seen(temperature=4.0, top_p=0.6) == {0, 1}  # … but 0.36 at temperature 4
    assert seen(temperature=1.0, top_k=3) == {0, 1, 2}
    assert seen(temperature=0.0, top_k=3) == {0}
    assert seen(temperature=-1.0) == {0}


def test_confidence_is_untempered_and_unfiltered() -> None:
    logits = torch.tensor([[[2.0, 1.0, -inf, 0.0]]], dtype=torch.bfloat16)
    found = confidence(logits, torch.tensor([[1]]))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(math.exp(1) / (math.exp(2) + math.exp(1) + 1))


def test_mask_token_is_never_chosen(random_model: Factory) -> None:
    model = random_model(seed=2, dtype=torch.float64)
    with torch.no_grad():
        model.denoiser.head.weight[11] *= 10.0
    free = call(model, "diffusion", ROWS, 30, temperature=3.0, seed=1)
    assert 11 in free[:, 30:]
    out = call(model, "diffusion", ROWS, 30, mask_token_id=11, temperature=3.0, seed=1)
    assert 11 not in out[:, 30:]
