"""The body of `POST /v1/responses`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from twotower.server.conversation import Conversation, ToolUse
from twotower.server.format_schemas import JsonSchema, ResponseFormat, check_size
from twotower.server.openai_responses.items import InputItem, MessageItem, Turns
from twotower.server.request_errors import RequestError
from twotower.server.request_schemas import MAX_MESSAGES, ChatRequest
from twotower.server.strict_model import ItemModel, JsonInteger, StrictModel, check_type
from twotower.server.tool_schemas import (
    MAX_TOOLS,
    AllowedToolChoice,
    AllowedTools,
    FunctionDefinition,
    FunctionReference,
    NamedToolChoice,
    ToolChoice,
    ToolDefinition,
    tool_use,
)

MAX_METADATA = 16
FORMAT_PARTS = ("schema", "regex", "grammar")
KEEPS_NOTHING = "this server keeps no responses, so send the earlier turns in input"

# Unsupported field → the values that turn it off, beside null.
UNSUPPORTED_FIELDS: dict[str, tuple[object, ...]] = {
    "previous_response_id": (),
    "conversation": (),
    "background": (False,),
    "prompt": (),
    "truncation": ("disabled",),
    "top_logprobs": (0,),
    "context_management": ([],),
    "moderation": (),
}
REMEDIES = {
    "previous_response_id": KEEPS_NOTHING,
    "conversation": KEEPS_NOTHING,
    "background": "this server keeps no responses, so omit it and wait for the response, or use stream",
    "prompt": "this server keeps no prompts, so send the text in instructions and input",
    "truncation": "shorten the input, or omit it",
    "top_logprobs": "omit it; /v1/chat/completions has log-probabilities",
}
LOGPROBS = "message.output_text.logprobs"


class FunctionTool(FunctionDefinition, ItemModel):
    """A function that the model may call."""

    ignored_fields: ClassVar = frozenset({"defer_loading", "output_schema"})
    off_values: ClassVar = {"allowed_callers": (["direct"], []), "async": (False,)}

    type: Literal["function"]

    @property
    def definition(self) -> ToolDefinition:
        function = FunctionDefinition(
            name=self.name, description=self.description, parameters=self.parameters, strict=None
        )
        return ToolDefinition(type="function", function=function)


def _function_only(value: object) -> object:
    return check_type(value, ("function",), "this server has no tools of its own, so give functions")


class NamedFunction(StrictModel):
    """A function of `tools`."""

    type: Literal["function"]
    name: str

    @property
    def choice(self) -> NamedToolChoice:
        return NamedToolChoice(type="function", function=FunctionReference(name=self.name))


NamedTool = Annotated[NamedFunction, BeforeValidator(_function_only)]


class AllowedFunctions(StrictModel):
    """Some of `tools`, and whether the reply must call one of them."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]

    @property
    def choice(self) -> AllowedToolChoice:
        allowed = AllowedTools(mode=self.mode, tools=[tool.choice for tool in self.tools])
        return AllowedToolChoice(type="allowed_tools", allowed_tools=allowed)


def _known_choice(value: object) -> object:
    return check_type(value, ("function", "allowed_tools"), "give auto, none, required, function or allowed_tools")


class TextFormat(ItemModel):
    """Format of the text: text (no constraint), json_object or json_schema.

    Beyond the API: regex (a regular expression) and grammar (a Lark grammar). Formats other than text need mode ar or
    verified.
    """

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=(), populate_by_name=True)

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    name: str = ""
    description: str | None = None
    json_schema: dict[str, object] | None = Field(default=None, alias="schema")
    strict: bool | None = None
    regex: str | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def _check_type(self) -> Self:
        given = {"schema": self.json_schema, "regex": self.regex, "grammar": self.grammar}
        wanted = "schema" if self.type == "json_schema" else self.type
        for part, value in given.items():
            if (value is not None) != (part == wanted):
                kind = "json_schema" if part == "schema" else part
                raise ValueError(f'must have "{part}" if and only if "type" is "{kind}"')
        if wanted in given:
            check_size(self.type, given[wanted])
        return self

    @property
    def response_format(self) -> ResponseFormat:
        """The format in the form of chat completions."""
        schema = None if self.json_schema is None else JsonSchema(name=self.name, schema=self.json_schema)
        return ResponseFormat(type=self.type, json_schema=schema, regex=self.regex, grammar=self.grammar)


class TextConfig(ItemModel):
    """How the text is written."""

    format: TextFormat | None = None
    verbosity: str | None = Field(None, max_length=64, description="A variable of the chat template.")


