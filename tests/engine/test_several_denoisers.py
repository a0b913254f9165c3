"""Several denoisers over one context tower: outputs are those of the models with one of them, alone and in batches."""

from __future__ import annotations

import copy
import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from several_denoisers import joined, with_one_each

from twotower import LLM, GenerationParams, Request
from twotower.cache.replica import DeviceTransfer
from twotower.checkpoint.quantize import quantize_
from twotower.decoding.output import Generation
from twotower.decoding.presets import parse_setting
from twotower.engine.generation import generate
from twotower.errors import ArgumentError, ConfigError
from twotower.evaluation.timed_towers import TimedTowers
from twotower.ops.cpu import library
from twotower.runners.fused_cpu import FusedCPURunner
from twotower.runners.packed_weights import packable_weights

PROMPTS = [[5], [6, 7, 8], [9, 10, 11, 12, 13, 14, 15, 16, 17, 18], [20, 21] * 9]
SETS = [
    ("nemotron_h", {"a": "masks", "b": "full"}),
    ("nemotron_h", {"a": "masks5", "b": "head", "c": "tower-head"}),
    ("llama", {"a": "shift", "b": "short", "c": "everywhere"}),
]
SETTINGS: list[dict[str, Any]] = [
    {"mode": "verified", "draft_steps": 1},
    {"mode": "diffusion", "confidence_threshold": 0.2},
    {"mode": "diffusion", "confidence_threshold": 0.3, "temperature": 0.7, "seed": 4},
    {"mode": "mock_ar"},
    {"mode": "ar"},
]


def ids(value: object) -> str | None:
    return "+".join(value.values()) if isinstance(value, dict) else str(value)


def params(setting: dict[str, Any], denoiser: str | None) -> GenerationParams:
    return GenerationParams.of(max_new_tokens=13, eos_token_id=2, block_size=6, denoiser=denoiser, **setting)


def facts(result: Generation) -> tuple[object, ...]:
    return result.tokens, result.finish_reason, result.accepted, result.denoiser_passes, result.context_passes


@pytest.mark.parametrize(("name", "choices"), SETS, ids=ids)
@torch.no_grad()
def test_outputs_are_those_of_each_model_alone_and_in_one_batch(name: str, choices: dict[str, str]) -> None:
    made = with_one_each(name, choices)
    model = joined(made)
    work = [(own, setting, prompt) for own in choices for setting in SETTINGS for prompt in PROMPTS[1:3]]
    expected = [generate(made[own], [prompt], params(setting, None))[0] for own, setting, prompt in work]
    for (own, setting, prompt), each in list(zip(work, expected, strict=True))[::3]:
        assert facts(generate(model, [prompt], params(setting, own))[0]) == facts(each), (own, setting)
    llm = LLM(model, rows=7, length=60, block_size=6)
    found = llm.generate([Request(prompt, params(setting, own)) for own, setting, prompt in work])
    for (own, setting, _), one, each in zip(work, found, expected, strict=True):
        assert facts(one) == facts(each), (own, setting)
    by_denoiser = [[facts(one) for (own, *_), one in zip(work, found, strict=True) if own == name] for name in choices]
    assert all(one != other for one, other in itertools.combinations(by_denoiser, 2))


def test_a_request_without_a_name_has_the_denoiser_of_its_mode() -> None:
    made = with_one_each("nemotron_h", {"a": "head", "b": "full"})
    model = joined(made, {"diffusion": "b"})
    for setting, own in ((SETTINGS[0], "a"), (SETTINGS[1], "b"), (SETTINGS[2], "b"), (SETTINGS[3], "a")):
        other = "ab".replace(own, "")
        found, expected, wrong = (
            [facts(one) for one in generate(each, PROMPTS, params(setting, None))]
            for each in (model, made[own], made[other])
        )
        assert found == expected
        assert found != wrong
    chosen = generate(model, PROMPTS, params({"mode": "auto"}, None))
    assert [one.mode for one in chosen] == ["verified"] * 4
    assert "adapters" in chosen[0].mode_reason
    assert [one.tokens for one in chosen] == [
        one.tokens for one in generate(model, PROMPTS, params({"mode": "ar"}, None))
    ]
    tensor = model.generate_mask_diffusion(PROMPTS[:1], max_new_tokens=12, denoiser="a")
    assert torch.equal(tensor, made["a"].generate_mask_diffusion(PROMPTS[:1], max_new_tokens=12))
    assert not torch.equal(tensor, model.generate_mask_diffusion(PROMPTS[:1], max_new_tokens=12))


