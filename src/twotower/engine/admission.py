"""Checks of a request against a model and an engine, and the KV slots that the request may need.

`GenerationParams` and `Request` check types and ranges when they are made. This module checks what depends on a model
or an engine, for every caller: `LLM.add_request`, the server, batch jobs and the `generate_*` methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from twotower.config import MASK_TOKEN_ID
from twotower.decoding.block_rule import BlockRule
from twotower.decoding.logit_rules import bad_word_tokens
from twotower.decoding.modes import AUTO, BLOCK_MODES
from twotower.decoding.params import GenerationParams
from twotower.engine.budget import check_block, check_text
from twotower.engine.constraint_masks import check_constraint
from twotower.engine.sequence import Request
from twotower.engine.towers import Towers, block_rule, model_for
from twotower.errors import ArgumentError, LengthError


def kv_slots_needed(request: Request, block_size: int) -> int:
    """The most KV slots that a request needs. Its last block may be longer than the tokens that remain.

    block_size: the engine's longest block.
    """
    params = request.params
    return len(request.prompt) + params.max_new_tokens + min(params.block_size, block_size)


def check_model(model: Towers, params: GenerationParams, prompt_lengths: Sequence[int]) -> None:
    """Raises ArgumentError if this model does not support the parameters, in any engine."""
    params.check_against(model.spec, prompt_lengths)
    if params.mode in BLOCK_MODES:
        check_block(model, params.block_size)
    bad_word_tokens(params.bad_words, model.tokenizer)  # raises an error
    if params.stop and model.tokenizer is None:
        raise ArgumentError("stop strings need a tokenizer; set model.tokenizer", param="stop")
    _check_policy(params, block_rule(model_for(model, params)))
    if params.mode not in ("ar", AUTO) and not model.has_denoiser:
        raise ArgumentError(
            f'mode is {params.mode!r} but only the context tower is loaded; load with towers="both"', param="mode"
        )


def _check_policy(params: GenerationParams, rule: BlockRule) -> None:
    """Raises ArgumentError if a model that commits from the left does not support the policy."""
    names = {params.policy} if isinstance(params.policy, str) else set(params.policy)
    other = sorted(names - {"threshold", "span"})
    modes = ("diffusion",) if rule.one_pass else ("diffusion", AUTO)  # with adapters at masks, auto means verified
    if rule.commits_from_left and params.mode in modes and other:
        denoiser = "is adapters, which commit" if rule.one_pass else "has a draft head, which draws"
        raise ArgumentError(
            f"policy is {other[0]!r}, and this model's denoiser {denoiser} from the left; use span or threshold",
            param="policy",
        )


def with_mask_token(model: Towers, request: Request) -> Request:
    """The request with the model's mask token, if it has the published default, 3, and the model another token."""
    params, own = request.params, model.config.mask_token
    if params.mask_token_id != MASK_TOKEN_ID or own == MASK_TOKEN_ID:
        return request
    return replace(request, params=replace(params, mask_token_id=own))


def check_before_engine(model: Towers, params: GenerationParams, prompt_lengths: Sequence[int]) -> None:
    """As `check_model`, for texts whose engine does not exist yet: the state of the longest must fit the free memory.

    Raises:
        ArgumentError: see `check_model`; LengthError names the tokens that fit.
    """
    check_model(model, params, prompt_lengths)
    block_size = params.block_size if params.mode in BLOCK_MODES else 1
    check_text(model, max(prompt_lengths), params.max_new_tokens, block_size)


def check(model: Towers, request: Request, length: int, block_size: int, max_kv_slots: int) -> None:
    """Raises ArgumentError if the request can never run in an engine, with the sizes in question.

    length, block_size: of the engine's longest text and block. max_kv_slots: the KV slots that its memory holds.
    """
    params, prompt, vocab_size = request.params, len(request.prompt), model.spec.vocab_size
    if not (min(request.prompt) >= 0 and max(request.prompt) < vocab_size):
        beyond = next(token for token in request.prompt if not 0 <= token < vocab_size)
        raise ArgumentError(
            f"the prompt has token id {beyond}; the vocabulary is 0 to {vocab_size - 1}", param="prompt"
        )
    check_model(model, params, [prompt])
    if prompt + params.max_new_tokens > length:
        raise LengthError(
            f"a prompt of {prompt} tokens plus max_new_tokens {params.max_new_tokens} is longer than the {length} "
            "tokens that this engine keeps for a text; shorten one of them or raise length",
            prompt_tokens=prompt,
            new_tokens=params.max_new_tokens,
            most=length,
        )
    if params.block_size > block_size and params.mode not in ("ar", "mock_ar"):
        raise ArgumentError(
            f"block_size is {params.block_size}; this engine's blocks have at most {block_size}", param="block_size"
        )
    if request.constraint is not None:
        check_constraint(request.constraint, params.mode, vocab_size)
    need = kv_slots_needed(request, block_size)
    if need > max_kv_slots:
        raise LengthError(
            f"a prompt of {prompt} tokens plus max_new_tokens {params.max_new_tokens} can need the keys and values of "
            f"{need} tokens, and this engine's memory holds {max_kv_slots}; shorten one of them or raise memory",
            prompt_tokens=prompt,
            new_tokens=params.max_new_tokens,
            most=max_kv_slots - (need - prompt - params.max_new_tokens),
        )
