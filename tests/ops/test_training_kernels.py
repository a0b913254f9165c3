"""Operations that training chooses on a GPU, shown on a CPU: experts under autograd."""

from __future__ import annotations

import pytest
import torch
from benchmark_parts import load
from torch.utils.flop_counter import FlopCounterMode

from twotower import options
from twotower.ops.reference import experts
from twotower.ops.reference.experts import experts_sorted
from twotower.ops.registry import report, select

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
