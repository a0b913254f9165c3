"""`Request`, and `RunningSequence`: the state of a running request."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor

from twotower.decoding.block_rule import RELEASED, BlockRule
from twotower.decoding.draft_controller import DraftController
from twotower.decoding.draft_planner import DraftPlanner
from twotower.decoding.logit_rules import LogitRules
from twotower.decoding.output import BlockEvent, StepEvent
from twotower.decoding.params import GenerationParams
from twotower.decoding.sampling import SamplingRule
from twotower.decoding.sequence_output import SequenceOutput
from twotower.decoding.structured import Constraint, Matcher
from twotower.errors import ArgumentError, NonFiniteLogitsError

MAX_LOGPROBS = 20


@dataclass(frozen=True)
class Request:
    """A prompt (at least one token id) and how to continue it. The parameters hold one seed, policy and policy value.

    logprobs: the number of most probable tokens to report at each new token, with ln P of these and of the new token
    under the AR model, in any mode (None: no log-probabilities). prompt_logprobs: the same for the prompt, which is
    then read without the prefix cache; with max_new_tokens 0 nothing else is done. constraint: a grammar for the text,
    in the modes ar and verified; a complete text ends with finish_reason "stop". watched: a `StepEvent` follows every
    denoiser pass over a block. mode_reason: why the mode was chosen, if mode "auto" was resolved before.

    Raises:
        ArgumentError: names the argument, its value and the remedy.
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
    """The next pass of a sequence."""

    PROMPT = "the context tower reads more of the prompt"
    STEP = "the context tower reads the pending token and chooses the next"
    DENOISE = "the denoiser fills the block"
    DRAFT = "the engine's drafter proposes the block"
    CHECK = "the context tower verifies the draft that follows the pending token"
    COMMIT = "the context tower reads the finished block"
    DENOISER_AR = "the denoiser proposes the token after the pending one"
    FINISHED = "no pass: the sequence has ended or was aborted"


