"""The items of `input`: what a client sends, and the turns of the chat that the items are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from twotower.server.message_schemas import MAX_PARTS, FunctionCall, JsonArguments, Message, ToolCall
from twotower.server.strict_model import ItemModel, check_type

PART_TYPES = ("input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text")
ITEM_TYPES = ("message", "function_call", "function_call_output", "reasoning")
REFERENCE = (
    "this server keeps no items of earlier responses, so send the items themselves, which some clients do with "
    "store: false"
)


class TextPart(ItemModel):
    """A part of a content: a text, or a refusal of the assistant."""

    ignored_fields: ClassVar = frozenset({"annotations", "logprobs", "prompt_cache_breakpoint"})

    type: Literal["input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text"]
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _check_type(self) -> Self:
        part = "refusal" if self.type == "refusal" else "text"
        if getattr(self, part) is None or (self.text is not None and self.refusal is not None):
            raise ValueError(f'must have "{part}", because its "type" is "{self.type}"')
        return self


def _known_part(value: object) -> object:
    return check_type(value, PART_TYPES, "this server reads only text")


def _known_item(value: object) -> object:
    if isinstance(value, dict) and value.get("type") == "item_reference":
        raise ValueError(f'has the type "item_reference"; {REFERENCE}')
    return check_type(value, ITEM_TYPES, f"give items of type {', '.join(ITEM_TYPES)}", "message")


Parts = Annotated[list[Annotated[TextPart, BeforeValidator(_known_part)]], Field(fail_fast=True, max_length=MAX_PARTS)]


def text_of(content: str | Sequence[TextPart] | None) -> str:
    """The text of a content."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text or part.refusal or "" for part in content)


class MessageItem(ItemModel):
    """A turn with a text."""

    ignored_fields: ClassVar = frozenset({"id", "status", "phase"})

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Parts


class FunctionCallItem(ItemModel):
    """A call of a function by the assistant. arguments: the JSON text of an object."""

    ignored_fields: ClassVar = frozenset({"id", "status", "caller"})

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: JsonArguments


class FunctionCallOutputItem(ItemModel):
    """The result of a call."""

    ignored_fields: ClassVar = frozenset({"id", "status", "caller", "name"})

    type: Literal["function_call_output"]
    call_id: str
    output: str | Parts


class ReasoningItem(ItemModel):
    """Reasoning of the assistant. Its text is that of `content`, or else of `summary`."""

    ignored_fields: ClassVar = frozenset({"id", "status", "encrypted_content"})

    type: Literal["reasoning"]
    summary: Parts = Field([])
    content: Parts | None = None

    @property
    def text(self) -> str:
        return text_of(self.content) or text_of(self.summary)


def _item_type(value: object) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if isinstance(kind, str) and kind else "message"


Item = MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem
InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_item_type),
    BeforeValidator(_known_item),
]


class Turns:
    """Turns of a chat, made from items. Reasoning, text and calls of the assistant that follow each other are a turn.

    places: where each turn begins in the request.
    """

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.places: list[str] = []
        self._open = False  # whether the last turn is of the assistant and can get more parts

    def add(self, item: Item, place: str) -> None:
        """Adds the next item."""
        match item:
            case MessageItem(role="assistant"):
                turn = self._assistant(place)
                if turn.content is not None or turn.tool_calls:
                    turn = self._begin(place)
                turn.content = text_of(item.content)
            case MessageItem():
                self._add(Message(role=item.role, content=text_of(item.content)), place)
            case FunctionCallOutputItem():
                self._add(Message(role="tool", content=text_of(item.output), tool_call_id=item.call_id), place)
            case ReasoningItem():
                self._begin(place).reasoning_content = item.text or None
            case FunctionCallItem():
                function = FunctionCall(name=item.name, arguments=item.arguments)
                turn = self._assistant(place)
                if len(turn.tool_calls or ()) == MAX_PARTS:
                    turn = self._begin(place)
                turn.tool_calls = [*(turn.tool_calls or ()), ToolCall(id=item.call_id, function=function)]

    def _assistant(self, place: str) -> Message:
        """The last turn, if it is of the assistant, or a new one."""
        return self.messages[-1] if self._open else self._begin(place)

    def _begin(self, place: str) -> Message:
        self._add(Message(role="assistant", content=None), place)
        self._open = True
        return self.messages[-1]

    def _add(self, message: Message, place: str) -> None:
        self.messages.append(message)
        self.places.append(place)
        self._open = False
