"""Generation for a batch of prompts, on top of the engine.

`generate` returns typed results, `stream` yields events, and `generate_tensor` returns the published API's padded
tensor. Each call checks its arguments, makes an engine for its prompts, and closes the engine at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Unpack

import torch
from torch import Tensor

from twotower.decoding.modes import AUTO
from twotower.decoding.output import BlockEvent, Generation
from twotower.decoding.params import GenerationParams, Parameters
from twotower.decoding.prompts import PromptRows, Prompts, read_prompts
from twotower.deprecation import renamed_argument
from twotower.engine.admission import check_before_engine
from twotower.engine.denoiser_step import StepCallback
from twotower.engine.engine_options import EngineOptions
from twotower.engine.llm import LLM, STREAM_SECONDS
from twotower.engine.mode_choice import resolve
from twotower.engine.sequence import Request
from twotower.engine.towers import Towers, model_for
from twotower.errors import ArgumentError, NonFiniteLogitsError


def generate(
    model: Towers,
    prompts: Prompts,
    params: GenerationParams,
    attention_mask: Tensor | None = None,
    step_callback: StepCallback | None = None,
) -> list[Generation]:
    """Runs a batch to the end → one result for each prompt, in order.

    Raises:
        ArgumentError (a ValueError): an argument is not allowed; raised before any pass.
        Exception: exceptions of a commit policy or of the callback, unchanged.
    """
    rows = _checked(model, prompts, params, attention_mask, step_callback)
    return _run(model, rows, params, step_callback)[0]


class StreamArguments(Parameters, total=False):
    """Keyword arguments of `stream`."""

    attention_mask: Tensor | None
    step_callback: StepCallback | None


@renamed_argument("knob", "policy_value")
def stream(
    model: Towers,
    prompts: Prompts,
    mode: str = "diffusion",
    *,
    attention_mask: Tensor | None = None,
    step_callback: StepCallback | None = None,
    **parameters: Unpack[Parameters],
) -> Iterator[BlockEvent]:
    """Yields the events of all rows. Arguments are checked at the call; the first pass runs with the first event."""
    params = GenerationParams.of(mode=mode, **parameters)
    rows = _checked(model, prompts, params, attention_mask, step_callback)
    return _events(model, rows, params, step_callback)


def generate_tensor(
    model: Towers,
    prompts: Prompts,
    params: GenerationParams,
    attention_mask: Tensor | None = None,
    step_callback: StepCallback | None = None,
) -> tuple[Tensor, int]:
    """Returns prompts and new tokens (B, S + n), padded on the right, and the number of denoiser passes."""
    rows = _checked(model, prompts, params, attention_mask, step_callback)
    results, passes = _run(model, rows, params, step_callback)
    failed = [f"prompt {place}: {result.error}" for place, result in enumerate(results) if result.error]
    if failed:  # a tensor has no place for an error
        raise NonFiniteLogitsError("; ".join(failed))
    width = max(len(result.tokens) for result in results)
    pad = _pad_token(model)
    new = torch.tensor([result.tokens + [pad] * (width - len(result.tokens)) for result in results], dtype=torch.long)
    padded = rows.padded
    return torch.cat([padded, new.view(len(results), width).to(padded.device, padded.dtype)], dim=1), passes


def generate_like_transformers(
    model: Towers,
    inputs: Tensor | None = None,
    generation_config: object = None,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    do_sample: bool = False,
    **kwargs: object,
) -> Tensor:
    """transformers' `generate`, as AR. Arguments without a meaning here raise ArgumentError."""
    prompts = inputs if inputs is not None else input_ids
    if prompts is None:
        raise ArgumentError("generate: no input_ids; give a (batch, length) tensor of token ids", param="input_ids")
    known = {"max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "eos_token_id"}
    known |= {"pad_token_id", "seed"}
    kwargs["generation_config"] = generation_config
    unknown = sorted(name for name, value in kwargs.items() if name not in known and value is not None)
    if unknown:
        raise ArgumentError(
            f"generate: {', '.join(unknown)} is not supported; generate is AR only. Use generate_mask_diffusion, "
            "generate_ar or generate_mock_ar",
            param=unknown[0],
        )
    kwargs.pop("pad_token_id", None)
    kwargs = {name: value for name, value in kwargs.items() if name in known and value is not None}
    if not do_sample:
        kwargs["temperature"] = 0.0
    else:
        kwargs.setdefault("temperature", 1.0)
    eos = model.generation_defaults.eos_or(getattr(model.config, "eos_token_id", None))
    kwargs.setdefault("eos_token_id", eos)  # one id, several, or none
    return generate_tensor(model, prompts, GenerationParams.from_mapping({"mode": "ar"} | kwargs), attention_mask)[0]


def _checked(
    model: Towers,
    prompts: Prompts,
    params: GenerationParams,
    attention_mask: Tensor | None,
    callback: StepCallback | None,
) -> PromptRows:
    if not isinstance(params, GenerationParams):
        raise ArgumentError(f"params is a {type(params).__name__}; give GenerationParams", param="params")
    if callback is not None and not callable(callback):
        raise ArgumentError(f"step_callback is {callback!r}; give a function", param="step_callback")
    vocab_size = model.spec.vocab_size
    rows = read_prompts(prompts, attention_mask, model.tokenizer, vocab_size, _pad_token(model))
    check_before_engine(model, params, [len(ids) for ids in rows.ids])
    if callback is not None and params.deterministic and len(rows.ids) > 1:
        raise ArgumentError(
            f"step_callback with deterministic=True and {len(rows.ids)} prompts: a callback is told of passes over all "
            "prompts at once, and deterministic prompts have passes of their own; give one prompt a call",
            param="step_callback",
        )
    return rows


@contextmanager
def _engine(
    model: Towers, rows: PromptRows, params: GenerationParams, callback: StepCallback | None
) -> Iterator[tuple[LLM, Sequence[Request]]]:
    """An engine for one batch, and the batch's requests.

    At the end its state returns to the model's workspace, unless an exception occurred.
    """
    chosen, reason = resolve(model, params, len(rows.ids))
    requests = [
        Request(ids, own, mode_reason=reason) for ids, own in zip(rows.ids, chosen.by_row(len(rows.ids)), strict=True)
    ]
    options = EngineOptions(prefix_cache=False, prompt_budget=None, step_callback=callback, raise_errors=True)
    llm = LLM.fitting(model, requests, rows=len(requests), options=options)
    try:
        yield llm, requests
    except GeneratorExit:
        llm.close()
        raise
    llm.close()


def _run(
    model: Towers, rows: PromptRows, params: GenerationParams, callback: StepCallback | None
) -> tuple[list[Generation], int]:
    """Returns the results and the number of denoiser passes."""
    with _engine(model, rows, params, callback) as (llm, requests):
        results = llm.generate(requests)
    _update_mode_chooser(model, params, results)
    return results, llm.denoiser_passes


def _events(
    model: Towers, rows: PromptRows, params: GenerationParams, callback: StepCallback | None
) -> Iterator[BlockEvent]:
    results = []
    with _engine(model, rows, params, callback) as (llm, requests):
        for request in requests:
            llm.add_request(request)
        while llm.has_work:
            for event in llm.step(STREAM_SECONDS):
                assert isinstance(event, BlockEvent)
                if event.result is not None:
                    results.append(event.result)
                yield event
    _update_mode_chooser(model, params, results)


def _update_mode_chooser(model: Towers, asked: GenerationParams, results: Sequence[Generation]) -> None:
    """Updates the averages of mode "auto" with the results of a batch."""
    if asked.mode == AUTO:
        model_for(model, asked).workspace.mode_chooser.recent.add_outputs(results, asked.block_size)


def _pad_token(model: Towers) -> int:
    pad = getattr(model.config, "pad_token_id", None)  # transformers 5 sets it only where the file has it
    return pad if isinstance(pad, int) else 0
