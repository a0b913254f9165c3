"""Writes the names of the fields of the installed `openai` package into src/twotower/server/neutral_fields.json.

The part about vLLM is written by hand: its request models at the commit that the file names.
"""

from __future__ import annotations

import importlib
import json
import typing
from pathlib import Path

import openai
import typing_extensions

FILE = Path(__file__).resolve().parents[1] / "src" / "twotower" / "server" / "neutral_fields.json"
# Route under /v1 → module and classes of its bodies.
BODIES = {
    "completions": ("openai.types.completion_create_params", "CompletionCreateParams"),
    "chat/completions": ("openai.types.chat.completion_create_params", "CompletionCreateParams"),
    "responses": ("openai.types.responses.response_create_params", "ResponseCreateParams"),
}
Names = dict[str, list[str]]


def openai_fields() -> dict[str, str | Names]:
    """The version of the package; for each route, the fields of a body (`body`) and of objects in it (`nested`)."""
    found: dict[str, str | Names] = {"version": openai.__version__}
    for route, (module_name, prefix) in BODIES.items():
        module = importlib.import_module(module_name)
        bodies = [getattr(module, f"{prefix}{end}") for end in ("NonStreaming", "Streaming")]
        names = {name for body in bodies for name in typing_extensions.get_type_hints(body)}
        nested: dict[type, set[str]] = {}
        for body in bodies:
            _collect(body, nested)
        inner = {name for kind, fields in nested.items() if kind not in bodies for name in fields}
        found[route] = {"body": sorted(names), "nested": sorted(inner)}
    return found


def _collect(kind: object, found: dict[type, set[str]]) -> None:
    """Adds the fields of all typed dictionaries in a type."""
    if isinstance(kind, type) and typing_extensions.is_typeddict(kind):
        if kind not in found:
            hints = typing_extensions.get_type_hints(kind)
            found[kind] = set(hints)
            for hint in hints.values():
                _collect(hint, found)
        return
    for part in typing.get_args(kind):
        _collect(part, found)


def main() -> None:
    known = json.loads(FILE.read_text("utf-8")) if FILE.exists() else {}
    FILE.write_text(json.dumps(known | {"openai": openai_fields()}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
