"""Request bodies: those of the OpenAI API, with additional fields for two-tower decoding.

A field that is unknown or not supported is an error that names the field. Some clients always send fields of the
OpenAI API that are not supported here. Such a field is accepted with a value that turns it off (null, 0, []).
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field

from twotower.decoding.modes import MODES_OF_FIELD, Mode
from twotower.server.conversation import Conversation, ToolUse
from twotower.server.format_schemas import ResponseFormat, StreamOptions
from twotower.server.message_schemas import Message
from twotower.server.request_errors import RequestError
from twotower.server.strict_model import JsonInteger, StrictModel, same_json
from twotower.server.tool_schemas import ToolChoice, ToolList, tool_use

# Bounds of what the server reads before it knows how many tokens a request has.
MAX_MESSAGES = 4096
MAX_PROMPTS = 1024
MAX_PROMPT_TOKENS = 2**20
MAX_NAME_LENGTH = 1024

ModeName = Literal[Mode, "auto"]
TokenIds = Annotated[
    list[Annotated[JsonInteger, Field(ge=0, lt=2**31)]], Field(fail_fast=True, max_length=MAX_PROMPT_TOKENS)
]
StopText = Annotated[str, Field(min_length=1, max_length=256)]

# Field of a request → parameter of `GenerationParams` that the field sets.
PARAMETER_OF_FIELD = {
    "threshold": "confidence_threshold",
    "policy": "policy",
    "policy_value": "policy_value",
    "block_size": "block_size",
    "steps": "steps_per_block",
    "draft_steps": "draft_steps",
    "acceptance": "acceptance",
    "deterministic": "deterministic",
    "top_k": "top_k",
}
FIELD_OF_PARAMETER = {name: field for field, name in PARAMETER_OF_FIELD.items()}

# Unsupported field of the OpenAI API → the values that turn it off, beside null.
UNSUPPORTED_FIELDS: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "best_of": (1,),
    "suffix": ("",),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (False, True),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "web_search_options": (),
    "verbosity": (),
    "prompt_cache_key": (),
    "safety_identifier": (),
}


class BaseRequest(StrictModel):
    """Fields of both endpoints. `GenerationParams` documents the decoding fields, which the OpenAI API lacks."""

    model: str | None = Field(
        None, max_length=MAX_NAME_LENGTH, description="Name or hub id of the served model. Optional."
    )
    temperature: float = Field(1.0, ge=0, le=2, description="Sampling temperature. 0: greedy decoding.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the smallest set of tokens with this probability.")
    top_k: JsonInteger | None = Field(None, ge=0, description="Sample from the k most likely tokens. 0: from all.")
    stop: StopText | Annotated[list[StopText], Field(fail_fast=True, max_length=16)] | None = Field(
        None, description="Strings that end the text. The text stops before the first of them."
    )
    seed: JsonInteger | None = Field(
        None,
        ge=-1,
        lt=2**62,
        description="Seed of the sampling; choice i uses seed + i. In a fixed mode, in fp32 or float64, the same seed "
        "gives the same text. With mode auto, or in bf16, it can differ, unless deterministic is true. "
        "-1: a random seed, which is also the default.",
    )
    n: JsonInteger = Field(1, ge=1, le=64, description="Number of choices for each prompt.")
    stream: bool = Field(False, description="Send server-sent events with chunks of final text.")
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=MAX_NAME_LENGTH, description="Written to the server's log.")
    response_format: ResponseFormat | None = None
    mode: ModeName | None = Field(None, description="Decoding mode. Default: the mode of the server's --setting.")
    threshold: float | None = Field(
        None, ge=0, le=1, description="A pass commits positions with a higher confidence than this."
    )
    policy: str | None = Field(None, description="Commit policy: which positions a pass commits.")
    policy_value: float | None = Field(None, description="The policy's one number, instead of threshold.")
    block_size: JsonInteger | None = Field(None, ge=1, le=4096, description="Number of positions in a block.")
    steps: JsonInteger | None = Field(
        None, ge=1, le=4096, description="Diffusion: maximum number of passes for a block."
    )
    draft_steps: JsonInteger | None = Field(
        None, ge=0, le=4096, description="Verified: denoising passes per draft. Default: chosen from recent speed."
    )
    acceptance: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Verified: accept drafted tokens with at least this share of the probability of the AR model's "
        "best token. 1: only the AR tokens.",
    )
    deterministic: bool | None = Field(
        None,
        description="Passes do not depend on measured times or other requests, so a seed repeats its text in bf16 too.",
    )
    stream_denoising: bool = Field(False, description="Also send an event for every denoising pass, with the block.")

    @classmethod
    def enabled_fields(cls, fields: dict[str, object]) -> dict[str, object]:
        if "knob" in fields:  # the old name of policy_value
            if "policy_value" in fields:
                raise RequestError("knob is the old name of policy_value; give only policy_value", param="knob")
            fields = {"policy_value" if name == "knob" else name: value for name, value in fields.items()}
        kept = super().enabled_fields(fields)
        for name in UNSUPPORTED_FIELDS:
            if name in cls.model_fields:
                continue
            value = kept.pop(name, None)
            if value is not None and not any(same_json(value, off) for off in UNSUPPORTED_FIELDS[name]):
                raise RequestError(f"{name} is not supported; omit it", param=name, code="unsupported")
        return kept

    def check_mode(self, mode: str) -> None:
        """Raises RequestError if a field has no effect in this mode, or needs another field."""
        for name, modes in MODES_OF_FIELD.items():
            if mode not in modes and getattr(self, name) is not None:
                raise RequestError(
                    f"{name} has no effect in mode {mode}; omit it, or use mode {' or '.join(modes)}", param=name
                )
        if self.threshold is not None and (self.policy_value is not None or self.policy not in (None, "threshold")):
            other = f"policy {self.policy}" if self.policy_value is None else "policy_value"
            raise RequestError(f"threshold and {other} exclude each other; omit one of them", param="threshold")
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream: true; set stream or omit it", param="stream_options")
        if self.stream_denoising and not self.stream:
            raise RequestError("stream_denoising needs stream: true; set stream or omit it", param="stream_denoising")
        if self.stream_denoising and mode in ("ar", "mock_ar"):
            words = f"stream_denoising has no effect in mode {mode}, which has no blocks; omit it or use another mode"
            raise RequestError(words, param="stream_denoising")

    def field_of(self, param: str | None) -> str | None:
        """The field that sets a parameter of `GenerationParams` or of the engine's `Request`; None: no field does."""
        own = {"constraint": self.constraint_field, "prompt": self.prompt_field, "prompt_logprobs": "echo"}
        if param == "max_new_tokens":
            return self.length_field or self.prompt_field  # without a length, only the prompt can be too long
        field = None if param is None else (own | FIELD_OF_PARAMETER).get(param, param)
        return field if field in type(self).model_fields else None

    @property
    def prompt_field(self) -> str:
        """Name of the field with the prompt."""
        raise NotImplementedError

    @property
    def constraint_field(self) -> str:
        """Name of the field that constrains the text."""
        return "response_format"

    @property
    def constrained(self) -> bool:
        """Whether a field constrains the text."""
        return self.response_format is not None and self.response_format.type != "text"

    @property
    def length_field(self) -> str | None:
        """Name of the field that limits the new tokens in this request; None: the request has no limit."""
        return "max_tokens" if "max_tokens" in self.model_fields_set else None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


