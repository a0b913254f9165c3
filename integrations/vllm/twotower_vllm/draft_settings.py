"""The settings of the drafter: `--additional-config '{"twotower": {"draft_passes": 2}}'`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from twotower.errors import ArgumentError

DRAFTER = "twotower_vllm.proposer.DenoiserProposer"  # `model` of --speculative-config
KEY = "twotower"  # in --additional-config
MOST_PASSES = 16


@dataclass(frozen=True)
class DraftSettings:
    """draft_passes: denoiser passes of each draft. threshold: confidence above which a token is kept before the last.

    Neither changes the text.
    """

    draft_passes: int = 1
    threshold: float = 0.9

    def __post_init__(self) -> None:
        if type(self.draft_passes) is not int or not 1 <= self.draft_passes <= MOST_PASSES:
            raise ArgumentError(
                f"draft_passes is {self.draft_passes!r}; it must be an integer from 1 to {MOST_PASSES}",
                param="draft_passes",
            )
        if not isinstance(self.threshold, int | float) or not 0 <= self.threshold <= 1:
            raise ArgumentError(f"threshold is {self.threshold!r}; it must be from 0 to 1", param="threshold")

    @classmethod
    def of(cls, additional: object) -> DraftSettings:
        """From the value of `--additional-config`.

        Raises:
            ArgumentError: an unknown key, or a value that is not allowed.
        """
        given = additional.get(KEY, {}) if isinstance(additional, Mapping) else {}
        if not isinstance(given, Mapping) or given.keys() - cls.__dataclass_fields__.keys():
            known = ", ".join(cls.__dataclass_fields__)
            raise ArgumentError(f"{KEY} of --additional-config is {given!r}; its keys are {known}", param=KEY)
        return cls(**given)
