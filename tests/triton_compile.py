"""Compiles every kernel for an H100 as its wrapper launches it, on a machine without a GPU.

The interpreter accepts code that the compiler rejects (for example, a variable that changes its type in a loop).
`triton_mode.compiled` runs this file in a separate process without the interpreter.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from twotower.ops.reference import int4
from twotower.ops.reference.attention import PLAIN, AttentionOptions, CachedKV
from twotower.ops.reference.rope import HeadNorms, Rotation
from twotower.ops.self_check_cases import (
    FALCON_SIZES,
    RELEASED_SIZES,
    Sizes,
    argmax_arguments,
    mamba_block_arguments,
    rms_norm_cases,
    state_update_arguments,
)
from twotower.ops.self_check_moe_cases import released_route_arguments, route_cases
from twotower.ops.triton import (
    activation,
    argmax,
    attention,
    draft_sweep,
    experts,
    linear,
    low_rank,
    mamba_block,
    norm,
    rope,
    routing,
    state_update,
)
from twotower.specs import Activation

SHARED_MEMORY = 227 << 10  # of an H100's program
# Bytes of registers that a thread may spill. ptxas spills two registers (8 bytes) if one more program then fits. Only
# these Mamba blocks, of (tokens, state size), need more registers than there are; `docs/benchmarks.md` has the table.
SPILLED = 8
SPILLED_BY_BLOCKS = {(32, 128): 488, (64, 128): 72, (16, 256): 576}
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
    activation,
    argmax,
    attention,
    draft_sweep,
    experts,
    linear,
    low_rank,
    mamba_block,
    norm,
    rope,
    routing,
    state_update,
)


class Compiler:
    """Replaces a kernel; a launch compiles the kernel for the arguments."""

    def __init__(self, kernel: Any, name: str) -> None:
        self.kernel, self.name = kernel, name
        self.done: set[str] = set()

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
        key = repr((signature, values, sorted(aligned), num_warps, num_stages))
        if key in self.done:
            return
        self.done.add(key)
        compiled = triton.compile(
            ASTSource(self.kernel, signature, values, aligned),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": num_warps, "num_stages": num_stages},
        )
        assert compiled.metadata.shared <= SHARED_MEMORY, compiled.metadata.shared
        name, used = self.kernel.__name__, _resources(compiled.asm["cubin"])
        block = (constants["TOKENS"], constants["SIZE_TILE"]) if name == "_block_kernel" else None
        spilled = SPILLED_BY_BLOCKS.get(block, SPILLED)
        assert used["STACK"] + used["LOCAL"] <= spilled, (name, used)
        spill = used["STACK"] + used["LOCAL"]
        print(
            self.name, compiled.metadata.shared, "bytes of shared memory,", used["REG"], "registers,", spill, "spilled"
        )


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers (REG) and bytes of local memory (STACK, LOCAL: where registers spill to) of a kernel, a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([program, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text.stdout)}


def _type(name: str, value: Any, constant: bool) -> str:
    """Triton's type of an argument; the integer 1 is a constant."""
    if constant or value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def main() -> None:
    """Compiles every kernel. Argument "full": for more sizes."""
    for module in MODULES:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            setattr(module, name, Compiler(getattr(module, name), f"{module.__name__.rpartition('.')[2]}.{name}"))
    full = "full" in sys.argv[1:]
    attentions(full)
    products(full)
    heads_and_activations()
    adapters(full)
    norms_and_routers()
    blocks([1, 16, 33, 17] if full else [1, 16])


