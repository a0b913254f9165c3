"""Records `decoding/requests.jsonl.gz`: results of random requests, alone and in batches. From the repository root:

    PYTHONPATH=src:tests python tests/golden/record_decoding.py

It records the results of the current decoder: run it only after a change that is meant to change results.
A request counts as equal in fp32 if float64, fp32 and five float64 models with weights changed by 1e-5 of their value
all give the same discrete results. Then no near tie depends on a processor's rounding.
"""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from functools import cache
from typing import NamedTuple

import torch
from decoding_goldens import (
    FILE,
    Golden,
    Row,
    depends_on_timing,
    discrete,
    params_of,
    row_matches,
    row_of,
    run_method,
    run_stream,
    run_with_callback,
    values_close,
)
from decoding_models import NAMES, decoding_model
from decoding_requests import random_request
from near_ties import perturbed

from twotower import TwoTowerForCausalLM, generate


class Part(NamedTuple):
    """Requests of one seed: numbers of lone requests and of batches, modes and models."""

    seed: int
    alone: int
    batches: int
    modes: tuple[str, ...]
    names: tuple[str, ...]


PARTS = (
    Part(20, 340, 72, ("diffusion", "diffusion", "verified", "verified", "ar", "mock_ar"), NAMES),
    Part(21, 50, 20, ("verified",), ("biased", "agreeing")),  # its drafts are often accepted in part
)
PERTURBED = 5


def observe(model: TwoTowerForCausalLM, golden: Golden, with_calls: bool) -> Golden:
    """The results of a golden's request: rows with their events, and the calls of step_callback."""
    counted = not depends_on_timing(golden)
    results, events = run_stream(model, golden)
    out: Golden = {"rows": [row_of(result, counted) for result in results]}
    if counted:
        for row, own in zip(out["rows"], events, strict=True):
            row["events"] = own
    if with_calls:
        results, out["calls"] = run_with_callback(model, golden)
        assert all(row_matches(row_of(own), row, 0.0) for own, row in zip(results, out["rows"], strict=True))
    return out


def observe_every_way(model: TwoTowerForCausalLM, golden: Golden, with_calls: bool) -> Golden:
    """As `observe`, and asserts that all public functions agree."""
    counted = not depends_on_timing(golden)
    out = observe(model, golden, with_calls)
    results = generate(model, golden["prompts"], params_of(golden))
    assert all(row_matches(row_of(own, counted), row, 0.0) for own, row in zip(results, out["rows"], strict=True))
    tokens, nfe = run_method(model, golden)
    rows = zip(tokens, out["rows"], strict=True)
    assert all(own[: len(row["tokens"])] == row["tokens"] for own, row in rows)
    return out | ({"nfe": nfe} if counted else {})


def same(a: Golden, b: Golden) -> bool:
    """Whether all discrete values are equal, and calls up to a tolerance."""
    return [discrete(row) for row in a["rows"]] == [discrete(row) for row in b["rows"]] and values_close(
        a.get("calls", []), b.get("calls", []), 0.02
    )


@cache
def others(name: str) -> list[TwoTowerForCausalLM]:
    """Models in fp32 and with slightly changed weights."""
    exact = decoding_model(name, torch.float64)
    return [decoding_model(name, torch.float32)] + [perturbed(exact, seed) for seed in range(PERTURBED)]


def alone(golden: Golden, place: int) -> Row:
    """The request of one row of a batch."""
    params = dict(golden["params"])
    for name in ("seed", "policy", "policy_value"):
        if isinstance(params.get(name), list):
            params[name] = params[name][place]
    lone: Golden = {"model": golden["model"], "prompts": [golden["prompts"][place]], "params": params}
    return observe(decoding_model(golden["model"], torch.float64), lone, False)["rows"][0]


def complete(golden: Golden, with_calls: bool) -> Golden:
    """Adds all results in float64, and whether fp32 gives the same."""
    exact = decoding_model(golden["model"], torch.float64)
    seen = observe_every_way(exact, golden, with_calls)
    for place, row in enumerate(seen["rows"] if len(golden["prompts"]) > 1 else []):
        own = alone(golden, place)
        if golden["params"]["mode"] != "verified":
            assert row_matches(own, row, 1e-6), (golden, place)
        elif not row_matches(own, row, 1e-6, ("tokens", "at", "passes", "text", "end", "sure")):
            assert own["tokens"][:-1] == row["tokens"][:-1], (golden, place)
            assert own["at"][:-1] == row["at"][:-1], (golden, place)
            row["alone"] = own
    if with_calls and any("alone" in row for row in seen["rows"]):
        del seen["calls"]  # the rows of the last rounds of a batch are not compared
    fp32 = all(same(_bare(seen), observe(other, golden, "calls" in seen)) for other in others(golden["model"]))
    return golden | seen | {"fp32": fp32}


def _bare(seen: Golden) -> Golden:
    """Without the results of rows alone."""
    rows = [{name: value for name, value in row.items() if name != "alone"} for row in seen["rows"]]
    return seen | {"rows": rows}


def record(part: Part) -> list[Golden]:
    """The goldens of a part."""
    rng = random.Random(part.seed)
    goldens: list[Golden] = []
    for number in range(part.alone + part.batches):
        batch = number >= part.alone
        mode = rng.choice(part.modes)
        golden = random_request(rng, mode, rng.randint(2, 8) if batch else 1, names=part.names)
        with_calls = mode in ("diffusion", "verified") and not depends_on_timing(golden) and rng.random() < 0.5
        goldens.append(complete(golden, with_calls))
        if number % 20 == 0:
            print(number, flush=True)
    return goldens


def main() -> None:
    write([golden for part in PARTS for golden in record(part)])


def write(goldens: list[Golden]) -> None:
    """Writes the file; equal goldens give equal bytes."""
    FILE.parent.mkdir(exist_ok=True)
    with open(FILE, "wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=9, mtime=0, filename="") as file:
        for golden in goldens:
            file.write((json.dumps(golden, separators=(",", ":")) + "\n").encode())
    describe(goldens)


def describe(goldens: list[Golden]) -> None:
    """A summary of goldens."""
    rows = [(golden, row) for golden in goldens for row in golden["rows"]]
    print(f"{len(goldens)} requests, {sum(len(g['rows']) > 1 for g in goldens)} of them batches, {len(rows)} rows")
    print("modes", dict(Counter(g["params"]["mode"] for g in goldens)))
    print("models", dict(Counter(g["model"] for g in goldens)))
    print("ends", dict(Counter(row["end"] for _, row in rows)))
    print("policies", dict(Counter(str(g["params"].get("policy", "default"))[:12] for g in goldens)))
    drafts = [row["drafts"] for g, row in rows if "drafts" in row and row["drafts"][0]]
    print("drafts", sum(d[0] for d in drafts), "drafted", sum(d[1] for d in drafts), "kept", sum(d[2] for d in drafts))
    print("fp32 near ties", sum(not g["fp32"] for g in goldens), "with calls", sum("calls" in g for g in goldens))
    print("rows whose last round differs alone", sum("alone" in row for _, row in rows))
    print("bytes", FILE.stat().st_size)


if __name__ == "__main__":
    main()
