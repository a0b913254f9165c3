"""What a measured figure depends on."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from twotower.checkpoint.quantize import quantization_of
from twotower.model.wide_tensors import tensors
from twotower.version import VERSION


def machine_facts(model: nn.Module) -> dict[str, object]:
    """What a figure of this model depends on, its size included."""
    first = next(model.parameters())
    return device_facts(first.device, first.dtype) | {
        "quantization": quantization_of(model),
        "weights_bytes": sum(tensor.nbytes for _, tensor in tensors(model)),
    }


def machine_summary(where: Mapping[str, object]) -> str:
    """What a reader of figures needs of it: weights, device, threads."""
    weights = where["dtype"] if where["quantization"] == "none" else f"{where['quantization']} and {where['dtype']}"
    return f"{weights}, {where['device']}, {where['threads']} thread{'s' * (where['threads'] != 1)}"


def device_facts(device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    """Hardware, threads, dtype, versions and memory (the process's peak so far, or the accelerator's)."""
    cuda = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "peak_bytes": peak,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "twotower": VERSION,
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or sys.platform


def _commit() -> str | None:
    """Of the checkout this runs from, if it is one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
