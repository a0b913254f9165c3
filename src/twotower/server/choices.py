"""Converts a client's request to requests of the engine: one `Choice` for each text to generate."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from twotower.decoding.modes import AUTO, CONSTRAINT_MODES, MODES_OF_FIELD
from twotower.decoding.params import GenerationParams
from twotower.decoding.structured import Constraint
from twotower.engine import AsyncLLM
from twotower.engine import Request as EngineRequest
from twotower.errors import ArgumentError, LengthError
from twotower.model_loading import eos_of
from twotower.server.chat_prompts import template_text
from twotower.server.completion_requests import CompletionRequest, GenerationRequest
from twotower.server.parsers.selection import has_reasoning, tool_parser
from twotower.server.reply import PLAIN, ReplyFormat
from twotower.server.request_errors import RequestError, context_error, length_error, request_error
from twotower.server.request_schemas import PARAMETER_OF_FIELD, BaseRequest
from twotower.server.settings import Limits, ServerSettings
from twotower.server.tokenizer_adapter import TokenizerAdapter

MAX_SCORES = 2**19  # log-probabilities and shown tokens of one response; the server holds up to 1 KiB for each
COMMIT_POLICY_PARAMETERS = {"confidence_threshold", "policy", "policy_value"}


@dataclass(frozen=True)
class Choice:
    """A text to generate.

    index: its index in the response; echo: the prompt, if the response repeats it; strip_leading_space: whether the
    response omits white space before the text. reply_format: how the text of a chat is read. constraint_field: the
    field of the request that constrains the text.
    """

    index: int
    engine_request: EngineRequest
    seed: int
    echo: str = ""
    strip_leading_space: bool = False
    reply_format: ReplyFormat = PLAIN
    constraint_field: str = "response_format"


@dataclass(frozen=True)
class Prompts:
    """The prompts of one request as token ids.

    stops: strings that end a chat without a template. continues: whether a reply continues a message.
    """

    tokens: list[list[int]]
    stops: tuple[str, ...] = ()
    continues: bool = False
    reply_format: ReplyFormat = PLAIN


class ChoiceBuilder:
    """Builds the choices of requests to one engine."""

    def __init__(self, engine: AsyncLLM, tokenizer: TokenizerAdapter) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        model = engine.llm.model
        self._ar_only = not model.has_denoiser
        # The mode of requests that have a response format and no mode.
        self._structured_mode = "ar" if self._ar_only else "verified"
        self._shared = {"eos_token_id": eos_of(model), "mask_token_id": model.config.mask_token}

    def build(
        self,
        request: GenerationRequest,
        settings: ServerSettings,
        prompts: Prompts | None = None,
        constraint: Constraint | None = None,
    ) -> list[Choice]:
        """Returns the choices of one request. prompts: those of `prompts`, if they are known.

        Raises:
            RequestError: The request is invalid. The error names the field and the reason.
        """
        try:
            return self._build(request, settings, prompts or self.prompts(request, settings), constraint)
        except LengthError as error:
            raise length_error(error, request.prompt_field, request.length_field) from None
        except ArgumentError as error:
            raise request_error(error, request.field_of(error.param)) from None

    def _build(
        self, request: GenerationRequest, settings: ServerSettings, prompts: Prompts, constraint: Constraint | None
    ) -> list[Choice]:
        mode = self._mode(request, settings)
        sources = request.prompt_list if isinstance(request, CompletionRequest) else [""]
        values = self._values(request, mode, (*request.stop_strings, *prompts.stops), settings)
        seed = _seed(request, mode, settings)
        logprobs, prompt_logprobs = request.logprob_counts
        if request.choice_count > request.returned_count and logprobs is None:
            logprobs = 0  # of the new tokens, to rank the texts
        choices: list[Choice] = []
        for given, prompt in zip(sources, prompts.tokens, strict=True):
            values["max_new_tokens"] = most = self._new_tokens(request, len(prompt), settings.limits)
            if request.min_tokens is not None and request.min_tokens > most:
                field = request.length_field or "max_tokens"
                words = f"min_tokens is {request.min_tokens}, and the text has at most {most} new tokens"
                raise RequestError(f"{words}; lower min_tokens or raise {field}", param="min_tokens")
            engine_requests = [
                EngineRequest(
                    prompt,
                    GenerationParams.from_mapping(values | {"seed": seed + number}),
                    constraint=constraint,
                    watched=request.stream_denoising,
                    logprobs=logprobs,
                    prompt_logprobs=prompt_logprobs,
                )
                for number in range(request.choice_count)
            ]
            self.engine.check(engine_requests[0])  # the other requests differ only in the seed
            echo = self._echo(given, prompt) if isinstance(request, CompletionRequest) and request.echo else ""
            for number, engine_request in enumerate(engine_requests):
                choices.append(
                    Choice(
                        len(choices),
                        engine_request,
                        seed + number,
                        echo,
                        strip_leading_space=bool(prompts.stops) and not prompts.continues,
                        reply_format=prompts.reply_format,
                        constraint_field=request.constraint_field,
                    )
                )
        _check_scores(request, choices)
        return choices

    def prompts(self, request: GenerationRequest, settings: ServerSettings) -> Prompts:
        """Encodes the prompts of a request, after the checks that need no tokens.

        Raises:
            RequestError: The request is invalid. The error names the field and the reason.
        """
        mode = self._mode(request, settings)
        request.check_mode(mode)
        if request.constrained and mode not in CONSTRAINT_MODES:
            field = request.constraint_field
            words = f"{field} needs mode {' or '.join(CONSTRAINT_MODES)}; mode is {mode}, so change one of them"
            raise RequestError(words, param=field)
        _check_count(request, settings.limits)
        self._check_characters(request)
        if isinstance(request, CompletionRequest):
            return Prompts([self.tokenizer.encode_prompt(prompt) for prompt in request.prompt_list])
        prompt = self.tokenizer.encode_chat(request.conversation)
        template = template_text(self.tokenizer.tokenizer)
        reply_format = ReplyFormat(
            reasoning=has_reasoning(settings.reasoning_parser, template),
            opening=prompt.opening,
            calls=tool_parser(settings.tool_parser, template),
            tool_use=request.tool_use,
        )
        return Prompts([prompt.tokens], prompt.stops, request.conversation.ending == "continue", reply_format)

    def _check_characters(self, request: GenerationRequest) -> None:
        """Raises RequestError if a text is too long for any tokens that fit. Encoding it would delay other requests."""
        most = self.engine.stats.max_seq_len
        if isinstance(request, CompletionRequest):
            longest = max((len(prompt) for prompt in request.prompt_list if isinstance(prompt, str)), default=0)
        else:
            longest = sum(len(message.text) for message in request.conversation.messages)
            longest += sum(len(json.dumps(tool)) for tool in request.tool_use.definitions)
        allowed = self.tokenizer.longest_text(most)
        if longest > allowed:
            field = request.prompt_field
            words = (
                f"{field} has {longest} characters; so many tokens are less than {allowed} characters, so shorten it"
            )
            raise context_error(most, words, field)

    def _echo(self, given: object, prompt: list[int]) -> str:
        """The prompt as the response repeats it: the text of the request, or all of the text of its tokens."""
        return given if isinstance(given, str) else self.tokenizer.decode(prompt)

    def _mode(self, request: BaseRequest, settings: ServerSettings) -> str:
        mode = request.mode or str(settings.decoding["mode"])
        if mode not in ("ar", AUTO) and self._ar_only:
            words = f"mode is {mode}; this server has only the context tower, so use mode ar"
            raise RequestError(words, param="mode" if request.mode else None)
        by_token = bool(request.constrained or request.bad_words)
        if request.mode is not None or by_token:
            return mode if request.mode or mode in CONSTRAINT_MODES else self._structured_mode
        steps_mean_diffusion = request.steps is not None and mode not in MODES_OF_FIELD["steps"] and not self._ar_only
        return "diffusion" if steps_mean_diffusion else mode

    def _values(
        self, request: GenerationRequest, mode: str, stops: Sequence[str], settings: ServerSettings
    ) -> dict[str, object]:
        """Arguments of `GenerationParams.of` without length and seed.

        The fields of the request override the server's defaults, which apply if the request has the server's mode. Both
        override the sampling defaults of `generation_config.json`.
        """
        defaults = dict(settings.sampling) | (dict(settings.decoding) if mode == settings.decoding["mode"] else {})
        given = {
            name: getattr(request, field)
            for field, name in PARAMETER_OF_FIELD.items()
            if getattr(request, field) is not None
        }
        if request.top_k == 0:
            given["top_k"] = None
        if given.keys() & COMMIT_POLICY_PARAMETERS:  # a request's commit policy replaces the server's as a whole
            defaults = {name: value for name, value in defaults.items() if name not in COMMIT_POLICY_PARAMETERS}
        defaults.pop("seed", None)  # see `_seed`
        sampling = {"temperature": request.temperature, "top_p": request.top_p}
        own = {
            name: value for name, value in sampling.items() if name in request.model_fields_set or name not in defaults
        }
        return self._shared | defaults | given | own | {"mode": mode, "stop": tuple(stops)}

    def _new_tokens(self, request: GenerationRequest, prompt: int, limits: Limits) -> int:
        """Maximum number of new tokens after a prompt of `prompt` tokens. The engine checks that they fit.

        Raises:
            RequestError: The prompt or the length exceeds the server's limits.
        """
        if limits.prompt_tokens is not None and prompt > limits.prompt_tokens:
            words = f"This server accepts prompts of at most {limits.prompt_tokens} tokens"
            words = f"{words}; the prompt has {prompt}, so shorten it"
            raise context_error(self.engine.stats.max_seq_len, words, request.field_of("prompt"))
        wanted, field = request.requested_tokens, request.length_field
        if field is not None and wanted is not None:
            if limits.output_tokens is not None and wanted > limits.output_tokens:
                raise RequestError(
                    f"{field} is {wanted}; this server allows at most {limits.output_tokens} new tokens", param=field
                )
            return wanted
        room = self.engine.stats.max_seq_len - prompt
        most = room if limits.output_tokens is None else min(room, limits.output_tokens)
        # At least one token, so that the engine rejects a prompt that leaves no room.
        return max(1, most if wanted is None else min(wanted, most))


def _check_count(request: GenerationRequest, limits: Limits) -> None:
    prompts = len(request.prompt_list) if isinstance(request, CompletionRequest) else 1
    if not prompts:
        raise RequestError("prompt is an empty list; give at least one prompt", param="prompt")
    if (count := prompts * request.choice_count) > limits.choices:
        raise RequestError(
            f"the request has {count} choices; this server allows at most {limits.choices}, so reduce "
            f"{request.count_field} or the prompts",
            param=request.count_field,
        )


def _check_scores(request: GenerationRequest, choices: Sequence[Choice]) -> None:
    """Raises RequestError if the response can have more log-probabilities or shown tokens than the server may hold."""
    first = choices[0].engine_request
    each = 0 if first.logprobs is None else 1 + first.logprobs
    each += first.params.steps_per_block if first.watched else 0
    tokens = sum(
        choice.engine_request.params.max_new_tokens
        + (len(choice.engine_request.prompt) if choice.engine_request.prompt_logprobs else 0)
        for choice in choices
    )
    if each * tokens > MAX_SCORES:
        field = "stream_denoising" if first.logprobs is None else "logprobs"
        raise RequestError(
            f"{field} of {tokens} tokens is up to {each * tokens} values; at most {MAX_SCORES} fit into a response, so "
            "reduce max_tokens, n or the number of alternatives",
            param=field,
        )


def _seed(request: BaseRequest, mode: str, settings: ServerSettings) -> int:
    """The seed of the request, else the server's seed if the request has the server's mode, else a random seed."""
    default = settings.decoding.get("seed") if mode == settings.decoding["mode"] else None
    seed = default if request.seed is None else request.seed
    if seed is None or seed == -1:
        return secrets.randbits(48)
    assert isinstance(seed, int)
    return seed
