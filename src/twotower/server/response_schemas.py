"""The shapes of what clients get: the OpenAI responses and stream chunks, with what two-tower decoding adds."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length"]


class PromptTokensDetails(BaseModel):
    """cached_tokens: known from earlier prompts, and not read again."""

    cached_tokens: int


class Usage(BaseModel):
    """passes: of the tower that proposes tokens (verified: of both), tokens_per_pass: new tokens for each of them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    passes: int
    tokens_per_pass: float


class DecodingStats(BaseModel):
    """How a choice came about. why: what mode auto says of its choice. Drafted, accepted: in verified decoding."""

    mode: str
    seed: int
    denoiser_passes: int
    context_passes: int
    tokens_per_pass: float
    drafted: int
    accepted: int
    seconds: float
    why: str = ""


class DenoisingStep(BaseModel):
    """A choice's block after a pass of the denoiser. start: its first position among the choice's new tokens (−1: the
    block begins with the token before them). texts: what stands at each position or, where it is still `masked`, what
    the denoiser would put there."""

    index: int
    start: int
    step: int
    steps: int
    tokens: list[int]
    texts: list[str]
    masked: list[bool]
    confidence: list[float]


class CommittedBlock(BaseModel):
    """The tokens that a chunk adds to a choice. start: of the first among the choice's new tokens. committed_at: the
    step that fixed each; confidence: in it. drafted: what verified decoding had drafted, of which `tokens` begin with
    the part that was kept."""

    index: int
    start: int
    tokens: list[int]
    texts: list[str]
    committed_at: list[int]
    confidence: list[float]
    drafted: list[int]


class CompletionLogprobs(BaseModel):
    """The AR model's, one entry a token; null for a text's first token. text_offset: where in the text each begins."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TopLogprob(BaseModel):
    """An alternative."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """A token and the AR model's alternatives to it."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The AR model's."""

    content: list[ChatLogprob]


class CompletionChoice(BaseModel):
    """decoding: in the choice's last chunk."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    decoding: DecodingStats | None = None


class AssistantMessage(BaseModel):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChoiceDelta(BaseModel):
    """What is new in it."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChoice(BaseModel):
    """A reply."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason
    decoding: DecodingStats


class ChatCompletionChunkChoice(BaseModel):
    """A part of a reply. decoding: in its last chunk."""

    index: int
    delta: ChoiceDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    decoding: DecodingStats | None = None


class ResponseHead(BaseModel):
    """What every answer begins with."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class Completion(ResponseHead):
    """The answer of `POST /v1/completions`, whole or a chunk of its stream."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | None = None
    denoising: DenoisingStep | None = None
    committed: CommittedBlock | None = None


class ChatCompletion(ResponseHead):
    """The answer of `POST /v1/chat/completions`."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class ChatCompletionChunk(ResponseHead):
    """A chunk of its stream."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatCompletionChunkChoice]
    usage: Usage | None = None
    denoising: DenoisingStep | None = None
    committed: CommittedBlock | None = None


class ErrorDetail(BaseModel):
    """What is wrong, which field, and how to mend it."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is not 200."""

    error: ErrorDetail


class ModelCard(BaseModel):
    """A served model. max_model_len: tokens of a text with its prompt; modes, block_size: what it can be asked for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    max_model_len: int
    modes: list[str]
    default_mode: str
    block_size: int
    mask_token_id: int


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
