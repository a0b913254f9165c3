"""How an engine works, beside its sizes."""

from __future__ import annotations

from dataclasses import dataclass

from twotower.engine.denoiser_step import StepCallback
from twotower.engine.drafting import Drafter


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """prefix_cache: whether prompts that begin alike are read once. prompt_budget: prompt tokens read in one step, of
    all sequences together (None: no limit).

    step_callback: told of every denoiser pass. Sequences then run in lockstep: as many waiting requests of one kind as
    there are slots, the next ones when all of these have ended; and a pass that does not fit the memory is not tried in
    halves. raise_errors: what commit policies and allocations raise leaves `step` unchanged; otherwise the exception
    ends its own request with finish_reason "error". drafter: drafts for verified decoding in place of the denoiser.
    """

    prefix_cache: bool = True
    prompt_budget: int | None = 512
    step_callback: StepCallback | None = None
    raise_errors: bool = False
    drafter: Drafter | None = None

    @property
    def lockstep(self) -> bool:
        """Whether the blocks of all sequences begin and end together."""
        return self.step_callback is not None
