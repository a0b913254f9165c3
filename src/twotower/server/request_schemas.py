"""Request bodies: those of the OpenAI API, with additional fields for two-tower decoding.

A field that is unknown or not supported is an error that names the field. Some clients always send fields of the
OpenAI API that are not supported here. Such a field is accepted with a value that turns it off (null, 0, []).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from twotower.decoding.modes import MODES_OF_FIELD, Mode
from twotower.server.conversation import Conversation, ToolUse
from twotower.server.format_schemas import ResponseFormat
from twotower.server.neutral_fields import strict_fields
from twotower.server.request_errors import RequestError
from twotower.server.sampling_schemas import SAMPLING_FIELDS, SamplingRequest
from twotower.server.strict_model import JsonInteger, same_json

# Bounds of what the server reads before it knows how many tokens a request has.
MAX_MESSAGES = 4096
MAX_PROMPTS = 1024
MAX_PROMPT_TOKENS = 2**20
MAX_NAME_LENGTH = 1024

ModeName = Literal[Mode, "auto"]
TokenIds = Annotated[
    list[Annotated[JsonInteger, Field(ge=0, lt=2**31)]], Field(fail_fast=True, max_length=MAX_PROMPT_TOKENS)
]
HintText = Annotated[str, Field(max_length=64)]
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
    "denoiser": "denoiser",
    "top_k": "top_k",
    **{name: name for name in SAMPLING_FIELDS},
}
FIELD_OF_PARAMETER = {name: field for field, name in PARAMETER_OF_FIELD.items()}


class BaseRequest(SamplingRequest):
    """Fields of all endpoints. `GenerationParams` documents the decoding fields, which the other APIs lack."""

    # Field that is not supported → the values that turn it off, beside null.
    unsupported_fields: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    remedies: ClassVar[Mapping[str, str]] = {}  # of unsupported fields; default: omit the field
    template_hints: ClassVar[tuple[str, ...]] = ()  # fields that only some chat templates read

    model: str | None = Field(
        None, max_length=MAX_NAME_LENGTH, description="Name or hub id of the served model. Optional."
    )
    temperature: float = Field(1.0, ge=0, le=2, description="Sampling temperature. 0: greedy decoding.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the smallest set of tokens with this probability.")
    top_k: JsonInteger | None = Field(None, ge=0, description="Sample from the k most likely tokens. 0: from all.")
    seed: JsonInteger | None = Field(
        None,
        ge=-1,
        lt=2**62,
        description="Seed of the sampling; choice i uses seed + i. In a fixed mode, in fp32 or float64, the same seed "
        "gives the same text. With mode auto, or in bf16, it can differ, unless deterministic is true. "
        "-1: a random seed, which is also the default.",
    )
    stream: bool = Field(False, description="Send server-sent events with chunks of final text.")
    user: str | None = Field(None, max_length=MAX_NAME_LENGTH, description="Written to the server's log.")
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
    denoiser: str | None = Field(
        None,
        max_length=MAX_NAME_LENGTH,
        description="Name of the denoiser, of a model with several, which /v1/models names. Default: that of the mode.",
    )
    stream_denoising: bool = Field(False, description="Also send an event for every denoising pass, with the block.")

    @classmethod
    def enabled_fields(cls, fields: dict[str, object]) -> dict[str, object]:
        if "knob" in fields:  # the old name of policy_value
            if "policy_value" in fields:
                raise RequestError("knob is the old name of policy_value; give only policy_value", param="knob")
            fields = {"policy_value" if name == "knob" else name: value for name, value in fields.items()}
        kept = super().enabled_fields(fields)
        for name, off_values in cls.refused_fields().items():
            if name in cls.model_fields and not (strict_fields.get() and name in cls.template_hints):
                continue
            value = kept.pop(name, None)
            if value is not None and not any(same_json(value, off) for off in off_values):
                remedy = cls.remedies.get(name, "omit it")
                raise RequestError(f"{name} is not supported; {remedy}", param=name, code="unsupported")
        return kept

    @classmethod
    def refused_fields(cls) -> Mapping[str, tuple[object, ...]]:
        """Field that is not supported → the values with which it is accepted, beside null."""
        return cls.unsupported_fields

    @classmethod
    def neutral_names(cls) -> frozenset[str]:
        return frozenset()

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
    def format_field(self) -> str:
        """Name of the field with the format of the text."""
        return "response_format"

    @property
    def text_format(self) -> ResponseFormat | None:
        """The format of the text; None: any text."""
        return None

    @property
    def constraint_field(self) -> str:
        """Name of the field that constrains the text."""
        return self.format_field

    @property
    def constrained(self) -> bool:
        """Whether a field constrains the text."""
        return self.text_format is not None and self.text_format.type != "text"

    @property
    def length_field(self) -> str | None:
        """Name of the field that limits the new tokens in this request; None: the request has no limit."""
        return "max_tokens" if "max_tokens" in self.model_fields_set else None

    @property
    def requested_tokens(self) -> int | None:
        """Maximum number of new tokens; None: as many as fit."""
        raise NotImplementedError

    @property
    def choice_count(self) -> int:
        """Number of texts to generate for each prompt."""
        return 1

    @property
    def returned_count(self) -> int:
        """Number of texts to return for each prompt, those with the largest mean AR log-probability."""
        return 1

    @property
    def count_field(self) -> str:
        """Name of the field that sets `choice_count`."""
        return "n"

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Strings that end the text."""
        return ()

    @property
    def logprob_counts(self) -> tuple[int | None, bool]:
        """`logprobs` and `prompt_logprobs` of the engine's `Request`."""
        return None, False


class ChatRequest(BaseRequest):
    """A request for the next turn of a chat, in the form of any API."""

    @property
    def tool_use(self) -> ToolUse:
        """The tools and how the reply may call them. See `tool_use` of `tool_schemas` for errors."""
        raise NotImplementedError

    @property
    def conversation(self) -> Conversation:
        """The chat in the form of all routes."""
        raise NotImplementedError

    @property
    def constraint_field(self) -> str:
        return "tool_choice" if self.tool_use.forced else super().constraint_field

    @property
    def constrained(self) -> bool:
        return self.tool_use.forced or super().constrained
