"""What clients send: the OpenAI requests, with what two-tower decoding adds.

Every field either does what it says or is refused by name. A field of the published API that is not supported may be
sent with the value that means "off" (null, 0, an empty list), as some clients always do.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

from twotower.decoding.modes import MEANT_FOR, Mode
from twotower.server.request_errors import RequestError

ModeName = Literal[Mode, "auto"]
JsonInteger = Annotated[int, BeforeValidator(lambda value: int(value) if _is_integral(value) else value)]
TokenIds = list[Annotated[JsonInteger, Field(ge=0, lt=2**31)]]
StopText = Annotated[str, Field(min_length=1, max_length=256)]

# Fields that set a parameter of `GenerationParams`, and the parameter's name.
PARAMETER_OF_FIELD = {
    "threshold": "confidence_threshold",
    "policy": "policy",
    "knob": "knob",
    "block_size": "block_size",
    "steps": "steps_per_block",
    "draft_steps": "draft_steps",
    "acceptance": "acceptance",
    "top_k": "top_k",
}
FIELD_OF_PARAMETER = {name: field for field, name in PARAMETER_OF_FIELD.items()}  # the reverse

# Fields of the published API that have no meaning here, and the values with which they ask for nothing.
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


def _is_integral(value: object) -> bool:
    """A float without a fraction: JSON does not tell 1.0 from 1."""
    return isinstance(value, float) and value.is_integer()


class StrictModel(BaseModel):
    """Nothing is taken for something else, and no field passes unseen."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(StrictModel):
    """include_usage: a last chunk with the whole request's usage."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class JsonSchema(StrictModel):
    """A JSON schema that the text has to fit."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=(), populate_by_name=True)

    name: str = ""
    description: str | None = None
    json_schema: dict[str, object] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(StrictModel):
    """text (anything), json_object, json_schema, or, beyond the published API, a regular expression (`regex`) or a Lark
    grammar (`grammar`) that the text has to fit. In the modes ar and verified."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: JsonSchema | None = None
    regex: str | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def _check_type(self) -> Self:
        for part in ("json_schema", "regex", "grammar"):
            if (getattr(self, part) is not None) != (self.type == part):
                raise ValueError(f'"{part}" goes with the type "{part}", and with no other')
        if self.json_schema is not None and self.json_schema.json_schema is None:
            raise ValueError('"json_schema" has no "schema"')
        return self


class BaseRequest(StrictModel):
    """What both endpoints take. See `GenerationParams` for the decoding fields, which are beyond the published API."""

    model: str | None = Field(None, description="The served model; may be left out.")
    temperature: float = Field(1.0, ge=0, le=2, description="0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: JsonInteger | None = Field(None, ge=1, description="Sample among the k likeliest tokens.")
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    seed: JsonInteger | None = Field(None, ge=0, lt=2**62, description="Same seed, same text; choice i has seed + i.")
    n: JsonInteger = Field(1, ge=1, le=64, description="Choices for each prompt.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    response_format: ResponseFormat | None = None
    mode: ModeName | None = Field(None, description="How to decode. Left out: as the server was started.")
    threshold: float | None = Field(None, ge=0, le=1, description="Commit what is more certain than this.")
    policy: str | None = Field(None, description="Which positions a pass commits.")
    knob: float | None = Field(None, description="The policy's one number, instead of threshold.")
    block_size: JsonInteger | None = Field(None, ge=1, le=4096, description="Positions denoised together.")
    steps: JsonInteger | None = Field(None, ge=1, le=4096, description="Diffusion: passes a block, at most.")
    draft_steps: JsonInteger | None = Field(
        None, ge=0, le=4096, description="Verified: passes a draft. Left out: what pays."
    )
    acceptance: float | None = Field(None, ge=0, le=1, description="Verified: 1 is lossless.")
    stream_denoising: bool = Field(False, description="Streams show every pass over a block, and its tokens.")

    @model_validator(mode="before")
    @classmethod
    def _drop_disabled_fields(cls, fields: object) -> object:
        if not isinstance(fields, dict):
            return fields
        known = UNSUPPORTED_FIELDS.keys() | cls.model_fields.keys()
        kept = {name: value for name, value in fields.items() if value is not None or name not in known}
        for name in UNSUPPORTED_FIELDS.keys() - cls.model_fields.keys():
            if name in kept and not any(_same(kept[name], off) for off in UNSUPPORTED_FIELDS[name]):
                raise RequestError(f"{name} is not supported; leave it out", param=name, code="unsupported")
            kept.pop(name, None)
        return kept

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, object]:
        """null stands for a field's default, as in the published API."""
        schema = handler.resolve_ref_schema(handler(core))
        for name, field in cls.model_fields.items():
            own = schema["properties"][name]
            if not field.is_required() and {"type": "null"} not in own.get("anyOf", ()):
                described = {key: own.pop(key) for key in ("title", "description", "default") if key in own}
                schema["properties"][name] = {"anyOf": [own, {"type": "null"}], **described}
        return schema

    def check_mode(self, mode: str) -> None:
        """Raises RequestError where a field means nothing in this mode, or without another field."""
        for name, modes in MEANT_FOR.items():
            if mode not in modes and getattr(self, name) is not None:
                raise RequestError(
                    f"{name} means nothing in mode {mode}; leave it out, or use {' or '.join(modes)}", param=name
                )
        if self.threshold is not None and (self.knob is not None or self.policy not in (None, "threshold")):
            other = f"policy {self.policy}" if self.knob is None else "knob"
            raise RequestError(f"threshold means nothing beside {other}; leave one of them out", param="threshold")
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options goes with stream: true", param="stream_options")
        if self.stream_denoising and not self.stream:
            raise RequestError("stream_denoising goes with stream: true", param="stream_denoising")
        if self.stream_denoising and mode in ("ar", "mock_ar"):
            raise RequestError(f"stream_denoising: mode {mode} fills no blocks", param="stream_denoising")

    def field_of(self, param: str | None) -> str | None:
        """The field of this request that sets a parameter of `GenerationParams` or of the engine's `Request`; None: no
        field sets the parameter."""
        own = {"constraint": "response_format", "prompt": self.prompt_field, "prompt_logprobs": "echo"}
        if param == "max_new_tokens":
            return self.length_field or self.prompt_field  # without a length, only the prompt can be too long
        field = None if param is None else (own | FIELD_OF_PARAMETER).get(param, param)
        return field if field in type(self).model_fields else None

    @property
    def prompt_field(self) -> str:
        """The field that holds what the text continues."""
        raise NotImplementedError

    @property
    def length_field(self) -> str | None:
        """The field in which this request gives its number of new tokens; None: it gives none."""
        return "max_tokens" if "max_tokens" in self.model_fields_set else None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


