"""The Triton kernel of the draft head's sweep beside plain loops in float64, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton_mode
from tiny_backbones import two_tower
from torch import Tensor

from twotower.decoding.params import GenerationParams
from twotower.engine.generation import generate
from twotower.ops import registry
from twotower.ops.reference import draft_sweep as reference
from twotower.ops.self_check import find_mismatch
from twotower.ops.self_check_cases import Randn, draft_sweep_cases

if importlib.util.find_spec("triton") is None:
    pytest.skip("the Triton kernels are not tested: the package triton is not installed", allow_module_level=True)

triton_mode.mend_interpreter()

from twotower.ops.triton import draft_sweep  # noqa: E402

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
MASKS = {
    "all": [[1, 1, 1, 1], [1, 1, 1, 1]],
    "prefixes": [[0, 1, 1, 1], [0, 0, 0, 1]],
    "apart": [[1, 0, 0, 1], [0, 1, 0, 1]],
    "none": [[0, 0, 0, 0], [0, 0, 0, 1]],
}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def arguments(size: int, rank: int, masks: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Halves and small integers, so that all sums are exact in bf16, and many are equal. Token 2 is excluded."""
    randn = Randn(5, DEVICE)
    logits = ((randn(2, 4, size) * 4).round() / 2).to(dtype)
    logits[..., 2] = -torch.inf
    weights = tuple((randn(size, rank) * 1.5).clamp(-2, 2).round().to(dtype) for _ in range(2))
    known = torch.randint(size, (2, 4), device=DEVICE), torch.full((2, 4), 0.25, device=DEVICE)
    masked = torch.tensor(MASKS[masks], device=DEVICE).bool()
    return logits, known, masked, torch.tensor([size - 1, 0], device=DEVICE), weights


def naive(given: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Row by row and position by position → tokens, confidences and changed logits."""
    logits, (tokens, sure), masked, before, (previous, following) = given
    logits, tokens, sure = logits.double().clone(), tokens.clone(), sure.double().clone()
    for row in range(len(tokens)):
        last = int(before[row])
        for place in range(tokens.shape[1]):
            if masked[row, place]:
                logits[row, place] += following.double() @ previous[last].double()
                probabilities = logits[row, place].softmax(-1)
                most = float(logits[row, place].max())
                token = next(i for i, value in enumerate(logits[row, place].tolist()) if value == most)
                tokens[row, place], sure[row, place] = token, probabilities[token]
            last = int(tokens[row, place])
    return tokens, sure, logits


def check(given: tuple[Any, ...], first: int = 0) -> None:
    expected = naive(given)
    before = [part.clone() for part in given[1]]
    found = draft_sweep.draft_sweep(*given, first)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-5, atol=1e-6)
    assert torch.equal(given[0].double(), expected[2])
    assert all(torch.equal(own, kept) for own, kept in zip(given[1], before, strict=True))


@DTYPES
@pytest.mark.parametrize("masks", list(MASKS))
@pytest.mark.parametrize(("size", "rank"), [(11, 1), (300, 5), (260, 33)])
def test_masks_anywhere(size: int, rank: int, masks: str, dtype: torch.dtype) -> None:
    """One part and two parts of the vocabulary; ranks of one and of two steps."""
    check(arguments(size, rank, masks, dtype))


@pytest.mark.parametrize("splits", [1, 2, 3])
def test_parts_of_several_steps(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_sweep, "SPLITS", splits)
    check(arguments(1100, 4, "prefixes", torch.float32), first=1)


@DTYPES
def test_the_reference_and_the_self_check(dtype: torch.dtype) -> None:
    for masks in MASKS:
        given = arguments(50, 3, masks, torch.float64)
        tokens, sure, _ = naive(given)
        found = reference.draft_sweep(*given)
        assert torch.equal(found[0], tokens)
        torch.testing.assert_close(found[1].double(), sure, rtol=1e-6, atol=1e-7)
    assert find_mismatch(draft_sweep.draft_sweep, reference.draft_sweep, draft_sweep_cases(DEVICE, dtype)) is None


def test_strided_logits_and_no_rows() -> None:
    given = arguments(40, 3, "apart", torch.float32)
    wide = torch.cat([given[0], given[0] * 0], dim=1)[:, :4]
    assert not wide.is_contiguous()
    check((wide, *given[1:]))
    logits, known, masked, before, weights = given
    none = logits[:0], tuple(part[:0] for part in known), masked[:0], before[:0], weights
    assert draft_sweep.draft_sweep(*none)[0].shape == (0, 4)


class Launches:
    """Replaces the kernel and records its launches."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *given, **constants: self.seen.append((grid, constants))


def test_a_launch_for_each_position_and_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors: nothing is read on the host, so the sweep does not wait for the device."""
    launches = Launches()
    monkeypatch.setattr(draft_sweep, "_draft_kernel", launches)
    logits, known, masked, before, weights = arguments(600, 4, "prefixes", torch.bfloat16)
    meta = torch.device("meta")
    own = tuple(part.to(meta) for part in known), masked.to(meta), before.to(meta), tuple(w.to(meta) for w in weights)
    draft_sweep.draft_sweep(logits.to(meta), *own, 1)
    assert len(launches.seen) == 4
    assert all(launch == launches.seen[0] for launch in launches.seen)


def test_greedy_rounds_take_the_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows at another temperature are drawn with their noise."""
    model = two_tower("llama", torch.float64, rank=3, draft_rank=4, num_hidden_layers=1)
    monkeypatch.setattr(model.context, "runners", ())
    called: list[int] = []
    (backend,) = (own for own in registry.REGISTRY["draft_sweep"] if own.name == "torch")

    def noting(logits: Tensor, *rest: Any) -> Any:
        called.append(logits.shape[1])
        return reference.draft_sweep(logits, *rest)

    own = {"draft_sweep": (dataclasses.replace(backend, function=noting, name="noting"),)}
    monkeypatch.setattr(registry, "REGISTRY", registry.REGISTRY | own)
    registry._select.cache_clear()
    for temperature in (0.0, 0.7):
        wanted: dict[str, Any] = {"mode": "diffusion", "confidence_threshold": 0.1, "temperature": temperature}
        params = GenerationParams.of(max_new_tokens=6, block_size=4, eos_token_id=(), seed=1, **wanted)
        called.clear()
        generate(model, [[5, 6, 7], [8]], params)
        assert bool(called) == (temperature == 0)
    registry._select.cache_clear()
