"""The routes of Ollama: /api/chat, /api/generate, /api/tags and /api/version. They stream lines of JSON."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import ExitStack, aclosing
from datetime import UTC, datetime
from typing import Annotated, ClassVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError

from twotower.decoding.output import BlockEvent, Generation
from twotower.server.choices import Choice
from twotower.server.completion_requests import ChatCompletionRequest, CompletionRequest, GenerationRequest
from twotower.server.error_responses import ERROR_RESPONSES
from twotower.server.parsers.pieces import CallArguments, CallStart, Piece, Reply
from twotower.server.reply import ReplyReader
from twotower.server.request_errors import RequestError
from twotower.server.request_schemas import MAX_MESSAGES, MAX_NAME_LENGTH
from twotower.server.service import Service
from twotower.server.streaming import EventStreamResponse, run_until_disconnect
from twotower.server.strict_model import StrictModel
from twotower.server.validation_errors import validation_error
from twotower.version import VERSION

# Option of Ollama → field of a request. Options of this server's decoding keep their names.
FIELD_OF_OPTION = {
    "num_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "seed", "stop", "mode", "threshold", "steps")},
    **{name: name for name in ("presence_penalty", "frequency_penalty", "block_size", "draft_steps", "acceptance")},
}
MACHINE_OPTIONS = frozenset(
    {
        "num_ctx",
        "num_batch",
        "num_gpu",
        "main_gpu",
        "num_thread",
        "num_keep",
        "use_mmap",
        "use_mlock",
        "low_vram",
        "numa",
    }
)  # without effect on the text
DONE_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


class OllamaRequest(StrictModel):
    """Fields of both bodies."""

    ignored_fields: ClassVar = frozenset({"keep_alive"})

    model: Annotated[str, Field(max_length=MAX_NAME_LENGTH)]
    stream: bool = True
    format: str | dict[str, object] = Field("", description="json, or a JSON schema.")
    options: dict[str, object] = Field({}, description="temperature, top_p, top_k, seed, stop, num_predict, …")
    think: bool | str | None = Field(None, description="For chat templates that read it.")

    def fields(self) -> dict[str, object]:
        """The fields of a request of this server, without its prompt."""
        out: dict[str, object] = {"model": self.model, "stream": self.stream}
        for name, value in self.options.items():
            if value is None or name in MACHINE_OPTIONS or (name == "num_predict" and value in (-1, -2)):
                continue
            if name not in FIELD_OF_OPTION:
                words = f"options.{name[:MAX_NAME_LENGTH]} is not supported; omit it"
                raise RequestError(words, param="options", code="unsupported")
            out[FIELD_OF_OPTION[name]] = value
        if self.format == "json":
            out["response_format"] = {"type": "json_object"}
        elif isinstance(self.format, dict):
            out["response_format"] = {"type": "json_schema", "json_schema": {"schema": self.format}}
        elif self.format:
            raise RequestError('format must be "json" or a JSON schema; correct it or omit it', param="format")
        if isinstance(self.think, bool):
            out["chat_template_kwargs"] = {"enable_thinking": self.think}
        elif self.think is not None:
            out["reasoning_effort"] = self.think
        return out


class OllamaChatRequest(OllamaRequest):
    """Body of `POST /api/chat`."""

    messages: Annotated[list[dict[str, object]], Field(max_length=MAX_MESSAGES)]
    tools: list[dict[str, object]] = Field([], description="Functions that the model may call.")

    def request(self) -> GenerationRequest:
        """The request of this server."""
        messages = [_message(number, message) for number, message in enumerate(self.messages)]
        return _checked(ChatCompletionRequest, self.fields() | {"messages": messages, "tools": self.tools})


class OllamaGenerateRequest(OllamaRequest):
    """Body of `POST /api/generate`. raw: the prompt is not written into a chat."""

    off_values: ClassVar = {"suffix": ("",), "images": ([],), "template": ("",), "context": ([],)}

    prompt: str
    system: str = ""
    raw: bool = False

    def request(self) -> GenerationRequest:
        """The request of this server."""
        if self.raw:
            fields = {name: value for name, value in self.fields().items() if name in CompletionRequest.model_fields}
            return _checked(CompletionRequest, {"max_tokens": 128} | fields | {"prompt": self.prompt})
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, {"role": "user", "content": self.prompt}]
        return _checked(ChatCompletionRequest, self.fields() | {"messages": messages})


def add_ollama_routes(app: FastAPI, service: Service) -> None:
    """Adds the routes."""

    async def respond(body: OllamaChatRequest | OllamaGenerateRequest, raw_request: Request) -> Response:
        request = body.request()
        choices = await service.build_choices(request)
        raw_request.state.log_fields |= {"mode": choices[0].engine_request.params.mode, "stream": body.stream}
        writer = _Writer(service, choices[0], chat=isinstance(body, OllamaChatRequest))
        with ExitStack() as stack:
            stack.enter_context(service.admit(len(choices), raw_request.state.key))
            if body.stream:
                response = EventStreamResponse(_lines(service, choices[0], writer), stack.pop_all())
                response.headers["content-type"] = "application/x-ndjson"
                return response
            (result,) = await run_until_disconnect(raw_request, service.results(choices))
            reply = Reply.of(writer.reader.take(result.tokens, result.text, last=True))
            return Response(writer.line(reply, result), media_type="application/json")

    lines: dict[str, object] = {"content": {"application/x-ndjson": {}}}
    responses: dict[int | str, dict[str, object]] = {200: lines, **ERROR_RESPONSES}

    @app.post("/api/chat", response_class=Response, responses=responses)
    async def chat(body: OllamaChatRequest, raw_request: Request) -> Response:
        """Replies to a chat, in the form of Ollama."""
        return await respond(body, raw_request)

    @app.post("/api/generate", response_class=Response, responses=responses)
    async def generate(body: OllamaGenerateRequest, raw_request: Request) -> Response:
        """Replies to a prompt, in the form of Ollama."""
        return await respond(body, raw_request)

    @app.get("/api/tags", responses={401: ERROR_RESPONSES[401]})
    async def tags() -> dict[str, list[dict[str, object]]]:
        """The served model under each of its names, in the form of Ollama."""
        made = datetime.fromtimestamp(service.started, UTC).isoformat()
        details = {"format": "safetensors", "family": "twotower", "families": ["twotower"], "parent_model": ""}
        details |= {"parameter_size": "", "quantization_level": ""}
        card = {"modified_at": made, "size": 0, "digest": "", "details": details}
        return {"models": [{"name": name, "model": name} | card for name in service.names]}

    @app.get("/api/version", responses={401: ERROR_RESPONSES[401]})
    async def version() -> dict[str, str]:
        """The version of this package."""
        return {"version": VERSION}


class _Writer:
    """Writes the lines of one response."""

    def __init__(self, service: Service, choice: Choice, chat: bool) -> None:
        self.started, self.chat, self.model = time.perf_counter(), chat, service.settings.name
        eos = choice.engine_request.params.eos_token_id
        self.reader = ReplyReader(choice.reply_format, service.tokenizer, eos, choice.strip_leading_space)

    def line(self, reply: Reply, result: Generation | None) -> bytes:
        """The line with a part of the reply. result: in the last line."""
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        thinking = {"thinking": reply.reasoning} if reply.reasoning else {}
        body: dict[str, object] = {"model": self.model, "created_at": now, "done": result is not None}
        if self.chat:
            calls = [{"function": {"name": c.name, "arguments": _arguments(c.arguments)}} for c in reply.calls]
            message = {"role": "assistant", "content": reply.content} | thinking
            body["message"] = message | ({"tool_calls": calls} if calls else {})
        else:
            body |= {"response": reply.content} | thinking
        if result is not None:
            body |= {
                "done_reason": DONE_REASONS[result.finish_reason],
                "total_duration": int((time.perf_counter() - self.started) * 1e9),
                "load_duration": 0,
                "prompt_eval_count": result.prompt_tokens,
                "prompt_eval_duration": int(result.prefill_seconds * 1e9),
                "eval_count": len(result.tokens),
                "eval_duration": int(result.decode_seconds * 1e9),
            }
        return json.dumps(body).encode()


async def _lines(service: Service, choice: Choice, writer: _Writer) -> AsyncGenerator[bytes, None]:
    """Yields the lines of a stream. An error is its last line. Calls come in the last line, when they are complete."""
    pieces: list[Piece] = []
    try:
        async with aclosing(service.events([choice])) as events:
            async for item in events:
                if item is None or not isinstance(event := item[1], BlockEvent):
                    continue
                last = event.result is not None
                pieces += writer.reader.take(event.tokens, event.text, last)
                reply = Reply.of(pieces) if last or not _calls(pieces) else None
                if reply is not None and (last or reply.content or reply.reasoning):
                    pieces = []
                    yield writer.line(reply, event.result) + b"\n"
    except RequestError as error:
        yield json.dumps({"error": error.message}).encode() + b"\n"


def _calls(pieces: list[Piece]) -> bool:
    return any(isinstance(piece, CallStart | CallArguments) for piece in pieces)


def _arguments(text: str) -> object:
    """The arguments of a call as an object; "": they were cut off."""
    try:
        return json.loads(text or "{}")
    except ValueError:
        return {}


def _message(number: int, message: Mapping[str, object]) -> dict[str, object]:
    """A message in the form of the OpenAI API."""
    names = {"thinking": "reasoning_content", "tool_name": "name"}
    if message.get("images"):
        words = f"messages.{number}.images is not supported; the model reads text only, so omit it"
        raise RequestError(words, param="messages", code="unsupported")
    return {names.get(name, name): value for name, value in message.items() if name != "images"}


def _checked(
    kind: type[ChatCompletionRequest] | type[CompletionRequest], fields: dict[str, object]
) -> GenerationRequest:
    """A checked request. Raises RequestError if the fields are invalid."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        details = [{**detail, "loc": ("body", *detail["loc"])} for detail in error.errors()]
        raise validation_error(RequestValidationError(details, body=fields)) from None
