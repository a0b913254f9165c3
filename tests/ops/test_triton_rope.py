"""Triton rotary position embedding and activations against their references, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from typing import get_args

import pytest
import torch
import triton_mode
from torch import Tensor

from twotower.ops.reference import activation as reference_activation
from twotower.ops.reference import rope as reference
from twotower.ops.reference.rope import HeadNorms, Rotation
from twotower.ops.self_check_cases import Randn
from twotower.ops.triton.launch import MAX_HEAD_DIM
from twotower.specs import Activation

if importlib.util.find_spec("triton") is None:
    pytest.skip("the Triton kernels are not tested: the package triton is not installed", allow_module_level=True)

triton_mode.mend_interpreter()

from twotower.ops.triton import activation, rope  # noqa: E402

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SHARE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}  # the interpreter truncates to bf16
Arguments = tuple[Tensor, Tensor, HeadNorms | None, Rotation | None]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# --- norm_and_rotate --------------------------------------------------------------------------------------------------


def arguments(
    heads: tuple[int, int] = (4, 2),
    width: int = 16,
    turned: int | None = None,
    interleaved: bool = False,
    normed: bool = True,
    dtype: torch.dtype = torch.float32,
    offset: float = 0.0,
    shape: tuple[int, int] = (2, 3),
) -> Arguments:
    """turned: the dimensions that turn; None: all, 0: no rotation. Positions up to 10⁵."""
    randn = Randn(0, DEVICE)
    q, k = (randn(*shape, count, width) * 3 for count in heads)
    norms, turn = None, None
    if normed:
        norms = HeadNorms(*((randn(width) / 4 + 1 - offset).to(dtype) for _ in "qk"), 1e-5, offset)
    if turned != 0:
        angles = randn(*shape, (turned or width) // 2) * 1e5
        turn = Rotation(angles.cos() * 1.1, angles.sin() * 1.1, interleaved)
    return q.to(dtype), k.to(dtype), norms, turn


def check(q: Tensor, k: Tensor, norms: HeadNorms | None, turn: Rotation | None) -> tuple[Tensor, Tensor]:
    wide_norms = None if norms is None else norms._replace(q=norms.q.double(), k=norms.k.double())
    wide_turn = None if turn is None else turn._replace(cos=turn.cos.double(), sin=turn.sin.double())
    expected = reference.norm_and_rotate(q.double(), k.double(), wide_norms, wide_turn)
    found = rope.norm_and_rotate(q, k, norms, turn)
    for actual, wanted in zip(found, expected, strict=True):
        assert actual.dtype == q.dtype
        assert actual.is_contiguous()
        torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=SHARE[q.dtype] * float(wanted.abs().max()))
    return found


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("width", "turned"), [(16, 16), (24, 10), (37, 36), (128, 64)])
def test_widths_and_turned_dimensions(
    width: int, turned: int, normed: bool, interleaved: bool, dtype: torch.dtype
) -> None:
    check(*arguments(width=width, turned=turned, interleaved=interleaved, normed=normed, dtype=dtype))


@DTYPES
@pytest.mark.parametrize("heads", [(1, 1), (5, 5), (12, 3), (40, 1)])
def test_heads_of_any_number(heads: tuple[int, int], dtype: torch.dtype) -> None:
    check(*arguments(heads, 64, dtype=dtype))


@DTYPES
def test_norms_alone_and_with_an_offset(dtype: torch.dtype) -> None:
    check(*arguments(turned=0, dtype=dtype))
    check(*arguments(turned=0, dtype=dtype, offset=1.0))
    check(*arguments(dtype=dtype, offset=1.0))


def test_nothing_to_do() -> None:
    q, k, _, _ = arguments()
    assert rope.norm_and_rotate(q, k, None, None) == (q, k)


def test_a_rotation_keeps_lengths_and_distances() -> None:
    """Products of turned queries and keys depend on the difference of their positions alone."""
    q, k, _, _ = arguments((1, 1), 32, normed=False, shape=(1, 2))
    q, k = q[:, :1].expand(1, 2, 1, 32), k[:, :1].expand(1, 2, 1, 32)
    products = []
    for position in (0.0, 1000.0):
        steps = torch.tensor([[position], [position + 7]], device=DEVICE) * 10.0 ** -torch.linspace(0, 4, 16)
        turned_q, turned_k = rope.norm_and_rotate(q, k, None, Rotation(steps.cos()[None], steps.sin()[None], False))
        assert torch.allclose(turned_q.norm(dim=-1), q.norm(dim=-1), rtol=1e-5)
        products.append(float((turned_q[0, 1] * turned_k[0, 0]).sum()))
    assert products[0] == pytest.approx(products[1], rel=1e-3)


def test_slices_and_other_strides() -> None:
    q, k, norms, turn = arguments((4, 2), shape=(4, 6))
    assert turn is not None
    expected = check(q, k, norms, turn)
    apart = [part.mT.contiguous().mT for part in (q, k)]
    by_heads = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in (q, k)]
    packed = torch.cat([q, k], dim=2).split([4, 2], dim=2)  # as from one projection
    angles = Rotation(turn.cos.mT.contiguous().mT, turn.sin.mT.contiguous().mT, False)
    for given in (apart, by_heads, packed):
        for actual, wanted in zip(rope.norm_and_rotate(*given, norms, angles), expected, strict=True):
            assert torch.equal(actual, wanted)
    check(q[1::2, 2:4], k[1::2, 2:4], norms, Rotation(turn.cos[1::2, 2:4], turn.sin[1::2, 2:4], False))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_tokens(shape: tuple[int, int]) -> None:
    q, k, norms, turn = arguments(shape=shape)
    found = rope.norm_and_rotate(q, k, norms, turn)
    assert [part.shape for part in found] == [q.shape, k.shape]


def test_wide_heads_go_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "norm_and_rotate", lambda *_: "the reference")
    assert rope.norm_and_rotate(*arguments(width=MAX_HEAD_DIM + 2)) == "the reference"
    assert rope.norm_and_rotate(*arguments(width=MAX_HEAD_DIM)) != "the reference"


# --- activate ---------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", get_args(Activation))
def test_activations(kind: Activation, gated: bool, dtype: torch.dtype) -> None:
    """Values from −30 to 30, in several programs; sums of small and large values keep their digits."""
    up = Randn(1, DEVICE)(2, 3, 400).to(dtype)
    gate = torch.linspace(-30, 30, 2400, device=DEVICE).view(2, 3, 400).to(dtype)
    given = (up, gate) if gated else (gate, None)
    expected = reference_activation.activate(given[0].double(), gate.double() if gated else None, kind)
    found = activation.activate(*given, kind)
    assert found.dtype == dtype
    share = {torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=share, atol=2e-6)


def test_activations_of_slices_and_of_nothing() -> None:
    both = Randn(2, DEVICE)(5, 2, 40)
    expected = activation.activate(both[:, 0].contiguous(), both[:, 1].contiguous(), "silu")
    assert torch.equal(activation.activate(both[:, 0], both[:, 1], "silu"), expected)
    found = activation.activate(both[:, 0].t().contiguous().t(), both[:, 1].t().contiguous().t(), "silu")
    assert torch.equal(found, expected)
    assert activation.activate(both[:0], None, "gelu").shape == (0, 2, 40)


@pytest.mark.parametrize("kind", get_args(Activation))
def test_activations_of_extreme_values(kind: Activation) -> None:
    values = torch.tensor([0.0, -0.0, 1e-30, -1e-20, 89.0, -89.0, 1e4, -1e4, 3e18, math.nan], device=DEVICE)
    expected = reference_activation.activate(values.double(), None, kind)
    found = activation.activate(values, None, kind).double()
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-30, equal_nan=True)
