"""Random requests over all decoding parameters, single and in ragged batches, for goldens and oracle."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from decoding_goldens import Golden, params_of
from decoding_models import NAMES, decoding_model

from twotower import generate
from twotower.decoding.unmasking import POLICIES

POLICY_VALUES = {
    "threshold": (0.05, 0.15, 0.3, 0.6), "top-k": (1, 2, 3, 7.5), "factor": (0.7, 1.5, 1.9, 4.0),
    "entropy": (0.1, 1.0, 3.0, 9.0), "margin": (0.02, 0.1, 0.4), "klass": (0.03, 0.1, 0.3), "span": (0.05, 0.15, 0.4),
    "decay": (0.1, 0.3, 0.7),
}  # fmt: skip
LENGTHS = (1, 2, 3, 9, 20, 37, 80, 150, 300, 530)


def random_params(rng: random.Random, mode: str, rows: int, policies: Sequence[str]) -> dict[str, Any]:
    """Random parameters of a request with `rows` prompts; parameters with default values are left out."""
    asked: dict[str, Any] = {"mode": mode, "max_new_tokens": rng.choice([0, 1, 2, 7, 12, 17, 24, 24, 33, 40])}
    if rng.random() < 0.55:
        asked["temperature"] = rng.choice([0.3, 0.8, 1.0, 1.0, 1.5])
        one = rows == 1 or rng.random() < 0.3
        asked["seed"] = rng.randrange(2**40) if one else [rng.randrange(2**40) for _ in range(rows)]
        if rng.random() < 0.4:
            asked["top_k"] = rng.choice([1, 2, 5, 12, 500])
        if rng.random() < 0.4:
            asked["top_p"] = rng.choice([0.0, 0.3, 0.7, 0.95, 1.0])
    if mode in ("diffusion", "verified"):
        asked["block_size"] = rng.choice([1, 2, 5, 8, 8, 16, 16, 24])
        if rng.random() < 0.15:
            asked["mask_token_id"] = 7
        asked |= random_policies(rng, rows, mode, policies)
    if mode == "diffusion":
        asked["steps_per_block"] = rng.choice([1, 2, 3, 6, 8, 16, 30])
    if mode == "verified":
        asked["draft_steps"] = rng.choice([0, 1, 1, 2, 3, 5])
        if rng.random() < 0.35:
            asked["acceptance"] = rng.choice([0.0, 0.1, 0.3, 0.7])
        elif rng.random() < 0.12:
            del asked["draft_steps"]
    return asked


def random_policies(
    rng: random.Random, rows: int, mode: str, policies: Sequence[str] = sorted(POLICIES)
) -> dict[str, Any]:
    """A policy for all rows or one for each row, with or without a policy value."""
    if rng.random() < 0.15:
        named = mode == "diffusion" and rng.random() < 0.8
        return {"confidence_threshold": rng.choice([0.05, 0.2, 0.5])} if named else {}
    if rows == 1 or rng.random() < 0.4:
        name = rng.choice(policies)
        return {"policy": name} | ({"policy_value": rng.choice(POLICY_VALUES[name])} if rng.random() < 0.8 else {})
    names = [rng.choice(policies) for _ in range(rows)]
    return {"policy": names} | (
        {"policy_value": [rng.choice(POLICY_VALUES[name]) for name in names]} if rng.random() < 0.8 else {}
    )


def random_request(
    rng: random.Random,
    mode: str,
    rows: int,
    longest: int = 530,
    names: Sequence[str] = NAMES,
    policies: Sequence[str] = sorted(POLICIES),
) -> Golden:
    """A random request, without its result, for one of the models `names`, with prompts of up to `longest` tokens.

    Its EOS tokens and stop strings are taken from the text that it has without them.
    """
    name = rng.choice(["biased", "biased", *names] if mode == "verified" else names)
    model = decoding_model(name, torch.float64)
    words = model.spec.vocab_size
    lengths = [min(longest, rng.choice(LENGTHS[: 7 if rng.random() < 0.85 else 10])) for _ in range(rows)]
    prompts = [[rng.randrange(4, words) for _ in range(length)] for length in lengths]
    golden: Golden = {"model": name, "prompts": prompts, "params": random_params(rng, mode, rows, policies)}
    if golden["params"].get("mask_token_id") == 7:
        golden["prompts"] = [[token if token != 7 else 8 for token in ids] for ids in prompts]
    free = generate(model, golden["prompts"], params_of(golden))
    written = rng.choice(free)
    if len(written.tokens) > 2 and rng.random() < 0.45:
        eos = [rng.choice(written.tokens)] + ([rng.choice(free[0].tokens)] if rng.random() < 0.3 else [])
        golden["params"]["eos_token_id"] = eos if len(eos) > 1 or rng.random() < 0.5 else eos[0]
    if len(written.text) > 4 and rng.random() < 0.45:
        at = rng.randrange(len(written.text) // 2, len(written.text) - 1)
        stops = [written.text[at : at + rng.randint(1, 4)]] + (["never said"] if rng.random() < 0.3 else [])
        golden["params"]["stop"] = [stop for stop in stops if "\ufffd" not in stop] or ["never said"]
    return golden