def test_names_are_checked() -> None:
    made = with_one_each("llama", {"a": "masks", "b": "full"})
    model = joined(made)
    for mode in ("diffusion", "ar", "auto"):
        with pytest.raises(ArgumentError, match="denoiser is 'c'; this model has the denoisers a and b, so name one"):
            generate(model, PROMPTS, params({"mode": mode}, "c"))
        with pytest.raises(ArgumentError, match="denoiser is 'a', and this model has one denoiser, without a name"):
            generate(made["a"], PROMPTS, params({"mode": mode}, "a"))
    with pytest.raises(ArgumentError, match="denoiser is 3; it must be a name"):
        params({"mode": "ar"}, 3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="policy is 'entropy', and this model's denoiser is adapters"):
        generate(model, PROMPTS, params({"mode": "diffusion", "policy": "entropy"}, "a"))
    generate(model, PROMPTS[:1], params({"mode": "diffusion", "policy": "entropy"}, "b"))
    calls: list[int] = []
    with pytest.raises(ArgumentError, match="step_callback: this model's denoiser is adapters"):
        generate(
            model, PROMPTS, params({"mode": "diffusion"}, "a"), step_callback=lambda step, *_, **__: calls.append(step)
        )
    generate(
        model, PROMPTS, params({"mode": "diffusion"}, "b"), step_callback=lambda step, *_, **__: calls.append(step)
    )
    assert calls
    with pytest.raises(ConfigError, match="the model has the denoisers a and b, and one is needed"):
        model.denoise(torch.tensor([[3]]), None, model.reader(model.new_state(1, 4)).view())


def test_a_prefix_read_for_one_denoiser_serves_the_others() -> None:
    made = with_one_each("nemotron_h", {"a": "masks", "b": "full"})
    model, prompt = joined(made), [5 + token % 90 for token in range(300)]
    llm = LLM(model, rows=2, length=340, block_size=6)
    for own in ("a", "b"):
        (found,) = llm.generate([Request(prompt, params(SETTINGS[1], own))])
        assert found.cached_tokens == (256 if own == "b" else 0)
        assert found.tokens == generate(made[own], [prompt], params(SETTINGS[1], None))[0].tokens


@pytest.mark.parametrize("plan", ["none", "int8"])
def test_compiled_passes_of_packed_and_quantised_weights(plan: str) -> None:
    made = with_one_each("nemotron_h", {"a": "masks", "b": "full", "c": "head"}, torch.float32)
    model = joined(made)
    for each in (model, *made.values()):
        quantize_(each, plan)
        each.pack()
    packed = sum(copy.nbytes for _, held in packable_weights(model) if (copy := held.data) is not None)
    assert model.pack() == packed
    work = [(own, setting, prompt) for own in made for setting in SETTINGS[:2] for prompt in PROMPTS]
    expected = [generate(made[own], [prompt], params(setting, None))[0] for own, setting, prompt in work]
    for rows in (1, 5):
        llm = LLM(model, rows=rows, length=60, block_size=6)
        found = llm.generate([Request(prompt, params(setting, own)) for own, setting, prompt in work])
        assert [one.tokens for one in found] == [one.tokens for one in expected]
    fused = [
        own for name in made for own in model.with_denoiser(name).context.runners if isinstance(own, FusedCPURunner)
    ]
    if not isinstance(library.library(), str):
        assert all(runner.prepared or runner._decode_passes for runner in fused)


def test_the_weights_of_a_view_are_those_of_the_model() -> None:
    made = with_one_each("llama", {"a": "masks", "b": "full"}, torch.float32)
    model = joined(made)
    view = model.with_denoiser("a")
    assert view is model.with_denoiser("a")
    context = dict(model.context.named_parameters())
    for name, parameter in view.context.named_parameters():
        assert name not in context or parameter is context[name]
    with ThreadPoolExecutor(4) as pool:
        views = list(pool.map(copy.deepcopy(model).with_denoiser, "ab" * 8))
    assert len(set(map(id, views))) == 2
    model.to(torch.float64)
    assert view.dtype == torch.float64
    expected = made["a"].to(torch.float64)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found = generate(other, PROMPTS, params(SETTINGS[1], "a"))
        assert [one.tokens for one in found] == [
            one.tokens for one in generate(expected, PROMPTS, params(SETTINGS[1], None))
        ]
    quantize_(model, "int8")
    assert model.with_denoiser("a") is not view
    assert model.with_denoiser("a").quantization == "int8"
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count < sum(parameter.numel() for each in made.values() for parameter in each.parameters())


def test_two_devices_keep_one_copy_for_all_towers() -> None:
    made = with_one_each("nemotron_h", {"a": "shift", "b": "full"})
    model = joined(made, {"diffusion": "b"})
    model.transfer = DeviceTransfer()
    work = [(own, setting, prompt) for own in made for setting in SETTINGS[:4] for prompt in PROMPTS[1:3]]
    llm = LLM(model, rows=5, length=60, block_size=6)
    assert llm.core.two_devices
    found = llm.generate([Request(prompt, params(setting, own)) for own, setting, prompt in work])
    for (own, setting, prompt), one in zip(work, found, strict=True):
        assert one.tokens == generate(made[own], [prompt], params(setting, None))[0].tokens
    adapters = joined(with_one_each("llama", {"a": "masks", "b": "full"}))
    with pytest.raises(ArgumentError, match="this model's denoiser is adapters on the context tower; give one device"):
        adapters.place_towers_on_devices("cpu", "meta")


def test_settings_name_a_denoiser() -> None:
    assert parse_setting("verified:denoiser=a,draft_steps=1").values == {
        "mode": "verified", "denoiser": "a", "draft_steps": 1,
    }  # fmt: skip
    timed = TimedTowers(joined(with_one_each("nemotron_h", {"a": "shift", "b": "full"}, torch.float32)))
    generate(timed, PROMPTS[:1], params(SETTINGS[1], "a"))  # type: ignore[arg-type]
    assert timed.times.passes["denoiser"] > 0
    assert timed.times.passes["context"] > 0
