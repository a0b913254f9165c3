"""Numbers of bytes in words."""


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
