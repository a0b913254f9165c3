"""The base of all parts of request bodies: strict types, bounded sizes, and null as the value that means "off"."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Annotated, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

from twotower.server.neutral_fields import nested_fields, strict_fields

MAX_NAME = 64  # characters of a name that an error repeats
MAX_FIELDS = 128  # of one JSON object of a request; the schema has fewer, and an error lists every unknown field

JsonInteger = Annotated[int, BeforeValidator(lambda value: int(value) if _is_integral(value) else value)]


def _is_integral(value: object) -> bool:
    """Whether a value is a float without a fraction. JSON does not distinguish 1.0 from 1."""
    return isinstance(value, float) and value.is_integer()


def same_json(value: object, other: object) -> bool:
    """Whether two JSON values are equal; true differs from 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


class StrictModel(BaseModel):
    """Rejects unknown fields, values of another type, NaN and infinity. A null for an optional field is the default."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    # Field that is not supported → the values that turn it off, beside null.
    off_values: ClassVar[dict[str, tuple[object, ...]]] = {}
    # Fields without effect on the text, which any value may have. With strict fields they are unknown.
    ignored_fields: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _drop_disabled_fields(cls, fields: object) -> object:
        if not isinstance(fields, dict):
            return fields
        if len(fields) > MAX_FIELDS:
            raise ValueError(f"has {len(fields)} fields; an object may have at most {MAX_FIELDS}")
        return cls.enabled_fields(fields)

    @classmethod
    def enabled_fields(cls, fields: dict[str, object]) -> dict[str, object]:
        """The fields of a JSON object without those that are off or have no effect."""
        own = cls.model_fields.keys() | {field.alias for field in cls.model_fields.values()}
        neutral, ignored = (
            (frozenset(), frozenset()) if strict_fields.get() else (cls.neutral_names(), cls.ignored_fields)
        )
        required = {field.alias or name for name, field in cls.model_fields.items() if field.is_required()}
        known = cls.off_values.keys() | own | neutral
        return {
            name: value
            for name, value in fields.items()
            if (name in own or name not in ignored)
            and not (value is None and name in known and name not in required)
            and not any(same_json(value, off) for off in cls.off_values.get(name, ()))
        }

    @classmethod
    def neutral_names(cls) -> frozenset[str]:
        """Names of fields that may be null although this object does not have them."""
        return nested_fields()

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, object]:
        """The JSON schema, in which every optional field also accepts null: the default, as in the OpenAI API."""
        schema = handler.resolve_ref_schema(handler(core))
        for name, field in cls.model_fields.items():
            key = field.alias or name
            own = schema["properties"][key]
            if not field.is_required() and {"type": "null"} not in own.get("anyOf", ()):
                described = {part: own.pop(part) for part in ("title", "description", "default") if part in own}
                schema["properties"][key] = {"anyOf": [own, {"type": "null"}], **described}
        return schema


class ItemModel(StrictModel):
    """A part of a body that clients may send back from a response: null means absent for every field."""

    @classmethod
    def enabled_fields(cls, fields: dict[str, object]) -> dict[str, object]:
        kept = super().enabled_fields(fields)
        return {name: value for name, value in kept.items() if value is not None and name not in cls.ignored_fields}


def check_type(value: object, known: Collection[str], remedy: str, default: str = "") -> object:
    """Returns a JSON object if its `type` is known; other values as they are, for the checks after this one.

    default: the type of an object without a type.

    Raises:
        ValueError: The type is not known.
    """
    kind = (value.get("type") or default) if isinstance(value, dict) else ""
    if isinstance(kind, str) and kind and kind not in known:
        # In ASCII, because pydantic fails with a lone surrogate in an error.
        raise ValueError(f"has the type {json.dumps(kind[:MAX_NAME])}, which is not supported; {remedy}")
    return value
