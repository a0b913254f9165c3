"""The text of a chat up to the reply: by the chat template of the model, or in a plain format."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

from twotower.server.conversation import Conversation, Ending
from twotower.server.message_schemas import Message
from twotower.server.request_errors import RequestError
from twotower.tokenizer import Tokenizer

MAX_FIELD_NAME = 64
ROLE_NAMES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}
SERVER_ARGUMENTS = {"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"}


def template_text(tokenizer: Tokenizer) -> str:
    """The text of a tokenizer's chat template, or of all its templates; "": it has none."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        return "\n".join(map(str, template.values()))
    return str(template or "")


def templated_prompt(tokenizer: Tokenizer, conversation: Conversation) -> str:
    """The prompt of a chat by the chat template.

    Raises:
        RequestError: The template rejects the messages or does not read a part of them, or an argument for the
            template is one that the server sets.
    """
    template = template_text(tokenizer)
    check_template_fields(conversation, template)
    arguments = conversation.template_arguments
    reserved = SERVER_ARGUMENTS | inspect.signature(tokenizer.apply_chat_template).parameters.keys()
    for name in arguments:
        if name in reserved:
            words = f"chat_template_kwargs.{name[:MAX_FIELD_NAME]} is an argument that the server sets; omit it"
            raise RequestError(words, param="chat_template_kwargs")
    turns = [message.template_fields for message in conversation.messages]
    tools = list(conversation.tool_use.definitions) or None
    try:
        return tokenizer.apply_chat_template(
            turns,
            tools,
            add_generation_prompt=conversation.ending == "reply",
            continue_final_message=conversation.ending == "continue",
            tokenize=False,
            **arguments,
        )
    except Exception as error:  # a template can raise any error
        reason = " ".join(f"{error}".split())
        words = f"the chat template of the model rejects these messages: {reason}"
        raise RequestError(words, param=conversation.request_field) from None


def plain_prompt(messages: Sequence[Message], ending: Ending = "reply") -> tuple[str, tuple[str, ...]]:
    """The prompt of a chat without a template, and the stop strings that end the reply.

    A turn is written as `Role: text`, and the role names are the stop strings. The calls of an assistant are written as
    forced calls are.
    """
    lines = [f"{ROLE_NAMES[message.role]}: {_plain_text(message)}".rstrip() for message in messages]
    has_tools = any(message.role == "tool" for message in messages)
    names = dict.fromkeys(name for role, name in ROLE_NAMES.items() if role != "tool" or has_tools)
    reply = {"reply": ["Assistant:"], "none": [""], "continue": []}[ending]
    return "\n".join([*lines, *reply]), tuple(f"\n{name}:" for name in names)


def _plain_text(message: Message) -> str:
    calls = [
        {"name": call.function.name, "arguments": call.function.arguments}
        for call in message.tool_calls or ()
        if message.role == "assistant"
    ]
    written = json.dumps(calls, ensure_ascii=False) if calls else ""
    return f"{message.text.strip()} {written}".strip()


def check_template_fields(conversation: Conversation, template: str) -> None:
    """Raises RequestError if a message has a role or a field whose meaning is lost without a template that reads it.

    template: "" for the plain format.
    """
    for number, message in enumerate(conversation.messages):
        place = conversation.place(number)
        if template and message.role == "tool" and not _reads(template, "tool"):
            words = f'{place}.role is "tool", which the chat template of this model does not read; omit the turn'
            raise RequestError(words, param=conversation.request_field, code="unsupported")
        for name in message.fields_for_templates_only:
            plain = not template and name == "tool_calls" and message.role == "assistant"
            if not plain and not _reads(template, name):
                words = f"{place}.{name} is a field that the chat template of this model does not read; omit it"
                raise RequestError(words, param=conversation.request_field, code="unsupported")


@lru_cache(maxsize=256)
def _reads(template: str, name: str) -> bool:
    """Whether a chat template contains the name of a field or role."""
    return len(name) <= MAX_FIELD_NAME and re.search(rf"\b{re.escape(name)}\b", template) is not None
