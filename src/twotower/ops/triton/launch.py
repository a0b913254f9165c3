"""What every launch of a Triton kernel needs; itself without Triton."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from twotower import options

# What one program can hold: the (L, L) products of a block, and the state of a head.
MAX_LENGTH = 64
MAX_STATE = 64 * 128
MAX_HEAD = 256  # width of an attention head: its queries, keys and values are whole in a program, whatever the lengths
MAX_TOKEN = 16384  # width of a token that a norm holds in the registers of 16 warps


def too_large(length: int, width: int, size: int) -> bool:
    """Whether the reference must run: a block of `length` tokens or a state (width P, size N) exceeds one program."""
    return length > MAX_LENGTH or tile_of(width) * tile_of(size) > MAX_STATE


def tile_of(size: int) -> int:
    """The next power of two, at least 16: the side of a tile."""
    return 1 << max(4, (size - 1).bit_length())


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be where this tower lives."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def precision(dtype: torch.dtype) -> str:
    """fp32 products: exact in a model of fp32; from three TF32 ones (21 bits) on the tensor cores in one of bf16."""
    return "ieee" if dtype == torch.float32 else "tf32x3"


def dense_from(tensor: Tensor, dim: int) -> Tensor:
    """The tensor if its dimensions from `dim` on lie without gaps, else a copy in which they do."""
    return tensor if tensor.is_contiguous() or tensor[(0,) * dim].is_contiguous() else tensor.contiguous()


def triton_unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton kernels do not run here, or None. TRITON_INTERPRET=1 runs them on a CPU: slow, for tests."""
    chosen = options.current()
    if not chosen.triton:
        return "is turned off by TWOTOWER_TRITON=0"
    if device.type != "cuda" and not (device.type == "cpu" and chosen.triton_interpret):
        return "needs CUDA"
    if dtype not in (torch.float32, torch.bfloat16):
        return "takes fp32 and bf16 only"
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton"
    return None
