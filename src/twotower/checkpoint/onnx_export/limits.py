"""What an ONNX export refuses, before it reads any weight."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from twotower.byte_units import format_bytes
from twotower.errors import CheckpointError, TwoTowerError, install_command
from twotower.model.towers import TwoTowerModel

PACKAGES = ("onnx", "onnxscript")
LARGEST_FILE = 2**31 - 2**24  # a file is one protobuf message of less than 2 GiB; the rest is for the graph


def require_packages() -> None:
    """Raises TwoTowerError if a package that writes ONNX files is not installed."""
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise TwoTowerError(f"--to onnx needs the package `{name}`: {install_command('onnx')}")


def check(model: TwoTowerModel, origin: Path) -> None:
    """Raises CheckpointError if the passes of a model cannot be graphs. origin: the checkpoint, for the message."""
    several, spec = model.config.denoisers, model.spec
    if several is not None:
        raise CheckpointError(
            f"{origin}: has the denoisers {', '.join(several.names)}, and an ONNX export has one; write one with "
            "twotower export --to denoiser --denoiser NAME, and export that"
        )
    if spec.delta_net is not None:
        raise CheckpointError(
            f"{origin}: has gated DeltaNet layers, which solve triangular systems, and ONNX has no such operation; use "
            "--to gguf or --to one-tower"
        )
    if spec.original_length is not None:
        raise CheckpointError(
            f"{origin}: has LongRoPE, whose rotary embedding depends on the length of the text, so a long text would "
            "be read twice; use --to gguf or --to one-tower"
        )


def check_sizes(sizes: Mapping[str, int], origin: Path) -> None:
    """Raises CheckpointError if a file is too large. sizes: the bytes of the weights of each file."""
    for name, size in sizes.items():
        if size > LARGEST_FILE:
            raise CheckpointError(
                f"{origin}: {name} would have {format_bytes(size)} of fp32 weights, and an ONNX file has less than "
                "2 GiB; --to gguf and --to one-tower write models of any size"
            )
