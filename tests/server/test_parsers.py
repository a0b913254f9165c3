"""Parsers of tool calls and reasoning: the same result for a text in one piece, in characters and in any pieces."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from chat_templates import TEMPLATES

from twotower.errors import ArgumentError
from twotower.server.parsers.forced import ForcedArguments, ForcedCalls
from twotower.server.parsers.pieces import Parser, Reply, Tool, joined
from twotower.server.parsers.schema_types import allowed_types, argument_value
from twotower.server.parsers.selection import TOOL_PARSERS, has_reasoning, tool_parser
from twotower.server.parsers.thinking import ThinkingParser, opening_of
from twotower.server.settings import ServerSettings

PROPERTIES = {
    "city": {"type": "string"}, "days": {"type": "integer"}, "metric": {"type": "boolean"},
    "where": {"type": "object"}, "tags": {"type": "array", "items": {"type": "string"}}, "share": {"type": "number"},
    "note": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "any": {},
}  # fmt: skip
TOOLS = [Tool(name, None, {"type": "object", "properties": PROPERTIES}) for name in ("look", "book-it", "now")]
Call = tuple[str, dict[str, Any]]
ULM: Call = ("look", {"city": "Ulm"})
TWO: list[Call] = [ULM, ("book-it", {"city": "Bonn", "days": 3})]
HARD_TEXT = 'a "b" \\ } ] { [ ; \n</tool> ü 漢 😀'
HARD: Call = ("look", {"city": HARD_TEXT, "where": {"a": [1, {"b": None}]}, "tags": ["x", "}"]})
VALUES: Call = ("look", {"days": -2, "metric": True, "share": 0.5, "note": None, "tags": [], "where": {}, "any": [1]})

# A text as parts: a list of calls, or a text around them. The white space beside calls is not content.
TEXTS: dict[str, list[str | list[Call]]] = {
    "one": [[ULM]],
    "without arguments": [[("now", {})]],
    "two": [TWO],
    "three": [[*TWO, ULM]],
    "text before": ["I look.\n\n", [ULM]],
    "text after": [[ULM], "\nDone."],
    "text around": ["First. ", [ULM], " Then."],
    "text between": [[ULM], " and ", [TWO[1]]],
    "blank before": [" \n\t", [ULM], "\n \n"],
    "difficult characters": [[HARD]],
    "values": [[VALUES]],
    "only text": ["Hello, how are you?"],
    "no text": [],
    "white space": [" \n "],
    "brackets": ["a < b, c[1] > 2, x{}; <b>bold</b> [TOOL] <tool>"],
    "many": [[("now", {})] * 6],
}
EXPECTED_TEXTS = {"text before": "I look.", "text after": "Done.", "text around": "First. Then.", "text between": "and"}


def hermes(calls: Sequence[Call]) -> str:
    return "\n".join(f"<tool_call>\n{named(call)}\n</tool_call>" for call in calls)


def nemotron(calls: Sequence[Call]) -> str:
    return f"<TOOLCALL>[{', '.join(map(named, calls))}]</TOOLCALL>"


def mistral(calls: Sequence[Call]) -> str:
    return f"[TOOL_CALLS] [{', '.join(map(named, calls))}]"


def mistral_named(calls: Sequence[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(arguments)}" for name, arguments in calls)


def llama(calls: Sequence[Call]) -> str:
    return "; ".join(json.dumps({"name": name, "parameters": arguments}) for name, arguments in calls)


def tagged(calls: Sequence[Call]) -> str:
    def one(name: str, arguments: dict[str, Any]) -> str:
        values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
        parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
        return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>\n"

    return "".join(one(*call) for call in calls)


def named(call: Call) -> str:
    return json.dumps({"name": call[0], "arguments": call[1]}, ensure_ascii=False)


FORMATS: dict[str, tuple[str, Callable[[Sequence[Call]], str]]] = {
    "hermes": ("hermes", hermes), "qwen3_coder": ("qwen3_coder", tagged), "nemotron_json": ("nemotron_json", nemotron),
    "llama3_json": ("llama3_json", llama), "mistral": ("mistral", mistral), "mistral_named": ("mistral", mistral_named),
}  # fmt: skip

# Texts that only one parser gives a meaning: text, content, calls. Malformed and truncated calls are content.
NO_ARGUMENTS: list[Call] = [("now", {})]
OWN: dict[str, list[tuple[str, str, list[Call]]]] = {
    "hermes": [
        ('<tool_call>{"name": "now"}</tool_call>', "", NO_ARGUMENTS),
        ('<tool_call>{"name": "now", "arguments": null}', "", NO_ARGUMENTS),
        ('<tool_call>{"name": "look", "arguments": "{\\"city\\": \\"Ulm\\"}"}</tool_c', "", [ULM]),
        ('<tool_call>[{"name": "now", "arguments": {}}, {"name": "now"}]</tool_call>', "", NO_ARGUMENTS * 2),
        ('<tool_call>{"type": "function", "function": {"name": "now", "arguments": {}}}', "", NO_ARGUMENTS),
        ('<tool_call>{"name": "look", "arguments": {"city": "U', None, []),
        ('<tool_call>{"name": "look", "arguments": {"city": "Ulm"}', None, []),
        ("<tool_call>", None, []),
        ("a <tool_ca", None, []),
        ('<tool_call>{"name": 5, "arguments": {}}</tool_call>', None, []),
        ('<tool_call>{"arguments": {}}</tool_call>', None, []),
        ('<tool_call>{"name": "look", "arguments": [1]}</tool_call>', None, []),
        ('<tool_call>{"name": "look", "arguments": {"share": NaN}}</tool_call>', None, []),
        ('<tool_call>{"name": "look", "arguments": {"share": 1e999}}</tool_call>', None, []),
        ('<tool_call>{"name": "look",}</tool_call>', None, []),
        ("<tool_call>{'name': 'look'}</tool_call>", None, []),
        ("<tool_call>[]</tool_call>", None, []),
        ("<tool_call>look(city)</tool_call>", None, []),
        ('<tool_call>oops <tool_call>{"name": "now"}</tool_call>', "<tool_call>oops", NO_ARGUMENTS),
        ('<tool_call>{"a": <tool_call>{"name": "now"}</tool_call>', '<tool_call>{"a":', NO_ARGUMENTS),
        ('<tool_call>{"name": "look", "arguments": {"city": "a\nb"}}</tool_call>', "", [("look", {"city": "a\nb"})]),
    ],
    "qwen3_coder": [
        ("<function=now>\n</function>", "", NO_ARGUMENTS),
        ("<tool_call><function=now></function></tool_call>", "", NO_ARGUMENTS),
        ("<tool_call><function=look><parameter=city>Ulm</parameter></function></tool_call>", "", [ULM]),
        ("<function=look><parameter=metric>True</parameter></function>", "", [("look", {"metric": True})]),
        ("<function=look><parameter=note>null</parameter></function>", "", [("look", {"note": None})]),
        ("<function=look><parameter=note>5</parameter></function>", "", [("look", {"note": "5"})]),
        ("<function=look><parameter=city>5</parameter></function>", "", [("look", {"city": "5"})]),
        ("<function=look><parameter=days>many</parameter></function>", "", [("look", {"days": "many"})]),
        ("<function=look><parameter=other>5</parameter></function>", "", [("look", {"other": "5"})]),
        ("<function=look><parameter=city>\n\na\n</parameter></function>", "", [("look", {"city": "\na"})]),
        ("<function=else><parameter=a>5</parameter></function>", "", [("else", {"a": "5"})]),
        ("<function=look><parameter=city>a </function> b</parameter></function>", "",
         [("look", {"city": "a </function> b"})]),
        ("<tool_call>\n<function=look>\n<parameter=city>\nUlm", None, []),
        ("<tool_call>\n<function=look>\n<parameter=city>\nUlm\n</parameter>\n</func", None, []),
        ("<tool_call>\n<function=look", None, []),
        ("<tool_call>\n<func", None, []),
        ("<function=look>oops</function>", None, []),
        ("<function=>\n</function>", None, []),
        ('<function="look">\n</function>', None, []),
        ("<function=look><parameter=a b>1</parameter></function>", None, []),
        ('<tool_call>{"name": "now"}</tool_call>', None, []),
        ("<function=x <function=now></function>", "<function=x", NO_ARGUMENTS),
        ("<function=look><parameter=share>1e999</parameter></function>", None, []),
    ],
    "nemotron_json": [
        ('<TOOLCALL>{"name": "now", "arguments": {}}</TOOLCALL>', "", NO_ARGUMENTS),
        ('<toolcall> {"name": "now", "arguments": {}} </toolcall>', "", NO_ARGUMENTS),
        ('<TOOLCALL>[{"name": "now", "arguments": "{}"}]', "", NO_ARGUMENTS),
        ('<TOOLCALL>[{"name": "now"}]</TOOL', "", NO_ARGUMENTS),
        ('<TOOLCALL>[{"name": "now"}', None, []),
        ('<TOOLCALL>[{"name": "now"}, {"na', None, []),
        ('<TOOLCALL>[{"name": "now"}, 5]</TOOLCALL>', None, []),
        ("<TOOLCALL>[]</TOOLCALL>", None, []),
        ("<TOOLCALL>now()</TOOLCALL>", None, []),
        ("<TOOLCALL", None, []),
        ('<TOOLCALL>[{"name": "now",}]</TOOLCALL>', None, []),
        ('<TOOLCALL>x<TOOLCALL>[{"name": "now"}]</TOOLCALL>', "<TOOLCALL>x", NO_ARGUMENTS),
        ('<tool_call>{"name": "now"}</tool_call>', None, []),
    ],
    "llama3_json": [
        ('<|python_tag|>{"name": "now", "parameters": {}}', "", NO_ARGUMENTS),
        ('{"name": "now", "arguments": {}}', "", NO_ARGUMENTS),
        ('{"type": "function", "name": "look", "parameters": {"city": "Ulm"}}', "", [ULM]),
        ('{"name": "now", "parameters": {}};', "", NO_ARGUMENTS),
        ('{"name": "other", "parameters": {}}', None, []),
        ('{"city": "Ulm"}', None, []),
        ('{"name": "now", "parameters": {}', None, []),
        ('{"name": "no', None, []),
        ("{", None, []),
        ("int f() { return {0}; }", None, []),
        ('{"a": {"name": "now", "parameters": {}}}', None, []),
        ('{x {"name": "now", "parameters": {}}', "{x", NO_ARGUMENTS),
        ("<|python_tag|>print(1)", None, []),
        ('[{"name": "look", "parameters": 5}]', None, []),
    ],
    "mistral": [
        ('[TOOL_CALLS][{"name": "now", "arguments": {}, "id": "a1B2c3D4e"}]', "", NO_ARGUMENTS),
        ('[TOOL_CALLS]{"name": "now", "arguments": {}}', "", NO_ARGUMENTS),
        ('[TOOL_CALLS]now{}', "", NO_ARGUMENTS),
        ('[TOOL_CALLS]now[CALL_ID]a1B2c3D4e[ARGS]{}', "", NO_ARGUMENTS),
        ('[TOOL_CALLS] now [ARGS] {}', None, []),
        ('[TOOL_CALLS]now[ARGS]{"a": ', None, []),
        ("[TOOL_CALLS]now[ARGS]", None, []),
        ("[TOOL_CALLS]", None, []),
        ("[TOOL_C", None, []),
        ("[TOOL_CALLS]now()", None, []),
        ('[TOOL_CALLS][{"name": "now"}', None, []),
        ("[TOOL_CALLS][]", None, []),
        ('[TOOL_CALLS]a b c{}', None, []),
        ('[TOOL_CALLS]"[TOOL_CALLS]now{}', '[TOOL_CALLS]"', NO_ARGUMENTS),
        ('[TOOL_CALLS]look[ARGS]{"city": oops}', None, []),
    ],
}  # fmt: skip
CASES = [
    (parser, text, content, calls)
    for label, (parser, write) in FORMATS.items()
    for name, parts in TEXTS.items()
    for text in ["".join(part if isinstance(part, str) else write(part) for part in parts)]
    for calls in [[call for part in parts if isinstance(part, list) for call in part]]
    for content in [EXPECTED_TEXTS.get(name, "" if calls else "".join(part for part in parts if isinstance(part, str)))]
] + [
    (parser, text, text if content is None else content, calls)
    for parser, found in OWN.items()
    for text, content, calls in found
]


def read(parser: Parser, pieces: Sequence[str]) -> Reply:
    found = [piece for text in pieces for piece in parser.feed(text)]
    return Reply.of([*found, *parser.finish()])


def result_of(reply: Reply) -> tuple[str, str, list[Call]]:
    return reply.content, reply.reasoning, [(call.name, json.loads(call.arguments)) for call in reply.calls]


def splits(text: str, rng: random.Random) -> list[list[str]]:
    """The text in one piece, in characters, in two pieces (of long texts, some), and in random pieces."""
    cuts = [sorted(rng.sample(range(len(text) + 1), min(5, len(text)))) for _ in range(5)]
    random_pieces = [[text[a:b] for a, b in zip([0, *cut], [*cut, len(text)], strict=True)] for cut in cuts]
    pairs = [[text[:at], text[at:]] for at in range(1, len(text), max(1, len(text) // 80))]
    return [[text], list(text), *pairs, *random_pieces]


def test_every_format_has_enough_texts() -> None:
    for parser in TOOL_PARSERS:
        assert len({text for name, text, *_ in CASES if name == parser}) >= 25


@pytest.mark.parametrize("parser", TOOL_PARSERS)
def test_the_result_does_not_depend_on_the_split(parser: str) -> None:
    rng = random.Random(5)
    for name, text, content, calls in CASES:
        if name == parser:
            for pieces in splits(text, rng):
                reply = read(TOOL_PARSERS[parser](TOOLS), pieces)
                assert result_of(reply) == (content, "", calls), (text, pieces)
                assert len({call.id for call in reply.calls}) == len(calls)


@pytest.mark.parametrize("parser", TOOL_PARSERS)
def test_texts_at_random(parser: str) -> None:
    """Parts of calls in any order: the result does not depend on the split, and no text is lost before a call."""
    rng = random.Random(6)
    parts = [part for name, text, *_ in CASES if name == parser for part in (text[: rng.randrange(len(text) + 1)], " ")]
    for _ in range(60):
        text = "".join(rng.choices(parts, k=5))
        whole = result_of(read(TOOL_PARSERS[parser](TOOLS), [text]))
        assert result_of(read(TOOL_PARSERS[parser](TOOLS), list(text))) == whole
        if not whole[2]:
            assert whole[0] == text


def test_text_is_final_as_soon_as_no_call_can_begin_there() -> None:
    parser = TOOL_PARSERS["hermes"](TOOLS)
    assert Reply.of(parser.feed("Hello <")).content == "Hello"
    assert Reply.of(parser.feed("b> x")).content == " <b> x"
    assert parser.feed(" \n<tool_call") == []


def test_without_parallel_calls_the_first_counts() -> None:
    for label, (parser, write) in FORMATS.items():
        reply = read(TOOL_PARSERS[parser](TOOLS, parallel=False), list(write(TWO)))
        assert result_of(reply) == ("", "", [ULM]), label


def test_ids_of_calls() -> None:
    (call,) = read(TOOL_PARSERS["hermes"](TOOLS), [hermes([ULM])]).calls
    assert call.id.startswith("call_")
    (call,) = read(TOOL_PARSERS["mistral"](TOOLS), [mistral([ULM])]).calls
    assert len(call.id) == 9
    assert call.id.isalnum()
    given = "[TOOL_CALLS]now[CALL_ID]a1B2c3D4e[ARGS]{}"
    assert read(TOOL_PARSERS["mistral"](TOOLS), [given]).calls[0].id == "a1B2c3D4e"


def test_a_long_text_takes_no_longer_than_its_characters() -> None:
    """Unfinished markers and white space, and a call of a long argument."""
    for text in (" " * 30_000 + "x", "<tool_call>" * 3000, hermes([("look", {"city": "x" * 100_000})])):
        read(TOOL_PARSERS["hermes"](TOOLS), list(text))


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": "string"}, {"string"}),
        ({"type": ["integer", "null"]}, {"integer", "null"}),
        ({"type": "number"}, {"number", "integer"}),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, {"string", "null"}),
        ({"enum": ["a", 1]}, {"string", "integer", "number"}),
        ({"const": True}, {"boolean"}),
        ({"$ref": "#/$defs/Colour"}, {"string"}),
        ({"allOf": [{"$ref": "#/$defs/Colour"}]}, {"string"}),
        ({"$ref": "#/$defs/Loop"}, {"string"}),
    ],
)
def test_types_of_arguments(schema: dict[str, Any], types: set[str]) -> None:
    loop = {"$ref": "#/$defs/Loop", "type": "string"}
    root = {"$defs": {"Colour": {"enum": ["red"], "type": "string"}, "Loop": loop}}
    assert allowed_types(schema, root) == types


def test_values_of_arguments() -> None:
    parameters = {"properties": PROPERTIES}
    values = [("days", "7", 7), ("share", "1", 1), ("where", '{"a": 1}', {"a": 1}), ("any", "[1]", [1])]
    for name, text, value in [*values, ("note", "None", None)]:
        assert argument_value(text, parameters, name) == value
    assert argument_value('"5"', parameters, "note") == '"5"'
    assert argument_value("x", None, "a") == "x"


# --- reasoning --------------------------------------------------------------------------------------------------------

THOUGHTS = [  # text, whether the prompt has opened the reasoning, content, reasoning
    ("<think>hm</think>yes", False, "yes", "hm"),
    ("<think>\nhm, so\n</think>\n\nyes\n", False, "yes\n", "hm, so"),
    ("\n<think>hm</think>", False, "", "hm"),
    ("hm</think>yes", True, "yes", "hm"),
    ("\nhm\n</think>\nyes", True, "yes", "hm"),
    ("<think>hm</think>yes", True, "yes", "hm"),
    ("</think>yes", True, "yes", ""),
    ("<think></think>yes", False, "yes", ""),
    ("yes", False, "yes", ""),
    ("  yes", False, "  yes", ""),
    ("<b>yes</b>", False, "<b>yes</b>", ""),
    ("yes <think>no</think>", False, "yes <think>no</think>", ""),
    ("<think>a </thin b</think>c", False, "c", "a </thin b"),
    ("<think>a <think> b</think>c</think>", False, "c</think>", "a <think> b"),
    ("hm", True, "", "hm"),
    ("hm \n", True, "", "hm"),
    ("hm </thi", True, "", "hm </thi"),
    ("<think>a\n\nb", False, "", "a\n\nb"),
    ("<thi", False, "<thi", ""),
    ("", True, "", ""),
    ("", False, "", ""),
    (" ", False, " ", ""),
    ("<think> \n </think> \n ", False, "", ""),
    ("ü</think>漢<think>", True, "漢<think>", "ü"),
]


@pytest.mark.parametrize(("text", "opened", "content", "reasoning"), THOUGHTS)
def test_reasoning_does_not_depend_on_the_split(text: str, opened: bool, content: str, reasoning: str) -> None:
    for pieces in splits(text, random.Random(7)):
        assert result_of(read(ThinkingParser(opened), pieces)) == (content, reasoning, []), pieces


def test_a_prompt_may_begin_the_reasoning() -> None:
    assert opening_of("<assistant><think>\n") == "open"
    assert opening_of("<assistant><think>\n\n</think>\n\n") == "closed"
    assert opening_of("<think>old</think> <assistant>\n") == "none"


# --- forced calls -----------------------------------------------------------------------------------------------------


def test_forced_calls_do_not_depend_on_the_split() -> None:
    for calls in ([ULM], TWO, [HARD, VALUES, ULM]):
        text = f"[{', '.join(map(named, calls))}]"
        for pieces in splits(text, random.Random(8)):
            assert result_of(read(ForcedCalls(), pieces)) == ("", "", calls)
    text = json.dumps(HARD[1])
    for pieces in splits(text, random.Random(9)):
        assert result_of(read(ForcedArguments("look"), pieces)) == ("", "", [HARD])


def test_arguments_of_forced_calls_arrive_in_pieces() -> None:
    parser = ForcedCalls()
    assert parser.feed('[{"name": "look", "argum') == []
    (start, first) = parser.feed('ents": {"ci')
    assert start.name == "look"
    (second,) = parser.feed('ty": "Ulm"')
    assert Reply.of(joined([start, first, second])).calls[0].arguments == '{"city": "Ulm"'


# --- the choice of parsers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("template", "parser"), [(text, name) for name, text in TEMPLATES.items()])
def test_the_template_chooses_the_parser(template: str, parser: str) -> None:
    assert tool_parser("auto", template) is TOOL_PARSERS[parser.partition("/")[0]]
    assert tool_parser("none", template) is None
    assert tool_parser("mistral", template) is TOOL_PARSERS["mistral"]


def test_without_a_known_template_there_is_no_parser() -> None:
    assert tool_parser("auto", "{{ messages }}") is None
    assert tool_parser("auto", "") is None
    assert has_reasoning("auto", "…</think>…")
    assert not has_reasoning("auto", "{{ messages }}")
    assert has_reasoning("think", "")
    assert not has_reasoning("none", "</think>")


@pytest.mark.parametrize("option", ["tool_parser", "reasoning_parser"])
def test_a_parser_must_exist(option: str) -> None:
    with pytest.raises(ArgumentError, match="is 'other'; choose one of auto, none, "):
        ServerSettings(name="a", **{option: "other"})
