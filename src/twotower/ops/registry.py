"""One catalogue of the operations a tower is made of, and which implementation each one uses.

Each op lists its backends in order of preference; the first that fits a device and dtype is taken, once, and
`report` says which and why. Every fast backend has a reference beside it that the tests hold it to. A compiled kernel
is also held to it on the machine it is to run on, before it is first used: one that gives wrong numbers is refused with
a warning. The options `triton` and `native` (`twotower.options`) allow or forbid the kernels. Choices are cached for
each set of options.
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
from twotower.ops.reference import argmax, attention, experts, int8, kv_write, linear, mamba_block, norm, routing
from twotower.ops.reference.kv_write import TensorPair
from twotower.ops.reference.mamba_block import MambaStepInputs
from twotower.ops.self_check_cases import CASES
from twotower.ops.triton.launch import triton_unsupported_reason


@dataclass(frozen=True)
class Backend:
    """One implementation. `unsupported_reason(device, dtype)` is None where it fits, else the reason why not.

    compiled: a kernel of this package. Autograd cannot see through it, and it is not trusted: before it is first used
    it is run on the op's `CASES` beside the op's last backend.
    """

    name: str
    function: Callable[..., Any]
    description: str
    unsupported_reason: Callable[[torch.device, torch.dtype], str | None] = lambda device, dtype: None
    compiled: bool = False


def _grouped_unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "needs CUDA"
    if dtype != torch.bfloat16:
        return "takes bf16 only"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "needs compute capability 9.0"
    return None


def _host_unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if device.type == "cpu" else "would wait for the device"


def _triton(module: str, name: str, description: str) -> Backend:
    """A function of a module that may be imported only where Triton is there."""

    def call(*args: object) -> object:
        return getattr(importlib.import_module(f"twotower.ops.triton.{module}"), name)(*args)

    return Backend("triton", call, description, triton_unsupported_reason, compiled=True)


def _native(function: Callable[..., object], description: str) -> Backend:
    """A kernel for processors."""
    return Backend("native", function, description, native_ops.cpu_unsupported_reason, compiled=True)


def _each_layer(backend: Backend) -> Backend:
    """`mamba_block.state_update` of one layer as the op, which takes the pools and the traces of all."""

    def each(
        pools: Sequence[TensorPair], inputs: Sequence[MambaStepInputs], accepted: Tensor, rows: Tensor | None
    ) -> list[TensorPair]:
        both = zip(pools, inputs, strict=True)
        return [backend.function(*pair, own, accepted, rows) for pair, own in both]

    return replace(backend, function=each)


REGISTRY: dict[str, tuple[Backend, ...]] = {
    "attention": (
        _triton("attention", "attention", "shares out each row's cache where it lies, as long as it is"),
        _native(native_ops.attention, "each row's cache where it lies, as long as it is"),
        Backend("two-part", attention.attention, "joins scores; copies the cache only where rows lie anywhere"),
    ),
    "mamba_block": (
        _triton("mamba_block", "mamba_block", "one kernel from in_proj to out_proj"),
        _native(native_ops.mamba_block, "one kernel from in_proj to out_proj"),
        Backend("torch", mamba_block.mamba_block, "plain torch, differentiable"),
    ),
    "state_update": (
        _each_layer(_triton("state_update", "state_update", "one kernel a layer, states change in place")),
        _native(native_ops.state_update, "all layers in one call, states change in place"),
        _each_layer(Backend("torch", mamba_block.state_update, "plain torch, differentiable")),
    ),
    "kv_append": (
        _native(native_ops.kv_append, "all layers in one call"),
        Backend("torch", kv_write.kv_append, "plain torch; out of place under autograd"),
    ),
    "argmax": (
        _triton("argmax", "argmax", "reads the logits once"),
        _native(native_ops.argmax, "reads the logits once"),
        Backend("tiles", argmax.argmax, "plain torch, widens one tile at a time"),
    ),
    "linear": (
        _native(native_ops.linear, "reads weights once, as they lie, for few tokens"),
        Backend("torch", linear.linear, "plain torch"),
    ),
    "linear_int8": (
        _triton("int8", "linear_int8", "reads int8 once and widens it in registers, for few tokens"),
        _native(native_ops.linear_int8, "widens int8 in registers, for few tokens"),
        Backend("torch", int8.linear, "widens the whole matrix, then plain torch"),
    ),
    "rms_norm": (
        _triton("norm", "rms_norm", "norm and modulation in one"),
        _native(native_ops.rms_norm, "norm and modulation in one"),
        Backend("torch", norm.rms_norm, "plain torch"),
    ),
    "route": (
        _triton("routing", "route", "scores and choice in two"),
        _native(native_ops.route, "scores and choice in one"),
        Backend("torch", routing.route, "plain torch"),
    ),
    "experts": (
        Backend("grouped-gemm", experts.experts_grouped, "one grouped GEMM, no host read", _grouped_unsupported_reason),
        _triton("experts", "experts", "reads each chosen expert once, no host read"),
        _native(native_ops.experts, "reads each chosen expert once"),
        Backend(
            "sorted-loop",
            experts.experts_sorted,
            "visits chosen experts only; host memory needs no sync",
            _host_unsupported_reason,
        ),
        Backend("gathered", experts.experts_gathered, "static shapes, no host read; copies the chosen weights"),
    ),
    "experts_int8": (
        _triton("experts", "experts_int8", "reads each chosen expert once, widens int8 in registers"),
        # For GPUs without Triton, and under autograd, where kernels of this package are left out.
        Backend(
            "grouped-gemm",
            int8.experts_grouped,
            "widens all experts, then one grouped GEMM",
            _grouped_unsupported_reason,
        ),
        _native(native_ops.experts_int8, "reads each chosen expert once, widens int8 in registers"),
        Backend("sorted-loop", int8.experts_sorted, "widens chosen experts only", _host_unsupported_reason),
        Backend("gathered", int8.experts_gathered, "static shapes, no host read; copies the chosen weights"),
    ),
}


def select(op: str, device: torch.device, dtype: torch.dtype, differentiable: bool | None = None) -> Backend:
    """The first backend of `op` that fits. differentiable: whether gradients may be asked for (None: whether autograd
    records now, or a dispatch mode watches)."""
    if differentiable is None:  # a dispatch mode (a FLOP counter, fake tensors, tracing) must see every operation too
        differentiable = torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack() > 0
    return _select(op, device, dtype, differentiable, options.current().kernels_key)


@cache
def _select(op: str, device: torch.device, dtype: torch.dtype, differentiable: bool, options_key: str) -> Backend:
    fitting = (b for b in REGISTRY[op] if not (b.compiled and differentiable))
    return next(b for b in fitting if _unsupported_reason(op, b, device, dtype, options_key) is None)


@cache
def _unsupported_reason(
    op: str, backend: Backend, device: torch.device, dtype: torch.dtype, options_key: str
) -> str | None:
    """Why a backend is not taken: it does not fit, or it has just been found wrong (once, with a warning).

    options_key: `Options.kernels_key` of the options in force, which the backends' own refusals read.
    """
    reason = backend.unsupported_reason(device, dtype)
    if reason is not None or not backend.compiled:
        return reason
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{op} is checked when it is first used, which a capture cannot hold: run the pass once before"
        )
    with torch.no_grad():
        wrong = self_check.find_mismatch(backend.function, REGISTRY[op][-1].function, CASES[op](device, dtype))
    if wrong is None:
        return None
    warnings.warn(f"{op}: {backend.name} is not used on {device} in {dtype}: it {wrong}", RuntimeWarning, stacklevel=4)
    return f"is not used: it {wrong}"


def report(device: torch.device, dtype: torch.dtype) -> list[tuple[str, str, str]]:
    """(op, backend, why) for each op of a pass without gradients, with the reasons why better ones were passed over."""
    rows, key = [], options.current().kernels_key
    for op, backends in REGISTRY.items():
        chosen = select(op, device, dtype, differentiable=False)
        passed = [
            f"{b.name} {_unsupported_reason(op, b, device, dtype, key)}" for b in backends[: backends.index(chosen)]
        ]
        checked = ["agreed with its reference on this machine"] if chosen.compiled else []
        rows.append((op, chosen.name, "; ".join([chosen.description, *checked, *passed])))
    return rows
