"""The fields of a request that vLLM and llama.cpp have beside the OpenAI API: sampling, and formats of the text."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field

from twotower.server.format_schemas import MAX_CHOICES, ResponseFormat
from twotower.server.request_errors import RequestError
from twotower.server.strict_model import JsonInteger, StrictModel

# Field of a request = parameter of `GenerationParams`.
SAMPLING_FIELDS = (
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "bad_words",
    "stop_token_ids",
    "min_tokens",
    "ignore_eos",
    "skip_special_tokens",
)

JsonObject = dict[str, object]
TokenId = Annotated[JsonInteger, Field(ge=0, lt=2**31)]
Choices = Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]


class StructuredOutputs(StrictModel):
    """vLLM's `structured_outputs`: exactly one of json, regex, choice, grammar and json_object."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)
    off_values: ClassVar[dict[str, tuple[object, ...]]] = {
        "disable_fallback": (False, True),  # there is only one implementation
        "disable_any_whitespace": (False,),
        "disable_additional_properties": (False,),
        "whitespace_pattern": (),
        "structural_tag": (),
    }

    json_schema: JsonObject | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool = False


class SamplingRequest(StrictModel):
    """Fields of all endpoints. `decoding.sampling_fields.SamplingFields` documents them."""

    min_p: float | None = Field(
        None, ge=0, le=1, description="Sample tokens with at least this share of the best one's probability."
    )
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=100, description="Above 1: tokens of the prompt and of the text become less likely."
    )
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description="Subtracted from a token's logit for each time that the text has it."
    )
    presence_penalty: float | None = Field(
        None, ge=-2, le=2, description="Subtracted from the logits of tokens that the text has."
    )
    logit_bias: dict[str, float] | None = Field(
        None, description="Token ids, as text, with numbers from -100 to 100 that are added to their logits."
    )
    bad_words: list[str] | None = Field(
        None, description="Words that the text does not have. Modes: ar, verified, mock_ar."
    )
    stop_token_ids: list[TokenId] | None = Field(None, description="Tokens that end the text, beside EOS.")
    min_tokens: JsonInteger | None = Field(None, ge=0, description="New tokens before anything may end the text.")
    ignore_eos: bool | None = Field(None, description="EOS does not end the text.")
    skip_special_tokens: bool | None = Field(None, description="false: the text has special tokens. Default: true.")


class FormatFields(StrictModel):
    """Fields with a format of the text."""

    off_values: ClassVar[dict[str, tuple[object, ...]]] = {"guided_whitespace_pattern": ()}

    structured_outputs: StructuredOutputs | None = Field(None, description="vLLM's format of the text.")
    guided_json: JsonObject | str | None = Field(None, description="vLLM: a JSON schema for the text.")
    guided_regex: str | None = Field(None, description="vLLM: a regular expression for the text.")
    guided_choice: Choices | None = Field(None, description="vLLM: the texts that are possible.")
    guided_grammar: str | None = Field(None, description="vLLM: a grammar in Lark's notation or in GBNF.")
    guided_decoding_backend: str | None = Field(
        None, max_length=256, description="vLLM: accepted, without effect; there is one implementation."
    )
    grammar: str | None = Field(None, description="llama.cpp: a grammar in GBNF, or in Lark's notation.")
    json_schema: JsonObject | None = Field(None, description="llama.cpp: a JSON schema for the text.")
    response_format: ResponseFormat | None = None

    @cached_property
    def formats(self) -> dict[str, ResponseFormat]:
        """The formats that the request has, by field.

        Raises:
            RequestError: A format is too long, or has several parts.
        """
        found = {}
        if self.response_format is not None and self.response_format.type != "text":
            found["response_format"] = self.response_format
        for field, kind in (
            ("guided_json", "json_schema"),
            ("guided_regex", "regex"),
            ("guided_choice", "choice"),
            ("guided_grammar", "grammar"),
            ("grammar", "grammar"),
            ("json_schema", "json_schema"),
        ):
            if (value := getattr(self, field)) is not None:
                found[field] = _format(field, kind, value)
        if (outputs := self.structured_outputs) is not None:
            parts = {name: getattr(outputs, name) for name in ("json_schema", "regex", "choice", "grammar")}
            parts = {name: value for name, value in parts.items() if value is not None}
            if outputs.json_object:
                parts["json_object"] = True
            if len(parts) != 1:
                given = " and ".join(name.removesuffix("_schema") for name in parts) or "nothing"
                words = f"structured_outputs has {given}; give one of json, regex, choice, grammar and json_object"
                raise RequestError(words, param="structured_outputs")
            ((kind, value),) = parts.items()
            found["structured_outputs"] = _format("structured_outputs", kind, value)
        return found

    @property
    def text_format(self) -> ResponseFormat | None:
        """The format of the text; None: there is none."""
        return next(iter(self.formats.values()), None)

    @property
    def format_field(self) -> str:
        """The field with the format of the text."""
        return next(iter(self.formats), "response_format")

    def check_formats(self) -> None:
        """Raises RequestError if there are several formats."""
        if len(formats := self.formats) > 1:
            raise RequestError(f"{' and '.join(formats)} exclude each other; give one of them", param=[*formats][1])


def _format(field: str, kind: str, value: object) -> ResponseFormat:
    try:
        return ResponseFormat.of(kind, value)
    except ValueError as error:
        raise RequestError(f"{field} {error}; shorten it", param=field) from None
