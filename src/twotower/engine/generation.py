"""Text from a two-tower model: one function per kind of answer, one table of modes.

`generate` gives typed results, `stream` the events that lead to them, `generate_tensor` the published API's
padded tensor. All three check every argument first and run the same loops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from twotower.decoding.auto_mode import chooser_of, resolve
from twotower.decoding.modes import AUTO, MODES
from twotower.decoding.output import BlockEvent, Generation
from twotower.decoding.params import GenerationParams
from twotower.decoding.prompts import PromptRows, Prompts, read_prompts
from twotower.engine.admission import check_model
from twotower.engine.loops.autoregressive import autoregressive, mock_autoregressive
from twotower.engine.loops.diffusion import StepCallback, diffusion
from twotower.engine.loops.session import Session
from twotower.engine.loops.speculative import verified
from twotower.errors import ArgumentError

if TYPE_CHECKING:
    from twotower.modeling_twotower import TwoTowerForCausalLM

__all__ = ["MODES", "BlockEvent", "Generation", "GenerationParams", "generate", "stream"]

Loop = Callable[[Session, StepCallback | None], Iterator[list[BlockEvent]]]
LOOPS: dict[str, Loop] = {
    "diffusion": diffusion,
    "verified": verified,
    "ar": lambda session, _: autoregressive(session),
    "mock_ar": lambda session, _: mock_autoregressive(session),
}


def generate(
    model: TwoTowerForCausalLM,
    prompts: Prompts,
    params: GenerationParams,
    attention_mask: Tensor | None = None,
    step_callback: StepCallback | None = None,
) -> list[Generation]:
    """Runs a batch to the end → one result a prompt, in order.

    Raises:
        ArgumentError (a ValueError): before any work.
    """
    rows = _checked(model, prompts, params, attention_mask)
    return _run_to_end(_session(model, rows, params), params, step_callback)


def stream(
    model: TwoTowerForCausalLM,
    prompts: Prompts,
    mode: str = "diffusion",
    *,
    attention_mask: Tensor | None = None,
    step_callback: StepCallback | None = None,
    **parameters: Any,
) -> Iterator[BlockEvent]:
    """Events of all rows as blocks are committed. Arguments are checked now, the work begins with the first event."""
    params = GenerationParams.of(mode=mode, **parameters)
    rows = _checked(model, prompts, params, attention_mask)
    return _events(model, rows, params, step_callback)


def generate_tensor(
    model: TwoTowerForCausalLM,
    prompts: Prompts,
    params: GenerationParams,
    attention_mask: Tensor | None = None,
    step_callback: StepCallback | None = None,
) -> tuple[Tensor, int]:
    """→ prompts and new tokens (B, S + n), padded on the right with the pad token, and the denoiser passes."""
    rows = _checked(model, prompts, params, attention_mask)
    session = _session(model, rows, params)
    results = _run_to_end(session, params, step_callback)
    width = max(len(result.tokens) for result in results)
    pad = _pad_token(model)
    new = torch.tensor([result.tokens + [pad] * (width - len(result.tokens)) for result in results], dtype=torch.long)
    padded = rows.padded
    return torch.cat([padded, new.view(len(results), width).to(padded.device, padded.dtype)], dim=1), session.passes


def generate_like_transformers(
    model: TwoTowerForCausalLM,
    inputs: Tensor | None = None,
    generation_config: Any = None,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    do_sample: bool = False,
    **kwargs: Any,
) -> Tensor:
    """transformers' `generate` in its plain form, answered by AR; anything it cannot mean here is refused."""
    prompts = inputs if inputs is not None else input_ids
    if prompts is None:
        raise ArgumentError("generate: no input_ids; give a (batch, length) tensor of token ids", param="input_ids")
    known = {"max_new_tokens", "temperature", "top_k", "top_p", "eos_token_id", "pad_token_id", "seed"}
    kwargs["generation_config"] = generation_config
    unknown = sorted(name for name, value in kwargs.items() if name not in known and value is not None)
    if unknown:
        raise ArgumentError(
            f"generate: {', '.join(unknown)} is not supported; generate is plain AR here. Use generate_mask_diffusion, "
            "generate_ar or generate_mock_ar",
            param=unknown[0],
        )
    kwargs.pop("pad_token_id", None)
    kwargs = {name: value for name, value in kwargs.items() if name in known and value is not None}
    if not do_sample:
        kwargs["temperature"] = 0.0
    else:
        kwargs.setdefault("temperature", 1.0)
    eos = getattr(model.config, "eos_token_id", None)
    kwargs.setdefault("eos_token_id", eos)  # one id, several, or none
    tokens, model._last_nfe = generate_tensor(model, prompts, GenerationParams.of(mode="ar", **kwargs), attention_mask)
    return tokens


def _checked(
    model: TwoTowerForCausalLM, prompts: Prompts, params: GenerationParams, attention_mask: Tensor | None
) -> PromptRows:
    vocab_size = model.config.backbone.vocab_size
    rows = read_prompts(prompts, attention_mask, model.tokenizer, vocab_size, _pad_token(model))
    check_model(model, params, [len(ids) for ids in rows.ids])
    return rows


def _session(model: TwoTowerForCausalLM, rows: PromptRows, params: GenerationParams) -> Session:
    chosen, why = resolve(model, params, len(rows.ids))
    return Session(model, rows.ids, chosen, model.tokenizer, why)


@torch.no_grad()
def _run_to_end(session: Session, asked: GenerationParams, callback: StepCallback | None) -> list[Generation]:
    for _ in LOOPS[session.params.mode](session, callback):
        pass
    return _learned(session, asked)


@torch.no_grad()
def _events(
    model: TwoTowerForCausalLM, rows: PromptRows, params: GenerationParams, callback: StepCallback | None
) -> Iterator[BlockEvent]:
    session = _session(model, rows, params)
    for events in LOOPS[session.params.mode](session, callback):
        yield from events
    if params.max_new_tokens == 0:  # no block, but every row has an end
        yield from (record.nothing() for record in session.records)
    _learned(session, params)


def _learned(session: Session, asked: GenerationParams) -> list[Generation]:
    """The results, from which mode "auto" learns."""
    results = [record.result() for record in session.records]
    if asked.mode == AUTO:
        chooser_of(session.model).recent.learn(results, asked.block_size)
    return results


def _pad_token(model: TwoTowerForCausalLM) -> int:
    pad = getattr(model.config, "pad_token_id", None)  # transformers 5 sets it only where the file has it
    return pad if isinstance(pad, int) else 0
