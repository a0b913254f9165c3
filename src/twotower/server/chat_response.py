"""Responses of `POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from twotower.decoding.output import BlockEvent, Generation, TokenLogprob
from twotower.server.choices import Choice
from twotower.server.completion_requests import ChatCompletionRequest
from twotower.server.parsers.pieces import CallArguments, CallStart, Piece, ReasoningPiece, Reply, TextPiece
from twotower.server.response_builder import FINISH_REASONS, ChunkBuilder, ScoreFields, to_json
from twotower.server.response_schemas import (
    AssistantMessage,
    CalledFunction,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionChunkChoice,
    ChatLogprob,
    ChatLogprobs,
    ChoiceDelta,
    CompletedCall,
    FinishReason,
    FunctionDelta,
    ToolCallDelta,
    TopLogprob,
)
from twotower.server.service import Service
from twotower.server.text_offsets import ContentLogprobs


class ChatResponseBuilder(ChunkBuilder):
    """Builds responses of `POST /v1/chat/completions`."""

    prefix, chunk_model, chunk_object = "chatcmpl", ChatCompletionChunk, "chat.completion.chunk"
    request: ChatCompletionRequest

    def __init__(self, service: Service, request: ChatCompletionRequest, choices: Sequence[Choice]) -> None:
        super().__init__(service, request, choices)
        self._contents: dict[int, ContentLogprobs] = {}
        self._readers = {choice.index: self._reader(choice) for choice in choices}
        self._called: set[int] = set()  # choices with a tool call

    def full_response(self, results: Sequence[Generation]) -> bytes:
        choices = []
        for index, choice, result in self._returned(results):
            reply = Reply.of(self._readers[choice.index].take(result.tokens, result.text, last=True))
            logprobs = self._logprobs(choice, result.logprobs, result.text, True) if self.request.logprobs else None
            choices.append(
                ChatChoice(
                    index=index,
                    message=message_of(reply),
                    logprobs=logprobs,
                    finish_reason=_finish_reason(result, bool(reply.calls)),
                    decoding=self._decoding(choice, result),
                )
            )
        return to_json(
            ChatCompletion(**self.head, object="chat.completion", choices=choices, usage=self._usage(results))
        )

    def block_chunk(self, choice: Choice, event: BlockEvent) -> bytes | None:
        last = event.result is not None
        delta = delta_of(self._readers[choice.index].take(event.tokens, event.text, last))
        if delta.tool_calls:
            self._called.add(choice.index)
        logprobs = self._logprobs(choice, event.logprobs, event.text, last) if self.request.logprobs else None
        shown = delta.model_fields_set or (logprobs and logprobs.content) or last or self.request.stream_denoising
        if not shown:
            return None
        if choice.index not in self._begun:  # with the first text, so that clients measure the time to it
            delta = delta.model_copy(update={"role": "assistant"} | ({} if delta.model_fields_set else {"content": ""}))
        end = self._end(choice, event.result)
        if event.result is not None:
            end["finish_reason"] = _finish_reason(event.result, choice.index in self._called)
        part = ChatCompletionChunkChoice(index=choice.index, delta=delta, logprobs=logprobs, **end)
        return self._chunk(choices=[part], **self._committed(choice, event))

    def _logprobs(self, choice: Choice, scores: Iterable[TokenLogprob], text: str, last: bool) -> ChatLogprobs:
        """Log-probabilities of the tokens of the content that are final. See `ContentLogprobs`."""
        params = choice.engine_request.params
        contents = self._contents.setdefault(
            choice.index,
            ContentLogprobs(self.tokenizer, params.end_tokens, choice.strip_leading_space, params.skip_special_tokens),
        )
        content = []
        for score in contents.take(scores, text, last):
            top = [TopLogprob(**self._alternative(token, value)) for token, value in score.top]
            content.append(ChatLogprob(**self._alternative(score.token, score.logprob), top_logprobs=top))
        return ChatLogprobs(content=content)

    def _alternative(self, token: int, logprob: float) -> ScoreFields:
        return {
            "token": self.tokenizer.token_text(token),
            "logprob": logprob,
            "bytes": list(self.tokenizer.token_bytes(token)),
        }


def message_of(reply: Reply) -> AssistantMessage:
    """The message of a reply. Only the parts that it has are set."""
    calls = [
        CompletedCall(id=call.id, type="function", function=CalledFunction(name=call.name, arguments=call.arguments))
        for call in reply.calls
    ]
    content = None if calls and not reply.content else reply.content
    message = AssistantMessage(role="assistant", content=content, refusal=None)
    if reply.reasoning:
        message.reasoning_content = reply.reasoning
    if calls:
        message.tool_calls = calls
    return message


def delta_of(pieces: Sequence[Piece]) -> ChoiceDelta:
    """The pieces as one delta, with one entry for each tool call."""
    reply = Reply.of(piece for piece in pieces if isinstance(piece, TextPiece | ReasoningPiece))
    delta = ChoiceDelta()
    if reply.reasoning:
        delta.reasoning_content = reply.reasoning
    if reply.content:
        delta.content = reply.content
    calls: dict[int, ToolCallDelta] = {}
    for piece in pieces:
        if isinstance(piece, CallStart):
            function = FunctionDelta(name=piece.name, arguments="")
            calls[piece.index] = ToolCallDelta(index=piece.index, id=piece.id, type="function", function=function)
        elif isinstance(piece, CallArguments):
            entry = calls.setdefault(
                piece.index, ToolCallDelta(index=piece.index, function=FunctionDelta(arguments=""))
            )
            entry.function.arguments += piece.text
    if calls:
        delta.tool_calls = list(calls.values())
    return delta


def _finish_reason(result: Generation, has_calls: bool) -> FinishReason:
    reason = FINISH_REASONS[result.finish_reason]
    return "tool_calls" if has_calls and reason == "stop" else reason