def blocks(lengths: list[int]) -> None:
    """Mamba mixers and argmax: released sizes with these lengths, larger heads, and one case of odd sizes."""
    odd = Sizes(heads=6, groups=2, width=12, state=24, taps=1)
    for sizes, length, dtype, trace in (
        *((RELEASED_SIZES, length, torch.bfloat16, length != 16) for length in lengths),
        *((FALCON_SIZES, length, torch.bfloat16, True) for length in lengths if length <= 16),
        (odd, 5, torch.float32, True),
    ):
        arguments = mamba_block_arguments(sizes, length, CPU, dtype, rows=2)
        mamba_block.mamba_block(*arguments, trace)
        state_update.state_update(*state_update_arguments(sizes, length, CPU, dtype))
    state_update.state_update(*state_update_arguments(RELEASED_SIZES, 16, CPU, torch.float32))
    projected, *_, weights = arguments
    mamba_block.mamba_block(projected, None, None, None, weights._replace(conv_bias=None), False)
    for length in lengths:
        *inputs, weights = mamba_block_arguments(RELEASED_SIZES, length, CPU, torch.bfloat16, rows=2)
        mamba_block.mamba_block(*inputs, weights._replace(norm="before_gate"), True)
        mamba_block.mamba_block(*inputs, weights._replace(norm="none", norm_weight=None), False)
    for dtype in (torch.bfloat16, torch.float32):
        argmax.argmax(*argmax_arguments(131072, CPU, dtype))


