"""Decoding settings as text: what `--setting` means in `twotower eval` and its neighbours.

ar                                    a mode
diffusion:0.8                         a mode and the policy value of the default policy
diffusion:factor=1.2,block_size=32    a policy and its policy value, and parameters by name
verified:draft_steps=1,acceptance=0.5
verified:deterministic=true
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from twotower.decoding.modes import REQUEST_MODES
from twotower.decoding.params import GenerationParams
from twotower.decoding.unmasking import POLICIES
from twotower.errors import ArgumentError

WHOLE = ("block_size", "steps_per_block", "draft_steps", "top_k", "seed")
FLAGS = ("deterministic",)
NUMBERS = ("temperature", "top_p", "acceptance", "confidence_threshold")


@dataclass(frozen=True)
class Setting:
    """label: as it was written; values: arguments of `GenerationParams.of`, the mode among them."""

    label: str
    values: dict[str, object] = field(hash=False)

    @property
    def mode(self) -> str:
        return str(self.values["mode"])

    def params(self, **shared: object) -> GenerationParams:
        """With what all settings of a run share; the setting's own values win."""
        return GenerationParams.from_mapping(shared | self.values)


AR = Setting("ar", {"mode": "ar"})


def with_ar(settings: Sequence[Setting]) -> list[Setting]:
    """AR, which everything is compared with, then the others."""
    return [AR, *(setting for setting in settings if setting.label != AR.label)]


def parse_setting(text: str) -> Setting:
    """One setting.

    Raises:
        ArgumentError: an unknown mode, parameter or policy, or a value that is none.
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
        elif name in NUMBERS:
            values[name] = _number(text, part, value)
        else:
            known = ", ".join((*WHOLE, *NUMBERS, *FLAGS, *POLICIES))
            raise ArgumentError(
                f"setting {text!r}: {name!r} is no parameter and no policy; known are {known}", param="setting"
            )
    setting = Setting(text, values)
    setting.params()  # what it says is checked now
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