class CompletionRequest(BaseRequest):
    """Body of `POST /v1/completions`."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(fail_fast=True, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(fail_fast=True, max_length=MAX_PROMPTS)]
    ) = Field(description="Text or token ids, or a list of either for several prompts.")
    max_tokens: JsonInteger = Field(16, ge=0, description="Maximum number of new tokens.")
    echo: bool = Field(False, description="Return the prompt before the text.")
    logprobs: JsonInteger | None = Field(
        None, ge=0, le=20, description="Return log-probabilities of the AR model, with this many alternatives."
    )

    @property
    def prompt_field(self) -> str:
        return "prompt"

    @property
    def requested_tokens(self) -> int | None:
        """Maximum number of new tokens."""
        return self.max_tokens

    @property
    def prompt_list(self) -> list[str] | list[list[int]]:
        """The prompts as a list of texts or of token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        texts = [part for part in self.prompt if isinstance(part, str)]
        ids = [part for part in self.prompt if isinstance(part, int)]
        return texts or ([ids] if ids else [part for part in self.prompt if isinstance(part, list)])


class ChatCompletionRequest(BaseRequest):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[
        list[Message],
        Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES, description="The turns of the chat so far."),
    ]
    max_tokens: JsonInteger | None = Field(
        None, ge=0, description="Maximum number of new tokens. Default: as many as fit."
    )
    max_completion_tokens: JsonInteger | None = Field(None, ge=0, description="The newer name of max_tokens.")
    logprobs: bool = Field(False, description="Return log-probabilities of the AR model, in every mode.")
    top_logprobs: JsonInteger | None = Field(None, ge=0, le=20, description="Number of alternatives for each token.")
    tools: ToolList = Field([], description="Functions that the model may call.")
    tool_choice: ToolChoice | None = Field(
        None,
        description="none: no calls; auto: the model decides, the default; required, or a named function: forced "
        "calls, in mode ar or verified.",
    )
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call. Default: true.")
    chat_template_kwargs: dict[str, object] = Field(
        {}, description="Further variables of the chat template, such as enable_thinking."
    )

    @property
    def prompt_field(self) -> str:
        return "messages"

    @cached_property
    def tool_use(self) -> ToolUse:
        """The tools and how the reply may call them. See `tool_use` of `tool_schemas` for errors."""
        return tool_use(self.tools, self.tool_choice, self.parallel_tool_calls)

    @property
    def conversation(self) -> Conversation:
        """The chat in the form of all routes."""
        return Conversation(self.messages, self.tool_use, self.chat_template_kwargs)

    @property
    def constraint_field(self) -> str:
        return "tool_choice" if self.tool_use.forced else super().constraint_field

    @property
    def constrained(self) -> bool:
        return self.tool_use.forced or super().constrained

    @property
    def length_field(self) -> str | None:
        return "max_completion_tokens" if self.max_completion_tokens is not None else super().length_field

    @property
    def requested_tokens(self) -> int | None:
        """Maximum number of new tokens; None: as many as fit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check_mode(self, mode: str) -> None:
        super().check_mode(mode)
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true; set logprobs or omit it", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            words = (
                f"max_tokens is {self.max_tokens}, max_completion_tokens {self.max_completion_tokens}; give one of them"
            )
            raise RequestError(words, param="max_tokens")


GenerationRequest = CompletionRequest | ChatCompletionRequest
