"""The registry of a tower's operations and of the backends that implement them.

Each operation lists its backends in order of preference. `select` returns the first that supports a device and dtype;
`report` says which one and why. The last backend of an operation is its reference in plain torch; the tests compare
every other backend with it. Before its first use on a machine, a compiled kernel is also compared with the reference
(`self_check`). A kernel with wrong results is not used, with a warning. The options `triton` and `native`
(`twotower.options`) switch the kernels off. Selections are cached per set of options.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from twotower import options
from twotower.ops import self_check
from twotower.ops.cpu import kernels as native_ops
from twotower.ops.cpu import moe_kernels as native_moe
from twotower.ops.reference import (
    activation,
    argmax,
    attention,
    draft_sweep,
    experts,
    int4,
    int8,
    integer,
    kv_write,
    linear,
    low_rank,
    mamba_block,
    norm,
    rope,
    routing,
)
from twotower.ops.reference.kv_write import TensorPair
from twotower.ops.reference.mamba_block import MambaStepInputs
from twotower.ops.self_check_cases import CASES
from twotower.ops.triton.launch import triton_unsupported_reason


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation.

    unsupported_reason(device, dtype): None if the backend supports them, otherwise the reason why not. compiled: a
    kernel of this package: it has no gradients, and it is self-checked on the operation's `CASES` before its first use.
    trains: used only where gradients may be needed.
    """

    name: str
    function: Callable[..., Any]
    description: str
    unsupported_reason: Callable[[torch.device, torch.dtype], str | None] = lambda device, dtype: None
    compiled: bool = False
    trains: bool = False


def _grouped_unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "needs CUDA"
    if dtype != torch.bfloat16:
        return "takes bf16 only"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "needs compute capability 9.0"
    return None


def _host_unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if device.type == "cpu" else "would make the host wait for the device"


def _device_unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if device.type == "cuda" else "is for CUDA"


def _triton(module: str, name: str, description: str) -> Backend:
    """A function of a module that is imported on first use, because it needs Triton."""

    def call(*args: object) -> object:
        return getattr(importlib.import_module(f"twotower.ops.triton.{module}"), name)(*args)

    return Backend("triton", call, description, triton_unsupported_reason, compiled=True)


def _native(function: Callable[..., object], description: str) -> Backend:
    """A C++ kernel for CPUs."""
    return Backend("native", function, description, native_ops.cpu_unsupported_reason, compiled=True)


def _each_layer(backend: Backend) -> Backend:
    """Adapts `state_update` of one layer to the operation, which takes the pools and step inputs of all layers."""

    def each(
        pools: Sequence[TensorPair], inputs: Sequence[MambaStepInputs], accepted: Tensor, rows: Tensor | None
    ) -> list[TensorPair]:
        both = zip(pools, inputs, strict=True)
        return [backend.function(*pair, own, accepted, rows) for pair, own in both]

    return replace(backend, function=each)


