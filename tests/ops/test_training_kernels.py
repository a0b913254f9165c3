"""Operations that training chooses on a GPU, shown on a CPU: experts under autograd, forms of attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from benchmark_parts import load
from packed import ROWS, case, deviation, objective
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from twotower import options
from twotower.model.packed_layout import Layout
from twotower.ops.reference import experts
from twotower.ops.reference.attention import tiled_attention
from twotower.ops.reference.attention_tiles import few_sizes
from twotower.ops.reference.experts import experts_sorted
from twotower.ops.registry import report, select

FORMS = ("padded", "stacked", "repeated")  # the other one is "grouped"
counted = load("common/operation_counts.py").counted


def test_gradients_of_experts_are_written_once() -> None:
    """The backward pass stacks the gradients of the selected experts, and writes no others for each of them."""
    torch.manual_seed(0)
    hidden, chosen, weight = torch.randn(9, 8), torch.rand(9, 6).topk(3).indices, torch.rand(9, 3)
    shapes = ((6, 16, 8), (6, 16, 8), (6, 8, 16))
    gate, up, down = (torch.randn(shape, requires_grad=True) for shape in shapes)
    loss = experts_sorted(hidden, chosen, weight, gate, up, down, "silu").sum()
    counts = counted(loss.backward)
    assert "select_backward" not in counts.kernels
    assert counts.kernels["stack"] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_on_cuda_does_not_gather_weights(dtype: torch.dtype) -> None:
    """In fp32 the experts loop under autograd; without autograd the host waits for nothing."""
    cuda = torch.device("cuda")
    assert select("experts", cuda, dtype).name == "sorted-loop, waiting"
    assert select("experts", torch.device("cpu"), dtype).name == "sorted-loop"
    with options.override(triton=False), torch.no_grad():
        assert select("experts", cuda, dtype).name == "gathered"
        with FlopCounterMode(display=False):  # a dispatch mode
            assert select("experts", cuda, dtype).name == "gathered"
        assert [row[1] for row in report(cuda, dtype) if row[0] == "experts"] == ["gathered"]


def test_gathered_weights_are_copied_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, chosen, weight = torch.randn(9, 8), torch.rand(9, 6).topk(3).indices, torch.rand(9, 3)
    given = (hidden, chosen, weight, None, torch.randn(6, 16, 8), torch.randn(6, 8, 16), "relu2")
    whole = experts.experts_gathered(*given)
    monkeypatch.setattr(experts, "GATHERED", 5 * 16 * 8)  # five pairs of 27
    assert torch.equal(experts.experts_gathered(*given), whole)
    assert counted(lambda: experts.experts_gathered(*given)).kernels["bmm"] == 2 * 6 + 1  # and the weighted sum


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("window", "kv_heads", "own_keys"), [(None, 2, True), (70, 2, False), (70, 1, True), (None, 6, True)]
)
def test_forms_of_attention_are_equal(form: str, window: int | None, kv_heads: int, own_keys: bool) -> None:
    """Values and gradients in float64, of tiles at every distance from the ends of a row."""
    torch.manual_seed(0)
    length, block = 5 * 128 + 40, 8
    document = torch.arange(length).div(300, rounding_mode="floor").expand(2, -1)
    layout = Layout(document // block * block, block)
    tiles = list(layout.denoiser_tiles(window) if own_keys else layout.causal_tiles(window))
    shapes = [(2, 6, length, 8)] + [(2, kv_heads, length, 8)] * 4
    given = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    cotangent = torch.randn(shapes[0], dtype=torch.float64)

    def run(form: str) -> list[Tensor]:
        leaves = [part.clone().requires_grad_() for part in given]
        with options.override(training_attention=form):
            out = tiled_attention(*leaves[:3], tiles, (leaves[3], leaves[4]) if own_keys else None)
        used = leaves if own_keys else leaves[:3]
        return [out, *torch.autograd.grad((out * cotangent).sum(), used)]

    for found, wanted in zip(run(form), run("grouped"), strict=True):
        assert deviation(found, wanted) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_attention_train_alike(form: str) -> None:
    """The loss and the gradients of a denoiser, with rows of more than one tile."""
    step = case("M*E*", 4, rows=(*ROWS, ((200, "bos"), (60, "prompted"))))
    training = objective(step.model, train_context=True)

    def run(form: str) -> list[Tensor]:
        training.zero_grad()
        with options.override(training_attention=form):
            loss = training(step.batch, step.noise, 4)
            loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in training.parameters() if p.grad is not None)]

    for found, wanted in zip(run(form), run("grouped"), strict=True):
        assert deviation(found, wanted) < 1e-9


class Shapes(TorchFunctionMode):
    """Notes the numbers of keys of attention, and leaves the attention out."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: set[int] = set()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.keys.add(args[1].shape[2])
        return torch.empty_like(args[0])


@pytest.mark.parametrize(("length", "grouped", "padded"), [(1024, 8, 6), (8192, 64, 12)])
def test_padded_attention_has_few_numbers_of_keys(length: int, grouped: int, padded: int) -> None:
    """cuDNN makes a plan for each number of keys: in the context tower, and twice in the denoiser."""
    document = torch.zeros(1, length, dtype=torch.long, device="meta")
    q, k, v = (torch.empty(1, 1, length, 8, device="meta") for _ in range(3))
    for form, count in (("grouped", grouped), ("padded", padded)):
        with options.override(training_attention=form), Shapes() as seen:
            tiled_attention(q, k, v, Layout(document, 16).causal_tiles())
            causal = len(seen.keys)
            tiled_attention(q, k, v, Layout(document, 16).denoiser_tiles(), (k, v))
        assert causal == count
        assert len(seen.keys) <= 2 * count
    assert all(keys <= few_sizes(keys) < 1.5 * keys + 128 for keys in range(1, 9000, 7))
