"""Quantization plans: which parts of which tower are in 8 or 4 bits, as text such as `experts=int4,rest=int8`.

A plan also says whether products of quantised weights round their activations to int8: `int4,activations=int8`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple, get_args

from twotower.errors import ArgumentError

Scheme = Literal["none", "int8", "int4"]
TowerName = Literal["context", "denoiser"]
# experts: routed and shared. projections: all other products of layers. heads: also the gates of shared experts.
Kind = Literal["experts", "projections", "heads"]

SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
TOWERS: tuple[TowerName, ...] = get_args(TowerName)
KINDS: tuple[Kind, ...] = get_args(Kind)
REST = "rest"
INT8_ACTIVATIONS = "activations=int8"


class Part(NamedTuple):
    """The large weights of one kind in one tower."""

    tower: TowerName
    kind: Kind


PARTS = tuple(Part(tower, kind) for tower in TOWERS for kind in KINDS)
NAMES = (*KINDS, *TOWERS, *(f"{part.tower}.{part.kind}" for part in PARTS), REST)
GRAMMAR = (
    f"a scheme ({', '.join(SCHEMES)}) or PART=SCHEME pairs with commas, of which the first that fits counts; "
    f"PART is {', '.join(KINDS)}, {' or '.join(TOWERS)}, both such as context.experts, or {REST}. "
    f"{INT8_ACTIVATIONS} beside them rounds activations too"
)


@dataclass(frozen=True)
class QuantizationPlan:
    """The scheme of each part. Heads have at least 8 bits: a plan of 4 bits gives them 8.

    int8_activations: whether products of quantised weights round their activations to int8, with a scale a token.
    """

    schemes: Mapping[Part, Scheme]
    int8_activations: bool = False

    @classmethod
    def parse(cls, text: str) -> QuantizationPlan:
        """A plan from text: a scheme for all parts, or pairs. Parts that no pair names stay as they are.

        Raises:
            ArgumentError: the text is not a plan, or a pair of it has no effect.
        """
        pairs = text.split(",")
        others = [pair for pair in pairs if re.sub(r"\s", "", pair) != INT8_ACTIVATIONS]
        rounds = len(pairs) - len(others)
        uniform = _scheme(others[0].strip()) if len(others) == 1 else None
        schemes = _with(PARTS, uniform) if uniform is not None else cls._of_pairs(others, text)
        if rounds and not set(schemes.values()) - {"none"}:
            raise ArgumentError(
                f"quantization: {INT8_ACTIVATIONS} in {text!r} needs weights in 8 or 4 bits; add a scheme, such as "
                f"int8,{INT8_ACTIVATIONS}"
            )
        if rounds > 1:
            raise ArgumentError(f"quantization: {text!r} has {INT8_ACTIVATIONS} {rounds} times; give it once")
        return cls(schemes, bool(rounds))

    @staticmethod
    def _of_pairs(pairs: Iterable[str], text: str) -> dict[Part, Scheme]:
        """The schemes of PART=SCHEME pairs. text: the whole plan, for errors."""
        schemes: dict[Part, Scheme] = {}
        for pair in pairs:
            name, _, value = (word.strip() for word in pair.partition("="))
            scheme = _scheme(value)
            if name not in NAMES or scheme is None:
                raise ArgumentError(f"quantization: {pair!r} in {text!r} is not valid; give {GRAMMAR}")
            new = [part for part in PARTS if part not in schemes and _fits(name, part)]
            if not new:
                raise ArgumentError(f"quantization: {pair!r} in {text!r} has no effect; put it first, or leave it out")
            if scheme == "int4" and all(part.kind == "heads" for part in new):
                raise ArgumentError(f"quantization: {pair!r} in {text!r}: heads have at least 8 bits; give int8")
            schemes |= _with(new, scheme)
        return _with(PARTS, "none") | schemes

    def scheme(self, tower: TowerName, kind: Kind) -> Scheme:
        """The scheme of a part."""
        return self.schemes[Part(tower, kind)]

    def __str__(self) -> str:
        return text_of(self.schemes, self.int8_activations)


def text_of(schemes: Mapping[Part, Scheme], int8_activations: bool = False) -> str:
    """The shortest plan with these schemes; a part that a model lacks has none and may have any."""
    return f"{_shortest(schemes)},{INT8_ACTIVATIONS}" if int8_activations else _shortest(schemes)


def _shortest(schemes: Mapping[Part, Scheme]) -> str:
    for text in _texts(schemes):
        named = [pair for pair in text.split(",") if not pair.endswith("=none")]  # what no pair names stays as it is
        for shortest in filter(None, (",".join(named), text)):
            if _agrees(shortest, schemes):
                return shortest
    raise AssertionError(schemes)  # the last text has all of them


def _texts(schemes: Mapping[Part, Scheme]) -> Iterator[str]:
    """Plans from short to long; the last one names every part."""
    yield from SCHEMES
    yield from (f"{kind}={scheme}" for kind in ("experts", "projections") for scheme in SCHEMES)
    yield from (f"{a}={first},{b}={second}" for a, b in [TOWERS] for first, second in product(SCHEMES, SCHEMES))
    yield from (f"experts={first},rest={second}" for first, second in product(SCHEMES, SCHEMES))
    for first, heads, second in product(SCHEMES, SCHEMES[:2], SCHEMES):
        yield f"experts={first},heads={heads},rest={second}"
    for each in product(SCHEMES, repeat=4):
        names = (f"{tower}{kind}" for tower in TOWERS for kind in (".experts", ""))
        yield ",".join(f"{name}={scheme}" for name, scheme in zip(names, each, strict=True))
    yield ",".join(f"{part.tower}.{part.kind}={scheme}" for part, scheme in schemes.items())


def _agrees(text: str, schemes: Mapping[Part, Scheme]) -> bool:
    meant = QuantizationPlan.parse(text).schemes
    return all(meant[part] == scheme for part, scheme in schemes.items())


def _scheme(text: str) -> Scheme | None:
    return next((scheme for scheme in SCHEMES if scheme == text), None)


def _with(parts: Iterable[Part], scheme: Scheme) -> dict[Part, Scheme]:
    heads: Scheme = "int8" if scheme == "int4" else scheme
    return {part: heads if part.kind == "heads" else scheme for part in parts}


def _fits(name: str, part: Part) -> bool:
    return name in (REST, part.tower, part.kind, f"{part.tower}.{part.kind}")
