"""Quantization plans: which parts of which tower are in 8 or 4 bits, as text such as `experts=int4,rest=int8`."""

from __future__ import annotations

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


class Part(NamedTuple):
    """The large weights of one kind in one tower."""

    tower: TowerName
    kind: Kind


PARTS = tuple(Part(tower, kind) for tower in TOWERS for kind in KINDS)
NAMES = (*KINDS, *TOWERS, *(f"{part.tower}.{part.kind}" for part in PARTS), REST)
GRAMMAR = (
    f"a scheme ({', '.join(SCHEMES)}) or PART=SCHEME pairs with commas, of which the first that fits counts; "
    f"PART is {', '.join(KINDS)}, {' or '.join(TOWERS)}, both such as context.experts, or {REST}"
)


@dataclass(frozen=True)
class QuantizationPlan:
    """The scheme of each part. Heads have at least 8 bits: a plan of 4 bits gives them 8."""

    schemes: Mapping[Part, Scheme]

    @classmethod
    def parse(cls, text: str) -> QuantizationPlan:
        """A plan from text: a scheme for all parts, or pairs. Parts that no pair names stay as they are.

        Raises:
            ArgumentError: the text is not a plan, or a pair of it has no effect.
        """
        if (uniform := _scheme(text)) is not None:
            return cls(_with(PARTS, uniform))
        schemes: dict[Part, Scheme] = {}
        for pair in text.split(","):
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
        return cls(_with(PARTS, "none") | schemes)

    def scheme(self, tower: TowerName, kind: Kind) -> Scheme:
        """The scheme of a part."""
        return self.schemes[Part(tower, kind)]

    def __str__(self) -> str:
        return text_of(self.schemes)


def text_of(schemes: Mapping[Part, Scheme]) -> str:
    """The shortest plan with these schemes; a part that a model lacks has none and may have any."""
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
