"""Old names of decoding arguments, fields and attributes still work, with a warning."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from click.testing import CliRunner
from conftest import build_random_model

from twotower.cli.generate import generate
from twotower.decoding.output import Generation
from twotower.decoding.params import GenerationParams
from twotower.decoding.unmasking import POLICIES, Pass, Verdict, register_policy
from twotower.modeling_twotower import TwoTowerForCausalLM
from twotower.server.completion_requests import CompletionRequest
from twotower.server.request_errors import RequestError


@pytest.fixture(scope="module")
def model() -> TwoTowerForCausalLM:
    return build_random_model("M*")


def test_knob_of_generation_params() -> None:
    with pytest.warns(DeprecationWarning, match="knob is deprecated; use policy_value"):
        params = GenerationParams.from_mapping({"policy": "margin", "knob": 0.5})
    assert params == GenerationParams.of(policy="margin", policy_value=0.5)
    with pytest.warns(DeprecationWarning, match="policy_value"):
        assert params.knob == 0.5
    with pytest.raises(TypeError, match="knob is the old name of policy_value; give only policy_value"):
        GenerationParams.from_mapping({"knob": 0.5, "policy_value": 0.5})


@pytest.mark.parametrize("method", ["generate_mask_diffusion", "generate_verified"])
def test_knob_of_the_published_methods(model: TwoTowerForCausalLM, method: str) -> None:
    call = getattr(model, method)
    assert "knob" not in inspect.signature(call).parameters
    wanted = call([[5, 6]], 4, policy="margin", policy_value=0.5)
    with pytest.warns(DeprecationWarning, match="policy_value"):
        assert torch.equal(call([[5, 6]], 4, policy="margin", knob=0.5), wanted)


def test_knob_of_stream(model: TwoTowerForCausalLM) -> None:
    stream: Callable[..., object] = model.stream
    with pytest.warns(DeprecationWarning, match="policy_value"):
        stream([[5, 6]], knob=0.5)


def test_knob_of_register_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    def rule(seen: Pass, value: torch.Tensor) -> Verdict:
        return Verdict(seen.confidence > value, seen.confidence)

    monkeypatch.delitem(POLICIES, "old", raising=False)
    register: Callable[..., None] = register_policy
    with pytest.warns(DeprecationWarning, match="knob is deprecated; use value_meaning"):
        register("old", rule, knob="confidence", default=0.5)
    assert POLICIES.pop("old").value_meaning == "confidence"


def test_why_of_a_result() -> None:
    result = Generation(
        mode="ar",
        tokens=[],
        text="",
        finish_reason="length",
        prompt_tokens=1,
        committed_at=[],
        confidence=[],
        denoiser_passes=0,
        context_passes=0,
        prefill_seconds=0.0,
        decode_seconds=0.0,
        mode_reason="cheapest",
    )
    assert result.to_dict()["mode_reason"] == "cheapest"
    with pytest.warns(DeprecationWarning, match="why is deprecated; use mode_reason"):
        assert result.why == "cheapest"


def test_knob_of_the_command_line() -> None:
    help_text = CliRunner().invoke(generate, ["--help"]).output
    assert "--policy-value" in help_text
    assert "knob" not in help_text
    result = CliRunner().invoke(generate, ["hi", "--knob", "0.5", "--model", "missing/folder"])
    assert "--knob is deprecated; use --policy-value" in result.stderr


def test_knob_of_a_server_request() -> None:
    request = CompletionRequest.model_validate({"prompt": "x", "policy": "margin", "knob": 0.5})
    assert request.policy_value == 0.5
    assert "knob" not in CompletionRequest.model_json_schema()["properties"]
    with pytest.raises(RequestError, match="knob is the old name of policy_value"):
        CompletionRequest.model_validate({"prompt": "x", "knob": 0.5, "policy_value": 0.5})
