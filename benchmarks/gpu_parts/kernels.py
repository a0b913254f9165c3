"""Part 1: every kernel against its reference in float64 on the device, in parallel; registers and spills of each."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from gpu_parts.compiled import resources
from gpu_parts.parallel import in_processes
from gpu_parts.record import Figures, Record
from gpu_parts.setting import Setting
from twotower.ops import self_check, self_check_cases
from twotower.ops.registry import REGISTRY

# Those whose cases compile most come first, so that no process begins one of them last.
SLOWEST = ("attention", "mamba_block", "experts_int4", "experts_int8", "linear_int4", "linear_int8", "experts")


def run(setting: Setting, record: Record) -> None:
    """A process can crash on a bad kernel, so that each checks some of the kernels, and another takes its place."""
    ops = sorted(REGISTRY, key=lambda op: SLOWEST.index(op) if op in SLOWEST else len(SLOWEST))
    dtypes = (torch.float32,) if setting.small else (torch.bfloat16, torch.float32)
    tasks = [(op, number, dtype) for op in ops for number in range(len(REGISTRY[op]) - 1) for dtype in dtypes]
    workers = 1 if setting.small else min(12, os.cpu_count() or 1)

    def check(task: tuple[str, int, torch.dtype]) -> None:
        record.measure(describe(*task), lambda: verdict(setting, *task))

    for task in in_processes(tasks, check, workers):
        record.add(describe(*task), error="its process died")
    for one in resources(Path(os.environ["TRITON_CACHE_DIR"])):
        record.add(f"compiled {one.pop('kernel')}", detail=not one["local"], **one)


def describe(op: str, number: int, dtype: torch.dtype) -> str:
    return f"{op}: {REGISTRY[op][number].name}, {str(dtype).removeprefix('torch.')}"


@torch.no_grad()
def verdict(setting: Setting, op: str, number: int, dtype: torch.dtype) -> Figures:
    """Whether a backend agrees with the last one, the reference."""
    backend = REGISTRY[op][number]
    reason = backend.unsupported_reason(setting.device, dtype)
    if reason is not None:
        return {"detail": True, "skipped": reason}
    cases = self_check_cases.CASES[op](setting.device, dtype)
    wrong = self_check.find_mismatch(backend.function, REGISTRY[op][-1].function, cases)
    return {"verdict": "agrees" if wrong is None else f"DIFFERS: it {wrong}"}
