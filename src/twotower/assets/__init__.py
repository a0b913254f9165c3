"""What ships with the package: one small trained two-tower model."""

from __future__ import annotations

from pathlib import Path

BUNDLED = "small"


def bundled_model() -> Path:
    """The directory of the bundled model (see its README.md for what it is and how it was made)."""
    return Path(__file__).parent / BUNDLED