REGISTRY: dict[str, tuple[Backend, ...]] = {
    "attention": (
        _triton("attention", "attention", "splits each row's cache among programs, in place, up to its length"),
        _native(native_ops.attention, "reads each row's cache in place, up to its length"),
        Backend("two-part", attention.attention, "plain torch; copies the cache unless rows have one stride"),
    ),
    "mamba_block": (
        _triton("mamba_block", "mamba_block", "one kernel from in_proj to out_proj"),
        _native(native_ops.mamba_block, "one kernel from in_proj to out_proj"),
        Backend("torch", mamba_block.mamba_block, "plain torch, differentiable"),
    ),
    "state_update": (
        _each_layer(_triton("state_update", "state_update", "one kernel per layer, in place")),
        _native(native_ops.state_update, "all layers in one call, in place"),
        _each_layer(Backend("torch", mamba_block.update_pools, "plain torch, differentiable")),
    ),
    "kv_append": (
        _native(native_ops.kv_append, "all layers in one call"),
        Backend("torch", kv_write.kv_append, "plain torch; out of place under autograd"),
    ),
    "argmax": (
        _triton("argmax", "argmax", "reads the logits once"),
        _native(native_ops.argmax, "reads the logits once"),
        Backend("tiles", argmax.argmax, "plain torch, upcasts one tile at a time"),
    ),
    "draft_sweep": (
        _triton("draft_sweep", "draft_sweep", "one kernel a position, no host read"),
        Backend("torch", draft_sweep.draft_sweep, "plain torch"),
    ),
    "linear": (
        _native(native_ops.linear, "reads weights once, for small batches"),
        Backend("torch", linear.linear, "plain torch"),
    ),
    "linear_int8": (
        _triton("linear", "linear_int8", "reads int8 once and upcasts it in registers, for small batches"),
        _native(native_ops.linear_int8, "upcasts int8 in registers, for small batches"),
        Backend("torch", int8.linear, "upcasts the whole matrix, then plain torch"),
    ),
    "linear_int4": (
        _triton("linear", "linear_int4", "reads int4 once and dequantizes it in registers, for small batches"),
        _native(native_ops.linear_int4, "dequantizes int4 in registers, for small batches"),
        Backend("torch", int4.linear, "dequantizes the whole matrix, then plain torch"),
    ),
    "linear_w8a8": (
        _native(native_ops.linear_w8a8, "integer products in registers"),
        Backend("torch", integer.linear_w8a8, "exact sums of integers as floats, plain torch"),
    ),
    "linear_w4a8": (
        _native(native_ops.linear_w4a8, "integer products in registers"),
        Backend("torch", integer.linear_w4a8, "exact sums of integers as floats, plain torch"),
    ),
    "low_rank": (
        _triton("low_rank", "low_rank", "all layers of one input in two kernels, in place"),
        Backend("torch", low_rank.low_rank, "plain torch, differentiable"),
    ),
    "rms_norm": (
        _triton("norm", "rms_norm", "norm and modulation in one kernel"),
        _native(native_ops.rms_norm, "norm and modulation in one kernel"),
        Backend("torch", norm.rms_norm, "plain torch"),
    ),
    "norm_and_rotate": (
        _triton("rope", "norm_and_rotate", "queries and keys in one kernel"),
        _native(native_ops.norm_and_rotate, "norm and rotation in one kernel"),
        Backend("torch", rope.norm_and_rotate, "plain torch"),
    ),
    "activate": (
        _triton("activation", "activate", "activation and product with the gate in one kernel"),
        _native(native_ops.activate, "activation and product with the gate in one kernel"),
        Backend("torch", activation.activate, "plain torch"),
    ),
    "route": (
        _triton("routing", "route", "scores and selection in two kernels"),
        _native(native_moe.route, "scores and selection in one kernel"),
        Backend("torch", routing.route, "plain torch"),
    ),
    "experts": (
        Backend("grouped-gemm", experts.experts_grouped, "grouped GEMMs, no host read", _grouped_unsupported_reason),
        _triton("experts", "experts", "reads each selected expert once, no host read"),
        _native(native_moe.experts, "reads each selected expert once"),
        Backend(
            "sorted-loop",
            experts.experts_sorted,
            "reads selected experts only; host memory needs no sync",
            _host_unsupported_reason,
        ),
        # Copies of the selected weights take 24 GB a layer for 8,192 tokens in fp32, and training keeps them.
        Backend(
            "sorted-loop, waiting",
            experts.experts_sorted,
            "reads selected experts only; the host waits for their numbers of tokens",
            _device_unsupported_reason,
            trains=True,
        ),
        Backend("gathered", experts.experts_gathered, "static shapes, no host read; copies the selected weights"),
    ),
    "experts_int4": (
        _triton("experts", "experts_int4", "reads each selected expert once, dequantizes int4 in registers"),
        # For GPUs without Triton, and under autograd, which excludes the kernels of this package.
        Backend(
            "grouped-gemm",
            int4.experts_grouped,
            "dequantizes all experts, then grouped GEMMs",
            _grouped_unsupported_reason,
        ),
        _native(native_moe.experts_int4, "reads each selected expert once, dequantizes int4 in registers"),
        Backend("sorted-loop", int4.experts_sorted, "dequantizes selected experts only", _host_unsupported_reason),
        Backend("gathered", int4.experts_gathered, "static shapes, no host read; copies the selected weights"),
    ),
    "experts_int8": (
        _triton("experts", "experts_int8", "reads each selected expert once, upcasts int8 in registers"),
        # For GPUs without Triton, and under autograd, which excludes the kernels of this package.
        Backend(
            "grouped-gemm",
            int8.experts_grouped,
            "upcasts all experts, then grouped GEMMs",
            _grouped_unsupported_reason,
        ),
        _native(native_moe.experts_int8, "reads each selected expert once, upcasts int8 in registers"),
        Backend("sorted-loop", int8.experts_sorted, "upcasts selected experts only", _host_unsupported_reason),
        Backend("gathered", int8.experts_gathered, "static shapes, no host read; copies the selected weights"),
    ),
    "experts_w8a8": (
        _native(native_moe.experts_w8a8, "reads each selected expert once, integer products in registers"),
        Backend("sorted-loop", integer.experts_w8a8, "exact sums of integers as floats", _host_unsupported_reason),
        Backend("gathered", integer.experts_w8a8_gathered, "static shapes, no host read; copies the selected weights"),
    ),
    "experts_w4a8": (
        _native(native_moe.experts_w4a8, "reads each selected expert once, integer products in registers"),
        Backend("sorted-loop", integer.experts_w4a8, "exact sums of integers as floats", _host_unsupported_reason),
        Backend("gathered", integer.experts_w4a8_gathered, "static shapes, no host read; copies the selected weights"),
    ),
}


