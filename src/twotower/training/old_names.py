"""Keys that earlier versions wrote into run directories, and the present names of these keys.

A run that an earlier version began is resumed with its files as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")

SETTINGS = {
    "rows": "batch_size",
    "micro_rows": "micro_batch_size",
    "rate": "lr",
    "final": "final_lr_ratio",
    "recompute": "activation_checkpointing",
}
LOG_RECORD = {"rate": "lr", "norm": "grad_norm"}
LOADER_STATE = {"lanes": "row_streams"}
LOADER_LAYOUT = {"rows": "batch_size"}


def with_present_names(data: Mapping[str, Value], renamed: Mapping[str, str]) -> dict[str, Value]:
    """The same values; keys in `renamed` get their present name."""
    return {renamed.get(name, name): value for name, value in data.items()}
