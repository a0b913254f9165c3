"""Structured output: constraints by a JSON schema, a regular expression or a grammar.

llguidance parses the bytes of the text so far and gives the tokens that may follow. The end of the text is a separate
token END here, because the request, not the tokenizer, defines the tokens that end a row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from twotower.decoding.structured_thinking import Exemption, Thinking, composed
from twotower.errors import ArgumentError, TwoTowerError, install_command
from twotower.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

END = "<|end of the grammar's text|>"
WHITESPACE = r" |\n[ \t]{0,24}"  # in JSON text; limited, because weak models may repeat it for ever
# llguidance's tables of tokenizers: making one takes up to a second.
TABLES: WeakKeyDictionary[Tokenizer, LLTokenizer] = WeakKeyDictionary()


class Constraint:
    """A constraint on a text, usable for any number of requests.

    Give exactly one of: json_schema (an object, or its JSON text), json_object (any JSON object), regex (must match the
    whole text), choice (the texts that are possible), grammar (in llguidance's Lark notation, or in llama.cpp's GBNF).
    thinking: reasoning that the text may begin with; the
    constraint applies to the text after it. exemption: texts that are not constrained, such as tool calls.

    Raises:
        ArgumentError: none or several are given, the given one is invalid, or llguidance is not installed.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        json_schema: Mapping[str, object] | str | None = None,
        json_object: bool = False,
        regex: str | None = None,
        choice: Sequence[str] | None = None,
        grammar: str | None = None,
        thinking: Thinking | None = None,
        exemption: Exemption | None = None,
    ) -> None:
        given: dict[str, object] = {"json_schema": json_schema, "json_object": json_object or None}
        given |= {"regex": regex, "choice": choice, "grammar": grammar}
        kinds = [kind for kind, value in given.items() if value is not None]
        if len(kinds) != 1:
            raise ArgumentError(f"a constraint has {' and '.join(kinds) or 'nothing'}; give one of {', '.join(given)}")
        (self.kind,) = kinds
        self.source = given[self.kind]
        llguidance, tables = _library(), _tables(tokenizer)
        compiled = _compiled(llguidance.LLMatcher, self.kind, self.source)
        if (thinking or exemption) and tokenizer is not None:
            is_lark = self.kind in ("choice", "grammar")
            body = {"lark_grammar": compiled} if is_lark else json.loads(compiled)["grammars"][0]
            compiled = composed(body, thinking, exemption, tokenizer)
        problem, said = llguidance.LLMatcher.validate_grammar_with_warnings(
            compiled, tables, limits=_limits(llguidance)
        )
        if problem:
            raise ArgumentError(f"{self.kind} cannot be used: {_one_line(said[0])}; change it", param=self.kind)
        self.vocab_size = tables.vocab_size - 1  # the last token is END
        self._start = llguidance.LLMatcher(tables, compiled, log_level=0, limits=_limits(llguidance))
        try:
            possible = bool(self.matcher(()).allowed(self.vocab_size).any())
        except TwoTowerError as error:
            raise ArgumentError(f"{self.kind} cannot be used: {error}", param=self.kind) from None
        if not possible:
            raise ArgumentError(
                f"{self.kind} allows no text that this tokenizer can encode; change it", param=self.kind
            )

    def matcher(self, eos: Sequence[int]) -> Matcher:
        """A matcher for a new text. The tokens `eos` are allowed where the text may end."""
        return Matcher(self._start.deep_copy(), self.vocab_size, eos)

    def __repr__(self) -> str:
        return f"Constraint({self.kind}={self.source!r})"


class Matcher:
    """The state of one text in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, eos: Sequence[int]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos = tuple(eos)

    def allowed(self, size: int) -> NDArray[np.uint8]:
        """The tokens that may follow, of a vocabulary of `size`, as bits (⌈size / 8⌉,), the lowest first."""
        bits = np.zeros(-(-max(size, self._vocab_size) // 8), dtype=np.uint8)
        found = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)[: -(-self._vocab_size // 8)]
        bits[: len(found)] = found
        if self._vocab_size % 8:  # END shares a byte with the last tokens
            bits[len(found) - 1] &= (1 << self._vocab_size % 8) - 1
        self._check()
        ends = self._matcher.is_accepting()
        for token in self._eos:
            bits[token // 8] &= ~np.uint8(1 << token % 8)
            bits[token // 8] |= np.uint8(ends << token % 8)
        return bits[: -(-size // 8)]

    def walk(self, draft: Sequence[int], size: int) -> tuple[list[NDArray[np.uint8]], int]:
        """Masks for a draft: `allowed` now, and after each allowed token of the draft; and the number of those tokens.

        The state does not change.
        """
        end = next((place for place, t in enumerate(draft) if t in self._eos or t >= self._vocab_size), len(draft))
        count = self._matcher.validate_tokens(list(draft[:end])) if end else 0
        masks = [self.allowed(size)]
        for token in draft[:count]:
            self._consume(token)
            masks.append(self.allowed(size))
        may_end = count == end < len(draft) and draft[end] in self._eos and self._matcher.is_accepting()
        if count and not self._matcher.rollback(count):
            raise TwoTowerError('the grammar cannot be followed: llguidance did not roll back a draft; use mode "ar"')
        return masks, count + may_end

    def take(self, tokens: Sequence[int]) -> tuple[int, bool]:
        """Appends tokens to the text → the number of tokens that belong to it, and whether no token may follow."""
        for count, token in enumerate(tokens, start=1):
            if token in self._eos:
                return count, False
            self._consume(token)
            if self._complete():
                return count, True
        return len(tokens), False

    def _complete(self) -> bool:
        if self._matcher.is_stopped():
            self._check()
            return True
        if self._eos or not self._matcher.is_accepting():
            return False
        return not self.allowed(self._vocab_size).any()  # more bytes may be allowed, but no token has them

    def _consume(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = _one_line(self._matcher.get_error())
            raise ArgumentError(f"the grammar cannot be followed: {reason}; change it", param="constraint")


def _limits(llguidance: ModuleType) -> LLParserLimits:
    """llguidance's limits, with errors that do not repeat its state."""
    limits: LLParserLimits = llguidance.LLParserLimits(verbose_errors=False)
    return limits


