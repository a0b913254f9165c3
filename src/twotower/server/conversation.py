"""A chat as all routes give it to the model: turns, tools and arguments of the chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from twotower.server.message_schemas import Message
from twotower.server.parsers.pieces import Tool
from twotower.server.parsers.thinking import Opening

Ending = Literal["reply", "continue", "none"]  # what follows the last message: a reply, its own rest, or any turn
CallRule = Literal["none", "auto", "required", "named"]


@dataclass(frozen=True)
class ToolUse:
    """The tools of a request.

    tools: the functions that the reply may call. definitions: the tools in the form of the OpenAI API, for the chat
    template. rule: none: no calls; auto: the model decides; required: at least one call; named: a call of the only
    tool. parallel: whether the reply may have several calls.
    """

    tools: tuple[Tool, ...] = ()
    definitions: tuple[Mapping[str, object], ...] = ()
    rule: CallRule = "none"
    parallel: bool = True

    @property
    def forced(self) -> bool:
        """Whether the reply must consist of calls."""
        return self.rule in ("required", "named")


@dataclass(frozen=True)
class Conversation:
    """The turns of a chat and everything else that its prompt depends on.

    request_field: the field of the request with the turns. places: where each turn is in the request, for errors;
    empty: the turns are the entries of `request_field`.
    """

    messages: Sequence[Message]
    tool_use: ToolUse = field(default_factory=ToolUse)
    template_arguments: Mapping[str, object] = field(default_factory=dict)
    request_field: str = "messages"
    places: Sequence[str] = ()
    ending: Ending = "reply"

    def place(self, number: int) -> str:
        """Where the turn `number` is in the request."""
        return self.places[number] if self.places else f"{self.request_field}.{number}"


@dataclass(frozen=True)
class ChatPrompt:
    """The prompt of a chat, up to the reply.

    stops: strings that end the reply, if there is no chat template. opening: what the prompt has of the reasoning.
    """

    tokens: list[int]
    stops: tuple[str, ...] = ()
    opening: Opening = "none"
