"""Constraints that begin after reasoning: the texts that they accept, token by token, and AR beside verified."""

from __future__ import annotations

import json
from typing import Any

import pytest
from test_stopping import TOKENIZER
from transformers import PreTrainedTokenizerFast

from twotower import Constraint
from twotower.decoding.structured_thinking import Exemption, Thinking

PERSON: dict[str, Any] = {
    "type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"], "additionalProperties": False,
}  # fmt: skip
CALL = ("<tool_call>", "</tool_call>")
KINDS = {
    "json_schema": (PERSON, '{"age": 5}'),
    "regex": ("[0-9]{3}", "123"),
    "grammar": ('start: "a" b\nb: "c"+', "ac"),
}
# Reasoning before the constrained text, and whether it is complete if the prompt has begun it, or has not.
REASONING = [
    ("hm, so </think>", True, False),
    ("</think>", True, False),
    ("a\n</thin\n</think>\n\n \t", True, False),
    ("", False, True),
    ("<think>hm</think>", True, True),
    ("<think>\n{}\n\n</think>\n\n", True, True),
    ("<think>hm", False, False),
    ("hm", False, False),
]


def tokenizer_with(marks: bool, special: bool = False) -> Any:
    """The byte-level tokenizer, in which the marks are single tokens or texts."""
    backend = type(TOKENIZER.backend_tokenizer).from_str(TOKENIZER.backend_tokenizer.to_str())
    if marks:
        (backend.add_special_tokens if special else backend.add_tokens)(["<think>", "</think>", *CALL])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("marks", "special"), [(False, False), (True, False), (True, True)])
def test_the_constraint_applies_after_the_reasoning(kind: str, marks: bool, special: bool) -> None:
    tokenizer = tokenizer_with(marks, special)
    source, text = KINDS[kind]
    size, eos = len(tokenizer), tokenizer.convert_tokens_to_ids(TOKENIZER.convert_ids_to_tokens(2))
    for opened in (True, False):
        constraint = Constraint(tokenizer, **{kind: source}, thinking=Thinking(opened=opened))
        for reasoning, if_opened, if_not in REASONING:
            tokens = [*tokenizer(reasoning + text, add_special_tokens=False)["input_ids"], eos]
            _, count = constraint.matcher((eos,)).walk(tokens, size)
            accepted = count == len(tokens)
            assert accepted == (if_opened if opened else if_not), (reasoning, opened)


@pytest.mark.parametrize(("marks", "special"), [(False, False), (True, False), (True, True)])
def test_exempt_texts(marks: bool, special: bool) -> None:
    """A text that begins with a mark is not constrained, after the reasoning if there is any."""
    tokenizer = tokenizer_with(marks, special)
    exemption = Exemption(starts=CALL[:1], marks=CALL[1:])
    plain = {'{"age": 5}': True, "<tool_call>x {</tool_call>\n<tool_call>y</tool_call>": True}
    other = {"x": False, "</tool_call>x": False, "x<tool_call>": False, '<tool_call{"age": 5}': False}
    for opened in (None, True, False):
        thinking = None if opened is None else Thinking(opened=opened)
        constraint = Constraint(tokenizer, json_schema=PERSON, thinking=thinking, exemption=exemption)
        start = {None: "", True: "a</think>\n", False: "<think>a</think>\n"}[opened]
        for text, accepted in (plain | other).items():
            tokens = [*tokenizer(start + text, add_special_tokens=False)["input_ids"], 2]
            _, count = constraint.matcher((2,)).walk(tokens, len(tokenizer))
            assert (count == len(tokens)) == accepted, (text, opened)


def test_without_reasoning_nothing_changes() -> None:
    constraint = Constraint(TOKENIZER, json_schema=json.dumps(PERSON))
    tokens = TOKENIZER('<think></think>{"age": 5}', add_special_tokens=False)["input_ids"]
    assert constraint.matcher(()).walk(tokens, len(TOKENIZER))[1] == 0
