"""Registers and memory of the kernels that Triton has compiled, read from its cache; needs no GPU."""

from __future__ import annotations

import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def resources(cache: Path) -> list[dict[str, Any]]:
    """The kernels that Triton compiled for a GPU: name, warps, registers a thread, bytes of local and shared memory.

    cache: Triton's folder. One line for each kernel: its variant with the most local memory (spills), then registers.
    """
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(_resources, sorted(cache.glob("*/*.cubin"))))
    worst: dict[str, dict[str, Any]] = {}
    for one in found:
        before = worst.get(one["kernel"])
        if before is None or (one["local"], one["registers"]) > (before["local"], before["registers"]):
            worst[one["kernel"]] = one
    counts = {name: sum(one["kernel"] == name for one in found) for name in worst}
    return [one | {"variants": counts[name]} for name, one in sorted(worst.items())]


def _resources(cubin: Path) -> dict[str, Any]:
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([program, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    facts = json.loads(cubin.with_suffix(".json").read_text(encoding="utf-8"))
    return {
        "kernel": facts["name"], "warps": facts["num_warps"], "registers": used["REG"],
        "local": used["STACK"] + used["LOCAL"], "shared": facts["shared"],
    }  # fmt: skip
