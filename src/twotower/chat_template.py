"""Conversations as text: checks messages, and renders them with the chat template of a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from twotower.errors import ArgumentError
from twotower.tokenizer import Tokenizer

Message = Mapping[str, object]

ASSISTANT = "assistant"


class ChatError(ArgumentError):
    """A conversation cannot be rendered. The text of the exception is the reason."""


def check_messages(value: object) -> tuple[Message, ...]:
    """The messages of a conversation: objects with a role and a content.

    Raises:
        ChatError: the value is no list of such objects, or is empty.
    """
    if not isinstance(value, list | tuple) or not value:
        raise ChatError("messages is not a list with a message; give [{'role': 'user', 'content': '…'}, …]")
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ChatError(f"message {number} has no role; give an object with a role and a content")
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and len(message) > 2):
            raise ChatError(f"message {number} has a content that is no text; give a string")
    return tuple(value)


def require_template(tokenizer: object) -> None:
    """Raises ArgumentError if a tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ArgumentError(
            "the data has messages, and the tokenizer has no chat template; put chat_template.jinja beside "
            "tokenizer.json, or give data with texts"
        )


def render(tokenizer: Tokenizer, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
    """The text of a conversation. generation_prompt: whether it ends with the beginning of a new assistant turn.

    Raises:
        ChatError: the template rejects the messages, or a text has half a surrogate pair.
    """
    try:
        text: str = tokenizer.apply_chat_template(messages, add_generation_prompt=generation_prompt, tokenize=False)
        text.encode()
    except UnicodeEncodeError:
        raise ChatError("a message has half a surrogate pair, which is no character; remove it") from None
    except Exception as error:  # a template can raise any error
        reason = " ".join(f"{error}".split())
        raise ChatError(f"the chat template rejects the messages: {reason}") from None
    return text
