"""Responses of `POST /v1/completions`."""

from __future__ import annotations

from collections.abc import Sequence

from twotower.decoding.output import BlockEvent, Generation, TokenLogprob
from twotower.server.choices import Choice
from twotower.server.completion_requests import CompletionRequest
from twotower.server.response_builder import ChunkBuilder, to_json
from twotower.server.response_schemas import Completion, CompletionChoice, CompletionLogprobs
from twotower.server.service import Service
from twotower.server.text_offsets import TextOffsets


class CompletionResponseBuilder(ChunkBuilder):
    """Builds responses of `POST /v1/completions`."""

    prefix, chunk_model, chunk_object = "cmpl", Completion, "text_completion"
    request: CompletionRequest

    def __init__(self, service: Service, request: CompletionRequest, choices: Sequence[Choice]) -> None:
        super().__init__(service, request, choices)
        self._offsets: dict[int, TextOffsets] = {}

    def full_response(self, results: Sequence[Generation]) -> bytes:
        choices = []
        for index, choice, result in self._returned(results):
            logprobs = None
            if self.request.logprobs is not None:
                logprobs = self._logprobs(choice, result.prompt_logprobs, result.logprobs)
            text = choice.echo + result.text
            choices.append(CompletionChoice(index=index, text=text, logprobs=logprobs, **self._end(choice, result)))
        return to_json(Completion(**self.head, object="text_completion", choices=choices, usage=self._usage(results)))

    def block_chunk(self, choice: Choice, event: BlockEvent) -> bytes | None:
        text, logprobs = event.text, None
        if self.request.logprobs is not None:
            logprobs = self._logprobs(choice, event.prompt_logprobs, event.logprobs)
        elif not text and event.result is None and not self.request.stream_denoising:
            return None
        if choice.index not in self._begun:
            text = choice.echo + text
        part = CompletionChoice(index=choice.index, text=text, logprobs=logprobs, **self._end(choice, event.result))
        return self._chunk(choices=[part], **self._committed(choice, event))

    def _logprobs(
        self, choice: Choice, prompt: Sequence[TokenLogprob | None], new: Sequence[TokenLogprob]
    ) -> CompletionLogprobs:
        """Log-probabilities of the prompt of a choice, with `echo`, and of its next tokens."""
        params = choice.engine_request.params
        offsets = TextOffsets(self.tokenizer, choice.echo, params.end_tokens, params.skip_special_tokens)
        text_offsets = self._offsets.setdefault(choice.index, offsets)
        out = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for place, score in enumerate((*prompt, *new)):
            token = choice.engine_request.prompt[0] if score is None else score.token
            in_prompt = place < len(prompt)
            out.text_offset.append(text_offsets.prompt_offset(token) if in_prompt else text_offsets.span(token)[0])
            own = self.tokenizer.token_text(token)
            out.tokens.append(own)
            out.token_logprobs.append(None if score is None else score.logprob)
            top = () if score is None else ((token, score.logprob), *score.top)
            tops = {self.tokenizer.token_text(one): value for one, value in top}
            out.top_logprobs.append(tops if score is not None else None)
        return out
