"""A request, and the row that it becomes while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor

from twotower.decoding.draft_controller import Pace
from twotower.decoding.output import StepEvent
from twotower.decoding.params import GenerationParams
from twotower.decoding.sampling import Rule
from twotower.decoding.sequence_output import RowRecord
from twotower.decoding.structured import Constraint, Matcher
from twotower.errors import ArgumentError

MOST_ALTERNATIVES = 20


@dataclass(frozen=True)
class Request:
    """A prompt (token ids) and how to continue it; the parameters hold one seed, one policy, one knob.

    logprobs: asks for ln P of each new token by the AR model, whatever the mode, and for so many of the likeliest
    tokens at its place (None: not asked). prompt_logprobs: the same of the prompt, which is then read in full even
    where its beginning is known; with max_new_tokens 0 that is all that is done. constraint: what the text must be, in
    the modes ar and verified; it ends with finish_reason "stop" where it is complete.
    watched: its blocks are shown after every pass of the denoiser, as `StepEvent`s.

    Raises:
        ArgumentError: what, value and remedy.
    """

    prompt: Sequence[int]
    params: GenerationParams
    logprobs: int | None = None
    prompt_logprobs: bool = False
    constraint: Constraint | None = None
    watched: bool = False

    def __post_init__(self) -> None:
        count = self.logprobs
        if count is not None and (type(count) is not int or not 0 <= count <= MOST_ALTERNATIVES):
            raise ArgumentError(
                f"logprobs is {count!r}; it must be a whole number from 0 to {MOST_ALTERNATIVES}, or None"
            )
        if not isinstance(self.prompt_logprobs, bool):
            raise ArgumentError(f"prompt_logprobs is {self.prompt_logprobs!r}; it must be True or False")
        if self.constraint is not None and not isinstance(self.constraint, Constraint):
            raise ArgumentError(f"constraint is a {type(self.constraint).__name__}; give a Constraint")


class Phase(Enum):
    """What a row needs next."""

    PROMPT = "the context tower reads more of the prompt"
    STEP = "it reads the pending token and chooses the next"
    DENOISE = "the denoiser fills the row's block"
    DRAFT = "the engine's drafter proposes the row's block"
    CHECK = "the context tower reads the pending token and the draft, and keeps what it agrees with"
    COMMIT = "the context tower reads the finished block"
    MOCK = "the denoiser proposes the token after the pending one"
    GONE = "nothing: it has ended or was given up"


@dataclass
class Row:
    """A running request: its slot of the state, what it needs next, and what it has written."""

    request: Request
    record: RowRecord
    slot: int
    seed: int
    policy: str
    knob: float
    pace: Pace
    phase: Phase = Phase.PROMPT
    read: int = 0  # tokens of the text that the state holds
    pending: int = -1  # the text's last token where the state does not hold it yet
    block: list[int] = field(default_factory=list)  # the finished block or draft
    committed_at: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    seen: list[StepEvent] = field(default_factory=list)  # of a watched request, not yet told
    kept: int = 0  # drafted tokens of the last round
    allowed: int = 0  # passes of the denoiser that this round may take; 0: none
    taken: int = 0  # and those that its block has been given
    opened: int = 0  # blocks that the denoiser has been asked for
    shown: int = -1  # tokens of the text that the denoiser has been shown; −1: it knows nothing of this text
    seconds: float = 0.0  # this row's share of the passes of its round
    held: list[int] = field(default_factory=list)  # new tokens that wait for their log-probabilities
    after: Tensor | None = None  # (V,): diffusion with logprobs: the AR model's logits after what is read
    matcher: Matcher | None = None  # where its text stands in the grammar that it must follow
    memory: object = None  # what its policy remembers of the block
    error: Exception | None = None  # what its matcher raised

    @property
    def params(self) -> GenerationParams:
        return self.request.params

    @property
    def mode(self) -> str:
        return self.record.mode

    @property
    def rule(self) -> Rule:
        return Rule(self.params.temperature, self.params.top_k, self.params.top_p)

    @property
    def needs_denoiser(self) -> bool:
        """Whether the denoiser has a pass to make for it, as far as is known."""
        return self.phase is Phase.MOCK or (self.phase is Phase.DENOISE and self.taken < self.allowed)

    @property
    def in_last_pass(self) -> bool:
        """Of a row that denoises: whether it is certain to need the context tower after the denoiser's next pass."""
        return self.phase is Phase.MOCK or self.taken == self.allowed - 1

    @property
    def prompt_end(self) -> int:
        """Prompt tokens that are read before anything is written: all in diffusion, else all but the pending one."""
        return len(self.request.prompt) - (self.mode != "diffusion" or not self.params.max_new_tokens)
