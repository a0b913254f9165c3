"""AsyncHostCopy: several tensors are copied to the host in one transfer."""

from __future__ import annotations

import torch

from twotower.ops.host_transfer import AsyncHostCopy, as_bytes, from_bytes


def test_several_tensors_in_one_copy() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.rand(3, 5, generator=generator) < 0.5,
        torch.randint(-(2**40), 2**40, (3, 5), generator=generator),
        torch.randn(3, 5, generator=generator),
        torch.randn(3, generator=generator, dtype=torch.float64),
        torch.empty(0, 4),
        torch.randn(7, generator=generator).bfloat16(),
        torch.arange(12).view(3, 4).T,  # not contiguous
    ]
    back = from_bytes(as_bytes(tensors), [(tensor.shape, tensor.dtype) for tensor in tensors])
    for sent, received in zip(tensors, back, strict=True):
        assert sent.dtype == received.dtype
        assert torch.equal(sent, received)


def test_on_a_cpu_nothing_is_copied() -> None:
    tensor = torch.arange(3)
    fetched = AsyncHostCopy(tensor, tensor + 1)
    assert fetched.wait()[0] is tensor
    assert fetched.tolist() == [[0, 1, 2], [1, 2, 3]]
