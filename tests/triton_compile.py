"""Compiles every kernel for an H100 as its wrapper launches it, on a machine without a GPU.

The interpreter accepts code that the compiler rejects (for example, a variable that changes its type in a loop).
`triton_mode.compiled` runs this file in a separate process without the interpreter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from twotower.ops.reference.attention import CachedKV
from twotower.ops.self_check_cases import (
    RELEASED_SIZES,
    Sizes,
    argmax_arguments,
    mamba_block_arguments,
    rms_norm_cases,
    state_update_arguments,
)
from twotower.ops.self_check_moe_cases import released_route_arguments, route_cases
from twotower.ops.triton import argmax, attention, experts, int8, mamba_block, norm, routing, state_update

SHARED_MEMORY = 227 << 10  # of an H100's program
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.uint8: "*u8",
}
CPU = torch.device("cpu")
MODULES = (
    attention, experts, state_update, argmax, int8, mamba_block, norm, routing,
)  # fmt: skip


class Compiler:
    """Replaces a kernel; a launch compiles the kernel for the arguments."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.compile

    def compile(self, *arguments: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any) -> None:
        given = dict(zip(self.kernel.arg_names, arguments, strict=False)) | constants
        signature = {name: _type(name, value, name in constants) for name, value in given.items()}
        values = {(i,): given[name] for i, name in enumerate(self.kernel.arg_names) if signature[name] == "constexpr"}
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(self.kernel.arg_names)
            if isinstance(given[name], Tensor) or (signature[name] == "i32" and given[name] % 16 == 0)
        }
        compiled = triton.compile(
            ASTSource(self.kernel, signature, values, aligned),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": num_warps, "num_stages": num_stages},
        )
        assert compiled.metadata.shared <= SHARED_MEMORY, compiled.metadata.shared
        print(self.kernel.__name__, compiled.metadata.shared, "bytes of shared memory")


def _type(name: str, value: Any, constant: bool) -> str:
    """Triton's type of an argument; the integer 1 is a constant."""
    if constant or value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def main() -> None:
    """Compiles the parts that the command line names: numbers of tokens, "attention", "norms", "products"."""
    for module in MODULES:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            setattr(module, name, Compiler(getattr(module, name)))
    asked = sys.argv[1:]
    if "attention" in asked:
        attentions()
    if "norms" in asked:
        norms_and_routers()
    if "products" in asked:
        products()
    lengths = [int(word) for word in asked if word.isdigit()]
    if lengths:
        blocks(lengths)


def blocks(lengths: list[int]) -> None:
    """Mamba mixers and argmax: released sizes with these lengths, and one case of odd sizes."""
    odd = Sizes(heads=6, groups=2, width=12, state=24, taps=1)
    for sizes, length, dtype, trace in (
        *((RELEASED_SIZES, length, torch.bfloat16, length != 16) for length in lengths),
        (odd, 5, torch.float32, True),
    ):
        arguments = mamba_block_arguments(sizes, length, CPU, dtype, rows=2)
        mamba_block.mamba_block(*arguments, trace)
        state_update.state_update(*state_update_arguments(sizes, length, CPU, dtype))
    projected, *_, weights = arguments
    mamba_block.mamba_block(projected, None, None, None, weights._replace(conv_bias=None), False)
    for dtype in (torch.bfloat16, torch.float32):
        argmax.argmax(*argmax_arguments(131072, CPU, dtype))


def products() -> None:
    """Experts and `out_proj` of the 30B shape for a token, a block, six blocks and a long prompt, plain and int8, and
    odd sizes. Nothing is computed, so tensors are not filled."""
    released = (128, 2688, 1856, 6)
    for tokens, (count, width, inner, top), dtype in (
        *((tokens, released, torch.bfloat16) for tokens in (1, 16, 96, 2048)),
        (96, released, torch.float32),
        (5, (7, 37, 21, 2), torch.bfloat16),
    ):
        hidden, choice = torch.empty(tokens, width, dtype=dtype), torch.zeros(tokens, top, dtype=torch.int64)
        up, down = torch.empty(count, inner, width, dtype=dtype), torch.empty(count, width, inner, dtype=dtype)
        experts.experts(hidden, choice, torch.empty(tokens, top), up, down)
        experts.experts_int8(hidden, choice, torch.empty(tokens, top), *_int8(up), *_int8(down))
        int8.linear_int8(torch.empty(min(tokens, 256), 4096, dtype=dtype), *_int8(torch.empty(width, 4096)))
    bias = torch.empty(131072, dtype=torch.bfloat16)
    int8.linear_int8(torch.empty(16, 2688, dtype=torch.bfloat16), *_int8(torch.empty(131072, 2688)), bias)


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and scales with the shapes that quantizing `weight` gives."""
    *lead, out, width = weight.shape
    return torch.empty(*lead, -(-out // 16), width, 16, dtype=torch.int8), torch.empty(*lead, out)


def attentions() -> None:
    """Attention of the released sizes over 128K tokens, for a denoised block, a token, a committed block, enough rows
    for one split, and a prompt; and of other sizes."""
    released, bf16, fp32 = (32, 2, 128), torch.bfloat16, torch.float32
    for rows, length, sizes, dtype, padded, causal, width in (
        (1, 16, released, bf16, False, False, 131072),
        (1, 1, released, bf16, False, True, 131072),
        (1, 16, released, bf16, True, True, 131072),
        (64, 16, released, bf16, True, True, 2048),
        (1, 512, released, bf16, True, True, 0),
        (1, 16, released, fp32, True, True, 1024),
        (2, 7, (6, 3, 37), bf16, True, False, 1024),
        (1, 16, (8, 2, 256), bf16, False, True, 1024),
    ):
        heads, kv_heads, head_dim = sizes
        q = torch.zeros(rows, length, heads, head_dim, dtype=dtype)
        k = torch.zeros(rows, length, kv_heads, head_dim, dtype=dtype)
        pool, place = torch.zeros(16, head_dim, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
        token_mask = torch.ones(rows, length, dtype=torch.bool) if padded else None
        attention.attention(q, k, k, token_mask, causal, CachedKV(pool, pool, place, place, place, width, 0))


def norms_and_routers() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for case in rms_norm_cases(CPU, dtype, 2688):
            norm.rms_norm(*case.arguments())
        routing.route(*released_route_arguments(CPU, dtype))
        for case in route_cases(CPU, dtype)[1:2]:  # of several groups
            routing.route(*case.arguments())


if __name__ == "__main__":
    main()
