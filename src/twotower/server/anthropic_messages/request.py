"""The bodies of `POST /v1/messages` and `POST /v1/messages/count_tokens`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from twotower.server.anthropic_messages.content import MessageParam, Texts, text_of, turns_of
from twotower.server.conversation import Conversation, Ending, ToolUse
from twotower.server.format_schemas import JsonSchema, ResponseFormat, check_size
from twotower.server.message_schemas import Message
from twotower.server.request_errors import RequestError
from twotower.server.request_schemas import MAX_MESSAGES, ChatRequest, StopText
from twotower.server.strict_model import ItemModel, JsonInteger, StrictModel, check_type
from twotower.server.tool_schemas import (
    MAX_TOOLS,
    FunctionDefinition,
    FunctionName,
    FunctionReference,
    NamedToolChoice,
    ToolChoice,
    ToolDefinition,
    tool_use,
)

# Unsupported field → the values that turn it off, beside null.
UNSUPPORTED_FIELDS: dict[str, tuple[object, ...]] = {
    "container": (),
    "mcp_servers": ([],),
    "context_management": ({},),
    "speed": ("standard",),
}


class ToolParam(ItemModel):
    """A tool that the model may call."""

    ignored_fields: ClassVar = frozenset({"cache_control", "defer_loading", "eager_input_streaming", "input_examples"})
    off_values: ClassVar = {"allowed_callers": (["direct"], [])}

    type: Literal["custom"] = "custom"
    name: FunctionName
    description: str | None = None
    input_schema: dict[str, object] = Field(description="JSON schema of an object.")
    strict: bool | None = Field(None, description="Accepted. Only forced calls are sure to match their schema.")

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if self.input_schema.get("type", "object") != "object":
            raise ValueError('must have "input_schema" of type "object"')
        return self

    @property
    def definition(self) -> ToolDefinition:
        function = FunctionDefinition(
            name=self.name, description=self.description, parameters=self.input_schema, strict=None
        )
        return ToolDefinition(type="function", function=function)


def _own_tool(value: object) -> object:
    return check_type(value, ("custom",), "this server has no tools of its own, so give a name and an input_schema")


class ToolChoiceParam(ItemModel):
    """auto: the model decides; any: the reply must call a tool; tool: it must call this one; none: no calls."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        if (self.name is not None) != (self.type == "tool"):
            raise ValueError('must have "name" if and only if "type" is "tool"')
        return self

    @property
    def choice(self) -> ToolChoice:
        if self.name is not None:
            return NamedToolChoice(type="function", function=FunctionReference(name=self.name))
        return "required" if self.type == "any" else "none" if self.type == "none" else "auto"


class ThinkingParam(ItemModel):
    """Whether the model reasons: the variable enable_thinking of the chat template."""

    ignored_fields: ClassVar = frozenset({"display"})

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: JsonInteger | None = Field(None, description="Accepted. max_tokens limits reasoning and text.")


class OutputFormat(StrictModel):
    """A JSON schema that the text must match. It needs mode ar or verified."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=(), populate_by_name=True)

    type: Literal["json_schema"]
    json_schema: dict[str, object] = Field(alias="schema")

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        check_size(self.type, self.json_schema)
        return self


class OutputConfig(ItemModel):
    """How the text is written."""

    format: OutputFormat | None = None
    effort: str | None = Field(None, max_length=64, description="The variable reasoning_effort of the chat template.")


class MetadataParam(ItemModel):
    """Accepted without an effect."""

    user_id: str | None = None


class PromptRequest(ChatRequest):
    """Body of `POST /v1/messages/count_tokens`: the part of a request that its prompt depends on."""

    unsupported_fields: ClassVar[Mapping[str, tuple[object, ...]]] = UNSUPPORTED_FIELDS

    messages: Annotated[list[MessageParam], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)] = Field(
        description="The turns of the chat so far. The reply continues the last one if it is of the assistant."
    )
    system: str | Texts | None = Field(None, description="A system message before the turns.")
    tools: Annotated[
        list[Annotated[ToolParam, BeforeValidator(_own_tool)]], Field(fail_fast=True, max_length=MAX_TOOLS)
    ] = Field([], description="Tools that the model may call.")
    tool_choice: ToolChoiceParam | None = None
    thinking: ThinkingParam | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, object] = Field(
        {}, description="Further variables of the chat template, such as enable_thinking."
    )
    cache_control: dict[str, object] | None = Field(None, description="Accepted without an effect.")

    @property
    def prompt_field(self) -> str:
        return "messages"

    @property
    def format_field(self) -> str:
        return "output_config"

    @property
    def text_format(self) -> ResponseFormat | None:
        if self.output_config is None or self.output_config.format is None:
            return None
        schema = JsonSchema(schema=self.output_config.format.json_schema)
        return ResponseFormat(type="json_schema", json_schema=schema)

    @property
    def requested_tokens(self) -> int | None:
        return None

    @cached_property
    def tool_use(self) -> ToolUse:
        given = self.tool_choice
        parallel = given is None or not given.disable_parallel_tool_use
        return tool_use([tool.definition for tool in self.tools], None if given is None else given.choice, parallel)

    @cached_property
    def conversation(self) -> Conversation:
        turns = [] if self.system is None else [Message(role="system", content=text_of(self.system))]
        places = ["system"] * len(turns)
        for number, message in enumerate(self.messages):
            try:
                own = turns_of(message)
            except ValueError as error:
                raise RequestError(f"messages.{number} {error}; move the block", param="messages") from None
            turns += own
            places += [f"messages.{number}"] * len(own)
        continues = self.messages[-1].role == "assistant"
        if continues and turns[-1].tool_calls:
            words = f"messages.{len(self.messages) - 1} is the last message and has a tool_use"
            raise RequestError(f"{words}; add a message with its tool_result", param="messages")
        ending: Ending = "continue" if continues else "reply"
        return Conversation(turns, self.tool_use, self._template_arguments, "messages", places, ending)

    @property
    def _template_arguments(self) -> dict[str, object]:
        """Variables of the chat template. Those of `chat_template_kwargs` count first."""
        found: dict[str, object] = {}
        if self.thinking is not None:
            found["enable_thinking"] = self.thinking.type != "disabled"
        if self.output_config is not None and self.output_config.effort is not None:
            found["reasoning_effort"] = self.output_config.effort
        return found | self.chat_template_kwargs


class MessagesRequest(PromptRequest):
    """Body of `POST /v1/messages`."""

    max_tokens: JsonInteger = Field(
        ge=1, description="Maximum number of new tokens, reasoning included. At most as many as fit are written."
    )
    stop_sequences: Annotated[list[StopText], Field(fail_fast=True, max_length=16)] | None = Field(
        None, description="Strings that end the text. The text stops before the first of them."
    )
    metadata: MetadataParam | None = None
    service_tier: str | None = Field(None, description="Accepted without an effect.")
    inference_geo: str | None = Field(None, description="Accepted without an effect.")

    @property
    def requested_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def length_field(self) -> str | None:
        return None  # every request has a limit, which many clients set without knowledge of the model

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop_sequences or ())
