"""Structured output: every text follows its grammar and equals AR with the same grammar, step by step."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import llguidance
import llguidance.hf
import numpy as np
import pytest
import torch
from conftest import EVERY_KIND, build_random_model
from test_engine import LENGTH, assert_as_alone, drive, some_request
from test_logprobs import assert_right, run
from test_stopping import EOS, TOKENIZER, VOCABULARY, sentence_pieces

from twotower import LLM, Constraint, GenerationParams, Request, TwoTowerForCausalLM, bundled_model
from twotower.decoding import structured as constraints
from twotower.decoding.output import Generation
from twotower.decoding.sampling import AR_TOKEN, Sampling, sample_with_confidence
from twotower.decoding.structured import Matcher
from twotower.engine import constraint_masks
from twotower.engine import context_step as reading_module
from twotower.errors import ArgumentError, TwoTowerError

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
ORDER = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "grün", "青"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
        "gift": {"type": "boolean"},
        "to": PERSON,
    },
    "required": ["colour", "sizes", "gift", "to"],
    "additionalProperties": False,
}
DATE = r"(19|20)[0-9]{2}-[01][0-9]-[0-3][0-9]"
PHONE = r"\+[0-9]{2} [0-9]{2,3}( [0-9]{2,4}){2}"
ACCENTS = "[äöüé漢😀]{2,5}"  # two, three and four bytes each
WORDS = "[a-f]{1,9}( [a-f]{1,9}){0,4}"  # may end early or go on
SUM = """
start: term (" + " term){1,3}
term: NUMBER | "(" term " * " term ")"
NUMBER: /[1-9][0-9]{0,2}/
"""


def is_person(value: Any) -> bool:
    good = isinstance(value["name"], str) and len(value["name"]) <= 12
    return good and set(value) == {"name", "age"} and type(value["age"]) is int and value["age"] >= 0


def is_order(value: Any) -> bool:
    sizes = value["sizes"]
    return (
        set(value) == set(ORDER["required"])
        and value["colour"] in ("red", "grün", "青")
        and isinstance(sizes, list)
        and len(sizes) <= 3
        and all(type(size) is int and 0 <= size <= 99 for size in sizes)
        and isinstance(value["gift"], bool)
        and is_person(value["to"])
    )


def is_sum(text: str) -> bool:
    term, before = "[1-9][0-9]{0,2}", ""
    while before != text:
        before, text = text, re.sub(rf"\(({term}) \* ({term})\)", "1", text)
    return re.fullmatch(rf"{term}( \+ {term}){{1,3}}", text) is not None


KINDS: dict[str, tuple[dict[str, Any], Callable[[str], bool]]] = {
    "person": ({"json_schema": PERSON}, lambda text: is_person(json.loads(text))),
    "order": ({"json_schema": json.dumps(ORDER)}, lambda text: is_order(json.loads(text))),
    "object": ({"json_object": True}, lambda text: isinstance(json.loads(text), dict)),
    "date": ({"regex": DATE}, lambda text: re.fullmatch(DATE, text) is not None),
    "phone": ({"regex": PHONE}, lambda text: re.fullmatch(PHONE, text) is not None),
    "accents": ({"regex": ACCENTS}, lambda text: re.fullmatch(ACCENTS, text) is not None),
    "words": ({"regex": WORDS}, lambda text: re.fullmatch(WORDS, text) is not None),
    "sum": ({"grammar": SUM}, is_sum),
}


@pytest.fixture(scope="module")
def model() -> TwoTowerForCausalLM:
    model = build_random_model(EVERY_KIND, dtype=torch.float64, vocab_size=VOCABULARY)
    model.tokenizer = TOKENIZER
    return model


@pytest.fixture(scope="module")
def bundled() -> TwoTowerForCausalLM:
    return TwoTowerForCausalLM.from_pretrained(bundled_model("small"), dtype="float32")


def made(tokenizer: Any) -> dict[str, Constraint]:
    return {name: Constraint(tokenizer, **given) for name, (given, _) in KINDS.items()}


@pytest.fixture(scope="module")
def of_bytes() -> dict[str, Constraint]:
    return made(TOKENIZER)


def name_of(constraint: Constraint | None, made: dict[str, Constraint]) -> str:
    return next(name for name, one in made.items() if one is constraint)


def matcher_of(tokenizer: Any, name: str) -> Any:
    """llguidance's own matcher, made in the simplest way."""
    (kind, source), maker = next(iter(KINDS[name][0].items())), llguidance.LLMatcher
    pattern = {"whitespace_pattern": constraints.WHITESPACE}
    grammar = {
        "json_schema": lambda: maker.grammar_from_json_schema(source, defaults=pattern),
        "json_object": lambda: maker.grammar_from_json_schema({"type": "object"}, defaults=pattern),
        "regex": lambda: maker.grammar_from_regex(source),
        "grammar": lambda: maker.grammar_from_lark(source),
    }[kind]()
    return maker(llguidance.hf.from_tokenizer(tokenizer), grammar, log_level=0)


