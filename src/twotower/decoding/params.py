"""`GenerationParams`: the parameters of a request, checked before any work is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack, cast

import torch

from twotower.decoding.checks import as_tuple, check_flag, check_number, check_whole
from twotower.decoding.modes import AUTO, BLOCK_MODES, REQUEST_MODES
from twotower.decoding.sampling_fields import (
    LogitBias,
    SamplingFields,
    SamplingLists,
    SamplingValues,
    check_token_ids,
    plain_bias,
)
from twotower.decoding.unmasking import POLICIES
from twotower.deprecation import renamed_argument, renamed_attribute
from twotower.errors import ArgumentError, LengthError
from twotower.specs import TowerSpec

DEFAULT_BLOCK_SIZE = 16


class RowIndependent(SamplingFields, total=False):
    """Parameters that are the same for every row of a batch; see `GenerationParams`."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    block_size: int
    steps_per_block: int
    mask_token_id: int
    confidence_threshold: float
    draft_steps: int | None
    acceptance: float
    deterministic: bool
    denoiser: str | None


class Parameters(RowIndependent, SamplingLists, total=False):
    """Parameters of one call, without the mode, in the wider types of the public API."""

    eos_token_id: int | Sequence[int] | None
    seed: int | Sequence[int] | None
    stop: str | Sequence[str] | None
    policy: str | Sequence[str]
    policy_value: float | Sequence[float] | None


