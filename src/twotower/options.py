"""Environment variables and process-wide switches in one typed object.

`current()` reads the environment once, when an option is first needed, and returns the same object from then on.
`override(triton=False)` changes options for the duration of a `with` block. Every other module asks `current()`;
none of them reads `os.environ`. The fields of `Options` are the table of all variables; `table_rows()` returns the
table as text.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from twotower.errors import ArgumentError


@dataclass(frozen=True, kw_only=True)
class Kind:
    """The type of a variable. allowed: the values, in words. parse: text → value; raises ValueError.

    fits: whether a value given in Python is allowed.
    """

    allowed: str
    parse: Callable[[str], object]
    fits: Callable[[object], bool]


@dataclass(frozen=True, kw_only=True)
class Variable:
    """The environment variable of one field. default: in words, if the default is None or empty."""

    name: str
    kind: Kind
    text: str
    default: str | None = None


def _one_of(values: Mapping[str, object]) -> Callable[[str], object]:
    def parse(text: str) -> object:
        if text not in values:
            raise ValueError(text)
        return values[text]

    return parse


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _choice(names: tuple[str, ...]) -> Kind:
    parse = _one_of(dict(zip(names, names, strict=True)))
    return Kind(allowed=", ".join(names), parse=parse, fits=lambda value: value in names)


TRAINING_ATTENTION = ("grouped", "padded", "stacked", "repeated")
CPU_TARGETS = ("native", "avx512_bf16", "avx512", "avx2", "none")
SWITCH = Kind(allowed="0 or 1", parse=_one_of({"0": False, "1": True}), fits=lambda value: isinstance(value, bool))
COUNT = Kind(
    allowed="a number of at least 0",
    parse=lambda text: range(1 << 62).index(int(text)),  # raises ValueError below 0
    fits=lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
)
TARGET, FORM = _choice(CPU_TARGETS), _choice(TRAINING_ATTENTION)
COMMAND = Kind(
    allowed="a command or a path",
    parse=str,
    fits=lambda value: value is None or (isinstance(value, str) and value != ""),
)
FOLDER = Kind(allowed="a folder", parse=Path, fits=lambda value: value is None or isinstance(value, Path))
SECRETS = Kind(
    allowed="keys, separated by commas",
    parse=_names,
    fits=lambda value: isinstance(value, tuple) and all(isinstance(key, str) and key for key in value),
)
# Triton's own variable: Triton accepts three spellings; every other value means off.
TRITON_SWITCH = Kind(
    allowed="1, true or on; every other value means 0",
    parse=lambda text: text.lower() in ("1", "true", "on"),
    fits=lambda value: isinstance(value, bool),
)


def _variable(name: str, kind: Kind, text: str, default: str | None = None) -> dict[str, Variable]:
    """The metadata of a field of `Options`."""
    return {"variable": Variable(name=name, kind=kind, text=text, default=default)}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Every environment variable that this package reads, with its default.

    Raises:
        ArgumentError: a value that its field does not allow.
    """

    triton: bool = field(
        default=True,
        metadata=_variable(
            "TWOTOWER_TRITON", SWITCH, "Whether the Triton kernels may be used; they need CUDA and the triton package."
        ),
    )
    native: bool = field(
        default=True,
        metadata=_variable("TWOTOWER_NATIVE", SWITCH, "Whether the C++ kernels may be compiled and used on the CPU."),
    )
    cpu_target: str = field(
        default="native",
        metadata=_variable("TWOTOWER_CPU_TARGET", TARGET, "The instruction set that the C++ kernels are compiled for."),
    )
    graphs: bool = field(
        default=True,
        metadata=_variable(
            "TWOTOWER_GRAPHS", SWITCH, "Whether passes on a CUDA device are captured and replayed as CUDA graphs."
        ),
    )
    graph_steps: bool = field(
        default=False,
        metadata=_variable("TWOTOWER_GRAPH_STEPS", SWITCH, "Whether a greedy AR step on CUDA is one CUDA graph."),
    )
    grouped_pairs: int = field(
        default=0,
        metadata=_variable("TWOTOWER_GROUPED_PAIRS", COUNT, "From how many pairs experts in bf16 take grouped GEMM."),
    )
    training_attention: str = field(
        default="grouped",
        metadata=_variable(
            "TWOTOWER_TRAINING_ATTENTION",
            FORM,
            "How training calls torch's attention, which decides its kernel on a GPU; see `docs/training.md`.",
        ),
    )
    training_compile: bool = field(
        default=False,
        metadata=_variable(
            "TWOTOWER_TRAINING_COMPILE", SWITCH, "Whether training compiles Mamba-2 layers with `torch.compile`."
        ),
    )
    pack: bool = field(
        default=True,
        metadata=_variable(
            "TWOTOWER_PACK", SWITCH, "Whether loading a model on the CPU packs a second copy of its weights for speed."
        ),
    )
    data_dir: Path | None = field(
        default=None,
        metadata=_variable(
            "TWOTOWER_DATA",
            FOLDER,
            "The folder from which `twotower eval --task` reads data sets.",
            "the Hugging Face hub",
        ),
    )
    api_keys: tuple[str, ...] = field(
        default=(),
        repr=False,
        metadata=_variable(
            "TWOTOWER_API_KEYS",
            SECRETS,
            "API keys that `twotower serve` accepts, beside those of `--api-keys`.",
            "no key is required",
        ),
    )
    cxx: str | None = field(
        default=None,
        metadata=_variable("CXX", COMMAND, "The compiler of the C++ kernels; it is tried first.", "c++, g++, clang++"),
    )
    cache_home: Path | None = field(
        default=None,
        metadata=_variable(
            "XDG_CACHE_HOME", FOLDER, "The folder in which `twotower/` keeps the compiled C++ kernels.", "~/.cache"
        ),
    )
    triton_interpret: bool = field(
        default=False,
        metadata=_variable(
            "TRITON_INTERPRET",
            TRITON_SWITCH,
            "Triton's own variable: its interpreter runs Triton kernels on the CPU, slowly; for tests.",
        ),
    )

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            value, kind = getattr(self, one.name), variable_of(one).kind
            if not kind.fits(value):
                raise ArgumentError(f"option {one.name} is {value!r}; its type is {one.type}, give {kind.allowed}")

    @property
    def cache_dir(self) -> Path:
        """The cache folder of this package.

        Raises:
            OSError: the user has no home folder.
        """
        try:
            return (self.cache_home or Path.home() / ".cache") / "twotower"
        except RuntimeError as error:
            raise OSError(f"{error} Set XDG_CACHE_HOME.") from None

    @cached_property
    def kernels_key(self) -> str:
        """The key for caches that depend on the selected kernels. A string, because strings cache their hash."""
        kernels = self.triton, self.native, self.cpu_target, self.triton_interpret, self.grouped_pairs
        parts = (*kernels, self.cxx, self.cache_home)
        return repr(tuple(map(str, parts)))


