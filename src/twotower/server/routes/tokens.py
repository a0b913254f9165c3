"""Routes about tokens: those of vLLM, which lm-evaluation-harness uses as a remote tokenizer."""

from __future__ import annotations

from typing import Annotated, Self

from fastapi import FastAPI
from pydantic import BaseModel, Field, model_validator

from twotower.server.chat_prompts import template_text
from twotower.server.completion_requests import ChatCompletionRequest
from twotower.server.error_responses import ERROR_RESPONSES
from twotower.server.message_schemas import Message
from twotower.server.request_errors import RequestError, context_error
from twotower.server.request_schemas import MAX_MESSAGES, MAX_NAME_LENGTH, TokenIds
from twotower.server.service import Service
from twotower.server.strict_model import StrictModel
from twotower.server.tool_schemas import ToolList

RESPONSES: dict[int | str, dict[str, object]] = {
    status: ERROR_RESPONSES[status] for status in (400, 401, 404, 408, 413, 415, 429)
}
ModelName = Annotated[str | None, Field(max_length=MAX_NAME_LENGTH)]


class TokenizeRequest(StrictModel):
    """Body of `POST /tokenize`: a text, or the messages of a chat."""

    model: ModelName = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: ToolList = Field([], description="Chats only: the tools that the chat template gets.")
    chat_template_kwargs: dict[str, object] = Field({}, description="Chats only: variables of the chat template.")
    add_generation_prompt: bool | None = Field(None, description="Chats only. Default: true.")
    continue_final_message: bool = Field(False, description="Chats only.")
    add_special_tokens: bool | None = Field(
        None, description="Add the special tokens of the tokenizer, such as BOS. Default: true for a text only."
    )
    return_token_strs: bool = Field(False, description="Also return the name of each token in the vocabulary.")

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("must have either prompt or messages")
        return self

    def chat(self) -> ChatCompletionRequest:
        """The chat as a request for a reply."""
        fields = self.model_dump(include=set(ChatCompletionRequest.model_fields), exclude_unset=True, by_alias=True)
        return ChatCompletionRequest.model_construct(**(fields | {"messages": self.messages, "tools": self.tools}))


class TokenizeResponse(BaseModel):
    """The tokens. token_strs: names in the vocabulary, null unless the request asks for them."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(StrictModel):
    """Body of `POST /detokenize`."""

    model: ModelName = None
    tokens: TokenIds = Field(description="Token ids.")


class DetokenizeResponse(BaseModel):
    """The text of the tokens, with special tokens."""

    prompt: str


class TokenizerInfo(BaseModel):
    """The tokenizer: its class, special tokens and chat template."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None
    vocab_size: int
    model_max_length: int


def add_token_routes(app: FastAPI, service: Service) -> None:
    """Adds the routes."""

    @app.post("/tokenize", responses=RESPONSES)
    async def tokenize(request: TokenizeRequest) -> TokenizeResponse:
        """The tokens of a text, or of the prompt of a chat."""
        check_model(service, request.model)
        tokens = await service.run_on_texts(_tokens, service, request)
        name = service.tokenizer.tokenizer.convert_ids_to_tokens
        strings = [name(token) or "" for token in tokens] if request.return_token_strs else None
        length = service.engine.stats.max_seq_len
        return TokenizeResponse(count=len(tokens), max_model_len=length, tokens=tokens, token_strs=strings)

    @app.post("/detokenize", responses=RESPONSES)
    async def detokenize(request: DetokenizeRequest) -> DetokenizeResponse:
        """The text of tokens."""
        check_model(service, request.model)
        most = service.model.spec.vocab_size - 1
        if (beyond := max(request.tokens, default=0)) > most:
            raise RequestError(f"tokens has {beyond}; the vocabulary is 0 to {most}", param="tokens")
        return DetokenizeResponse(prompt=await service.run_on_texts(service.tokenizer.decode, request.tokens))

    @app.get("/tokenizer_info", responses={401: ERROR_RESPONSES[401]})
    async def tokenizer_info() -> TokenizerInfo:
        """The special tokens and the chat template of the tokenizer."""
        tokenizer = service.tokenizer.tokenizer

        def special(kind: str) -> str | None:
            found = getattr(tokenizer, f"{kind}_token", None)
            return None if found is None else str(found)

        return TokenizerInfo(
            tokenizer_class=type(tokenizer).__name__,
            bos_token=special("bos"),
            eos_token=special("eos"),
            pad_token=special("pad"),
            unk_token=special("unk"),
            chat_template=template_text(tokenizer) or None,
            vocab_size=len(tokenizer),
            model_max_length=service.engine.stats.max_seq_len,
        )


def check_model(service: Service, model: str | None) -> None:
    """Raises RequestError (404) if a request names another model."""
    if model is not None:
        service.check_model_name(model)


def _tokens(service: Service, request: TokenizeRequest) -> list[int]:
    most, field = service.engine.stats.max_seq_len, "messages" if request.prompt is None else "prompt"
    length = len(request.prompt or "") + sum(len(message.text) for message in request.messages or ())
    if length > (allowed := service.tokenizer.longest_text(most)):
        words = f"{field} has {length} characters; so many tokens have less than {allowed}, so shorten it"
        raise context_error(most, words, field)
    if request.prompt is not None:
        return service.tokenizer.encode_text(request.prompt, request.add_special_tokens is not False)
    chat = request.chat()
    chat.check_ending()
    if request.add_special_tokens:
        words = "add_special_tokens has no effect on messages, because the chat template writes special tokens; omit it"
        raise RequestError(words, param="add_special_tokens")
    return service.tokenizer.encode_chat(chat.conversation).tokens
