"""What a machine without network needs for `gpu.py`: packages, a checkout of at most 64 MiB, and data to train on."""

from __future__ import annotations

import gzip
import importlib.metadata
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from gpu_parts.machine import PACKAGES
from gpu_parts.training import DIALOGUES, RECORDED

MOST = 64 << 20  # bytes that may travel
SOURCE = Path("corpora/sgd_dialogues/valid.jsonl.gz")  # in TWOTOWER_DATA


def prepared(root: Path) -> Iterator[str]:
    """Copies the data; lines about what is there, what is missing and how much would travel."""
    yield copied_dialogues()
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.split("\0")
    files = [root / name for name in listed if name and (root / name).is_file()]
    files += [DIALOGUES] * DIALOGUES.exists()
    size = sum(file.stat().st_size for file in files)
    yield f"checkout and data: {len(files)} files, {size / 2**20:.0f} MiB{'' if size <= MOST else ': more than 64 MiB'}"
    for package in PACKAGES:
        try:
            yield f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{package} is missing: the parts that need it are skipped"
    yield f"{RECORDED.name}: {'there' if RECORDED.exists() else 'missing; write it with --record-losses'}"


def copied_dialogues() -> str:
    """Copies the dialogues of TWOTOWER_DATA to `DIALOGUES`, which git ignores."""
    source = Path(os.environ.get("TWOTOWER_DATA", "")) / SOURCE
    if not source.is_file():
        return "no dialogues: set TWOTOWER_DATA to their folder; without them, the run trains on the suite's problems"
    DIALOGUES.parent.mkdir(parents=True, exist_ok=True)
    DIALOGUES.write_bytes(gzip.decompress(source.read_bytes()))
    return f"{DIALOGUES}: {DIALOGUES.stat().st_size / 2**20:.1f} MiB"
