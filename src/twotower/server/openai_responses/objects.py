"""Shapes of the responses of `/v1/responses`: those of the OpenAI API, with additional fields for decoding."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from twotower.server.response_schemas import DecodingStats

JsonObject = dict[str, object]
ItemStatus = Literal["in_progress", "completed", "incomplete"]
ResponseStatus = Literal["in_progress", "completed", "incomplete", "failed"]
ErrorCode = Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]


class OutputText(BaseModel):
    """A text of a message. annotations and logprobs are empty."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[object] = []
    logprobs: list[object] = []


class OutputMessage(BaseModel):
    """An item with a text."""

    id: str
    type: Literal["message"] = "message"
    status: ItemStatus
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class OutputFunctionCall(BaseModel):
    """An item with a call. arguments: the JSON text of an object. A function_call_output answers it by its call_id."""

    id: str
    type: Literal["function_call"] = "function_call"
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


class ReasoningPart(BaseModel):
    """A text of the reasoning."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class OutputReasoning(BaseModel):
    """An item with the reasoning. It is in `content`, or in `summary` if the request asks for a summary."""

    id: str
    type: Literal["reasoning"] = "reasoning"
    status: ItemStatus
    summary: list[ReasoningPart]
    content: list[ReasoningPart]
    encrypted_content: None = None


OutputItem = OutputMessage | OutputFunctionCall | OutputReasoning


class InputTokensDetails(BaseModel):
    """cached_tokens: tokens found in the prefix cache."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(BaseModel):
    """reasoning_tokens: tokens before the end of the reasoning."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """Token counts. passes, tokens_per_pass: as in chat completions."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int
    passes: int
    tokens_per_pass: float


class IncompleteDetails(BaseModel):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class ResponseFailure(BaseModel):
    """The error that ended a stream."""

    code: ErrorCode
    message: str


class ResponseObject(BaseModel):
    """The response of `POST /v1/responses`. Fields of the request are repeated; decoding: as in chat completions."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None
    status: ResponseStatus
    background: Literal[False] = False
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None = None
    reasoning: JsonObject
    service_tier: Literal["default"] = "default"
    store: Literal[False] = False
    temperature: float
    text: JsonObject
    tool_choice: str | JsonObject
    tools: list[JsonObject]
    top_p: float | None
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None
    user: str | None
    metadata: dict[str, str]
    decoding: DecodingStats | None = None
