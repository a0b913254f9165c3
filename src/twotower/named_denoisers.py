"""Several denoisers over one context tower: the fields `denoisers` and `denoiser_for` of a config.json, validated.

`denoisers` has the choices of each denoiser by name: the fields of `DenoiserConfig`, and the block size that it was
trained with. `denoiser_for` names the denoiser of each mode, for requests that name none. Such a checkpoint has a
`format` of its own, so that a reader that knows one denoiser refuses it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from twotower.denoiser_fields import NAMES, SEVERAL, DenoiserConfig, check_format
from twotower.errors import ArgumentError, ConfigError
from twotower.json_text import JsonObject

FORMAT = 2  # of checkpoints with several denoisers
MODES_WITH_DENOISER = ("diffusion", "verified", "mock_ar")
AUTO = "auto"  # if it has no entry: the denoiser of verified
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_CHOICES = tuple(field.name for field in dataclasses.fields(DenoiserConfig))


@dataclass(frozen=True)
class NamedDenoiser:
    """A denoiser of several. block_size: the one that it was trained with; None: not known."""

    choices: DenoiserConfig
    block_size: int | None = None

    def to_json(self) -> JsonObject:
        """The value of its name in `denoisers`."""
        values = self.choices.to_json()
        values.pop("format", None)
        return values if self.block_size is None else values | {"block_size": self.block_size}


@dataclass(frozen=True)
class NamedDenoisers:
    """At least two denoisers by name, in the order of their names, and the name of the one of each mode."""

    by_name: Mapping[str, NamedDenoiser]
    for_mode: Mapping[str, str]

    @classmethod
    def of(cls, fields: Mapping[str, object]) -> NamedDenoisers | None:
        """The fields of a config.json; None if there is no `denoisers`.

        Raises:
            ConfigError: a value is not allowed; the message names the field, the value and the remedy.
        """
        check_format(fields.get("format"), FORMAT)
        given, modes = (fields.get(name) for name in SEVERAL)
        if given is None:
            for name, there in (
                ("denoiser_for", modes is not None),
                (f"format {FORMAT}", fields.get("format") == FORMAT),
            ):
                if there:
                    raise ConfigError(f"config: {name} needs denoisers, which are missing; remove {name.split()[0]}")
            return None
        if not isinstance(given, dict) or len(given) < 2:
            raise ConfigError(
                f"config: denoisers is {given!r}; it must be an object with the choices of at least two denoisers by "
                'name, such as {"drafter": {"prediction_shift": 1}, "writer": {}}'
            )
        if fields.get("format") not in (None, FORMAT):
            raise ConfigError(f"config: format is {fields['format']!r}; a config with denoisers has format {FORMAT}")
        for name in _CHOICES:
            if fields.get(name) is not None:
                raise ConfigError(f"config: {name} stands beside denoisers; move it to the denoiser that it describes")
        return cls.named({name: _denoiser(name, given[name]) for name in given}, modes)

    @classmethod
    def named(cls, denoisers: Mapping[str, NamedDenoiser], modes: object) -> NamedDenoisers:
        """Denoisers by name. modes: the value of `denoiser_for`.

        Raises:
            ConfigError: a name is not allowed, or a mode has no denoiser or an unknown one.
        """
        for name in denoisers:
            check_name(name)
        found = dict(sorted(denoisers.items()))
        return cls(found, _for_mode(modes, list(found)))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.by_name)

    def items(self) -> Iterator[tuple[str, NamedDenoiser]]:
        """Names and denoisers, in the order of the names."""
        yield from self.by_name.items()

    def of_mode(self, mode: str) -> str:
        """The name of the denoiser of a mode that uses one."""
        return self.for_mode.get(mode) or self.for_mode["verified"]

    def modes_of(self, name: str) -> list[str]:
        """The modes whose denoiser has this name."""
        return [mode for mode in (*MODES_WITH_DENOISER, AUTO) if self.of_mode(mode) == name]

    def check_known(self, name: object, param: str = "denoiser") -> str:
        """The name itself.

        Raises:
            ArgumentError: there is no such denoiser; the message lists the names.
        """
        if not isinstance(name, str) or name not in self.by_name:
            raise ArgumentError(
                f"denoiser is {name!r}; this model has the denoisers {words(self.names)}, so name one of them",
                param=param,
            )
        return name

    def ambiguous(self, source: str = "MODEL") -> ConfigError:
        """The error of code that needs one denoiser, and has several. source: the checkpoint."""
        first = self.names[0]
        return ConfigError(
            f"the model has the denoisers {words(self.names)}, and one is needed; name it (denoiser={first!r}), or "
            f"write it alone: twotower export {source} --to denoiser --denoiser {first} -o DIR"
        )

    def to_json(self) -> JsonObject:
        """The fields for a config.json, with the format."""
        named = {name: each.to_json() for name, each in self.items()}
        return {"denoisers": named, "denoiser_for": dict(self.for_mode), "format": FORMAT}


def check_name(name: object) -> None:
    """Raises ConfigError if a denoiser cannot have this name."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"config: denoisers has the name {name!r}; a name has 1 to 64 letters, digits, _ or -, and begins with a "
            "letter or a digit"
        )


def words(names: tuple[str, ...]) -> str:
    """Names as a list in words: a, b and c."""
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _denoiser(name: object, value: object) -> NamedDenoiser:
    check_name(name)
    where = f"config: denoisers.{name}"
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is {value!r}; it must be an object with the choices of a denoiser, such as {{}}")
    if unknown := sorted(value.keys() - {*_CHOICES, "block_size"}):
        known = ", ".join((*_CHOICES, "block_size"))
        raise ConfigError(f"{where} has {unknown[0]!r}; the fields of a denoiser are {known}")
    size = value.get("block_size")
    if size is not None and (type(size) is not int or size < 1):
        raise ConfigError(f"{where}.block_size is {size!r}; it must be a positive integer")
    try:
        return NamedDenoiser(DenoiserConfig.of({key: value[key] for key in NAMES if key in value}), size)
    except ConfigError as error:
        raise ConfigError(f"{where}: {str(error).removeprefix('config: ')}") from None


def _for_mode(modes: object, names: list[str]) -> dict[str, str]:
    known = (*MODES_WITH_DENOISER, AUTO)
    if not isinstance(modes, dict):
        raise ConfigError(
            f"config: denoiser_for is {modes!r}; it must be an object with the name of a denoiser for each of "
            f"{', '.join(MODES_WITH_DENOISER)}"
        )
    if unknown := sorted(modes.keys() - set(known)):
        raise ConfigError(f"config: denoiser_for has {unknown[0]!r}; the modes with a denoiser are {', '.join(known)}")
    for mode in MODES_WITH_DENOISER:
        if mode not in modes:
            raise ConfigError(f"config: denoiser_for has no {mode}; add the name of its denoiser")
    for mode, name in modes.items():
        if name not in names:
            raise ConfigError(
                f"config: denoiser_for.{mode} is {name!r}; it must be one of the denoisers {', '.join(names)}"
            )
    return {mode: modes[mode] for mode in known if mode in modes}
