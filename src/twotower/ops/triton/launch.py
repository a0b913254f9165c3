"""Launch helpers shared by all Triton kernels. This module does not import Triton."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from twotower import options

# Blocks of one program: for state sizes N up to the first number, tokens up to the second. Registers hold no more.
MAX_BLOCKS = ((128, 64), (256, 16), (512, 1))
MAX_STATE = 64 * 128  # values of one head's state that a program holds at once
MAX_HEAD_DIM = 256  # attention head width: one program holds whole queries, keys and values
MAX_NORM_WIDTH = 16384  # width of a token that a norm keeps in the registers of 16 warps


def exceeds_one_program(length: int, size: int) -> bool:
    """Whether a block of `length` tokens with a state size N exceeds one program; then the reference runs."""
    return not any(size <= largest and length <= tokens for largest, tokens in MAX_BLOCKS)


def head_tile(width: int, size: int, tokens: int) -> int:
    """The rows of a head's state (P, N) that are computed at once; the rows do not depend on each other.

    With more than 32 tokens half as many, because the tokens take registers too.
    """
    return min(tile_of(width), MAX_STATE // tile_of(size) // (1 if tokens <= 32 else 2))


def tile_of(size: int) -> int:
    """The side of a tile: the next power of two, at least 16."""
    return 1 << max(4, (size - 1).bit_length())


def device_guard(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device current: Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def dot_precision(dtype: torch.dtype) -> str:
    """Triton's precision of fp32 matrix products.

    "ieee" (exact) in an fp32 model; in a bf16 model "tf32x3": three TF32 products on the tensor cores, 21 bits.
    """
    return "ieee" if dtype == torch.float32 else "tf32x3"


def contiguous_from(tensor: Tensor, dim: int) -> Tensor:
    """The tensor if its dimensions from `dim` on are contiguous, else a contiguous copy."""
    return tensor if tensor.is_contiguous() or tensor[(0,) * dim].is_contiguous() else tensor.contiguous()


def triton_unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton kernels cannot run here, or None. TRITON_INTERPRET=1 runs them on a CPU: slow, for tests."""
    chosen = options.current()
    if not chosen.triton:
        return "is turned off by TWOTOWER_TRITON=0"
    if device.type != "cuda" and not (device.type == "cpu" and chosen.triton_interpret):
        return "needs CUDA"
    if dtype not in (torch.float32, torch.bfloat16):
        return "supports fp32 and bf16 only"
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton"
    return None