def variable_of(one: dataclasses.Field[Any]) -> Variable:
    """The environment variable of a field of `Options`."""
    variable = one.metadata["variable"]
    assert isinstance(variable, Variable)
    return variable


def from_environment(environment: Mapping[str, str]) -> Options:
    """The options of an environment. An empty value counts as an unset variable.

    Raises:
        ArgumentError: a variable has a value that is not allowed.
    """
    given: dict[str, Any] = {}
    for one in dataclasses.fields(Options):
        variable = variable_of(one)
        text = environment.get(variable.name, "")
        if not text:
            continue
        try:
            given[one.name] = variable.kind.parse(text)
        except ValueError:
            message = f"environment variable {variable.name} is {text!r}; set it to {variable.kind.allowed}"
            raise ArgumentError(message) from None
    return Options(**given)


def set_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of this package that an environment sets, for a worker on another machine; secrets are left out."""
    known = [variable_of(one) for one in dataclasses.fields(Options)]
    names = [each.name for each in known if each.name.startswith("TWOTOWER_") and each.kind is not SECRETS]
    return {name: environment[name] for name in names if environment.get(name)}


# --- the options of this process --------------------------------------------------------------------------------------


class _Process:
    """The options of this process, for all threads.

    A `ContextVar` does not work: engines, servers and data loaders compute in threads that would not see the variable.

    changes: of the open `override` blocks, in order of opening. The end of a block removes only its own entry, so
    blocks of several threads may overlap in any order.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.base: Options | None = None
        self.changes: list[dict[str, Any]] = []
        self.current: Options | None = None

    def update(self) -> Options:
        """Computes `current` from the environment, read at the first call, and the changes."""
        with self.lock:
            if self.base is None:
                self.base = from_environment(os.environ)
            found = self.base
            for change in self.changes:
                found = dataclasses.replace(found, **change)
            self.current = found
            return found


_process = _Process()


def current() -> Options:
    """The current options. The first call reads the environment.

    Raises:
        ArgumentError: a variable has a value that is not allowed.
    """
    return _process.current or _process.update()


@contextmanager
def override(**changes: Any) -> Iterator[Options]:
    """Options with some fields changed, in all threads of the process, until the `with` block ends.

    Begin and end a block while no other thread computes: a pass must not mix kernels of two sets of options. Processes
    that are started within the block read the environment.

    Raises:
        ArgumentError: no such option, or a value that is not allowed.
    """
    known = [one.name for one in dataclasses.fields(Options)]
    for name in changes:
        if name not in known:
            raise ArgumentError(f"there is no option {name!r}; choose one of {', '.join(known)}")
    dataclasses.replace(current(), **changes)  # raises before anything changes
    own = dict(changes)
    with _process.lock:
        _process.changes.append(own)
        found = _process.update()
    try:
        yield found
    finally:
        with _process.lock:
            _process.changes = [change for change in _process.changes if change is not own]
            _process.update()


# --- the table --------------------------------------------------------------------------------------------------------


class TableRow(NamedTuple):
    """One line of the table of variables, as text."""

    variable: str
    option: str
    type: str
    default: str
    allowed: str
    text: str


def table_rows() -> list[TableRow]:
    """All variables with option, type, default, allowed values and meaning."""
    out = []
    for one in dataclasses.fields(Options):
        variable = variable_of(one)
        default = one.default
        shown = variable.default or (str(int(default)) if isinstance(default, bool) else str(default))
        out.append(TableRow(variable.name, one.name, str(one.type), shown, variable.kind.allowed, variable.text))
    return out