@dataclass(eq=False)
class RunningSequence:
    """A running request: its slot, its phase, and its output so far.

    read: text tokens that the state holds. pending: the last text token, if the state does not hold it yet.
    block, committed_at, confidence: the finished block or draft. has_masks: whether the open block has mask tokens.
    room: new tokens that may still follow in this round. max_passes: denoising passes of this round (0: none).
    passes_launched: those launched for the open block. blocks_opened: blocks so far.
    visible_length: text tokens in the denoiser's view (−1: no view of this text yet).
    block_rule: of the denoiser. denoiser: its name, if the model has several and the mode uses one. draft: with
    `one_pass`, the next draft, after the pending token. masks: mask tokens of the pass; drafting: whether a pass may
    have masks.
    width: with `one_pass`, of the next pass (0: not planned yet). planner: in verified decoding, the rule that chooses
    the width and the draft.
    accepted: accepted drafted tokens of the last round. seconds: this sequence's share of the time of its round.
    held_tokens: new tokens that wait for their log-probabilities. last_logits (V,): in diffusion with
    log-probabilities, the AR model's logits after the last token read. policy_memory: the commit policy's memory of the
    block. error: an exception of the matcher, or the one that ended the sequence. written: new tokens of an earlier
    start; the context tower reads them after the prompt, except for the last `unread` and the one before, which the
    first pass reads as its draft. strikes, trial_end: see `Recovery`: its exceptions so far, and
    the new tokens that end its trial.
    """

    request: Request
    output: SequenceOutput
    slot: int
    seed: int
    policy: str
    policy_value: float
    controller: DraftController
    matcher: Matcher | None = None
    block_rule: BlockRule = RELEASED
    denoiser: str | None = None
    draft: list[int] = field(default_factory=list)
    width: int = 0
    masks: int = 0
    drafting: bool = False
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
    written: Sequence[int] = ()
    unread: int = 0
    strikes: int = 0
    trial_end: int = 0

    def __post_init__(self) -> None:
        self.params: GenerationParams = self.request.params
        self.mode = self.output.mode
        self.rule = SamplingRule(self.params.temperature, self.params.top_k, self.params.top_p, self.params.min_p)
        self.logit_rules = LogitRules.of(self.params, self.request.prompt, self.output.progress.tokenizer)
        self.text = [*self.request.prompt, *self.written] if self.written else self.request.prompt
        # Whether a block begins with the pending token. If not, the state holds the whole text when a block opens.
        self.begins_with_text = self.block_rule.begins_with_text(self.mode)
        pending = self.mode != "diffusion" or self.begins_with_text or not self.params.max_new_tokens
        self.prompt_end = len(self.text) - pending - self.unread  # tokens to read before the first round
        # In diffusion the context tower accepts every token of the denoiser.
        self.acceptance = 0.0 if self.mode == "diffusion" and self.begins_with_text else self.params.acceptance
        self.planner = DraftPlanner(self.params.block_size)

    @classmethod
    def of(
        cls,
        request: Request,
        output: SequenceOutput,
        slot: int,
        controller: DraftController,
        block_rule: BlockRule,
        denoiser: str | None = None,
    ) -> RunningSequence:
        """The sequence of a request. block_rule, denoiser: see the class."""
        (policy,), (policy_value,) = request.params.row_policies(1)
        if block_rule.draft_head and policy == "threshold":
            policy = "span"
        (seed,) = request.params.row_seeds(1)
        return cls(
            request, output, slot, seed, policy, policy_value, controller, _matcher(request), block_rule, denoiser
        )

    def restarted(self) -> RunningSequence:
        """The sequence from its first token, which keeps the new tokens that events have delivered."""
        tokens, matcher = self.output.rewind(), _matcher(self.request)
        if self.request.prompt_logprobs and not self.output.blocks:
            self.output.prompt_logprobs.append(None)
        if matcher is not None:
            matcher.take(tokens)
        facts = self.request, self.output, self.slot, self.seed, self.policy, self.policy_value, self.controller
        return RunningSequence(
            *facts,
            matcher,
            self.block_rule,
            self.denoiser,
            written=tuple(tokens),
            unread=max(self.output.last_tokens - 1, 0) if self.final_drafts else 0,
            strikes=self.strikes,
            trial_end=self.trial_end,
        )

    @property
    def last_token(self) -> int:
        """The last token of the text so far."""
        written = self.output.progress.tokens
        return written[-1] if written else self.request.prompt[-1]

    @property
    def one_pass(self) -> bool:
        """Whether each pass checks the last draft and makes the next one."""
        return self.block_rule.one_pass

    @property
    def changes_logits(self) -> bool:
        """Whether a rule of `LogitRules` can change the next token."""
        return self.logit_rules is not None and self.logit_rules.active(len(self.output.progress.tokens))

    @property
    def open_predictions(self) -> int:
        """Positions that the denoiser fills in the next block; 0: the context tower chooses the next token instead."""
        chooses_first = self.block_rule.first_from_ar and self.mode == "diffusion" and not self.output.progress.tokens
        return 0 if chooses_first else self.block_rule.predictions(self.params.block_size, self.mode)

    @property
    def final_block(self) -> bool:
        """Whether a check accepts the whole block, and adds the AR model's next token: diffusion after the text."""
        return self.mode == "diffusion" and self.begins_with_text and not self.one_pass

    @property
    def keeps_draft(self) -> bool:
        """Whether a check keeps the drafted tokens whatever the AR model says, and their confidences do not matter."""
        return self.final_drafts or self.final_block

    @property
    def final_drafts(self) -> bool:
        """Whether drafted tokens are text at once: in diffusion with adapters, unless log-probabilities must wait."""
        return self.one_pass and self.mode == "diffusion" and self.request.logprobs is None

    @property
    def deterministic(self) -> bool:
        """Whether no pass may hold another sequence beside this one."""
        return self.params.deterministic

    @property
    def needs_denoiser(self) -> bool:
        """Whether this sequence needs a denoiser pass, as far as the host knows."""
        if self.phase is Phase.DENOISE:
            return self.passes_launched < self.max_passes
        return self.phase is Phase.DENOISER_AR

    @property
    def in_last_pass(self) -> bool:
        """Whether this sequence certainly needs the context tower after the next denoiser pass."""
        return self.phase is Phase.DENOISER_AR or self.passes_launched == self.max_passes - 1

    @property
    def draft_length(self) -> int:
        """Positions of the draft block to verify, including the pending token."""
        return min(self.room, self.controller.draft_length(self.params.block_size))

    def fail(self, error: Exception) -> BlockEvent:
        """Ends the sequence with an error. Results of launched passes no longer count."""
        self.phase, self.error = Phase.FINISHED, error
        return self.output.fail(error)

    def fail_if_not_finite(self, values: Iterable[float], tower: str) -> BlockEvent | None:
        """Ends the sequence if one of these confidences or log-probabilities shows that logits are not finite."""
        if math.isfinite(sum(values)):
            return None
        place = len(self.output.progress.tokens) + 1
        words = f"the logits of the {tower} are NaN or infinite at new token {place}; check the weights and the dtype"
        return self.fail(NonFiniteLogitsError(words))


def charge(sequences: Sequence[RunningSequence], started: float) -> None:
    """Adds to each sequence its share of the time since `started`."""
    seconds = (time.perf_counter() - started) / max(len(sequences), 1)
    for sequence in sequences:
        sequence.seconds += seconds


def _matcher(request: Request) -> Matcher | None:
    params = request.params
    return (
        None
        if request.constraint is None
        else request.constraint.matcher(() if params.ignore_eos else params.eos_token_id)
    )
