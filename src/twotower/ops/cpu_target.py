"""The instruction set of the CPU kernels: that of the processor, or a smaller one that the user selects.

The option `cpu_target` (`TWOTOWER_CPU_TARGET`) names the target. The target selects the compiler flags of the C++
kernels and decides whether bf16 products count as fast. It does not configure torch: `ATEN_CPU_CAPABILITY` and
`ONEDNN_MAX_CPU_ISA` do.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch

from twotower import options

VARIABLE = "TWOTOWER_CPU_TARGET"
X86_64 = ("x86_64", "AMD64")


@dataclass(frozen=True, kw_only=True)
class CPUTarget:
    """One instruction set.

    flags: alternative compiler flags; the first set that compiles is used; none: no kernels. probe: the function of
    `torch.cpu` that tests for the instruction set on x86-64; None: every processor has it. allows_bf16: whether the
    target contains instructions for bf16 products.
    """

    name: str
    flags: tuple[tuple[str, ...], ...]
    probe: str | None = None
    allows_bf16: bool = False


NATIVE = CPUTarget(name="native", flags=(("-march=native",), ("-mcpu=native",), ()), allows_bf16=True)
TARGETS = {
    target.name: target
    for target in (
        NATIVE,
        CPUTarget(
            name="avx512_bf16",
            flags=(("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"),),  # every processor with BF16 has VNNI
            probe="_is_avx512_bf16_supported",
            allows_bf16=True,
        ),
        CPUTarget(name="avx512", flags=(("-march=x86-64-v4",),), probe="_is_avx512_supported"),
        CPUTarget(name="avx2", flags=(("-march=x86-64-v3",),), probe="_is_avx2_supported"),
        CPUTarget(name="none", flags=()),
    )
}


def selected() -> CPUTarget:
    """The target that the options name."""
    return TARGETS[options.current().cpu_target]


def unsupported_reason(target: CPUTarget) -> str | None:
    """Why this processor cannot run code for the target, or None."""
    if target.probe is None:
        return None
    if platform.machine() not in X86_64:
        return f"{target.name} needs an x86-64 processor; this one is {platform.machine()}"
    return None if _has(target.probe) else f"this processor has no {target.name}"


def has_bf16_matmul(target: CPUTarget) -> bool:
    """Whether the processor has bf16 products (AVX-512 BF16 or AMX) and the target allows them."""
    return target.allows_bf16 and platform.machine() in X86_64 and (_has("_is_avx512_bf16_supported") or has_amx())


def has_amx() -> bool:
    """Whether the processor has AMX, which torch's products use and the C++ kernels do not."""
    return _has("_is_amx_tile_supported")


def _has(probe: str) -> bool:
    """Whether torch detects the feature; False where this version of torch has no such function."""
    return bool(getattr(torch.cpu, probe, lambda: False)())
