"""The counter of kernels and of reads that make the host wait (`benchmarks/common/operation_counts.py`)."""

from __future__ import annotations

import torch
from benchmark_parts import load

counts_module = load("common/operation_counts.py")
OperationCounts, counted = counts_module.OperationCounts, counts_module.counted


def test_an_operation_is_a_kernel_and_a_view_is_none() -> None:
    x = torch.randn(4, 6)
    with OperationCounts() as counts:
        y = x.T.unflatten(0, (2, 3))[1:].exp()
        y.mul_(2).add_(1)
        torch.empty(3)
    assert counts.kernels == {"exp": 1, "mul_": 1, "add_": 1}
    assert not counts.host_reads


def test_backward_kernels_count() -> None:
    x = torch.randn(3, 3, requires_grad=True)
    forward = x.sin().sum()
    assert counted(forward.backward).kernels["cos"] == 1


def test_reads_that_wait_for_the_device_are_named() -> None:
    x = torch.tensor([1, 0, 2])
    reads = {
        "_local_scalar_dense": lambda: float(x.sum()),
        "nonzero": lambda: x.nonzero(),
        "bincount": lambda: x.bincount(minlength=3),
        "index": lambda: x[x > 0],
        "index_put_": lambda: x.clone().__setitem__(x > 0, torch.tensor([1, 2])),
        "repeat_interleave": lambda: x.repeat_interleave(x),
    }
    for name, read in reads.items():
        assert name in counted(read).host_reads, name
    assert not counted(lambda: x[torch.tensor([0, 1])].repeat_interleave(2)).host_reads


def test_work_on_the_host_can_be_left_out() -> None:
    x = torch.ones(2)
    with OperationCounts() as counts:
        with counts.paused():
            x.exp().sum().item()
        x.sin()
    assert counts.kernels == {"sin": 1}
    assert not counts.host_reads


def test_a_device_leaves_out_host_work() -> None:
    meta = torch.device("meta")
    with OperationCounts(meta) as counts:
        host = torch.ones(3).exp().nonzero()
        host.to(meta).exp()
    assert counts.kernels == {"_to_copy": 1, "exp": 1}
    assert not counts.host_reads
