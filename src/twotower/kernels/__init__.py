"""One catalogue of the operations a tower is made of, and which implementation each one uses.

Each op lists its backends in order of preference; the first that fits a device and dtype is taken, once, and
`report` says which and why. Every fast backend has a slow twin beside it that the tests hold it to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from twotower.kernels import attention, conv, experts, ssd


@dataclass(frozen=True)
class Backend:
    """One implementation. `refusal(device, dtype)` is None where it fits, else the reason why not."""

    name: str
    function: Callable[..., Any]
    why: str
    refusal: Callable[[torch.device, torch.dtype], str | None] = lambda device, dtype: None


def _grouped_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "needs CUDA"
    if dtype != torch.bfloat16:
        return "takes bf16 only"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "needs compute capability 9.0"
    return None


CATALOGUE: dict[str, tuple[Backend, ...]] = {
    "attention": (Backend("two-part", attention.block_attention, "joins scores, never copies the cache"),),
    "causal_conv": (Backend("shifted-adds", conv.causal_conv, "plain torch"),),
    "ssd": (Backend("matrix-form", ssd.ssd_block, "a block is one chunk; plain torch, no compiled package"),),
    "experts": (
        Backend("grouped-gemm", experts.experts_grouped, "one grouped GEMM, no host read", _grouped_refusal),
        Backend(
            "sorted-loop",
            experts.experts_sorted,
            "visits chosen experts only; host memory needs no sync",
            lambda device, dtype: None if device.type == "cpu" else "would wait for the device",
        ),
        Backend("gathered", experts.experts_gathered, "static shapes, no host read; copies the chosen weights"),
    ),
}


@cache
def select(op: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The first backend of `op` that fits."""
    return next(b for b in CATALOGUE[op] if b.refusal(device, dtype) is None)


def report(device: torch.device, dtype: torch.dtype) -> list[tuple[str, str, str]]:
    """(op, backend, why) for each op, with the reasons why better ones were passed over."""
    rows = []
    for op, backends in CATALOGUE.items():
        chosen = select(op, device, dtype)
        passed = [f"{b.name} {b.refusal(device, dtype)}" for b in backends[: backends.index(chosen)]]
        rows.append((op, chosen.name, "; ".join([chosen.why, *passed])))
    return rows
