"""Schemas of responses and stream chunks: those of the OpenAI API, with additional fields for two-tower decoding."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(BaseModel):
    """Details of the prompt tokens. cached_tokens: tokens found in the prefix cache."""

    cached_tokens: int


class Usage(BaseModel):
    """Token counts of a request.

    passes: passes of the tower that generates tokens (verified: of both towers); tokens_per_pass: new tokens per pass.
    With continuous_usage_stats, the chunks before the last one have only the numbers of tokens.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    passes: int | None = None
    tokens_per_pass: float | None = None


class DecodingStats(BaseModel):
    """How a choice was decoded. mode_reason: why mode auto chose its mode; drafted, accepted: tokens, if verified."""

    mode: str
    seed: int
    denoiser_passes: int
    context_passes: int
    tokens_per_pass: float
    drafted: int
    accepted: int
    seconds: float
    mode_reason: str = ""


class DenoisingStep(BaseModel):
    """The block of a choice after a denoising pass.

    start: index of the block's first position among the new tokens (−1: the block begins with the token before them).
    tokens, texts: the token at each position; at `masked` positions, the current prediction of the denoiser.
    """

    index: int
    start: int
    step: int
    steps: int
    tokens: list[int]
    texts: list[str]
    masked: list[bool]
    confidence: list[float]


class CommittedBlock(BaseModel):
    """The tokens that a chunk adds to a choice.

    start: index of the first token among the new tokens. committed_at: the step that committed each token; confidence:
    in that step. drafted: the draft in mode verified; `tokens` begins with the accepted part of the draft.
    """

    index: int
    start: int
    tokens: list[int]
    texts: list[str]
    committed_at: list[int]
    confidence: list[float]
    drafted: list[int]


class CompletionLogprobs(BaseModel):
    """Log-probabilities of the AR model, one entry per token; null for the first token of a text.

    text_offset: index of each token's first character in the text.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TopLogprob(BaseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """A token, its log-probability, and the most likely alternatives of the AR model."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of the AR model, one entry per token."""

    content: list[ChatLogprob]


class CompletionChoice(BaseModel):
    """A text, or a piece of it in a stream. decoding: only in the last chunk of a choice."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    decoding: DecodingStats | None = None


class CalledFunction(BaseModel):
    """A call of a function. arguments: the JSON text of an object."""

    name: str
    arguments: str


class CompletedCall(BaseModel):
    """A tool call. A message with role tool answers it by its id."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(BaseModel):
    """The reply of the assistant. content: null if the reply has only calls."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[CompletedCall] | None = None


class FunctionDelta(BaseModel):
    """The new part of a call: the name once, and pieces of the arguments."""

    name: str | None = None
    arguments: str = ""


class ToolCallDelta(BaseModel):
    """The new part of the tool call `index`; id and type come with its first part."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChoiceDelta(BaseModel):
    """The new part of a reply."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChoice(BaseModel):
    """A reply and how it was decoded."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason
    decoding: DecodingStats


class ChatCompletionChunkChoice(BaseModel):
    """A piece of a reply in a stream. decoding: only in the last chunk of a choice."""

    index: int
    delta: ChoiceDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    decoding: DecodingStats | None = None


class ResponseHead(BaseModel):
    """Fields of every response and chunk."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class Completion(ResponseHead):
    """The response of `POST /v1/completions`, or a chunk of its stream."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | None = None
    denoising: DenoisingStep | None = None
    committed: CommittedBlock | None = None


class ChatCompletion(ResponseHead):
    """The response of `POST /v1/chat/completions`."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class ChatCompletionChunk(ResponseHead):
    """A chunk of the stream of `POST /v1/chat/completions`."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatCompletionChunkChoice]
    usage: Usage | None = None
    denoising: DenoisingStep | None = None
    committed: CommittedBlock | None = None


class ErrorDetail(BaseModel):
    """An error. message: the cause and the remedy; param: the field of the request."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every response with an error status."""

    error: ErrorDetail


class ModelCard(BaseModel):
    """A served model. max_model_len: maximum tokens of prompt and text; block_size: the largest allowed block.

    denoisers: of a model with several, the modes that use each if a request names none; otherwise empty.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    max_model_len: int
    modes: list[str]
    default_mode: str
    block_size: int
    mask_token_id: int
    denoisers: dict[str, list[str]] = {}


class ModelList(BaseModel):
    """The list of served models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
