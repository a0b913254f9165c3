"""Scripted replies for the tests of the APIs, and helpers that read the events of streams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from chat_templates import TEMPLATES
from scripted import ScriptedLLM
from serving import NAME, RunningServer, serving, tiny_model, wait_until
from test_stopping import TOKENIZER

from twotower import LLM
from twotower.server.service import Service
from twotower.server.settings import ServerSettings

TWO_CALLS = (
    'I look.\n<tool_call>\n{"name": "look", "arguments": {"city": "Ülm", "days": 1}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
REPLIES = {
    "calls": TWO_CALLS,
    "thinking": "<think>\nWarm?\n</think>\n\nYes.",
    "both": "<think>\nI look.\n</think>\n\n" + TWO_CALLS.partition("\n")[2],
    "after": TWO_CALLS + "\nI have looked.",
    "malformed": '<tool_call>{"name": "look", "arguments": {"ci</tool_call>',
    "empty": "",
    "text": "Yes, it is.",
}
PARAMETERS = {
    "type": "object", "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
}  # fmt: skip


def kind_of(prompt: str) -> str:
    return next((kind for kind in REPLIES if f"reply: {kind}" in prompt), "text")


@contextmanager
def scripted_server() -> Iterator[RunningServer]:
    """A server whose replies are those of `REPLIES`, by the words `reply: NAME` of the prompt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TOKENIZER, "chat_template", TEMPLATES["hermes"])
        engine = ScriptedLLM(LLM(tiny_model(), rows=2, length=2048), lambda prompt: REPLIES[kind_of(prompt)])
        with serving(service=Service(engine, ServerSettings(name=NAME))) as found:
            yield found
            wait_until(found.is_idle)


def last_prompt(served: RunningServer) -> str:
    assert isinstance(served.service.engine, ScriptedLLM)
    return served.service.engine.prompts[-1]


def named_events(text: str) -> list[dict[str, Any]]:
    """The events of a complete stream, each of which has its name twice."""
    events = []
    for block in text.strip().split("\n\n"):
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events
