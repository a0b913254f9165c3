"""The generation methods of the released model. Names, defaults and positional order are those of the release."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Unpack

from torch import Tensor

from twotower.decoding.params import GenerationParams
from twotower.decoding.prompts import Prompts
from twotower.decoding.sampling_fields import SamplingArguments
from twotower.deprecation import renamed_argument


class PublishedMethods:
    """The methods `generate_*` of a model. Each returns prompts and new tokens (B, S + n), padded on the right.

    denoiser: the name of the one to use, in a model with several; None: that of the mode.
    """

    @abstractmethod
    def _generate(
        self,
        input_ids: Prompts,
        params: GenerationParams,
        attention_mask: Tensor | None,
        callback: Callable[..., None] | None = None,
    ) -> Tensor:
        """Runs a batch to its end."""

    def generate_ar(
        self,
        input_ids: Prompts,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        *,
        attention_mask: Tensor | None = None,
        seed: int | Sequence[int] | None = None,
        stop: str | Sequence[str] | None = None,
        deterministic: bool = False,
        **sampling: Unpack[SamplingArguments],
    ) -> Tensor:
        """Autoregressive decoding with the context tower, one token a pass → prompt + new tokens (B, S + n)."""
        params = GenerationParams.of(
            mode="ar",
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_token_id=eos_token_id,
            seed=seed,
            stop=stop,
            deterministic=deterministic,
            **sampling,
        )
        return self._generate(input_ids, params, attention_mask)

    def generate_mock_ar(
        self,
        input_ids: Prompts,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        *,
        attention_mask: Tensor | None = None,
        seed: int | Sequence[int] | None = None,
        stop: str | Sequence[str] | None = None,
        deterministic: bool = False,
        denoiser: str | None = None,
        **sampling: Unpack[SamplingArguments],
    ) -> Tensor:
        """Decoding with the denoiser as a next-token predictor, without t → prompt + new tokens (B, S + n)."""
        params = GenerationParams.of(
            mode="mock_ar",
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_token_id=eos_token_id,
            seed=seed,
            stop=stop,
            deterministic=deterministic,
            denoiser=denoiser,
            **sampling,
        )
        return self._generate(input_ids, params, attention_mask)

    @renamed_argument("knob", "policy_value")
    def generate_mask_diffusion(
        self,
        input_ids: Prompts,
        max_new_tokens: int = 128,
        block_size: int = 16,
        steps_per_block: int = 16,
        mask_token_id: int = 3,
        temperature: float = 0.0,
        top_k: int | None = None,
        confidence_threshold: float = 0.9,
        eos_token_id: int | Sequence[int] | None = None,
        step_callback: Callable[..., None] | None = None,
        *,
        top_p: float | None = None,
        attention_mask: Tensor | None = None,
        seed: int | Sequence[int] | None = None,
        stop: str | Sequence[str] | None = None,
        deterministic: bool = False,
        denoiser: str | None = None,
        policy: str | Sequence[str] | None = None,
        policy_value: float | Sequence[float] | None = None,
        **sampling: Unpack[SamplingArguments],
    ) -> Tensor:
        """Masked diffusion, block by block → prompt + new tokens (B, S + n).

        mask_token_id: 3, the default of the release, stands for the model's own mask token.
        policy, policy_value: the commit policy (`decoding.unmasking.POLICIES`), one for all rows or one for each.
        step_callback(step, steps, block, t=, logits=, block_idx=): called once per block with t 1.0 and logits None,
        then after each pass. block (B, L) does not have the commits of this pass yet.
        """
        params = GenerationParams.of(
            mode="diffusion",
            block_size=block_size,
            steps_per_block=steps_per_block,
            mask_token_id=mask_token_id,
            confidence_threshold=confidence_threshold,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_token_id=eos_token_id,
            seed=seed,
            stop=stop,
            deterministic=deterministic,
            denoiser=denoiser,
            policy="threshold" if policy is None else policy,
            policy_value=policy_value,
            **sampling,
        )
        return self._generate(input_ids, params, attention_mask, step_callback)

    @renamed_argument("knob", "policy_value")
    def generate_verified(
        self,
        input_ids: Prompts,
        max_new_tokens: int = 128,
        block_size: int = 16,
        draft_steps: int | None = None,
        mask_token_id: int = 3,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        *,
        acceptance: float = 1.0,
        attention_mask: Tensor | None = None,
        seed: int | Sequence[int] | None = None,
        stop: str | Sequence[str] | None = None,
        deterministic: bool = False,
        denoiser: str | None = None,
        policy: str | Sequence[str] | None = None,
        policy_value: float | Sequence[float] | None = None,
        **sampling: Unpack[SamplingArguments],
    ) -> Tensor:
        """The denoiser drafts a block, the context tower verifies it in one pass → prompt + new tokens (B, S + n).

        With acceptance 1 the tokens are those of `generate_ar` with the same seed: in fp32 and float64 exactly, in bf16
        up to near ties. acceptance < 1 also accepts drafted tokens with at least this share of the probability of the
        AR model's best token. draft_steps: denoising passes per draft; None: adapted to recent throughput.
        """
        params = GenerationParams.of(
            mode="verified",
            block_size=block_size,
            draft_steps=draft_steps,
            mask_token_id=mask_token_id,
            acceptance=acceptance,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_token_id=eos_token_id,
            seed=seed,
            stop=stop,
            deterministic=deterministic,
            denoiser=denoiser,
            policy="threshold" if policy is None else policy,
            policy_value=policy_value,
            **sampling,
        )
        return self._generate(input_ids, params, attention_mask)
