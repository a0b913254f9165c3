"""Denoisers that lack layers or have another feed-forward, in every mode and on every path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import oracle
import pytest
import torch
from conftest import random_two_tower
from decoding_goldens import row_matches, row_of
from shaped_models import MASK, STATIC, config_of, shaped
from test_compiled import BURST, by_row, compiled, needs_kernels, run
from tiny_backbones import VOCAB, slow_but

from twotower import LLM, GenerationParams, Request, TwoTowerForCausalLM, generate
from twotower.cache import sliding_window
from twotower.cache.replica import DeviceTransfer, Replica
from twotower.config import GenericTwoTowerConfig
from twotower.engine import core
from twotower.engine.engine_options import EngineOptions

FAST = ("windows", "hybrid, fewer experts")


@pytest.fixture(autouse=True)
def _no_grad(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Also makes the slots of windows as small as possible, so that tokens move in them often."""
    monkeypatch.setattr(sliding_window, "SHORTEST_CHUNK", 1)
    with torch.no_grad():
        yield


def text(length: int, seed: int = 1) -> list[int]:
    return torch.randint(4, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def requests() -> list[Request]:
    def asked(mode: str, prompt: int, **values: Any) -> Request:
        shared: dict[str, Any] = {"mode": mode, "max_new_tokens": 7, "mask_token_id": MASK}
        return Request(text(prompt), GenerationParams.of(**(shared | values)))

    return [
        asked("mock_ar", 30),
        asked("diffusion", 1, block_size=7, steps_per_block=3),
        asked("diffusion", 33, block_size=26, steps_per_block=3, temperature=0.8, seed=7),
        asked("verified", 25, block_size=9, draft_steps=2),
    ]


def together(model: TwoTowerForCausalLM, rounds: int = 1) -> Any:
    with patch.object(core, "PROMPT_CHUNK", 8):
        llm = LLM(model, rows=3, length=90, block_size=30, options=EngineOptions())
        for _ in range(rounds):
            results = llm.generate(requests())
        llm.close()
    return results


@pytest.mark.parametrize("name", slow_but(FAST, (*STATIC, "shifted")))
def test_requests_equal_the_oracle(name: str) -> None:
    """Alone, together in an engine with prefix cache hits, and through a replica on another device."""
    model = shaped(name)
    rows = [row_of(oracle.decode(model, list(request.prompt), request.params)) for request in requests()]
    for request, row in zip(requests(), rows, strict=True):
        (alone,) = generate(model, [request.prompt], request.params)
        assert row_matches(row_of(alone), row, 2e-6), request
    found = together(model, rounds=2)
    with patch.object(model, "transfer", DeviceTransfer()):
        reader = model.reader(model.new_state(1, 1))
        assert isinstance(reader, Replica)
        assert [i for i, pool in enumerate(reader.copy.pools) if pool is not None] == [
            i
            for i, pool in enumerate(reader.state.pools)
            if pool is not None and i in model.denoiser.spec.context_layers
        ]
        copied = together(model)
    for row, one, two in zip(rows, found, copied, strict=True):
        assert row_matches(row_of(one), row, 2e-6)
        assert row_matches(row_of(two), row, 2e-6)


@pytest.mark.parametrize("name", ["longrope", "windows"])
def test_a_denoiser_that_lacks_layers_is_one_whose_other_layers_add_nothing(name: str) -> None:
    """After texts below, at and beyond the length at which the frequencies of LongRoPE change, together."""
    model, config = shaped(name), config_of(name)
    full = random_two_tower(GenericTwoTowerConfig(backbone=config.backbone, mask_token_id=MASK), 0, torch.float64)
    full.context.load_state_dict(model.context.state_dict())
    for part in ("embeddings", "norm_f", "head"):
        getattr(full.denoiser, part).load_state_dict(getattr(model.denoiser, part).state_dict())
    place = {layer: i for i, layer in enumerate(model.denoiser.spec.context_layers)}
    for i, layer in enumerate(full.denoiser.all_layers()):
        if i in place:
            layer.load_state_dict(model.denoiser.layers[place[i]].state_dict())
        else:
            last = layer.mixer.o_proj if layer.kind == "*" else layer.mixer.down_proj
            last.weight.zero_()
    lengths, block = torch.tensor([60, 64, 70, 3]), torch.tensor([text(5, seed=9)] * 4)
    padded = torch.tensor([text(70, seed=row) for row in range(4)])
    found = []
    for each in (model, full):
        state = each.new_state(4, 80)
        each.prefill(padded, lengths, state)
        found.append(each.denoise(block, None, each.reader(state).view()))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@needs_kernels
@pytest.mark.parametrize("name", slow_but(("hybrid, fewer experts",), [name for name in STATIC if name != "DeltaNet"]))
def test_compiled_decoding_gives_the_same_events(name: str) -> None:
    """fp32: blocks in compiled calls, many passes in one, and the engine's passes one by one."""
    model = shaped(name, torch.float32)
    with compiled(on=False):
        expected = run(LLM(model, rows=2, length=90), greedy(), 0.0)
    with compiled() as calls:
        found = run(LLM(model, rows=2, length=90), greedy(), BURST)
    assert by_row(found) == by_row(expected)
    assert calls["fill_blocks"] > 2


def greedy() -> list[Request]:
    rule = {"policy": "threshold", "policy_value": 0.4, "temperature": 0.0}
    kinds: list[dict[str, Any]] = [
        {"mode": "diffusion", "block_size": 8}, {"mode": "verified", "block_size": 5, "draft_steps": 2},
    ]  # fmt: skip
    return [
        Request(text(length), GenerationParams.of(max_new_tokens=12, mask_token_id=MASK, **rule, **kinds[length % 2]))
        for length in (3, 40, 33)
    ]