class ReasoningConfig(ItemModel):
    """How the model reasons. summary: the response has the reasoning as the summary of its reasoning item."""

    ignored_fields: ClassVar = frozenset({"context", "mode"})

    effort: str | None = Field(
        None, max_length=64, description="The variable reasoning_effort of the chat template. none: no reasoning."
    )
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponsesStreamOptions(StrictModel):
    """Options of a stream."""

    include_obfuscation: bool = Field(False, description="Accepted. The stream has no obfuscation.")


class ResponsesRequest(ChatRequest):
    """Body of `POST /v1/responses`. The server keeps neither the request nor the response."""

    unsupported_fields: ClassVar[Mapping[str, tuple[object, ...]]] = UNSUPPORTED_FIELDS
    remedies: ClassVar[Mapping[str, str]] = REMEDIES

    input: str | Annotated[list[InputItem], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)] = Field(
        description="The turns so far: a text of the user, or items."
    )
    instructions: str | None = Field(None, description="A system message before the input.")
    max_output_tokens: JsonInteger | None = Field(
        None, ge=1, description="Maximum number of new tokens, reasoning included. Default: as many as fit."
    )
    tools: Annotated[
        list[Annotated[FunctionTool, BeforeValidator(_function_only)]], Field(fail_fast=True, max_length=MAX_TOOLS)
    ] = Field([], description="Functions that the model may call.")
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedFunction | AllowedFunctions | None, BeforeValidator(_known_choice)
    ] = Field(None, description="See tool_choice of chat completions.")
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call. Default: true.")
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    stream_options: ResponsesStreamOptions | None = None
    chat_template_kwargs: dict[str, object] = Field(
        {}, description="Further variables of the chat template, such as enable_thinking."
    )
    metadata: Annotated[dict[str, str], Field(max_length=MAX_METADATA)] | None = Field(
        None, description="Repeated in the response."
    )
    store: bool | None = Field(None, description="Accepted. The server keeps no responses.")
    include: Annotated[list[str], Field(max_length=64)] | None = Field(
        None, description="Accepted, except log-probabilities."
    )
    max_tool_calls: JsonInteger | None = Field(None, description="Accepted. It limits calls of built-in tools.")
    service_tier: str | None = Field(None, description="Accepted without an effect.")
    prompt_cache_key: str | None = Field(None, description="Accepted without an effect.")
    prompt_cache_options: dict[str, object] | None = Field(None, description="Accepted without an effect.")
    prompt_cache_retention: str | None = Field(None, description="Accepted without an effect.")
    safety_identifier: str | None = Field(None, description="Accepted without an effect.")

    @property
    def prompt_field(self) -> str:
        return "input"

    @property
    def format_field(self) -> str:
        return "text"

    @property
    def text_format(self) -> ResponseFormat | None:
        return None if self.text is None or self.text.format is None else self.text.format.response_format

    @property
    def length_field(self) -> str | None:
        return "max_output_tokens" if self.max_output_tokens is not None else None

    @property
    def requested_tokens(self) -> int | None:
        return self.max_output_tokens

    @cached_property
    def tool_use(self) -> ToolUse:
        choice: ToolChoice | None = (
            self.tool_choice.choice
            if isinstance(self.tool_choice, NamedFunction | AllowedFunctions)
            else self.tool_choice
        )
        return tool_use([tool.definition for tool in self.tools], choice, self.parallel_tool_calls)

    @cached_property
    def conversation(self) -> Conversation:
        turns = Turns()
        if self.instructions is not None:
            turns.add(MessageItem(role="system", content=self.instructions), "instructions")
        if isinstance(self.input, str):
            turns.add(MessageItem(role="user", content=self.input), "input")
        else:
            for number, item in enumerate(self.input):
                turns.add(item, f"input.{number}")
        return Conversation(turns.messages, self.tool_use, self._template_arguments, "input", turns.places)

    @property
    def _template_arguments(self) -> dict[str, object]:
        """Variables of the chat template. Those of `chat_template_kwargs` count first."""
        found: dict[str, object] = {}
        if self.reasoning is not None and self.reasoning.effort is not None:
            found["reasoning_effort"] = self.reasoning.effort
            if self.reasoning.effort == "none":
                found["enable_thinking"] = False
        if self.text is not None and self.text.verbosity is not None:
            found["verbosity"] = self.text.verbosity
        return found | self.chat_template_kwargs

    @property
    def summarizes(self) -> bool:
        """Whether the response has its reasoning as a summary."""
        return self.reasoning is not None and bool(self.reasoning.summary or self.reasoning.generate_summary)

    def check_mode(self, mode: str) -> None:
        super().check_mode(mode)
        if LOGPROBS in (self.include or ()):
            words = (
                f"include has {LOGPROBS}, which is not supported; omit it, /v1/chat/completions has log-probabilities"
            )
            raise RequestError(words, param="include", code="unsupported")
