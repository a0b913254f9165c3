"""The Triton kernels of low-rank updates beside plain loops in float64, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton_mode
from pairwise import pairwise
from tiny_backbones import two_tower
from torch import Tensor

from twotower import options
from twotower.model.adapters import LowRank, adapting
from twotower.model.linear import Linear, linears
from twotower.ops import registry
from twotower.ops.reference import low_rank as reference
from twotower.ops.self_check import find_mismatch
from twotower.ops.self_check_cases import Randn, low_rank_cases

if importlib.util.find_spec("triton") is None:
    pytest.skip("the Triton kernels are not tested: the package triton is not installed", allow_module_level=True)

triton_mode.mend_interpreter()

from twotower.ops.triton import low_rank  # noqa: E402

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
SHARE = {torch.float32: 4e-6, torch.bfloat16: 1e-2}
Given = tuple[tuple[Tensor, ...], Tensor, tuple[tuple[Tensor, Tensor], ...], Tensor]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def arguments(
    shape: tuple[int, ...], width: int, outs: tuple[int, ...], rank: int, dtype: torch.dtype, acts: str = "masks"
) -> Given:
    """acts: of each row of tokens all but the first two ("masks"), or "all", "none" or "one"."""
    randn = Randn(3, DEVICE)
    x = randn(*shape, width).to(dtype)
    pairs = tuple((randn(rank, width).to(dtype) / width**0.5, randn(out, rank).to(dtype) / 2) for out in outs)
    place = torch.arange(x[..., 0].numel(), device=DEVICE).view(shape)
    chosen = {"masks": place % shape[-1] > 1, "all": place >= 0, "none": place < 0, "one": place == place.numel() - 1}
    return tuple(randn(*shape, out).to(dtype) for out in outs), x, pairs, chosen[acts]


def copied(given: Given) -> Given:
    return tuple(out.clone() for out in given[0]), *given[1:]


def naive(given: Given) -> list[Tensor]:
    """Token by token."""
    outs, x, pairs, acts = given
    new = []
    for out, (a, b) in zip(outs, pairs, strict=True):
        wide = out.double().flatten(0, -2).clone()
        for token, own in enumerate(x.double().flatten(0, -2)):
            if acts.flatten()[token]:
                wide[token] += b.double() @ (a.double() @ own)
        new.append(wide.view_as(out))
    return new


def check(given: Given) -> tuple[Tensor, ...]:
    expected, before = naive(given), copied(given)[0]
    found = low_rank.low_rank(*given)
    acts = given[3]
    for actual, wanted, own in zip(found, expected, before, strict=True):
        assert actual.dtype == own.dtype
        limit = SHARE[own.dtype] * max(float(wanted.abs().max()), 1.0)
        torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=limit)
        assert torch.equal(actual[~acts], own[~acts])
    return found


@pytest.mark.parametrize(
    ("shape", "width", "outs", "rank", "acts", "dtype"),
    pairwise(
        [(1, 1), (2, 5), (17,), (3, 30)],
        [7, 128, 700],
        [(1,), (64, 65), (40, 3, 130), (10, 20, 30, 40)],
        [1, 16, 33, 70],
        ["masks", "all", "none", "one"],
        DTYPES,
    ),
)
def test_all_arguments(
    shape: tuple[int, ...], width: int, outs: tuple[int, ...], rank: int, acts: str, dtype: torch.dtype
) -> None:
    """Sums in one part and in several, ranks of several tiles, one to four layers; other tokens keep their bits."""
    check(arguments(shape, width, outs, rank, dtype, acts))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_is_that_of_plain_loops(dtype: torch.dtype) -> None:
    given = arguments((2, 5), 40, (30, 7), 6, torch.float64)
    for actual, wanted in zip(reference.low_rank(*given), naive(given), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)
    assert find_mismatch(low_rank.low_rank, reference.low_rank, low_rank_cases(DEVICE, dtype)) is None


def test_contiguous_outputs_are_changed_in_place_and_others_are_copied() -> None:
    outs, *rest = arguments((2, 4), 20, (16, 24), 4, torch.float32)
    turned = outs[1].transpose(0, 1).contiguous().transpose(0, 1)
    kept = turned.clone()
    found = check(((outs[0], turned), *rest))
    assert found[0].data_ptr() == outs[0].data_ptr()
    assert torch.equal(turned, kept)


def test_strided_inputs() -> None:
    outs, x, pairs, acts = arguments((2, 6), 48, (20,), 5, torch.float32)
    expected = low_rank.low_rank(tuple(out.clone() for out in outs), x, pairs, acts)[0]
    wide = torch.cat([x, x + 1], dim=-1)[..., :48]
    assert torch.equal(low_rank.low_rank(outs, wide, pairs, acts.mT.contiguous().mT)[0], expected)


def test_values_where_the_update_does_not_act_have_no_effect() -> None:
    outs, x, pairs, acts = arguments((3, 7), 300, (40, 9), 8, torch.bfloat16)
    expected = low_rank.low_rank(tuple(out.clone() for out in outs), x, pairs, acts)
    dirty = x.masked_fill(~acts[..., None], torch.nan)
    for actual, wanted in zip(low_rank.low_rank(outs, dirty, pairs, acts), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_equals_the_token_alone(dtype: torch.dtype) -> None:
    """The parts of a sum do not depend on the number of tokens."""
    outs, x, pairs, acts = arguments((30,), 1000, (70, 20), 16, dtype, "all")
    together = low_rank.low_rank(tuple(out.clone() for out in outs), x, pairs, acts)
    for at in (slice(0, 1), slice(17, 20)):
        alone = low_rank.low_rank(tuple(out[at].clone() for out in outs), x[at], pairs, acts[at])
        for own, whole in zip(alone, together, strict=True):
            assert torch.equal(own, whole[at])


def test_no_tokens() -> None:
    outs, x, pairs, acts = arguments((2, 3), 8, (5,), 2, torch.float32)
    assert low_rank.low_rank((outs[0][:0],), x[:0], pairs, acts[:0])[0].shape == (0, 3, 5)


@pytest.mark.parametrize(("width", "parts"), [(48, (1, 128)), (700, (2, 384)), (2688, (7, 384)), (10304, (14, 768))])
def test_parts_cover_the_inputs(width: int, parts: tuple[int, int]) -> None:
    assert low_rank.split_k(width) == parts
    assert parts[0] * parts[1] >= width > (parts[0] - 1) * parts[1]


class Launches:
    """Replaces a kernel and records its launches."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*given: Any, **constants: Any) -> None:
            self.seen.append((grid, [part.shape if isinstance(part, Tensor) else part for part in given], constants))

        return launch