def _same(value: object, off: object) -> bool:
    """Equal, but True is not 1."""
    return value == off and isinstance(value, bool) == isinstance(off, bool)


class CompletionRequest(BaseRequest):
    """`POST /v1/completions`."""

    prompt: str | TokenIds | list[str] | list[TokenIds] = Field(
        description="Text or token ids; a list of either for several prompts."
    )
    max_tokens: JsonInteger = Field(16, ge=0, description="New tokens, at most.")
    echo: bool = Field(False, description="Give the prompt back in front of the text.")
    logprobs: JsonInteger | None = Field(None, ge=0, le=20, description="The AR model's, with so many alternatives.")

    @property
    def prompt_field(self) -> str:
        return "prompt"

    @property
    def requested_tokens(self) -> int | None:
        """How many are asked for, or usual; None: as many as fit."""
        return self.max_tokens

    @property
    def prompt_list(self) -> list[str] | list[list[int]]:
        """One entry a prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        texts = [part for part in self.prompt if isinstance(part, str)]
        ids = [part for part in self.prompt if isinstance(part, int)]
        return texts or ([ids] if ids else [part for part in self.prompt if isinstance(part, list)])


class TextPart(StrictModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(StrictModel):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatCompletionRequest(BaseRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: JsonInteger | None = Field(None, ge=0, description="New tokens, at most. Left out: as many as fit.")
    max_completion_tokens: JsonInteger | None = Field(None, ge=0, description="The same by its newer name.")
    logprobs: bool = Field(False, description="The AR model's, whatever the mode.")
    top_logprobs: JsonInteger | None = Field(None, ge=0, le=20, description="With so many alternatives.")

    @property
    def prompt_field(self) -> str:
        return "messages"

    @property
    def length_field(self) -> str | None:
        return "max_completion_tokens" if self.max_completion_tokens is not None else super().length_field

    @property
    def requested_tokens(self) -> int | None:
        """How many are asked for; None: as many as fit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check_mode(self, mode: str) -> None:
        super().check_mode(mode)
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs goes with logprobs: true", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise RequestError("max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")


GenerationRequest = CompletionRequest | ChatCompletionRequest
