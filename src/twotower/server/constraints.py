"""The constraint on the texts of a request: its response format, or the calls that it forces."""

from __future__ import annotations

from twotower.decoding.structured import Constraint
from twotower.decoding.structured_thinking import Thinking
from twotower.errors import ArgumentError
from twotower.server.conversation import ToolUse
from twotower.server.format_schemas import ResponseFormat
from twotower.server.parsers.forced import forced_grammar
from twotower.server.reply import ReplyFormat
from twotower.server.request_errors import RequestError, request_error
from twotower.server.tokenizer_adapter import TokenizerAdapter


def build_constraint(
    tokenizer: TokenizerAdapter,
    response_format: ResponseFormat | None,
    reply_format: ReplyFormat,
    format_field: str = "response_format",
) -> Constraint | None:
    """Builds the constraint; None: there is none. Forced calls count before the response format.

    format_field: the field of the request with the format, for errors.

    A reply with a response format may have calls instead, if the model decides so and they begin with a mark.

    Raises:
        RequestError: The format or the schema of a tool is invalid.
    """
    tools, thinking = reply_format.tool_use, reply_format.thinking
    if tools.forced:
        return _tool_constraint(tokenizer, tools, thinking)
    if response_format is None or response_format.type == "text":
        return None
    exemption = reply_format.exemption
    if exemption and "{" in exemption.starts:
        words = f"{format_field} and tools exclude each other, because calls of this model are JSON without a mark; set"
        raise RequestError(f"{words} tool_choice none or required, or omit one of them", param=format_field)
    try:
        return Constraint(
            tokenizer.tokenizer,
            json_schema=None if response_format.json_schema is None else response_format.json_schema.json_schema,
            json_object=response_format.type == "json_object",
            regex=response_format.regex,
            choice=response_format.choice,
            grammar=response_format.grammar,
            thinking=thinking,
            exemption=exemption,
        )
    except ArgumentError as error:
        raise request_error(error, format_field) from None


def _tool_constraint(tokenizer: TokenizerAdapter, tools: ToolUse, thinking: Thinking | None) -> Constraint:
    grammar = forced_grammar(tools.tools, tools.rule == "named", tools.parallel)
    try:
        return Constraint(tokenizer.tokenizer, grammar=grammar, thinking=thinking)
    except ArgumentError as error:
        raise request_error(error, "tools") from None
