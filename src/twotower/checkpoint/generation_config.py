"""`generation_config.json`: the EOS token ids and the sampling defaults that the makers of a checkpoint recommend."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from twotower.config import read_object
from twotower.errors import ConfigError

FILE = "generation_config.json"
# Keys that describe the file or the model, or that are read elsewhere.
_NOT_SAMPLING = {
    "_from_model_config",
    "bos_token_id",
    "cache_implementation",
    "decoder_start_token_id",
    "do_sample",
    "eos_token_id",
    "pad_token_id",
    "transformers_version",
    "use_cache",
}
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_WITHOUT_EFFECT: tuple[object, ...] = (None, False, 0, 1, "", [])  # values that switch an unsupported setting off


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """The contents of a `generation_config.json`; empty if there is none.

    values: the keys of the file, unchanged. eos_token_id: None if the file has no EOS token. file: None without a file.
    """

    values: Mapping[str, object] = field(default_factory=dict)
    eos_token_id: tuple[int, ...] | None = None
    file: Path | None = None

    @classmethod
    def read(cls, path: Path, vocab_size: int) -> GenerationDefaults:
        """Reads the file, or that of a checkpoint directory. A directory without the file gives empty defaults.

        Raises:
            ConfigError: the file is not a JSON object, or `eos_token_id` is no token id of the vocabulary.
        """
        file = path / FILE if path.is_dir() else path
        if path.is_dir() and not file.exists():
            return cls()
        values = read_object(file, f"give a {FILE} or its directory")
        return cls(values=values, eos_token_id=_eos(file, values.get("eos_token_id"), vocab_size), file=file)

    def eos_or(self, eos: int | Sequence[int] | None) -> int | Sequence[int] | None:
        """The EOS token ids of the file, else the given ones, which `config.json` has."""
        return eos if self.eos_token_id is None else self.eos_token_id

    def sampling(self) -> dict[str, object]:
        """The values of `_SAMPLING` in the file, as arguments of `GenerationParams.of`.

        As in transformers, `do_sample: false` means temperature 0.

        Raises:
            ConfigError: a value is not allowed.
        """
        found = {name: self.values[name] for name in _SAMPLING if self.values.get(name) is not None}
        for name, value in found.items():
            words, allowed = _ALLOWED[name]
            if isinstance(value, bool) or not isinstance(value, int | float) or not allowed(value):
                raise ConfigError(f"{self.file}: {name} is {value!r}; it must be {words}")
        if self.values.get("do_sample") is False:
            return {"temperature": 0.0} | {k: v for k, v in found.items() if k == "repetition_penalty"}
        if found.get("top_k") == 0:
            found["top_k"] = None
        return found

    def unused(self) -> list[str]:
        """Keys of the file that would change the text in transformers and have no effect here."""
        others = {name: value for name, value in self.values.items() if name not in {*_NOT_SAMPLING, *_SAMPLING}}
        return sorted(name for name, value in others.items() if value not in _WITHOUT_EFFECT)

    def override(self, given: GenerationDefaults) -> GenerationDefaults:
        """The given defaults, with the EOS token ids of this file if the given ones have none."""
        return given if given.eos_token_id is not None else replace(given, eos_token_id=self.eos_token_id)

    def text(self) -> str:
        """The file's text, to be written beside saved weights."""
        return json.dumps(dict(self.values), indent=2, sort_keys=True) + "\n"


_ALLOWED: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("a finite number of at least 0", lambda value: 0 <= value < math.inf),
    "top_p": ("a number above 0 and at most 1", lambda value: 0 < value <= 1),
    "min_p": ("a number from 0 to 1", lambda value: 0 <= value <= 1),
    "repetition_penalty": ("a number from 0.01 to 100", lambda value: 0.01 <= value <= 100),
    "top_k": ("a whole number of at least 0", lambda value: isinstance(value, int) and value >= 0),
}


def _eos(file: Path, value: object, vocab_size: int) -> tuple[int, ...] | None:
    if value is None or value == []:
        return None
    ids = value if isinstance(value, list) else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise ConfigError(f"{file}: eos_token_id is {value!r}; it must have token ids from 0 to {vocab_size - 1}")
    return tuple(dict.fromkeys(ids))
