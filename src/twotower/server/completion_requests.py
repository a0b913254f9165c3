"""The bodies of `POST /v1/completions` and `POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, ClassVar

from pydantic import Field

from twotower.server.conversation import Conversation, Ending, ToolUse
from twotower.server.format_schemas import StreamOptions
from twotower.server.message_schemas import Message
from twotower.server.neutral_fields import (
    REMEDIES,
    UNSUPPORTED_FIELDS,
    WITHOUT_EFFECT,
    body_fields,
    neutral_values,
    strict_fields,
)
from twotower.server.request_errors import RequestError
from twotower.server.request_schemas import (
    MAX_MESSAGES,
    MAX_PROMPTS,
    BaseRequest,
    ChatRequest,
    HintText,
    StopText,
    TokenIds,
)
from twotower.server.sampling_schemas import FormatFields
from twotower.server.strict_model import JsonInteger
from twotower.server.tool_schemas import ToolChoice, ToolList, tool_use


class OpenAIRequest(FormatFields, BaseRequest):
    """Fields of completions and of chat completions."""

    route: ClassVar[str]  # path below /v1
    unsupported_fields: ClassVar = UNSUPPORTED_FIELDS
    remedies: ClassVar = REMEDIES
    ignored_fields: ClassVar = WITHOUT_EFFECT

    stop: StopText | Annotated[list[StopText], Field(fail_fast=True, max_length=16)] | None = Field(
        None, description="Strings that end the text. The text stops before the first of them."
    )
    n: JsonInteger = Field(1, ge=1, le=64, description="Number of choices for each prompt.")
    best_of: JsonInteger | None = Field(
        None,
        ge=1,
        le=64,
        description="Generate this many texts, and return the n with the largest mean AR log-probability.",
    )
    stream_options: StreamOptions | None = None

    @classmethod
    def refused_fields(cls) -> Mapping[str, tuple[object, ...]]:
        if strict_fields.get():
            return cls.unsupported_fields
        neutral = neutral_values(cls.route)
        return {name: (*cls.unsupported_fields.get(name, ()), *values) for name, values in neutral.items()}

    @classmethod
    def neutral_names(cls) -> frozenset[str]:
        return body_fields()

    @property
    def choice_count(self) -> int:
        return max(self.best_of or 0, self.n)

    @property
    def returned_count(self) -> int:
        return self.n

    @property
    def count_field(self) -> str:
        return "n" if self.best_of is None else "best_of"

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    def check_mode(self, mode: str) -> None:
        super().check_mode(mode)
        self.check_formats()
        if self.best_of is not None and self.best_of < self.n:
            words = f"best_of is {self.best_of} and n {self.n}; best_of texts are generated, so raise it or lower n"
            raise RequestError(words, param="best_of")
        if self.stream and self.choice_count > self.n:
            words = f"best_of is {self.best_of} with stream: true; the best texts are known at the end, so omit one"
            raise RequestError(words, param="best_of")
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream: true; set stream or omit it", param="stream_options")


class CompletionRequest(OpenAIRequest):
    """Body of `POST /v1/completions`."""

    route: ClassVar = "completions"

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
    def logprob_counts(self) -> tuple[int | None, bool]:
        return self.logprobs, self.logprobs is not None and self.echo

    @property
    def requested_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def prompt_list(self) -> list[str] | list[list[int]]:
        """The prompts as a list of texts or of token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        texts = [part for part in self.prompt if isinstance(part, str)]
        ids = [part for part in self.prompt if isinstance(part, int)]
        return texts or ([ids] if ids else [part for part in self.prompt if isinstance(part, list)])


class ChatCompletionRequest(OpenAIRequest, ChatRequest):
    """Body of `POST /v1/chat/completions`."""

    route: ClassVar = "chat/completions"
    template_hints: ClassVar = ("reasoning_effort", "verbosity")

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

    add_generation_prompt: bool | None = Field(
        None, description="false: the prompt ends with the last message, without the beginning of a reply."
    )
    continue_final_message: bool = Field(False, description="The reply continues the text of the last message.")
    reasoning_effort: HintText | None = Field(None, description="For chat templates that read it.")
    verbosity: HintText | None = Field(None, description="For chat templates that read it.")

    @property
    def prompt_field(self) -> str:
        return "messages"

    @cached_property
    def tool_use(self) -> ToolUse:
        return tool_use(self.tools, self.tool_choice, self.parallel_tool_calls)

    @cached_property
    def conversation(self) -> Conversation:
        hints = {name: value for name in self.template_hints if (value := getattr(self, name)) is not None}
        ending: Ending = "none" if self.add_generation_prompt is False else "reply"
        ending = "continue" if self.continue_final_message else ending
        return Conversation(self.messages, self.tool_use, hints | self.chat_template_kwargs, ending=ending)

    @property
    def length_field(self) -> str | None:
        return "max_completion_tokens" if self.max_completion_tokens is not None else super().length_field

    @property
    def logprob_counts(self) -> tuple[int | None, bool]:
        return (self.top_logprobs or 0 if self.logprobs else None), False

    @property
    def requested_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check_ending(self) -> None:
        """Raises RequestError if the reply shall continue the last message and be a message of its own."""
        if self.continue_final_message and self.add_generation_prompt:
            words = "continue_final_message and add_generation_prompt exclude each other; set one of them to false"
            raise RequestError(words, param="continue_final_message")

    def check_mode(self, mode: str) -> None:
        super().check_mode(mode)
        self.check_ending()
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true; set logprobs or omit it", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            words = (
                f"max_tokens is {self.max_tokens}, max_completion_tokens {self.max_completion_tokens}; give one of them"
            )
            raise RequestError(words, param="max_tokens")


GenerationRequest = CompletionRequest | ChatRequest
