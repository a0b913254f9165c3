"""`EngineOptions`: options of an engine other than its sizes."""

from __future__ import annotations

from dataclasses import dataclass

from twotower.engine.denoiser_step import StepCallback
from twotower.engine.drafting import Drafter
from twotower.engine.towers import Towers, block_rule
from twotower.errors import ArgumentError


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options of an engine.

    prefix_cache: whether the common beginning of prompts is read once. prompt_budget: the most prompt tokens that one
    step reads, over all sequences (None: no limit).
    step_callback: called after every denoiser pass. Sequences then run in lockstep: requests of one kind fill the
    slots, and the next requests start when all of these have ended. A pass that runs out of memory is not repeated
    in halves. raise_errors: `step` raises exceptions of commit policies and allocations unchanged. Otherwise an
    exception ends its own request with finish_reason "error". drafter: makes drafts for verified decoding in place of
    the denoiser.
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


def check_options(model: Towers, options: EngineOptions) -> None:
    """Raises ArgumentError if an engine of this model cannot have these options."""
    one_pass = block_rule(model).one_pass
    for name in ("step_callback", "drafter"):
        if one_pass and getattr(options, name) is not None:
            raise ArgumentError(
                f"{name}: this model's denoiser is adapters, and one pass checks a draft and makes the next; leave out "
                f"{name}, or use a model with a denoiser tower",
                param=name,
            )
