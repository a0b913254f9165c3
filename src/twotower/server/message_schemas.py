"""The turns of a chat, with every field that clients send back from earlier responses."""

from __future__ import annotations

import json
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator

from twotower.server.neutral_fields import strict_fields
from twotower.server.strict_model import StrictModel

CACHE_FIELDS = frozenset({"cache_control", "prompt_cache_breakpoint"})  # hints for caches of prompts
MAX_PARTS = 1024  # parts of one content, and tool calls of one message


class ContentPart(StrictModel):
    """A part of a content: a text, or a refusal of the assistant."""

    ignored_fields: ClassVar = CACHE_FIELDS

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _check_type(self) -> Self:
        for part in ("text", "refusal"):
            if (getattr(self, part) is not None) != (self.type == part):
                raise ValueError(f'must have "{part}" if and only if "type" is "{part}"')
        return self


def _arguments(value: object) -> object:
    """The arguments of a tool call as an object, which templates expect; the OpenAI API has their JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else {}
    except (ValueError, RecursionError):
        raise ValueError("must be the JSON text of an object") from None


JsonArguments = Annotated[
    dict[str, object], BeforeValidator(_arguments, json_schema_input_type=str | dict[str, object])
]


class FunctionCall(StrictModel):
    """The call of a function."""

    name: str
    arguments: JsonArguments


class ToolCall(StrictModel):
    """A tool call of the assistant."""

    id: str | None = None
    index: int | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


def _is_strict() -> bool:
    return strict_fields.get()


class Message(StrictModel):
    """One turn of a chat.

    The chat template of the model gets all fields that are not null. A further field is an error unless the template
    reads it; so are tool_calls and the role tool.
    """

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], Field(fail_fast=True, max_length=MAX_PARTS)] | None = Field(
        None, description="The text. Only an assistant's content may be null."
    )
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=MAX_PARTS)] | None = None
    tool_call_id: str | None = None

    off_values: ClassVar = {"tool_calls": ([],), "annotations": ([],)}
    ignored_fields: ClassVar = CACHE_FIELDS
    template_hints: ClassVar = frozenset({"id"})  # fields that only some chat templates read

    _strict: bool = PrivateAttr(default_factory=_is_strict)  # other threads do not have the variable

    @classmethod
    def enabled_fields(cls, fields: dict[str, object]) -> dict[str, object]:
        return {name: value for name, value in super().enabled_fields(fields).items() if value is not None}

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(f'must have "content", because its role is {self.role}')
        return self

    @property
    def text(self) -> str:
        """The text of the content. The text of an assistant that only refused is the refusal."""
        if self.content is None:
            return self.refusal or ""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text or part.refusal or "" for part in self.content)

    @property
    def template_fields(self) -> dict[str, object]:
        """The message for a chat template: role, text, and all other fields that are not null.

        `reasoning` is another name of `reasoning_content`, which is the name that templates read.
        """
        dumped = self.model_dump(mode="json", exclude_none=True, exclude={"role", "content"})
        reasoning = {"reasoning_content": self.reasoning} if self.reasoning is not None else {}
        return {"role": self.role, "content": self.text} | reasoning | dumped

    @property
    def fields_for_templates_only(self) -> list[str]:
        """The fields whose meaning is lost unless the chat template reads them."""
        hints = frozenset() if self._strict else self.template_hints
        extra = [name for name in self.model_extra or () if name not in hints]
        return [*(["tool_calls"] if self.tool_calls else []), *extra]
