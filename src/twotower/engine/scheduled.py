"""The tokens that the context tower reads for one row in one pass."""

from __future__ import annotations

from dataclasses import dataclass

from twotower.engine.sequence import Row


@dataclass
class ScheduledTokens:
    """Tokens to append to a row's slot; scored: whether the AR model chooses the tokens that follow them.

    following: where the AR model chooses nothing, the known token after each of `tokens`, whose log-probabilities are
    wanted (None: not wanted).
    """

    row: Row
    tokens: list[int]
    scored: bool
    following: list[int] | None = None

    @property
    def asks(self) -> bool:
        """Whether log-probabilities are wanted."""
        return self.following is not None or (self.scored and self.row.request.logprobs is not None)
