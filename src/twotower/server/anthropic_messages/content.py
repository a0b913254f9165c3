"""The content of messages: what a client sends, and the turns of the chat that the messages are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from twotower.server.message_schemas import MAX_PARTS, FunctionCall, Message, ToolCall
from twotower.server.strict_model import ItemModel, check_type

BLOCK_TYPES = ("text", "thinking", "redacted_thinking", "tool_use", "tool_result")


class TextBlock(ItemModel):
    """A text."""

    ignored_fields: ClassVar = frozenset({"cache_control", "citations"})

    type: Literal["text"]
    text: str


class ThinkingBlock(ItemModel):
    """Reasoning of the assistant."""

    ignored_fields: ClassVar = frozenset({"signature", "cache_control"})

    type: Literal["thinking"]
    thinking: str


class RedactedThinkingBlock(ItemModel):
    """Reasoning of another model, which nobody but its provider can read. It is left out."""

    ignored_fields: ClassVar = frozenset({"data", "cache_control"})

    type: Literal["redacted_thinking"]


class ToolUseBlock(ItemModel):
    """A call of a tool by the assistant."""

    ignored_fields: ClassVar = frozenset({"cache_control", "caller"})

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, object]


def _text_only(value: object) -> object:
    return check_type(value, ("text",), "this server reads only text")


Texts = Annotated[list[Annotated[TextBlock, BeforeValidator(_text_only)]], Field(fail_fast=True, max_length=MAX_PARTS)]


class ToolResultBlock(ItemModel):
    """The result of a call."""

    ignored_fields: ClassVar = frozenset({"cache_control", "is_error"})

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Texts = ""


def _block_type(value: object) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if isinstance(kind, str) else None


def _known_block(value: object) -> object:
    if isinstance(value, dict) and "type" not in value:
        raise ValueError('must have a "type"')
    return check_type(value, BLOCK_TYPES, f"this server reads {', '.join(BLOCK_TYPES)}")


Block = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[RedactedThinkingBlock, Tag("redacted_thinking")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")],
    Discriminator(_block_type),
    BeforeValidator(_known_block),
]


class MessageParam(ItemModel):
    """A turn. Calls and reasoning are of the assistant, results of the user."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], Field(fail_fast=True, max_length=MAX_PARTS)]


def text_of(content: str | Sequence[TextBlock]) -> str:
    """The text of a content: its blocks as lines."""
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def turns_of(message: MessageParam) -> list[Message]:
    """The turns of the chat that a message is: each result of a call is a turn of its own, before the text.

    Raises:
        ValueError: The message has a block that is not of its role.
    """
    blocks = [] if isinstance(message.content, str) else message.content
    calls = [block for block in blocks if isinstance(block, ToolUseBlock)]
    results = [block for block in blocks if isinstance(block, ToolResultBlock)]
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]
    texts = [block for block in blocks if isinstance(block, TextBlock)]
    if (calls or thoughts) and message.role != "assistant":
        raise ValueError(f"has {'tool_use' if calls else 'thinking'}, which only a message of the assistant may have")
    if results and message.role != "user":
        raise ValueError("has tool_result, which only a message of the user may have")
    turns = [Message(role="tool", content=text_of(one.content), tool_call_id=one.tool_use_id) for one in results]
    content = message.content if isinstance(message.content, str) else text_of(texts)
    if message.role == "assistant":
        turn = Message(role="assistant", content=content if content or not calls else None)
        turn.reasoning_content = "\n".join(thoughts) or None
        turn.tool_calls = [_call(block) for block in calls] or None
        return [turn]
    return [*turns, Message(role=message.role, content=content)] if texts or not results else turns


def _call(block: ToolUseBlock) -> ToolCall:
    return ToolCall(id=block.id, function=FunctionCall(name=block.name, arguments=block.input))
