"""From a client's request to the engine's: one `Choice` for each text that is to be written."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from twotower.decoding.modes import CONSTRAINED
from twotower.decoding.params import GenerationParams
from twotower.decoding.structured import Constraint
from twotower.engine import AsyncLLM, Request
from twotower.errors import ArgumentError
from twotower.model_loading import eos_of
from twotower.server.request_errors import RequestError, request_error
from twotower.server.request_schemas import PARAMETERS, Asked, ChatAsked, CompletionAsked, ResponseFormat
from twotower.server.settings import Limits, Settings
from twotower.server.tokenizer_adapter import TokenizerAdapter

CHOICE_OF_POSITIONS = {"confidence_threshold", "policy", "knob"}


@dataclass(frozen=True)
class Choice:
    """A text to be written. place: its index in the answer; echo: the prompt, where it is given back; trimmed: whether
    white space before its text is left out."""

    place: int
    request: Request
    seed: int
    echo: str = ""
    trimmed: bool = False


class ChoiceBuilder:
    """Makes the choices of requests to one engine."""

    def __init__(self, engine: AsyncLLM, tokenizer: TokenizerAdapter) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        model = engine.llm.model
        self._structured_mode = "ar" if model.denoiser is None else "verified"  # of formats, where no mode is asked for
        self._shared = {"eos_token_id": eos_of(model), "mask_token_id": model.config.mask_token}

    def build(
        self, asked: CompletionAsked | ChatAsked, constraint: Constraint | None, settings: Settings
    ) -> list[Choice]:
        """Everything that one request wants written.

        Raises:
            RequestError: it cannot be done; says why, and which field.
        """
        try:
            return self._build(asked, constraint, settings)
        except ArgumentError as error:
            raise request_error(error, asked.field_of(error.param)) from None

    def _build(
        self, asked: CompletionAsked | ChatAsked, constraint: Constraint | None, settings: Settings
    ) -> list[Choice]:
        mode = self._mode(asked, constraint, settings)
        asked.check(mode)
        _check_count(asked, settings.limits)
        prompts, ends = self._prompts(asked)
        values = self._values(asked, mode, (*asked.stops, *ends), settings)
        seed = _seed(asked, mode, settings)
        logprobs, of_prompt = _logprobs(asked)
        choices: list[Choice] = []
        for prompt in prompts:
            values["max_new_tokens"] = self._new_tokens(asked, len(prompt), settings.limits)
            requests = [
                Request(
                    prompt,
                    GenerationParams.from_mapping(values | {"seed": seed + number}),
                    constraint=constraint,
                    watched=asked.stream_denoising,
                    logprobs=logprobs,
                    prompt_logprobs=of_prompt,
                )
                for number in range(asked.n)
            ]
            self.engine.check(requests[0])  # the others differ in their seed alone
            echo = self.tokenizer.text(prompt) if isinstance(asked, CompletionAsked) and asked.echo else ""
            for number, request in enumerate(requests):
                choices.append(Choice(len(choices), request, seed + number, echo, trimmed=bool(ends)))
        return choices

    def _prompts(self, asked: CompletionAsked | ChatAsked) -> tuple[list[list[int]], tuple[str, ...]]:
        """Token ids of each prompt, and the stop strings that belong to the prompts' form."""
        if isinstance(asked, ChatAsked):
            tokens, ends = self.tokenizer.chat(asked.messages)
            return [tokens], ends
        return [self.tokenizer.tokens(prompt) for prompt in asked.prompts], ()

    def _mode(self, asked: Asked, constraint: Constraint | None, settings: Settings) -> str:
        mode = asked.mode or str(settings.decoding["mode"])
        if constraint is not None and asked.mode is None and mode not in CONSTRAINED:
            return self._structured_mode
        return mode

    def _values(
        self, asked: CompletionAsked | ChatAsked, mode: str, stops: Sequence[str], settings: Settings
    ) -> dict[str, object]:
        """Arguments of `GenerationParams.of` but for the length and the seed: the server's own, where the request's
        mode is the server's, then the request's."""
        usual = dict(settings.decoding) if mode == settings.decoding["mode"] else {}
        given = {name: getattr(asked, field) for field, name in PARAMETERS.items() if getattr(asked, field) is not None}
        if given.keys() & CHOICE_OF_POSITIONS:  # one choice, not to be mixed with the server's
            usual = {name: value for name, value in usual.items() if name not in CHOICE_OF_POSITIONS}
        usual.pop("seed", None)  # see `_seed`
        sampling = {"temperature": asked.temperature, "top_p": asked.top_p}
        own = {name: value for name, value in sampling.items() if name in asked.model_fields_set or name not in usual}
        return self._shared | usual | given | own | {"mode": mode, "stop": tuple(stops)}

    def _new_tokens(self, asked: CompletionAsked | ChatAsked, prompt: int, limits: Limits) -> int:
        """New tokens after a prompt of so many, at most. Whether the engine has room for them is the engine's to check.

        Raises:
            RequestError: more than this server's limits allow.
        """
        if limits.prompt_tokens is not None and prompt > limits.prompt_tokens:
            raise RequestError(
                f"the prompt has {prompt} tokens; this server takes at most {limits.prompt_tokens}",
                param=asked.field_of("prompt"),
            )
        wanted, said = asked.new_tokens, asked.length_field
        if said is not None and wanted is not None:
            if limits.output_tokens is not None and wanted > limits.output_tokens:
                raise RequestError(f"{said} is {wanted}; this server writes at most {limits.output_tokens}", param=said)
            return wanted
        room = self.engine.stats.max_seq_len - prompt
        most = room if limits.output_tokens is None else min(room, limits.output_tokens)
        return max(1, most if wanted is None else min(wanted, most))  # at least one: a full text is refused


def constraint_of(tokenizer: TokenizerAdapter, wanted: ResponseFormat | None) -> Constraint | None:
    """What a response format makes of the text.

    Raises:
        RequestError: the format cannot be used; says why.
    """
    if wanted is None or wanted.type == "text":
        return None
    try:
        return Constraint(
            tokenizer.tokenizer,
            json_schema=None if wanted.json_schema is None else wanted.json_schema.json_schema,
            json_object=wanted.type == "json_object",
            regex=wanted.regex,
            grammar=wanted.grammar,
        )
    except ArgumentError as error:
        raise request_error(error, "response_format") from None


def _check_count(asked: CompletionAsked | ChatAsked, limits: Limits) -> None:
    prompts = len(asked.prompts) if isinstance(asked, CompletionAsked) else 1
    if not prompts:
        raise RequestError("prompt is an empty list; give at least one", param="prompt")
    if (count := prompts * asked.n) > limits.choices:
        raise RequestError(
            f"{count} choices are asked for; this server writes at most {limits.choices} for a request", param="n"
        )


def _seed(asked: Asked, mode: str, settings: Settings) -> int:
    """The request's seed, else the server's where the mode is the server's, else a fresh one."""
    usual = settings.decoding.get("seed") if mode == settings.decoding["mode"] else None
    seed = usual if asked.seed is None else asked.seed
    if seed is None:
        return secrets.randbits(48)
    assert isinstance(seed, int)
    return seed


def _logprobs(asked: CompletionAsked | ChatAsked) -> tuple[int | None, bool]:
    """Which log-probabilities are asked for: `logprobs` and `prompt_logprobs` of the engine's `Request`."""
    if isinstance(asked, ChatAsked):
        return (asked.top_logprobs or 0 if asked.logprobs else None), False
    return asked.logprobs, asked.logprobs is not None and asked.echo
