"""The tokens that the context tower reads for one sequence in one pass, and which sequences share a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from twotower.engine.sequence import Phase, RunningSequence


@dataclass(eq=False, slots=True)
class ScheduledTokens:
    """Tokens to append to a sequence's slot.

    masks: mask tokens that follow, at which a model with adapters predicts the next draft. plan: of the pass after this
    one, if it is known: the drafted tokens that it checks, and its width. sampled: whether the AR model samples the
    tokens after them. known_next: if not, the known token after each of `tokens`, whose
    log-probabilities are wanted (None: not wanted).
    """

    sequence: RunningSequence
    tokens: list[int]
    sampled: bool
    known_next: list[int] | None = None
    masks: int = 0
    plan: tuple[int, int] | None = None

    @property
    def width(self) -> int:
        """The number of tokens that the pass reads."""
        return len(self.tokens) + self.masks

    @property
    def denoiser(self) -> str | None:
        """The name of the denoiser whose adapters act at the masks; None: no masks, or the model has one denoiser."""
        drafts = self.sequence.one_pass and self.sequence.phase is Phase.CHECK
        return self.sequence.denoiser if drafts else None

    @property
    def deterministic(self) -> bool:
        """Whether no pass may hold another sequence beside this one."""
        return self.sequence.deterministic

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities are wanted."""
        return self.known_next is not None or (self.sampled and self.sequence.request.logprobs is not None)


Item = TypeVar("Item", ScheduledTokens, RunningSequence)


def denoiser_of(items: Sequence[Item]) -> str | None:
    """The name of the denoiser of a part; None: none is needed."""
    return next((item.denoiser for item in items if item.denoiser is not None), None)


def passes(items: Sequence[Item]) -> list[Sequence[Item]]:
    """The items of each pass: every deterministic one has a pass of its own, the others share one for each denoiser.

    Items that the model with any denoiser can read join the first pass of several.
    """
    together = [item for item in items if not item.deterministic]
    parts: list[Sequence[Item]] = [[item] for item in items if item.deterministic]
    names = dict.fromkeys(item.denoiser for item in together if item.denoiser is not None)
    if len(names) < 2:
        if together:
            parts.append(together)
        return parts
    first = next(iter(names))
    return parts + [[item for item in together if (item.denoiser or first) == name] for name in names]
