"""Arguments that a model wrote as plain text → values of the types that the JSON schema of the tool allows."""

from __future__ import annotations

import json
from collections.abc import Mapping

ALL_TYPES = frozenset({"string", "number", "integer", "boolean", "null", "object", "array"})
PYTHON_WORDS = {"True": True, "False": False, "None": None}  # chat templates write values as Jinja does
MAX_DEPTH = 16  # of references


def argument_value(text: str, parameters: Mapping[str, object] | None, name: str) -> object:
    """The value of the argument `name`, as its schema in `parameters` allows.

    An argument that the schema does not describe is a text. JSON that the schema allows counts before text.
    """
    properties = (parameters or {}).get("properties")
    schema = properties.get(name) if isinstance(properties, Mapping) else None
    types = frozenset({"string"}) if schema is None else allowed_types(schema, parameters or {})
    if types == {"string"}:
        return text
    word = text.strip()
    if "boolean" in types and word.lower() in ("true", "false"):
        return word.lower() == "true"
    try:
        value = PYTHON_WORDS[word] if word in PYTHON_WORDS else json.loads(word, strict=False, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text
    if "string" in types and isinstance(value, str):  # a text that has quotation marks of its own
        return text
    return value if _kinds(value) & types else text


def allowed_types(schema: object, root: Mapping[str, object], depth: int = 0) -> frozenset[str]:
    """The types of JSON that a schema allows; without a statement, all. root: the schema of references."""
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
        return ALL_TYPES
    found = ALL_TYPES
    kinds = schema.get("type")
    if isinstance(kinds, str | list):
        found &= {kinds} if isinstance(kinds, str) else {kind for kind in kinds if isinstance(kind, str)}
        if "number" in found:
            found |= {"integer"}
    for key in ("anyOf", "oneOf"):
        if isinstance(options := schema.get(key), list):
            found &= frozenset().union(*(allowed_types(option, root, depth + 1) for option in options))
    if isinstance(parts := schema.get("allOf"), list):
        for part in parts:
            found &= allowed_types(part, root, depth + 1)
    if isinstance(values := schema.get("enum"), list):
        found &= frozenset().union(*map(_kinds, values))
    if "const" in schema:
        found &= _kinds(schema["const"])
    if isinstance(reference := schema.get("$ref"), str):
        found &= allowed_types(_resolved(reference, root), root, depth + 1)
    return found


def _resolved(reference: str, root: Mapping[str, object]) -> object:
    """The schema of a reference such as `#/$defs/Colour`; None: there is none."""
    found: object = root
    for part in reference.removeprefix("#/").split("/"):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _kinds(value: object) -> frozenset[str]:
    """The names of a JSON value's types."""
    match value:
        case None:
            return frozenset({"null"})
        case bool():
            return frozenset({"boolean"})
        case int():
            return frozenset({"integer", "number"})
        case float():
            return frozenset({"number", "integer"} if value.is_integer() else {"number"})
        case str():
            return frozenset({"string"})
        case list():
            return frozenset({"array"})
        case _:
            return frozenset({"object"})


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")
