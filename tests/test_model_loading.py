"""`load_model`: what dtype "auto" means, and what users are told about bf16."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from command import Result

from twotower import bundled_model, model_loading, system_memory

GIB = 1 << 30
SMALL, LARGE = 10_000_000, model_loading.FP32_BELOW


@pytest.fixture(autouse=True)
def _enough_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_memory, "available_memory", lambda: GIB)


@pytest.mark.parametrize(
    ("stored", "parameters", "devices", "free", "expected"),
    [
        (torch.bfloat16, SMALL, ["cpu", "cpu"], GIB, torch.float32),
        (torch.bfloat16, SMALL, ["cpu", "cpu"], None, torch.float32),
        (torch.bfloat16, SMALL, ["cuda:0", "cpu"], GIB, torch.float32),
        (torch.bfloat16, SMALL, ["cuda:0", "cuda:1"], GIB, torch.bfloat16),
        (torch.bfloat16, SMALL, ["cpu"], 7 * SMALL, torch.bfloat16),
        (torch.bfloat16, LARGE, ["cpu"], 1000 * GIB, torch.bfloat16),
        (torch.bfloat16, LARGE - 1, ["cpu"], 1000 * GIB, torch.float32),
        (torch.float64, SMALL, ["cpu"], GIB, torch.float64),
        (torch.float32, LARGE, ["cuda:0"], GIB, torch.float32),
    ],
)
def test_auto_is_fp32_for_small_models_on_a_cpu(
    stored: torch.dtype,
    parameters: int,
    devices: list[str],
    free: int | None,
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(system_memory, "available_memory", lambda: free)
    assert model_loading.auto_dtype(stored, parameters, devices) == expected


@pytest.mark.parametrize("path", ["native", "none"])
def test_auto_does_not_depend_on_the_instruction_set(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled model is stored in bf16, and computes in fp32 whether or not the processor multiplies bf16."""
    monkeypatch.setattr("twotower.ops.precision.has_fast_bf16_matmul", lambda device: path == "native")
    model = model_loading.load_model(bundled_model("small"), dtype="auto")
    assert model.dtype == model.config.dtype == torch.float32
    assert model_loading.dtype_note(model, "auto") is None


def test_a_model_that_stays_in_bf16_says_so(cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_loading, "FP32_BELOW", 1)
    result = cli("User: Hi", "-n", "2", "--mode", "ar", "--json")
    assert json.loads(result.out)["dtype"] == "bfloat16"
    assert "--dtype float32 is exact, --deterministic repeats the same text" in result.err
    assert "bfloat16" not in cli("User: Hi", "-n", "2", "--mode", "ar", "--dtype", "bfloat16").err
    assert "bfloat16" not in cli("User: Hi", "-n", "2", "--mode", "ar", "--dtype", "float32").err
    assert json.loads(cli("info", "--json").out)["computes_in"]["cpu"] == "bfloat16"


def test_deterministic_reaches_the_engine(cli: Callable[..., Result]) -> None:
    plain, repeatable = (
        json.loads(cli("User: Hi", "-m", "bundled/small", "-n", "8", "--mode", "auto", "--json", *flags).out)
        for flags in ((), ("--deterministic",))
    )
    assert "deterministic" in repeatable["mode_reason"]
    assert "deterministic" not in plain["mode_reason"]


def test_a_bundled_model_has_a_name(cli: Callable[..., Result]) -> None:
    found = model_loading.source_of("bundled/small")
    assert found == bundled_model("small")
    assert model_loading.name_of(found) == "bundled/small"
    result = cli("info", "bundled/large")
    assert result.code == 2
    assert "bundled/large: no such bundled model; there are bundled/adapters, bundled/small" in result.err