def assert_follows(output: Generation, request: Request, tokenizer: Any, name: str) -> None:
    """The text is complete and valid, or it was cut by length and is a valid prefix."""
    eos = set(request.params.eos_token_id)
    text = [token for token in output.tokens if token not in eos]
    matcher = matcher_of(tokenizer, name)
    assert matcher.validate_tokens(text) == len(text), output
    matcher.consume_tokens(text)
    if output.finish_reason == "length":
        assert len(output.tokens) == request.params.max_new_tokens
        assert not matcher.is_stopped()
    else:
        assert output.finish_reason == ("eos" if output.tokens[-1] in eos else "stop")
        assert (output.finish_reason == "stop") == matcher.is_stopped()
        assert matcher.is_accepting()
        assert KINDS[name][1](output.text), output.text


# --- the slow twin ----------------------------------------------------------------------------------------------------


def step_by_step(model: TwoTowerForCausalLM, request: Request, name: str) -> tuple[list[int], str]:
    """AR with a full forward each step, masked by llguidance's bits → tokens, finish reason."""
    params, matcher = request.params, matcher_of(model.tokenizer, name)
    rule = {"temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p}
    sampling = Sampling(seeds=torch.tensor([params.seed]), **rule)
    text, new = list(request.prompt), []
    while len(new) < params.max_new_tokens:
        with torch.no_grad():
            logits = model(torch.tensor([text])).logits[:, -1:]
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        if not params.eos_token_id:
            bits[EOS] = 0
        forbidden = torch.from_numpy(bits[: logits.shape[-1]] == 0)
        tokens, _ = sample_with_confidence(
            logits.masked_fill(forbidden, -torch.inf), sampling, torch.tensor([[len(text)]]), AR_TOKEN
        )
        token = int(tokens)
        text.append(token)
        new.append(token)
        if token in params.eos_token_id:
            return new, "eos"
        assert matcher.consume_token(token)
        if matcher.is_stopped():
            return new, "stop"
    return new, "length"


def constrained_request(rng: random.Random, constraint: Constraint, **given: Any) -> Request:
    given = {"mode": rng.choice(["ar", "verified"]), "acceptance": 1.0} | given
    given = {"max_new_tokens": rng.choice([1, 9, 24]), "eos_token_id": rng.choice([None, EOS])} | given
    if given["mode"] == "ar":
        given.pop("acceptance")
    return replace(some_request(rng, **given), constraint=constraint)


def test_text_equals_ar_with_masked_logits(model: TwoTowerForCausalLM, of_bytes: dict[str, Constraint]) -> None:
    rng = random.Random(1)
    requests = [constrained_request(rng, constraint) for _ in range(3) for constraint in of_bytes.values()]
    outputs = LLM(model, rows=5, length=LENGTH).generate(requests)
    assert {"stop", "eos", "length"} == {output.finish_reason for output in outputs}
    for request, output in zip(requests, outputs, strict=True):
        name = name_of(request.constraint, of_bytes)
        assert (output.tokens, output.finish_reason) == step_by_step(model, request, name), request
        assert_follows(output, request, TOKENIZER, name)


@pytest.mark.parametrize("rows", [1, 3, 12])
def test_verified_writes_what_ar_writes_among_others(
    model: TwoTowerForCausalLM, of_bytes: dict[str, Constraint], rows: int
) -> None:
    """Requests of every mode without a grammar run beside it and equal their results alone."""
    rng = random.Random(rows)
    verified, ar = [], []
    for place in range(36):
        if place % 3 == 0:
            verified.append(some_request(rng))
            ar.append(verified[-1])
            continue
        constraint = rng.choice(list(of_bytes.values()))
        request = constrained_request(rng, constraint, mode="verified", draft_steps=rng.choice([None, 1, 2]))
        verified.append(request)
        ar.append(replace(request, params=replace(request.params, mode="ar")))
    found, expected = (LLM(model, rows=rows, length=LENGTH).generate(requests) for requests in (verified, ar))
    for request, one, other in zip(verified, found, expected, strict=True):
        if request.constraint is None:
            assert_as_alone(model, request, one)
            continue
        assert (one.tokens, one.text, one.finish_reason) == (other.tokens, other.text, other.finish_reason), request
        assert one.confidence == pytest.approx(other.confidence)
        assert_follows(one, request, TOKENIZER, name_of(request.constraint, of_bytes))


def drafting(model: TwoTowerForCausalLM, text: list[int]) -> Any:
    """A denoiser that is certain of these tokens: tokens[i] at position i of the text after a prompt of one token."""

    def denoise(block: torch.Tensor, t: Any, view: Any, **options: Any) -> torch.Tensor:
        logits = torch.zeros(*block.shape, VOCABULARY, dtype=torch.float64)
        for row, read in enumerate(view.lengths.tolist()):
            for column in range(block.shape[1]):
                place = read + column - 1
                logits[row, column, text[place] if 0 <= place < len(text) else 70] = 50.0
        return logits

    return patch.object(model, "denoise", denoise)


def encoded(text: str) -> list[int]:
    return list(TOKENIZER.backend_tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("acceptance", [1.0, 0.3, 0.0])
def test_drafts_that_leave_the_grammar(model: TwoTowerForCausalLM, acceptance: float) -> None:
    """Drafts leave it at any point: by a wrong token, an early end or tokens after the end. The rest is accepted."""
    constraint = Constraint(TOKENIZER, regex="[ab]{12}")
    good = encoded("a") * 12
    params = {"max_new_tokens": 30, "draft_steps": 1, "eos_token_id": EOS, "seed": 1}
    ar = Request([5], GenerationParams.of(mode="ar", **params), constraint=constraint)
    (expected,) = LLM(model, rows=1, length=64).generate([ar])
    for wrong in (0, 1, 5, 11, 12):
        for other in (encoded("z")[0], EOS, 3, VOCABULARY - 1):
            draft = [*good[:wrong], other, *good[wrong:], *encoded("zz")]
            verified = GenerationParams.of(mode="verified", acceptance=acceptance, **params)
            with drafting(model, draft):
                (output,) = LLM(model, rows=1, length=64).generate([Request([5], verified, constraint=constraint)])
            assert output.finish_reason == "stop"
            assert re.fullmatch("[ab]{12}", output.text)
            if acceptance == 1:
                assert output.tokens == expected.tokens
            if acceptance == 0:  # acceptance 0 accepts every token that the grammar allows
                assert output.accepted >= min(wrong, 12)
                assert output.text[:wrong] == "a" * wrong


def test_an_end_in_the_draft_is_kept_where_the_text_may_end(model: TwoTowerForCausalLM) -> None:
    constraint = Constraint(TOKENIZER, regex="a{3,9}")
    letter = encoded("a")[0]
    params = GenerationParams.of(
        mode="verified", acceptance=0.0, max_new_tokens=30, draft_steps=1, eos_token_id=(EOS, 9), seed=1
    )
    for end in (EOS, 9):
        with drafting(model, [letter] * 4 + [end] * 8):
            (output,) = LLM(model, rows=1, length=64).generate([Request([5], params, constraint=constraint)])
        assert (output.tokens, output.finish_reason) == ([letter] * 4 + [end], "eos")
    with drafting(model, [letter, EOS] + [letter] * 8):
        (output,) = LLM(model, rows=1, length=64).generate([Request([5], params, constraint=constraint)])
    assert output.tokens[1] == letter


def test_without_an_end_token_a_text_that_may_go_on_goes_on(model: TwoTowerForCausalLM) -> None:
    request = Request(
        [5, 6], GenerationParams.of(mode="ar", max_new_tokens=20), constraint=Constraint(TOKENIZER, regex="[ab]+")
    )
    (output,) = LLM(model, rows=1, length=64).generate([request])
    assert output.finish_reason == "length"
    assert len(output.tokens) == 20
    ends = replace(request, params=replace(request.params, eos_token_id=encoded("c")))  # EOS is an ordinary token
    (output,) = LLM(model, rows=1, length=64).generate([ends])
    assert encoded("c")[0] not in output.tokens[:1]
    assert re.fullmatch("[ab]+", output.text)


def test_a_stop_string_ends_it_too(model: TwoTowerForCausalLM) -> None:
    constraint = Constraint(TOKENIZER, regex="x[ab]{3}c")
    for stop, text in (
        ("x", ""),
        ("c", None),
        ("cd", None),
        ("nothing", None),
    ):  # "cd" could begin, so the last letter is held back
        for mode in ("ar", "verified"):
            params = GenerationParams.of(mode=mode, max_new_tokens=20, stop=stop, seed=0)
            (output,) = LLM(model, rows=1, length=64).generate([Request([5], params, constraint=constraint)])
            assert output.finish_reason == "stop"
            if text is None:
                assert re.fullmatch("x[ab]{3}" + ("" if stop == "c" else "c"), output.text)
            else:
                assert output.text == text


# --- a trained model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["ar", "verified"])
def test_what_the_bundled_model_writes_is_valid(bundled: TwoTowerForCausalLM, mode: str) -> None:
    tokenizer, rng = bundled.tokenizer, random.Random(2)
    every = made(tokenizer)
    lines = ["User: I need a taxi.\nAssistant:", "Who are you?", "青い 😀", "1 + 1 ="]
    requests = [
        Request(
            tokenizer(rng.choice(lines))["input_ids"],
            GenerationParams.of(
                mode=mode,
                max_new_tokens=limit,
                temperature=temperature,
                seed=rng.randrange(100),
                eos_token_id=rng.choice([None, tokenizer.eos_token_id]),
                acceptance=rng.choice([1.0, 0.1]) if mode == "verified" else 1.0,
            ),
            constraint=constraint,
        )
        for constraint in every.values()
        for temperature, limit in ((0.0, 150), (1.0, 150), (1.5, 150), (1.0, 12))
    ]
    outputs = LLM(bundled, rows=16, length=256).generate(requests)
    ended = set()
    for request, output in zip(requests, outputs, strict=True):
        name = name_of(request.constraint, every)
        assert_follows(output, request, tokenizer, name)
        if output.finish_reason != "length":
            ended.add(name)
    assert ended >= {"date", "phone", "accents", "sum", "order"}


def test_a_schema_may_say_how_it_is_spaced(model: TwoTowerForCausalLM) -> None:
    tight = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
    for options, wanted in (
        ({"whitespace_flexible": False}, r'\{"a":\s?1\}'),
        ({"whitespace_pattern": "x"}, r'\{x?"a"x?:x?1x?\}'),
    ):
        constraint = Constraint(TOKENIZER, json_schema=tight | {"x-guidance": options})
        for seed in range(4):
            params = GenerationParams.of(mode="ar", max_new_tokens=30, temperature=2.0, seed=seed)
            (output,) = LLM(model, rows=1, length=64).generate([Request([5], params, constraint=constraint)])
            assert re.fullmatch(wanted, output.text), output.text


# --- beside log-probabilities and memory that gives out ---------------------------------------------------------------


def test_logprobs_are_not_masked_by_the_grammar(model: TwoTowerForCausalLM, of_bytes: dict[str, Constraint]) -> None:
    """Log-probabilities are unmasked ones of the AR model; confidence is the probability after masking."""
    rng = random.Random(8)
    requests = [
        replace(constrained_request(rng, constraint), logprobs=4, prompt_logprobs=True)
        for constraint in of_bytes.values()
        for _ in range(2)
    ]
    outputs, _ = run(LLM(model, rows=6, length=LENGTH), requests)
    without = LLM(model, rows=6, length=LENGTH).generate(
        [replace(request, logprobs=None, prompt_logprobs=False) for request in requests]
    )
    for request, output, other in zip(requests, outputs, without, strict=True):
        assert_right(model, request, output)
        assert output.tokens == other.tokens
        assert all(
            sure >= np.exp(told.logprob) - 1e-9 for sure, told in zip(output.confidence, output.logprobs, strict=True)
        )


def test_out_of_memory_does_not_advance_grammars(model: TwoTowerForCausalLM, of_bytes: dict[str, Constraint]) -> None:
    rng = random.Random(9)
    requests = [constrained_request(rng, constraint) for constraint in of_bytes.values() for _ in range(2)]
    expected = LLM(model, rows=6, length=LENGTH).generate(requests)
    real = reading_module.mask_logits

    def scarce(works: Any, logits: torch.Tensor) -> Any:
        out = real(works, logits)
        if len(works) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return out

    with patch.object(reading_module, "mask_logits", scarce):
        outputs = LLM(model, rows=6, length=LENGTH).generate(requests)
    assert [output.tokens for output in outputs] == [output.tokens for output in expected]
    assert [output.finish_reason for output in outputs] == [output.finish_reason for output in expected]


def test_a_matcher_that_fails_ends_its_own_request_only(
    model: TwoTowerForCausalLM, of_bytes: dict[str, Constraint]
) -> None:
    """It fails before sampling, after sampling, or because no token may follow."""
    date = of_bytes["date"]
    walk, take, matcher = Matcher.walk, Matcher.take, Constraint.matcher

    def run_with(**patches: Any) -> list[Generation]:
        params = [GenerationParams.of(mode=mode, max_new_tokens=20, seed=1) for mode in ("verified", "ar")]
        broken = Constraint(TOKENIZER, regex="[0-9]{18}")
        requests = [Request([5, 6], one, constraint=c) for one in params for c in (date, broken, None)]
        llm = LLM(model, rows=6, length=64)
        expected = llm.generate([requests[0], requests[2]])
        with patch.multiple(Matcher, **patches):
            outputs = llm.generate(requests)
        assert [output.finish_reason for output in outputs] == ["stop", "error", "length"] * 2
        assert [outputs[0].tokens, outputs[2].tokens] == [output.tokens for output in expected]
        assert len(llm.core.scheduler.free) == 6
        return [outputs[1], outputs[4]]

    def marked(self: Constraint, eos: Any) -> Matcher:
        out = matcher(self, eos)
        out.broken = self.source == "[0-9]{18}"  # type: ignore[attr-defined]
        return out

    def bad(real: Any) -> Any:
        def method(self: Any, *args: Any) -> Any:
            if self.broken:
                raise TwoTowerError("the lexer is too complex")
            return real(self, *args)

        return method

    def no_token(self: Any, *args: Any) -> Any:
        masks, count = walk(self, *args)
        return ([mask * 0 for mask in masks], count) if self.broken else (masks, count)

    with patch.object(Constraint, "matcher", marked):
        for patches in ({"walk": bad(walk)}, {"take": bad(take)}):
            assert {output.error for output in run_with(**patches)} == {"TwoTowerError: the lexer is too complex"}
        assert {output.error for output in run_with(walk=no_token)} == {
            "TwoTowerError: the grammar allows no token here; change the constraint"
        }


def test_aborted_requests(model: TwoTowerForCausalLM, of_bytes: dict[str, Constraint]) -> None:
    rng = random.Random(3)
    requests = [constrained_request(rng, rng.choice(list(of_bytes.values()))) for _ in range(24)]
    outputs = drive(LLM(model, rows=4, length=LENGTH), requests, rng, aborted=0.1)
    for place, output in outputs.items():
        assert_follows(output, requests[place], TOKENIZER, name_of(requests[place].constraint, of_bytes))


def test_no_cost_for_rows_without_a_grammar(model: TwoTowerForCausalLM) -> None:
    rng = random.Random(4)
    requests = [some_request(rng) for _ in range(6)]
    with patch.object(constraint_masks, "np", None), patch.dict(sys.modules, {"llguidance": None}):
        for request, output in zip(requests, LLM(model, rows=3, length=LENGTH).generate(requests), strict=True):
            assert_as_alone(model, request, output)


# --- tokenizers -------------------------------------------------------------------------------------------------------


def test_masks_are_unpacked_alike_everywhere() -> None:
    masks = np.random.default_rng(0).integers(0, 256, (5, 41), dtype=np.uint8)
    there = constraint_masks.shifted(torch.from_numpy(masks))
    assert torch.equal(constraint_masks.unpacked(masks, torch.device("cpu")), there)
    assert there[3, 8 * 7 + 2] == bool(masks[3, 7] & 4)


def test_every_vocabulary_size() -> None:
    """The bits of the last tokens are not read as the grammar's end, and bits beyond them not as tokens."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    for more in range(9):
        own = Tokenizer.from_str(TOKENIZER.backend_tokenizer.to_str())
        own.add_tokens([f"word{i}" for i in range(more)])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=own)
        size = own.get_vocab_size()
        constraint = Constraint(tokenizer, regex="(word[0-9])*")
        assert constraint.vocab_size == size
        for wider in (size, size + 1, size + 13):
            bits = np.unpackbits(constraint.matcher([wider - 1]).allowed(wider), bitorder="little")
            allowed = set(bits.nonzero()[0].tolist())
            assert {size - 1 - i for i in range(more)} | {wider - 1} <= allowed
            assert all(token < size or token == wider - 1 for token in allowed)


def test_a_tokenizer_with_spaces_as_characters() -> None:
    """SentencePiece: ▁ is a space, and <0xNN> a byte."""
    tokenizer = sentence_pieces()
    text = " hello the world, Grüße 😀"
    matcher = Constraint(tokenizer, regex=text).matcher([2])
    new = tokenizer.backend_tokenizer.encode(text[1:], add_special_tokens=False).ids
    masks, count = matcher.walk([*new, 2], len(tokenizer))
    assert count == len(new) + 1 == len(masks)
    assert matcher.take(new) == (len(new), True)


# --- asking -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "a constraint has nothing; give one of json_schema, json_object, regex, choice, grammar"),
        ({"regex": "a", "json_object": True}, "a constraint has json_object and regex; give one of"),
        ({"regex": "(("}, "regex cannot be used: .*unclosed group; change it"),
        ({"regex": "(?=a)b"}, "look-ahead and look-behind, is not supported"),
        ({"regex": ""}, "regex allows no text"),
        ({"regex": r"[^\s\S]"}, "regex cannot be used"),
        ({"regex": 3}, "regex is a int; give a string"),
        ({"regex": "\ud800"}, "regex has half of a surrogate pair"),
        ({"grammar": "start: foo"}, 'grammar cannot be used: .*unknown name: "foo"'),
        ({"grammar": "start foo (("}, "grammar cannot be used: .*Expected token ':'"),
        ({"grammar": ""}, "grammar cannot be used: Empty grammar"),
        ({"json_schema": "{"}, "json_schema is not JSON: Expecting property name"),
        ({"json_schema": "[" * 100_000}, "json_schema is not JSON: maximum recursion"),
        ({"json_schema": "[1]"}, r"json_schema is \[1\]; give an object"),
        ({"json_schema": {"type": "strin"}}, "json_schema cannot be used: Invalid type: strin"),
        ({"json_schema": {"const": {1, 2}}}, "json_schema is not JSON: Object of type set"),
        ({"json_schema": {"const": float("nan")}}, "json_schema is not JSON: NaN is not a JSON number"),
        ({"json_schema": {"minLength": 10**30}}, "json_schema cannot be used: Value is not JSON"),
        ({"json_schema": {"const": "\ud800"}}, "json_schema has half of a surrogate pair"),
        ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "Unsatisfiable schema"),
    ],
)
def test_invalid_constraints(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as error:
        Constraint(TOKENIZER, **given)
    assert "\n" not in str(error.value)


def test_who_cannot_follow(model: TwoTowerForCausalLM, of_bytes: dict[str, Constraint]) -> None:
    llm = LLM(model, rows=1, length=64)
    for mode in ("diffusion", "mock_ar", "auto"):
        with pytest.raises(ArgumentError, match=f'mode is \'{mode}\'.*use mode "ar" or "verified"'):
            llm.add_request(Request([5], GenerationParams.of(mode=mode, max_new_tokens=9), constraint=of_bytes["date"]))
    small = build_random_model("M*", dtype=torch.float64)
    with pytest.raises(ArgumentError, match="the constraint's tokenizer has 320 tokens and this model 64"):
        LLM(small, length=64).add_request(
            Request([5], GenerationParams.of(mode="ar", max_new_tokens=3), constraint=of_bytes["date"])
        )
    with pytest.raises(ArgumentError, match="constraint is a str; give a Constraint"):
        Request([5], GenerationParams.of(), constraint="a+")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"needs a tokenizer; set model\.tokenizer"):
        Constraint(None, regex="a")
    with pytest.raises(ArgumentError, match="not a str"):
        Constraint("tokenizer", regex="a")
    assert not llm.has_work


def test_the_library_may_be_missing() -> None:
    with (
        patch.dict(sys.modules, {"llguidance": None}),
        pytest.raises(
            ArgumentError, match=re.escape("a constraint needs llguidance; pip install 'twotower[structured]'")
        ),
    ):
        Constraint(TOKENIZER, regex="a")


def test_a_tokenizer_is_read_once() -> None:
    Constraint(TOKENIZER, regex="a")
    with patch("tokenizers.Tokenizer.from_str", side_effect=AssertionError("read again")):
        Constraint(TOKENIZER, regex="b")
