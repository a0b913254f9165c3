"""The fields of a request about tools: functions that the model may call."""

from __future__ import annotations

import json
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from twotower.server.conversation import CallRule, ToolUse
from twotower.server.message_schemas import CACHE_FIELDS
from twotower.server.parsers.pieces import Tool
from twotower.server.request_errors import RequestError
from twotower.server.strict_model import StrictModel

MAX_TOOLS = 128
MAX_SCHEMA_SIZE = 2**16  # characters of the JSON schemas of all tools that a reply may be forced to call
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]


class FunctionDefinition(StrictModel):
    """A function: its name, what it does, and the JSON schema of its arguments."""

    ignored_fields: ClassVar = frozenset({"defer_loading"})

    name: FunctionName
    description: str | None = None
    parameters: dict[str, object] | None = Field(None, description="JSON schema of an object. Absent: no arguments.")
    strict: bool | None = Field(None, description="Accepted. Only forced calls are sure to match their schema.")

    @model_validator(mode="after")
    def _check_parameters(self) -> Self:
        if self.parameters and self.parameters.get("type", "object") != "object":
            raise ValueError('must have "parameters" of type "object"')
        return self


class ToolDefinition(StrictModel):
    """A tool that the model may call."""

    ignored_fields: ClassVar = CACHE_FIELDS | {"defer_loading"}

    type: Literal["function"]
    function: FunctionDefinition

    def for_template(self) -> dict[str, object]:
        """The definition for a chat template. Templates expect parameters."""
        function = self.function
        described = {} if function.description is None else {"description": function.description}
        parameters = function.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": {"name": function.name, **described, "parameters": parameters}}


class FunctionReference(StrictModel):
    """The name of a function of `tools`."""

    name: str


class NamedToolChoice(StrictModel):
    """The reply must be a call of this function."""

    type: Literal["function"]
    function: FunctionReference


class AllowedTools(StrictModel):
    """Some of `tools`, and whether the reply must call one of them."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedToolChoice], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedToolChoice(StrictModel):
    """The reply may use only these tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolList = Annotated[list[ToolDefinition], Field(fail_fast=True, max_length=MAX_TOOLS)]
ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice | AllowedToolChoice


def tool_use(tools: list[ToolDefinition], choice: ToolChoice | None, parallel: bool | None) -> ToolUse:
    """The tools of a request and how the reply may call them.

    Raises:
        RequestError: Two tools have one name, or the choice names a tool that does not exist.
    """
    by_name = {tool.function.name: tool for tool in tools}
    if len(by_name) < len(tools):
        repeated = next(name for name in by_name if sum(name == tool.function.name for tool in tools) > 1)
        raise RequestError(f"tools has the function {repeated!r} twice; give each function its own name", param="tools")
    rule: CallRule = "auto"
    names = list(by_name)
    if isinstance(choice, NamedToolChoice):
        rule, names = "named", [choice.function.name]
    elif isinstance(choice, AllowedToolChoice):
        rule, names = choice.allowed_tools.mode, [tool.function.name for tool in choice.allowed_tools.tools]
    elif choice is not None:
        rule = choice
    for name in names:
        if name not in by_name:
            raise RequestError(
                f"tool_choice names {name!r}, which is not in tools; add it to tools", param="tool_choice"
            )
    if rule == "required" and not names:
        raise RequestError(
            "tool_choice forces a call, and there are no tools; give tools or omit it", param="tool_choice"
        )
    if rule == "none" or not names:
        return ToolUse()
    callable_tools = tuple(_tool(by_name[name]) for name in dict.fromkeys(names))
    shown = tools if rule == "named" else [by_name[name] for name in dict.fromkeys(names)]
    definitions = tuple(tool.for_template() for tool in shown)
    found = ToolUse(callable_tools, definitions, rule, parallel is not False)
    _check_size(found)
    return found


def _tool(definition: ToolDefinition) -> Tool:
    function = definition.function
    return Tool(function.name, function.description, function.parameters)


def _check_size(use: ToolUse) -> None:
    try:
        size = sum(len(json.dumps(tool.parameters)) for tool in use.tools)
    except RecursionError:
        raise RequestError("tools is nested too deeply; simplify the parameters", param="tools") from None
    if use.forced and size > MAX_SCHEMA_SIZE:
        words = f"tools has parameters of {size} characters; at most {MAX_SCHEMA_SIZE} are allowed for forced calls"
        raise RequestError(f"{words}, so shorten them or use tool_choice auto", param="tools")