@dataclass(frozen=True, kw_only=True)
class GenerationParams(SamplingValues):
    """Parameters of one call. All rows of a batch share them, except for seed, policy and policy value.

    mode: how tokens are generated; "auto" chooses AR, verified or diffusion (`engine.mode_choice`).
    max_new_tokens: the most tokens after the prompt. temperature: 0 or less is greedy.
    top_k, top_p: filters of the candidate's distribution, applied after the temperature.
    eos_token_id: one id or several; a row ends at the first of them. stop: strings that end a row.
    seed: one for all rows or one a row; None draws seeds from torch's generator.
    block_size: positions of a block. In verified decoding, of a draft with the token that it continues.
    steps_per_block: the most denoising passes for a block in diffusion.
    mask_token_id: of the masks; 3, the published default, stands for the model's own mask token.
    policy: which positions a pass commits, for all rows or one a row (`unmasking.POLICIES`).
    policy_value: the policy's number; None: its default, which is confidence_threshold for the policy "threshold".
    draft_steps: denoising passes for a draft; None: adapts to throughput.
    acceptance: 1 keeps drafted tokens that equal the AR model's choice. α < 1 also keeps tokens with at least α times
    the probability of the AR model's best token.
    deterministic: the text repeats itself on one machine in any dtype, because the passes do not depend on measured
    times or on other requests. Each sequence has passes of its own, a draft has a fixed depth (draft_steps, by default
    1) and length, prompts are read in fixed pieces without the prefix cache, and mode "auto" means verified.
    denoiser: the name of the one to use, in a model with several; None: that of the mode.
    min_p, repetition_penalty, … skip_special_tokens: see `SamplingFields`
    and `SamplingLists`.

    Raises:
        ArgumentError (a ValueError): names the parameter, its value and the remedy.
    """

    mode: str = "diffusion"
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    eos_token_id: tuple[int, ...] = ()
    seed: int | tuple[int, ...] | None = None
    stop: tuple[str, ...] = ()
    block_size: int = DEFAULT_BLOCK_SIZE
    steps_per_block: int = 16
    mask_token_id: int = 3
    confidence_threshold: float = 0.9
    policy: str | tuple[str, ...] = "threshold"
    policy_value: float | tuple[float, ...] | None = None
    draft_steps: int | None = None
    acceptance: float = 1.0
    deterministic: bool = False
    denoiser: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "logit_bias", plain_bias(self.logit_bias))
        for name in ("eos_token_id", "stop", "bad_words", "stop_token_ids"):  # a single value means a tuple of one
            object.__setattr__(self, name, as_tuple(getattr(self, name)))
        for name in ("seed", "policy", "policy_value"):  # one value a row: the order counts
            if isinstance(given := getattr(self, name), set):
                raise ArgumentError(f"{name} is {given!r}, and a set has no order; give a list", param=name)
        if self.mode not in REQUEST_MODES:
            raise ArgumentError(f"mode is {self.mode!r}; choose one of {', '.join(REQUEST_MODES)}", param="mode")
        check_whole("max_new_tokens", self.max_new_tokens, least=0)
        check_whole("block_size", self.block_size, least=1)
        check_whole("steps_per_block", self.steps_per_block, least=1)
        check_whole("mask_token_id", self.mask_token_id, least=0)
        check_number("temperature", self.temperature, None, None)
        check_number("confidence_threshold", self.confidence_threshold, 0.0, 1.0)
        check_number("acceptance", self.acceptance, 0.0, 1.0)
        if self.draft_steps is not None:
            check_whole("draft_steps", self.draft_steps, least=0)
        if self.denoiser is not None and not isinstance(self.denoiser, str):
            raise ArgumentError(f"denoiser is {self.denoiser!r}; it must be a name, or None", param="denoiser")
        check_flag("deterministic", self.deterministic)
        self.check_sampling(self.mode, self.max_new_tokens)
        if self.top_k is not None:
            check_whole("top_k", self.top_k, least=1)
        if self.top_p is not None:
            check_number("top_p", self.top_p, 0.0, 1.0)
        self._check_policies()
        for seed in () if self.seed is None else as_tuple(self.seed):
            check_whole("seed", seed, least=0)
            if seed >= 2**63:
                raise ArgumentError(f"seed is {seed}; it must be below 2**63", param="seed")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise ArgumentError(f"stop has {text!r}; each stop must be a non-empty string", param="stop")

    def _check_policies(self) -> None:
        names = as_tuple(self.policy)
        for name in names:
            if not isinstance(name, str) or name not in POLICIES:
                raise ArgumentError(f"policy is {name!r}; choose one of {', '.join(POLICIES)}", param="policy")
        if not names:
            raise ArgumentError("policy is empty; give one policy, or one for each prompt", param="policy")
        values = as_tuple(self.policy_value)
        if len(names) > 1 and len(values) > 1 and len(names) != len(values):
            raise ArgumentError(
                f"{len(values)} policy values for {len(names)} policies; give one, or one for each",
                param="policy_value",
            )
        for name in set(names):
            policy = POLICIES[name]
            own = values if len(values) != len(names) else [v for n, v in zip(names, values, strict=True) if n == name]
            for value in own:
                check_number("policy_value", value, policy.low, policy.high, f" ({name}: {policy.value_meaning})")

    knob = renamed_attribute("knob", "policy_value")

    @classmethod
    @renamed_argument("knob", "policy_value")
    def of(
        cls,
        *,
        mode: str = "diffusion",
        eos_token_id: int | Sequence[int] | None = None,
        seed: int | Sequence[int] | None = None,
        stop: str | Sequence[str] | None = None,
        policy: str | Sequence[str] = "threshold",
        policy_value: float | Sequence[float] | None = None,
        logit_bias: Mapping[int, float] | LogitBias | None = None,
        bad_words: str | Sequence[str] | None = None,
        stop_token_ids: int | Sequence[int] | None = None,
        **values: Unpack[RowIndependent],
    ) -> GenerationParams:
        """Makes parameters from the wider types of the public API."""
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            known = ", ".join(cls.__dataclass_fields__)
            raise ArgumentError(f"unknown argument {', '.join(unknown)}; known are {known}", param=unknown[0])
        return cls(
            mode=mode,
            eos_token_id=as_tuple(eos_token_id),
            seed=as_tuple(seed) if isinstance(seed, Sequence) else seed,
            stop=as_tuple(stop),
            logit_bias=plain_bias(logit_bias),
            bad_words=as_tuple(bad_words),
            stop_token_ids=as_tuple(stop_token_ids),
            policy=tuple(policy) if isinstance(policy, Sequence) and not isinstance(policy, str) else policy,
            policy_value=tuple(policy_value)
            if isinstance(policy_value, Sequence) and not isinstance(policy_value, str)
            else policy_value,
            **values,
        )

    @classmethod
    def from_mapping(cls, values: Mapping[str, object]) -> GenerationParams:
        """Makes parameters from names and values of unknown types, such as JSON. All values are checked."""
        return cls.of(**cast(Mapping[str, Any], values))

    def check_against(self, spec: TowerSpec, prompt_lengths: Sequence[int]) -> None:
        """Raises ArgumentError where a parameter does not fit the model or the prompts."""
        vocab = spec.vocab_size
        if self.mode in BLOCK_MODES and self.mask_token_id >= vocab:
            raise ArgumentError(
                f"mask_token_id is {self.mask_token_id}; the vocabulary ends at {vocab - 1}", param="mask_token_id"
            )
        check_token_ids("eos_token_id", self.eos_token_id, vocab)
        self.check_tokens(vocab)
        window = spec.max_position_embeddings
        longest = max(prompt_lengths)
        if longest + self.max_new_tokens > window:
            raise LengthError(
                f"a prompt of {longest} tokens plus max_new_tokens {self.max_new_tokens} is beyond the context window "
                f"of {window}; shorten one of them",
                prompt_tokens=longest,
                new_tokens=self.max_new_tokens,
                most=window,
            )
        if self.mode in BLOCK_MODES and self.block_size > max(window, DEFAULT_BLOCK_SIZE):
            raise ArgumentError(
                f"block_size is {self.block_size}; give at most {window}, the context window", param="block_size"
            )
        for name, plural in (("seed", "seeds"), ("policy", "policies"), ("policy_value", "policy values")):
            given = getattr(self, name)
            if isinstance(given, tuple) and len(given) != len(prompt_lengths):
                raise ArgumentError(
                    f"{len(given)} {plural} for {len(prompt_lengths)} prompts; give one, or one for each", param=name
                )

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The tokens that end a row: EOS, unless it is ignored, and the stop tokens."""
        return tuple(dict.fromkeys((*(() if self.ignore_eos else self.eos_token_id), *self.stop_token_ids)))

    @property
    def fixed_draft_depth(self) -> int | None:
        """Denoiser passes of every draft; None: round by round what pays.

        Under relaxed acceptance the text depends on the draft, and in `deterministic` requests the rounding does. The
        default depth is then 1, because an adaptive depth depends on measured times.
        """
        fixed = self.acceptance < 1 or self.deterministic
        return 1 if self.draft_steps is None and fixed else self.draft_steps

    @property
    def depends_on_timing(self) -> bool:
        """Whether the choice of passes depends on measured times."""
        if self.mode == AUTO:
            return not self.deterministic
        return self.mode == "verified" and self.fixed_draft_depth is None

    def row_policies(self, rows: int) -> tuple[list[str], list[float]]:
        """The policy and the policy value of each row."""
        names = list(self.policy) if isinstance(self.policy, tuple) else [self.policy] * rows
        given = self.policy_value if isinstance(self.policy_value, tuple) else (self.policy_value,) * rows
        default = {name: POLICIES[name].default for name in names} | {"threshold": self.confidence_threshold}
        return names, [default[name] if value is None else value for name, value in zip(names, given, strict=True)]

    def by_row(self, rows: int) -> list[GenerationParams]:
        """The parameters of each row, with one seed, one policy and one policy value."""
        parts = zip(*self.row_policies(rows), self.row_seeds(rows), strict=True)
        return [replace(self, policy=policy, policy_value=value, seed=seed) for policy, value, seed in parts]

    def row_seeds(self, rows: int) -> list[int]:
        """The seed of each row. In fp32 and float64, equal prompts and seeds give equal text anywhere in a batch."""
        if isinstance(self.seed, tuple):
            return list(self.seed)
        if self.seed is not None:
            return [self.seed] * rows
        return [int(x) for x in torch.randint(2**62, (rows,))]
