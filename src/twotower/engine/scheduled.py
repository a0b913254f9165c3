"""The tokens that the context tower reads for one sequence in one pass."""

from __future__ import annotations

from dataclasses import dataclass

from twotower.engine.sequence import RunningSequence


@dataclass(eq=False, slots=True)
class ScheduledTokens:
    """Tokens to append to a sequence's slot; scored: whether the AR model chooses the tokens that follow them.

    following: where the AR model chooses nothing, the known token after each of `tokens`, whose log-probabilities are
    wanted (None: not wanted).
    """

    sequence: RunningSequence
    tokens: list[int]
    scored: bool
    following: list[int] | None = None

    @property
    def asks(self) -> bool:
        """Whether log-probabilities are wanted."""
        return self.following is not None or (self.scored and self.sequence.request.logprobs is not None)
