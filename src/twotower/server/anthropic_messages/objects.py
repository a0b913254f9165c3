"""Shapes of the responses of `/v1/messages`: those of the Anthropic API, with additional fields for decoding."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from twotower.server.response_schemas import DecodingStats

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class TextContent(BaseModel):
    """A text of the reply."""

    type: Literal["text"] = "text"
    text: str


class ThinkingContent(BaseModel):
    """The reasoning of the reply. signature: empty."""

    type: Literal["thinking"] = "thinking"
    thinking: str
    signature: str = ""


class ToolUseContent(BaseModel):
    """A call of a tool. input: {} in a call that max_tokens has cut off."""

    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, object]


Content = TextContent | ThinkingContent | ToolUseContent


class ThinkingTokensDetails(BaseModel):
    """thinking_tokens: tokens before the end of the reasoning."""

    thinking_tokens: int


class MessageUsage(BaseModel):
    """Token counts, as in chat completions. input_tokens: without those that were found in the prefix cache."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingTokensDetails | None = None
    passes: int = 0
    tokens_per_pass: float = 0.0


class MessageObject(BaseModel):
    """The response of `POST /v1/messages`. decoding: as in chat completions."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[Content]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage
    decoding: DecodingStats | None = None


class TokenCount(BaseModel):
    """The response of `POST /v1/messages/count_tokens`."""

    input_tokens: int


class MessagesErrorDetail(BaseModel):
    """An error. message: the cause and the remedy."""

    type: str
    message: str


class MessagesErrorBody(BaseModel):
    """The body of every response with an error status."""

    type: Literal["error"]
    error: MessagesErrorDetail
    request_id: str
