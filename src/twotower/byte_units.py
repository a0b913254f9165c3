"""Numbers of bytes in words."""

from __future__ import annotations

import re

UNITS = {"": 1, "b": 1} | {f"{name}b": 10**power for name, power in (("k", 3), ("m", 6), ("g", 9), ("t", 12))}
UNITS |= {f"{name}ib": 2**power for name, power in (("k", 10), ("m", 20), ("g", 30), ("t", 40))}


def unit_of(count: int) -> tuple[str, int]:
    """The largest binary unit of at most `count` bytes: its name and its bytes."""
    for name, divisor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= divisor:
            return name, divisor
    return "bytes", 1


def format_bytes(count: int) -> str:
    """A number of bytes in its unit, such as "1.5 MiB"."""
    unit, divisor = unit_of(count)
    return f"{count / divisor:.{0 if divisor == 1 else 1}f} {unit}"


def parse_bytes(text: str | int) -> int | None:
    """Bytes of a number, or of text such as "5GB", "1.5 MiB", "20kb" or "4096"; None if it is not a size above 0."""
    found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?) ?([kmgt]?i?b|)", str(text).lower())
    if found is None or found[2] not in UNITS:
        return None
    return int(float(found[1]) * UNITS[found[2]]) or None