def _library() -> ModuleType:
    try:
        import llguidance
    except ImportError:
        raise ArgumentError(f"a constraint needs llguidance; {install_command('structured')}") from None
    return llguidance


def _tables(tokenizer: Tokenizer | None) -> LLTokenizer:
    """llguidance's table of the tokenizer's tokens as bytes, followed by END."""
    if tokenizer is None:
        raise ArgumentError("a constraint needs a tokenizer; set model.tokenizer", param="tokenizer")
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ArgumentError(
            f"a constraint needs a tokenizer of the tokenizers library, not a {type(tokenizer).__name__}; use one "
            "with a tokenizer.json",
            param="tokenizer",
        )
    found = TABLES.get(tokenizer)
    if found is None:
        from tokenizers import Tokenizer

        own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        own.no_padding()
        own.no_truncation()
        own.add_special_tokens([END])
        try:
            found = _library().LLTokenizer(own.to_str(), eos_token=own.token_to_id(END))
        except ValueError as error:
            raise ArgumentError(
                f"llguidance cannot read this tokenizer: {_one_line(str(error))}; use another", param="tokenizer"
            ) from None
        TABLES[tokenizer] = found
    return found


def _compiled(matcher: type[LLMatcher], kind: str, source: object) -> str:
    """The constraint in llguidance's own format."""
    if kind == "choice":
        return str(matcher.grammar_from_lark(_choice_grammar(source)))
    if kind in ("regex", "grammar"):
        if not isinstance(source, str):
            raise ArgumentError(f"{kind} is a {type(source).__name__}; give a string", param=kind)
        _encode(kind, source)
        if kind == "grammar" and "::=" in source:
            source = _from_gbnf(source)
        return str(matcher.grammar_from_regex(source) if kind == "regex" else matcher.grammar_from_lark(source))
    schema = {"type": "object"} if kind == "json_object" else source
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        schema = json.loads(text, parse_constant=_refuse)
        plain = json.dumps(schema, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise ArgumentError(f"json_schema is not JSON: {_one_line(str(error))}; change it", param=kind) from None
    if not isinstance(schema, dict):
        raise ArgumentError(f"json_schema is {plain[:40]}; give an object, {{}} for any JSON value", param=kind)
    _encode("json_schema", plain)
    schema.setdefault("x-guidance", {"whitespace_pattern": WHITESPACE})  # llguidance's options, which a caller may set
    try:
        return str(matcher.grammar_from_json_schema(schema))
    except ValueError as error:  # an integer of more than 64 bits
        raise ArgumentError(f"{kind} cannot be used: {_one_line(str(error))}; change it", param=kind) from None


def _choice_grammar(texts: object) -> str:
    """A grammar of these texts, in Lark's notation."""
    good = isinstance(texts, Sequence) and not isinstance(texts, str) and texts
    if not isinstance(texts, Sequence) or not good or not all(isinstance(text, str) and text for text in texts):
        raise ArgumentError(f"choice is {repr(texts)[:60]}; give a list of non-empty texts", param="choice")
    for text in texts:
        _encode("choice", text)
    return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)


def _from_gbnf(source: str) -> str:
    """A grammar in Lark's notation from one in GBNF."""
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return str(gbnf_to_lark(source))
    except Exception as error:  # the converter raises plain exceptions
        raise ArgumentError(f"grammar is not GBNF: {_one_line(str(error))}; change it", param="grammar") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def _encode(kind: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ArgumentError(
            f"{kind} has half of a surrogate pair, which cannot be encoded; remove it", param=kind
        ) from None


def _one_line(message: str) -> str:
    """The message in one line, without llguidance's drawings and dumps."""
    lines = [line.strip() for line in re.split("<(?:state|backtrace|non-verbose)", message)[0].splitlines()]
    return " ".join(line for line in lines if line.strip("^ ") and not re.match(r"\d+ \|", line))[:300]
