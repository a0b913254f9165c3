"""The shape of a denoiser tower: which layers it has, and what stands in the place of its MoE layers.

Both are values of config.json (`denoiser_layers`, `denoiser_feed_forward`) and text of `twotower init`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from twotower.errors import ArgumentError, ConfigError

FeedForwardKind = Literal["experts", "dense"]
FEED_FORWARDS: tuple[FeedForwardKind, ...] = get_args(FeedForwardKind)
LAYERS_GRAMMAR = (
    "every:N (layers 0, N, 2N, …), first:N, last:N, numbers and ranges such as 0,4,8-11, or several of these with +"
)
_RULE = re.compile(r"(every|first|last):(\d+)")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class FeedForward:
    """What stands in the place of the denoiser's MoE layers.

    kind "experts": its `size` most used experts, with the router's rows of these. "dense": an MLP of width `size`.
    """

    kind: FeedForwardKind
    size: int

    @classmethod
    def of(cls, value: object) -> FeedForward:
        """The value of `denoiser_feed_forward` in config.json.

        Raises:
            ConfigError: it is not an object with a kind and a size.
        """
        if isinstance(value, dict) and value.keys() == {"kind", "size"}:
            kind, size = value["kind"], value["size"]
            if kind in FEED_FORWARDS and type(size) is int and size >= 1:
                return cls(kind, size)
        raise ConfigError(
            f'config: denoiser_feed_forward is {value!r}; it must be an object such as {{"kind": "experts", "size": 8}}'
            ' or {"kind": "dense", "size": 1024}'
        )

    @classmethod
    def parse(cls, text: str) -> FeedForward:
        """Text such as `experts:8` or `dense:1024`.

        Raises:
            ArgumentError: it is not of this form.
        """
        kind, _, size = text.partition(":")
        for known in FEED_FORWARDS:
            if kind == known and size.isdecimal() and int(size) >= 1:
                return cls(known, int(size))
        raise ArgumentError(
            f"denoiser_feed_forward is {text!r}; give experts:K, the number of experts to keep, or dense:WIDTH",
            param="denoiser_feed_forward",
        )

    def __str__(self) -> str:
        return f"{self.kind}:{self.size}"


def layers_of(value: object) -> tuple[int, ...]:
    """The value of `denoiser_layers` in config.json: numbers of the autoregressive model's layers.

    Raises:
        ConfigError: it is not a list of increasing numbers.
    """
    if not isinstance(value, list | tuple) or not value or not all(type(number) is int for number in value):
        raise ConfigError(f"config: denoiser_layers is {value!r}; it must be a list of numbers, such as [0, 4, 8]")
    numbers: tuple[int, ...] = tuple(value)
    wrong = next((pair for pair in pairwise(numbers) if pair[0] >= pair[1]), None)
    if wrong is not None:
        raise ConfigError(f"config: denoiser_layers has {wrong[1]} after {wrong[0]}; the numbers must increase")
    if numbers[0] < 0:
        raise ConfigError(f"config: denoiser_layers has {numbers[0]}; layers are numbered from 0")
    return numbers


def parse_layers(text: str, count: int) -> tuple[int, ...]:
    """The layers that a text names, of an autoregressive model of `count` layers; see `LAYERS_GRAMMAR`.

    Raises:
        ArgumentError: it is not of this form, names a layer that the model lacks, or lists layers in another order.
    """
    found: set[int] = set()
    for part in text.split("+"):
        rule = _RULE.fullmatch(part.strip())
        if rule is None:
            found |= set(_listed(text, part, count))
            continue
        size = int(rule[2])
        if size < 1:
            raise _error(text, f"{part.strip()} names no layer")
        rules = {"every": range(0, count, size), "first": range(size), "last": range(count - size, count)}
        chosen = rules[rule[1]]
        if chosen and (chosen[0] < 0 or chosen[-1] >= count):
            raise _error(text, f"the model has {count} layers")
        found |= set(chosen)
    return tuple(sorted(found))


def _listed(text: str, part: str, count: int) -> Iterator[int]:
    last = -1
    for item in part.split(","):
        match = _RANGE.fullmatch(item.strip())
        if match is None:
            raise _error(text, f"give {LAYERS_GRAMMAR}")
        first, end = int(match[1]), int(match[2] or match[1])
        if first <= last or end < first:
            raise _error(text, f"{item.strip()} does not come after {last}" if first <= last else f"{item} is empty")
        if end >= count:
            raise _error(text, f"the model has layers 0 to {count - 1}")
        yield from range(first, end + 1)
        last = end


def _error(text: str, reason: str) -> ArgumentError:
    return ArgumentError(f"denoiser_layers is {text!r}: {reason}", param="denoiser_layers")
