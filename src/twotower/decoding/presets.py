"""Decoding settings as text, for the option `--setting` of `twotower eval` and other verbs.

ar                                    a mode
diffusion:0.8                         a mode, and the value of the default policy
diffusion:factor=1.2,block_size=32    a policy with its value, and parameters by name
verified:draft_steps=1,acceptance=0.5
verified:deterministic=true
verified:denoiser=drafter             of a model with several denoisers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from twotower.decoding.modes import REQUEST_MODES
from twotower.decoding.params import GenerationParams
from twotower.decoding.unmasking import POLICIES
from twotower.errors import ArgumentError

WHOLE = ("block_size", "steps_per_block", "draft_steps", "top_k", "seed", "min_tokens")
FLAGS = ("deterministic", "ignore_eos")
PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")
NUMBERS = ("temperature", "top_p", "min_p", "acceptance", "confidence_threshold", *PENALTIES)
NAMES = ("denoiser",)


@dataclass(frozen=True)
class Setting:
    """label: the text of the setting; values: arguments of `GenerationParams.of`, including the mode."""

    label: str
    values: dict[str, object] = field(hash=False)

    @property
    def mode(self) -> str:
        return str(self.values["mode"])

    def params(self, **shared: object) -> GenerationParams:
        """Parameters from `shared` and from this setting; this setting's values take precedence."""
        return GenerationParams.from_mapping(shared | self.values)


AR = Setting("ar", {"mode": "ar"})


def with_ar(settings: Sequence[Setting]) -> list[Setting]:
    """AR, the baseline, then the other settings."""
    return [AR, *(setting for setting in settings if setting.label != AR.label)]


def parse_setting(text: str) -> Setting:
    """Parses one setting.

    Raises:
        ArgumentError: an unknown mode, parameter or policy, or a value that is not a number.
    """
    mode, _, rest = text.partition(":")
    if mode not in REQUEST_MODES:
        raise ArgumentError(
            f"setting {text!r}: mode is {mode!r}; choose one of {', '.join(REQUEST_MODES)}", param="setting"
        )
    values: dict[str, object] = {"mode": mode}
    for part in filter(None, rest.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            name, value = "threshold", name
        if name in POLICIES:
            values |= {"policy": name, "policy_value": _number(text, part, value)}
        elif name in WHOLE:
            values[name] = int(_number(text, part, value, whole=True))
        elif name in FLAGS:
            values[name] = _flag(text, part, value)
        elif name in NAMES:
            values[name] = value
        elif name in NUMBERS:
            values[name] = _number(text, part, value)
        else:
            known = ", ".join((*WHOLE, *NUMBERS, *FLAGS, *NAMES, *POLICIES))
            raise ArgumentError(
                f"setting {text!r}: unknown parameter or policy {name!r}; known are {known}", param="setting"
            )
    setting = Setting(text, values)
    setting.params()  # raises ArgumentError if a value is not allowed
    return setting


def _flag(text: str, part: str, value: str) -> bool:
    if value not in ("true", "false"):
        raise ArgumentError(f"setting {text!r}: {part!r} needs true or false after the =", param="setting")
    return value == "true"


def _number(text: str, part: str, value: str, whole: bool = False) -> float:
    try:
        return int(value) if whole else float(value)
    except ValueError:
        raise ArgumentError(
            f"setting {text!r}: {part!r} needs a {'whole ' if whole else ''}number after the =", param="setting"
        ) from None
