"""Quantization plans as text: which part gets which scheme, the shortest text of a plan, errors in one line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from command import Result

from twotower.errors import ArgumentError
from twotower.quantization import PARTS, SCHEMES, Part, QuantizationPlan, text_of


def schemes(text: str) -> list[str]:
    """Of experts, projections and heads of the context tower, then of the denoiser."""
    plan = QuantizationPlan.parse(text)
    return [plan.schemes[part] for part in PARTS]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", ["none"] * 6),
        ("int8", ["int8"] * 6),
        ("int4", ["int4", "int4", "int8"] * 2),
        ("experts=int4,rest=int8", ["int4", "int8", "int8"] * 2),
        ("experts=int4", ["int4", "none", "none"] * 2),
        ("heads=none, rest=int4", ["int4", "int4", "none"] * 2),
        ("denoiser=int4,context=int8", ["int8"] * 3 + ["int4", "int4", "int8"]),
        ("denoiser.experts=int4,experts=int8", ["int8", "none", "none", "int4", "none", "none"]),
        ("context.heads=none,context=int8", ["int8", "int8", "none"] + ["none"] * 3),
    ],
)
def test_the_first_pair_that_fits_counts(text: str, expected: list[str]) -> None:
    assert schemes(text) == expected


@pytest.mark.parametrize(
    ("text", "shortest"),
    [
        ("experts=int4,projections=int4,heads=int8", "int4"),
        ("rest=none", "none"),
        ("experts=int4,rest=none", "experts=int4"),
        ("context=int4", "context=int4"),
        ("denoiser=int4,context=int8", "context=int8,denoiser=int4"),
        ("projections=int8,rest=int4", "experts=int4,rest=int8"),
        ("heads=none,rest=int4", "experts=int4,heads=none,rest=int4"),
        ("context.experts=int4,context=int8", "context.experts=int4,context=int8"),
    ],
)
def test_the_text_of_a_plan_is_short_and_means_the_plan(text: str, shortest: str) -> None:
    plan = QuantizationPlan.parse(text)
    assert str(plan) == shortest
    assert schemes(shortest) == schemes(text)


@pytest.mark.parametrize(
    ("text", "shortest"),
    [
        ("int8,activations=int8", "int8,activations=int8"),
        ("activations = int8, int4", "int4,activations=int8"),
        ("experts=int4,activations=int8,rest=int8", "experts=int4,rest=int8,activations=int8"),
    ],
)
def test_activations_stand_beside_schemes(text: str, shortest: str) -> None:
    plan = QuantizationPlan.parse(text)
    assert plan.int8_activations
    assert str(plan) == shortest
    assert QuantizationPlan.parse(shortest) == plan
    assert not QuantizationPlan.parse("int8").int8_activations


def test_every_plan_has_a_text() -> None:
    """Also those of models without experts, and of a context tower alone."""
    for first in SCHEMES:
        for second in SCHEMES:
            found = {Part("context", "experts"): first, Part("denoiser", "projections"): second}
            meant = QuantizationPlan.parse(text_of(found)).schemes
            assert {part: meant[part] for part in found} == found
    every = dict(zip(PARTS, ["int4", "int8", "none", "none", "int4", "int8"], strict=True))
    assert QuantizationPlan.parse(text_of(every)).schemes == every
    assert text_of({}) == "none"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int3", "'int3' in 'int3' is not valid; give a scheme"),
        ("", "'' in '' is not valid"),
        ("experts=int3", "'experts=int3' in"),
        ("expert=int4", "'expert=int4' in"),
        ("experts=int4,", "'' in"),
        ("experts.context=int4", "'experts.context=int4' in"),
        ("rest=int8,experts=int4", "'experts=int4' in 'rest=int8,experts=int4' has no effect; put it first"),
        (
            "activations=int8",
            "'activations=int8' needs weights in 8 or 4 bits; add a scheme, such as int8,activations=",
        ),
        ("none,activations=int8", "needs weights in 8 or 4 bits"),
        ("experts=none,activations=int8", "needs weights in 8 or 4 bits"),
        ("int8,activations=int4", "'int8' in 'int8,activations=int4' is not valid"),
        ("activations=int8,int4,activations=int8", "has activations=int8 2 times; give it once"),
        ("heads=int4", "heads have at least 8 bits; give int8"),
        ("context=int8,heads=int4", "heads have at least 8 bits; give int8"),
    ],
)
def test_errors_name_the_pair_and_the_remedy(text: str, message: str, cli: Callable[..., Result]) -> None:
    with pytest.raises(ArgumentError) as error:
        QuantizationPlan.parse(text)
    assert message in str(error.value)
    result = cli("generate", "x", "--quantization", text)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert len(result.err.strip().splitlines()) == 1
