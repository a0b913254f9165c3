"""The fields of a request about the form of its response."""

from __future__ import annotations

import json
from typing import Literal, Self

from pydantic import ConfigDict, Field, model_validator

from twotower.server.strict_model import StrictModel

# Characters of a format. The time to compile a regular expression, also in a grammar, grows with the square.
MAX_FORMAT_SIZE = {"json_schema": 2**16, "regex": 2**12, "choice": 2**14, "grammar": 2**14}
MAX_CHOICES = 1024


class StreamOptions(StrictModel):
    """Options of a stream."""

    include_usage: bool = Field(False, description="Send a last chunk with the usage of the whole request.")
    continuous_usage_stats: bool = Field(
        False, description="With include_usage: every chunk with choices has the tokens so far."
    )
    include_obfuscation: Literal[False] = False


class JsonSchema(StrictModel):
    """A JSON schema that the text must match."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=(), populate_by_name=True)

    name: str = ""
    description: str | None = None
    json_schema: dict[str, object] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(StrictModel):
    """Format of the text: text (no constraint), json_object or json_schema.

    Beyond the OpenAI API: regex (a regular expression), choice (a list of texts) and grammar (in Lark's notation or
    GBNF). As in llama.cpp, json_object and json_schema may have a schema. Formats other than text need mode ar or
    verified.
    """

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)

    type: Literal["text", "json_object", "json_schema", "regex", "choice", "grammar"]
    json_schema: JsonSchema | None = None
    regex: str | None = None
    choice: list[str] | None = Field(default=None, min_length=1, max_length=MAX_CHOICES)
    grammar: str | None = None
    own_schema: dict[str, object] | None = Field(default=None, alias="schema")

    @classmethod
    def of(cls, kind: str, value: object) -> ResponseFormat:
        """A format from another field of a request.

        Raises:
            ValueError: The format is too long.
        """
        made = cls.model_construct(_fields_set=None, type=kind)
        if kind != "json_object":
            setattr(made, kind, JsonSchema.model_construct(json_schema=value) if kind == "json_schema" else value)
        check_size(kind, value)
        return made

    @model_validator(mode="after")
    def _check_type(self) -> Self:
        if self.own_schema is not None:
            if self.type not in ("json_object", "json_schema") or self.json_schema is not None:
                raise ValueError('has "schema" beside another format; omit one of them')
            self.type, self.json_schema = "json_schema", JsonSchema(schema=self.own_schema)
        for part in ("json_schema", "regex", "choice", "grammar"):
            if (getattr(self, part) is not None) != (self.type == part):
                raise ValueError(f'must have "{part}" if and only if "type" is "{part}"')
        if self.json_schema is not None and self.json_schema.json_schema is None:
            raise ValueError('must have a "schema" in "json_schema"')
        given = (
            self.json_schema.json_schema if self.json_schema is not None else self.regex or self.grammar or self.choice
        )
        check_size(self.type, given)
        return self


def check_size(kind: str, given: object) -> None:
    """Raises ValueError if a schema, an expression or a grammar is too long. kind: the type of the format."""
    try:
        size = len(given) if isinstance(given, str) else len(json.dumps(given))
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if (most := MAX_FORMAT_SIZE.get(kind)) is not None and size > most:
        raise ValueError(f"has a {kind} of {size} characters; at most {most} are allowed")
