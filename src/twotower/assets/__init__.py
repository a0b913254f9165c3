"""What ships with the package: small trained two-tower models. Their README.md says what they are, and how made."""

from __future__ import annotations

from pathlib import Path

BUNDLED = "adapters"  # the model of commands without --model
FOLDER = Path(__file__).parent


def bundled_model(name: str = BUNDLED) -> Path:
    """The directory of a bundled model, whether it exists or not."""
    return FOLDER / name


def bundled_names() -> list[str]:
    """The names of the bundled models."""
    return sorted(file.parent.name for file in FOLDER.glob("*/config.json"))