def test_two_launches_for_the_layers_of_an_input_whatever_the_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors: nothing is read on the host, so a CUDA graph can replay the update."""
    launches = Launches()
    monkeypatch.setattr(low_rank, "_reduce_kernel", launches)
    monkeypatch.setattr(low_rank, "_expand_kernel", launches)
    outs, x, pairs, acts = arguments((2, 4), 300, (16, 24, 8), 4, torch.bfloat16)
    meta = tuple(out.to("meta") for out in outs), x.to("meta"), tuple((a.to("meta"), b.to("meta")) for a, b in pairs)
    low_rank.low_rank(*meta, acts.to("meta"))
    assert len(launches.seen) == 2
    for chosen in (acts, ~acts):
        low_rank.low_rank(outs, x, pairs, chosen)
    assert launches.seen[:2] == launches.seen[2:4] == launches.seen[4:]


@pytest.mark.parametrize("name", ["nemotron_h", "llama"])
def test_a_pass_of_adapters_takes_the_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round in fp32 with Triton's kernels equals the same round in plain torch; masks and AR rows in one pass."""
    model = two_tower(name, torch.float32, rank=3)
    called: list[int] = []
    real = low_rank.low_rank

    def noting(outs: Any, *rest: Any) -> Any:
        called.append(len(outs))
        return real(outs, *rest)

    monkeypatch.setattr(low_rank, "low_rank", noting)
    monkeypatch.setattr(model.context, "runners", ())
    tokens = torch.tensor([[20, 21, 22, 3, 3], [23, 3, 3, 0, 0], [24, 0, 0, 0, 0]])
    widths, prefix = torch.tensor([5, 3, 1]), torch.tensor([3, 1, 1])

    def logits() -> Tensor:
        state = model.new_state(3, 20)
        model.prefill(torch.tensor([[5, 6, 7], [8, 9, 0], [10, 0, 0]]), torch.tensor([3, 2, 1]), state)
        found = model.extend(tokens, state, widths, prefix=prefix)
        assert found is not None
        return found

    with options.override(native=False, triton=False):
        expected = logits()
    assert not called
    with options.override(native=False, triton=True):
        registry.select("low_rank", DEVICE, torch.float32)  # its self-check is not counted
        called.clear()
        found = logits()
    for row, width in enumerate(widths.tolist()):
        torch.testing.assert_close(found[row, :width], expected[row, :width], rtol=2e-4, atol=2e-4)
    assert max(called) == 3  # queries, keys and values
    assert len(called) < sum(isinstance(part, Linear) for part in model.context.layers.modules())


@pytest.mark.parametrize(
    "acts", [None, torch.tensor([[False, True, True], [False, False, True]])], ids=["none", "some"]
)
def test_linears_are_those_of_single_layers(acts: Tensor | None) -> None:
    """A layer without an adapter between two with one; biases."""
    layers = [Linear(6, out).double() for out in (4, 3, 5)]
    for layer in (layers[0], layers[2]):
        layer.adapter = LowRank(6, layer.out_features, 2).double()
        for weight in layer.adapter.parameters():
            torch.nn.init.normal_(weight)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    plain = [layer(x) for layer in layers]
    with adapting(acts):
        together, single = linears(x, *layers), [layer(x) for layer in layers]
    for i, (found, alone, base) in enumerate(zip(together, single, plain, strict=True)):
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-12)
        assert torch.equal(found, base) == (acts is None or i == 1)