def products(full: bool) -> None:
    """Experts and `out_proj` of the 30B shape for a block and a long prompt, plain, int8 and int4, and odd sizes.

    Experts of a block have gates too. In full also a token and six blocks, and gates for all. Tensors are not filled,
    because nothing is computed.
    """
    released = (128, 2688, 1856, 6)
    for tokens, (count, width, inner, top), dtype in (
        *((tokens, released, torch.bfloat16) for tokens in ((1, 16, 96, 2048) if full else (16, 2048))),
        (96, released, torch.float32),
        (5, (7, 37, 21, 2), torch.bfloat16),
    ):
        hidden, choice = torch.empty(tokens, width, dtype=dtype), torch.zeros(tokens, top, dtype=torch.int64)
        up, down = torch.empty(count, inner, width, dtype=dtype), torch.empty(count, width, inner, dtype=dtype)
        share, kinds = torch.empty(tokens, top), ("silu", "gelu_tanh") if tokens == 16 else ("silu",)
        for kind in ("relu2", *(kinds if full or tokens == 16 else ())):
            gates = kind != "relu2"
            experts.experts(hidden, choice, share, up if gates else None, up, down, kind)
            if kind != "gelu_tanh":  # an activation is the same code for all weights
                packed, data = (_int8(up), _int8(down)), (_int4(up), _int4(down))
                experts.experts_int8(hidden, choice, share, packed[0] if gates else None, *packed, kind)
                experts.experts_int4(hidden, choice, share, data[0] if gates else None, *data, inner, kind)
        x, weight = torch.empty(tokens, 4096, dtype=dtype), torch.empty(width, 4096)
        linear.linear_int8(x[: linear.MAX_TOKENS], *_int8(weight))
        linear.linear_int4(x[: linear.MAX_TOKENS_INT4], _int4(weight), width)
    x, head, bias = torch.empty(16, 2688).bfloat16(), torch.empty(131072, 2688), torch.empty(131072).bfloat16()
    linear.linear_int8(x, *_int8(head), bias)
    linear.linear_int4(x, _int4(head), len(head), bias)


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and scales with the shapes that quantizing `weight` gives."""
    *lead, out, width = weight.shape
    return torch.empty(*lead, -(-out // 16), width, 16, dtype=torch.int8), torch.empty(*lead, out)


def _int4(weight: Tensor) -> Tensor:
    """int4 data with the shape that quantizing `weight` gives."""
    return torch.empty(int4.data_shape(tuple(weight.shape)), dtype=torch.uint8)


def attentions(full: bool) -> None:
    """Attention of the released sizes over 128K tokens, for a denoised block, a token, a committed block, enough rows
    for one split, and a prompt; of other sizes; and with windows and softcaps, as in Gemma 2. Every second one if not
    in full. Causal ones of a block also with a prefix."""
    released, bf16, fp32 = (32, 2, 128), torch.bfloat16, torch.float32
    gemma, window, both = (8, 4, 256), AttentionOptions(None, 4096, None), AttentionOptions(0.0625, 4096, 50.0)
    cases = (
        (1, 16, released, bf16, False, False, 131072),
        (1, 1, released, bf16, False, True, 131072),
        (1, 16, released, bf16, True, True, 131072),
        (64, 16, released, bf16, True, True, 2048),
        (1, 512, released, bf16, True, True, 0),
        (1, 16, released, fp32, True, True, 1024),
        (2, 7, (6, 3, 37), bf16, True, False, 1024),
        (1, 16, (8, 2, 256), bf16, False, True, 1024),
        (1, 16, released, bf16, False, False, 131072, window),
        (1, 16, released, bf16, True, True, 131072, window),
        (1, 1, released, bf16, False, True, 131072, window),
        (1, 512, released, bf16, True, True, 4096, window),
        (1, 16, released, fp32, True, True, 4096, window),
        (1, 16, gemma, bf16, False, False, 4096, both),
        (1, 512, gemma, bf16, True, True, 4096, both),
        (1, 1, gemma, bf16, False, True, 4096, both._replace(window=None)),
        (1, 16, gemma, fp32, True, True, 4096, both),
    )
    for rows, length, sizes, dtype, padded, causal, width, *options in cases[:: 1 if full else 2]:
        heads, kv_heads, head_dim = sizes
        q = torch.zeros(rows, length, heads, head_dim, dtype=dtype)
        k = torch.zeros(rows, length, kv_heads, head_dim, dtype=dtype)
        pool, place = torch.zeros(16, head_dim, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
        token_mask = torch.ones(rows, length, dtype=torch.bool) if padded else None
        cached, own = CachedKV(pool, pool, place, place, place, width, 0), options or [PLAIN]
        attention.attention(q, k, k, token_mask, causal, cached, *own)
        if causal and length == 16:
            attention.attention(q, k, k, token_mask, causal, cached, *own, place)


def adapters(full: bool) -> None:
    """Adapters of the input projection of a Mamba layer, of attention, and of a gated MLP; draft heads."""
    for width, outs, rank, dtype in (
        (2688, (10304,), 16, torch.bfloat16),
        (2688, (4096, 256, 256), 32, torch.bfloat16),
        (2688, (3712, 3712), 96, torch.bfloat16),
        (2688, (4096, 256, 256), 16, torch.float32),
        (37, (21, 35), 5, torch.bfloat16),
    ):
        for count in (16, 96) if full else (16,):
            x = torch.empty(count, width, dtype=dtype)
            pairs = [(x.new_empty(rank, width), x.new_empty(out, rank)) for out in outs]
            acts = torch.ones(count, dtype=torch.bool)
            low_rank.low_rank([x.new_empty(count, out) for out in outs], x, pairs, acts)

    for rank, dtype in ((32, torch.bfloat16), (5, torch.bfloat16), (48, torch.float32)):
        logits, weights = torch.empty(2, 1, 131072, dtype=dtype), [torch.empty(131072, rank, dtype=dtype)] * 2
        tokens, masked = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1, dtype=torch.bool)
        draft_sweep.draft_sweep(logits, (tokens, torch.zeros(2, 1)), masked, tokens[:, 0], weights)


def heads_and_activations() -> None:
    """Norms and rotations of the heads of an 8B Qwen3, of Gemma and of odd sizes; every activation."""
    for heads, kv_heads, width, turned, normed, interleaved in (
        (32, 8, 128, 128, True, False),
        (8, 4, 256, 256, True, False),
        (9, 3, 64, 64, False, False),
        (6, 2, 37, 20, True, True),
        (16, 2, 128, 0, True, False),
    ):
        for dtype in (torch.bfloat16, torch.float32):
            q, k = (torch.empty(2, 16, count, width, dtype=dtype) for count in (heads, kv_heads))
            norms = HeadNorms(*(torch.empty(width, dtype=dtype) for _ in "qk"), 1e-6, 1.0) if normed else None
            angles = torch.empty(2, 16, turned // 2)
            rope.norm_and_rotate(q, k, norms, Rotation(angles, angles, interleaved) if turned else None)
    for dtype in (torch.bfloat16, torch.float32):
        up = torch.empty(16, 14336, dtype=dtype)
        for kind in get_args(Activation):
            activation.activate(up, up, kind)
        activation.activate(up, None, "relu2")


def norms_and_routers() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for case in rms_norm_cases(CPU, dtype, 2688):
            norm.rms_norm(*case.arguments())
        routing.route(*released_route_arguments(CPU, dtype))
        for case in route_cases(CPU, dtype)[1:2]:  # of several groups
            routing.route(*case.arguments())


if __name__ == "__main__":
    main()
