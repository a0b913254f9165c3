"""Description of the machine and the software on which a figure was measured."""

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
from twotower.model.fp32_tensors import named_tensors
from twotower.version import VERSION


def machine_facts(model: nn.Module) -> dict[str, object]:
    """Facts about the machine, the software and the model's weights, for the record of a measurement."""
    first = next(model.parameters())
    return device_facts(first.device, first.dtype) | {
        "quantization": quantization_of(model),
        "weights_bytes": sum(tensor.nbytes for _, tensor in named_tensors(model)),
    }


def machine_summary(machine: Mapping[str, object]) -> str:
    """The facts of `machine_facts` that stand beside figures: weights, device, threads."""
    weights = (
        machine["dtype"] if machine["quantization"] == "none" else f"{machine['quantization']} and {machine['dtype']}"
    )
    return f"{weights}, {machine['device']}, {machine['threads']} thread{'s' * (machine['threads'] != 1)}"


def device_facts(device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    """Hardware, threads, dtype, versions and peak memory so far (of the process, or of the CUDA device)."""
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
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or sys.platform


def _commit() -> str | None:
    """Commit of the checkout that this file belongs to; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