def select(
    op: str, device: torch.device, dtype: torch.dtype, differentiable: bool | None = None, few: bool = False
) -> Backend:
    """The first backend of `op` that supports the device and dtype.

    differentiable: whether gradients may be needed; None: whether autograd records now or a dispatch mode is active.
    few: whether a Triton kernel is preferred to grouped GEMM, for little work (`few_pairs`).
    """
    trains = torch.is_grad_enabled() if differentiable is None else differentiable
    # A dispatch mode (FLOP counter, fake tensors, tracing) must see torch operations.
    plain = trains or (differentiable is None and torch._C._len_torch_dispatch_stack() > 0)
    return _select(op, _indexed(device), dtype, plain, trains, few, options.current().kernels_key)


def _indexed(device: torch.device) -> torch.device:
    """The device with its index: "cuda" and "cuda:0" have one selection, and one self-check."""
    if device.type != "cuda" or device.index is not None or not torch.cuda.is_available():
        return device
    return torch.device("cuda", torch.cuda.current_device())


def few_pairs(hidden: Tensor, choice: Tensor, inner: int) -> bool:
    """Whether bf16 experts take the Triton kernel before grouped GEMM, by the option `grouped_pairs`.

    hidden (T, H), choice (T, k). Widths that are no multiples of 8 would make grouped GEMM copy all weights.
    """
    return choice.numel() < options.current().grouped_pairs or bool(hidden.shape[-1] % 8 or inner % 8)


@cache
def _select(
    op: str, device: torch.device, dtype: torch.dtype, plain: bool, trains: bool, few: bool, options_key: str
) -> Backend:
    fitting = [b for b in REGISTRY[op] if not (b.compiled and plain) and (trains or not b.trains)]
    if few and any(b.name == "triton" for b in fitting):
        fitting.sort(key=lambda b: b.name != "triton")  # the others keep their order
    return next(b for b in fitting if _unsupported_reason(op, b, device, dtype, options_key) is None)


@cache
def _unsupported_reason(
    op: str, backend: Backend, device: torch.device, dtype: torch.dtype, options_key: str
) -> str | None:
    """Why a backend is not used: it does not support the device and dtype, or its self-check failed (warns once).

    options_key: `Options.kernels_key` of the options in force, which the backends' own checks read.
    """
    reason = backend.unsupported_reason(device, dtype)
    if reason is not None or not backend.compiled:
        return reason
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{op} is self-checked at its first use; run the pass once before a CUDA graph captures it")
    with torch.no_grad():
        wrong = self_check.find_mismatch(backend.function, REGISTRY[op][-1].function, CASES[op](device, dtype))
    if wrong is None:
        return None
    warnings.warn(f"{op}: {backend.name} is not used on {device} in {dtype}: it {wrong}", RuntimeWarning, stacklevel=4)
    return f"is not used: it {wrong}"


def report(device: torch.device, dtype: torch.dtype) -> list[tuple[str, str, str]]:
    """(op, backend, reason) for each operation of a pass without gradients.

    The reason includes why preferred backends are not used.
    """
    rows, key, device = [], options.current().kernels_key, _indexed(device)
    for op, backends in REGISTRY.items():
        chosen = select(op, device, dtype, differentiable=False)
        before = (b for b in backends[: backends.index(chosen)] if not b.trains)
        passed = [f"{b.name} {_unsupported_reason(op, b, device, dtype, key)}" for b in before]
        checked = ["passed its self-check"] if chosen.compiled else []
        rows.append((op, chosen.name, "; ".join([chosen.description, *checked, *passed])))
    return rows
