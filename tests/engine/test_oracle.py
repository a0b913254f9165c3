"""Compares the engine and the model's methods with the oracle in float64: random requests over all parameters.

The engine runs all requests of a model together; `generate` and the published methods run each alone.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import fields, replace

import oracle
import pytest
import torch
from decoding_goldens import Golden, Row, depends_on_timing, params_of, row_matches, row_of, run_method
from decoding_models import KINDS, STORED, decoding_model
from decoding_requests import random_request
from oracle_tower import KNOWN_FIELDS

from twotower import LLM, Request, generate

NAMES = (*KINDS, *STORED)
MODES = ("diffusion", "diffusion", "verified", "verified", "ar", "mock_ar")
LONGEST, MOST_NEW = 37, 24  # tokens: the oracle's time is quadratic in them
FORMS = [
    pytest.param(48, id="short"),
    pytest.param(480, id="full", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
]


def expected(golden: Golden) -> Row:
    """The oracle's row. With adaptive drafts the tokens are AR's, and the counts are not compared."""
    params = params_of(golden)
    if depends_on_timing(golden):
        params = replace(params, mode="ar")
    found = oracle.decode(decoding_model(golden["model"], torch.float64), golden["prompts"][0], params)
    return row_of(found, not depends_on_timing(golden))


@pytest.mark.parametrize("count", FORMS)
@torch.no_grad()
def test_every_way_to_ask_equals_the_oracle(count: int) -> None:
    rng = random.Random(count)
    goldens: list[Golden] = []
    for number in range(count):
        golden = random_request(rng, MODES[number % len(MODES)], 1, LONGEST, NAMES)
        golden["params"]["max_new_tokens"] = min(golden["params"]["max_new_tokens"], MOST_NEW)
        goldens.append(golden)
    rows = [expected(golden) for golden in goldens]
    for golden, row in zip(goldens, rows, strict=True):
        model = decoding_model(golden["model"], torch.float64)
        (result,) = generate(model, golden["prompts"], params_of(golden))
        assert row_matches(row_of(result, not depends_on_timing(golden)), row, 2e-6), (golden, row)
        (tokens,), nfe = run_method(model, golden)
        assert tokens == row["tokens"], golden
        assert depends_on_timing(golden) or nfe == row["passes"][0], golden
    for name in NAMES:
        own = [place for place, golden in enumerate(goldens) if golden["model"] == name]
        llm = LLM(decoding_model(name, torch.float64), rows=4, length=LONGEST + MOST_NEW, block_size=24)
        requests = [Request(goldens[place]["prompts"][0], params_of(goldens[place])) for place in own]
        for place, result in zip(own, llm.generate(requests), strict=True):
            assert row_matches(row_of(result, not depends_on_timing(goldens[place])), rows[place], 2e-6), (
                goldens[place],
                rows[place],
            )
    ends = Counter(row["end"] for row in rows)
    assert min(ends[end] for end in ("eos", "stop", "length")) >= count / 12
    drafts = [row["drafts"] for row in rows if "drafts" in row]
    assert 0 < sum(each[2] for each in drafts) < sum(each[1] for each in drafts)


@pytest.mark.parametrize("spec", KNOWN_FIELDS, ids=lambda spec: spec.__name__)
def test_the_oracle_knows_every_option(spec: type) -> None:
    """Except LongRoPE, which tests/model/test_long_rope.py compares with transformers."""
    found = {field.name for field in fields(spec)} - {"original_length", "long_inverse_frequencies"}
    assert found == set(KNOWN_FIELDS[spec].split())


def test_text_ends_before_a_stop_string() -> None:
    """Checks the oracle's text against values written by hand."""
    tokenizer = decoding_model("biased", torch.float64).tokenizer
    ids = tokenizer.convert_tokens_to_ids
    the, end, half, rest, eos = ids(["Ġthe", "end", "Ã", "¼", "</s>"])
    assert oracle.cut(tokenizer, [the, end], (), ()) == (" theend", False)
    assert oracle.cut(tokenizer, [the, end], (), ("een", "ee")) == (" th", True)
    assert oracle.cut(tokenizer, [the, half], (), ("ü",)) == (" the\ufffd", False)
    assert oracle.cut(tokenizer, [the, half, rest], (), ("ü",)) == (" the", True)
    assert oracle.cut(tokenizer, [the, eos], (eos,), ()) == (" the", False)
