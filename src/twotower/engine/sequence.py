"""A request, and the sequence that it becomes while it runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor

from twotower.decoding.draft_controller import DraftController
from twotower.decoding.output import BlockEvent, StepEvent
from twotower.decoding.params import GenerationParams
from twotower.decoding.sampling import SamplingRule
from twotower.decoding.sequence_output import SequenceOutput
from twotower.decoding.structured import Constraint, Matcher
from twotower.errors import ArgumentError

MAX_LOGPROBS = 20


@dataclass(frozen=True)
class Request:
    """A prompt (at least one token id) and how to continue it. The parameters hold one seed, policy and policy value.

    logprobs: asks for ln P of each new token by the AR model, whatever the mode, and for so many of the likeliest
    tokens at its place (None: not asked). prompt_logprobs: the same of the prompt, which is then read in full even
    where its beginning is known; with max_new_tokens 0 that is all that is done. constraint: what the text must be, in
    the modes ar and verified; it ends with finish_reason "stop" where it is complete.
    watched: its blocks are shown after every pass of the denoiser, as `StepEvent`s. mode_reason: why its mode was
    chosen, where mode "auto" was resolved before.

    Raises:
        ArgumentError: what, value and remedy.
    """

    prompt: Sequence[int]
    params: GenerationParams
    logprobs: int | None = None
    prompt_logprobs: bool = False
    constraint: Constraint | None = None
    watched: bool = False
    mode_reason: str = ""

    def __post_init__(self) -> None:
        _check_prompt(self.prompt)
        if not isinstance(self.params, GenerationParams):
            raise ArgumentError(
                f"params is a {type(self.params).__name__}; give GenerationParams, e.g. GenerationParams.of(mode='ar')",
                param="params",
            )
        count = self.logprobs
        if count is not None and (type(count) is not int or not 0 <= count <= MAX_LOGPROBS):
            raise ArgumentError(
                f"logprobs is {count!r}; it must be a whole number from 0 to {MAX_LOGPROBS}, or None",
                param="logprobs",
            )
        if not isinstance(self.prompt_logprobs, bool):
            raise ArgumentError(
                f"prompt_logprobs is {self.prompt_logprobs!r}; it must be True or False", param="prompt_logprobs"
            )
        if self.constraint is not None and not isinstance(self.constraint, Constraint):
            raise ArgumentError(
                f"constraint is a {type(self.constraint).__name__}; give a Constraint", param="constraint"
            )


def _check_prompt(prompt: Sequence[int]) -> None:
    if isinstance(prompt, str) or not isinstance(prompt, Sequence):
        raise ArgumentError(f"prompt is a {type(prompt).__name__}; give a list of token ids", param="prompt")
    if not prompt:
        raise ArgumentError("the prompt is empty; give at least one token", param="prompt")
    if not set(map(type, prompt)) <= {int}:
        strange = next(token for token in prompt if type(token) is not int)
        raise ArgumentError(f"the prompt has {strange!r}; token ids are whole numbers", param="prompt")


class Phase(Enum):
    """What a sequence needs next."""

    PROMPT = "the context tower reads more of the prompt"
    STEP = "the context tower reads the pending token and chooses the next"
    DENOISE = "the denoiser fills the block"
    DRAFT = "the engine's drafter proposes the block"
    CHECK = "the context tower reads the pending token and the draft, and accepts what it agrees with"
    COMMIT = "the context tower reads the finished block"
    DENOISER_AR = "the denoiser proposes the token after the pending one"
    FINISHED = "nothing: the sequence has ended or was aborted"


@dataclass(eq=False)
class RunningSequence:
    """A running request: its slot of the state, what it needs next, and its output so far.

    read: tokens of the text that the state holds. pending: the text's last token, where the state does not hold it yet.
    block, committed_at, confidence: the finished block or draft; has_masks: whether the open block has masks left.
    room: new tokens that this round may write. allowed: denoiser passes that this round may take (0: none); launched:
    those launched for the open block; opened: blocks opened so far. seen: text tokens that the denoiser was shown
    (−1: nothing of this text). accepted: drafted tokens of the last round. seconds: this sequence's share of the passes
    of its round. held: new tokens that wait for their log-probabilities. after (V,): diffusion with log-probabilities:
    the AR model's logits after what is read. memory: what the commit policy remembers of the block. error: what the
    matcher raised.
    """

    request: Request
    output: SequenceOutput
    slot: int
    seed: int
    policy: str
    policy_value: float
    controller: DraftController
    matcher: Matcher | None = None
    phase: Phase = Phase.PROMPT
    read: int = 0
    pending: int = -1
    block: list[int] = field(default_factory=list)
    committed_at: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    has_masks: bool = False
    step_events: list[StepEvent] = field(default_factory=list)
    accepted: int = 0
    room: int = 0
    max_passes: int = 0
    passes_launched: int = 0
    blocks_opened: int = 0
    visible_length: int = -1
    seconds: float = 0.0
    held_tokens: list[int] = field(default_factory=list)
    last_logits: Tensor | None = None
    policy_memory: object = None
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.params: GenerationParams = self.request.params
        self.mode = self.output.mode
        self.rule = SamplingRule(self.params.temperature, self.params.top_k, self.params.top_p)
        # Prompt tokens to read before anything is written: all in diffusion, else all but the pending one.
        self.prompt_end = len(self.request.prompt) - (self.mode != "diffusion" or not self.params.max_new_tokens)

    @property
    def deterministic(self) -> bool:
        """Whether no pass may hold another sequence beside this one."""
        return self.params.deterministic

    @property
    def needs_denoiser(self) -> bool:
        """Whether the denoiser has a pass to make for this sequence, as far as the host knows."""
        if self.phase is Phase.DENOISE:
            return self.passes_launched < self.max_passes
        return self.phase is Phase.DENOISER_AR

    @property
    def in_last_pass(self) -> bool:
        """Whether the context tower is certain to be needed after the denoiser's next pass."""
        return self.phase is Phase.DENOISER_AR or self.passes_launched == self.max_passes - 1

    @property
    def draft_length(self) -> int:
        """Positions of the draft block worth checking, the pending token included."""
        return min(self.room, self.controller.draft_length(self.params.block_size))

    def fail(self, error: Exception) -> BlockEvent:
        """Ends the sequence with an error; passes of it that are on their way count no more."""
        self.phase = Phase.FINISHED
        return self.output.fail(error)


def charge(sequences: Sequence[RunningSequence], started: float) -> None:
    """Gives each sequence its share of the time since `started`: of a launch, or of the wait for its results."""
    seconds = (time.perf_counter() - started) / max(len(sequences), 1)
    for sequence in sequences:
        sequence.seconds += seconds
