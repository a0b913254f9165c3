"""Samples of a model in training: greedy continuations of held-out texts, one with its denoising passes."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from twotower.decoding.output import Generation
from twotower.decoding.params import GenerationParams
from twotower.engine.generation import generate
from twotower.errors import ArgumentError
from twotower.modeling_twotower import TwoTowerForCausalLM
from twotower.tokenizer import Tokenizer
from twotower.training.data.batch import Batch
from twotower.training.fsdp import World
from twotower.training.log_schema import Sample, Trace, Validation

FIRST_PART = 128  # at most so many tokens of a text without prompt are given


@contextmanager
def unsharded(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Unshards the parameters of these modules on every process, in the compute dtype, for a `with` block.

    Every process must enter the block. Afterwards the parameters are sharded again, as the optimizer needs them.
    """
    parts = [module for module in modules if isinstance(module, FSDPModule)]
    try:
        for part in parts:
            part.unshard()
        yield
    finally:
        for part in parts:
            part.reshard()


def cut_prompts(sources: Iterable[Iterable[Batch]], count: int, longest: int, shift: int = 0) -> list[list[int]]:
    """Prompts from the first `count` documents, one source after the other in turn.

    A document is cut where its prompt ends; without a prompt, after its first half (at most 128 tokens). Prompts
    longer than `longest` are skipped. shift: of the predictions, the tokens of a prompt that blocks begin with.
    """
    streams = [(p for batch in batches for p in _prompts(batch, shift) if 0 < len(p) <= longest) for batches in sources]
    in_turn = (prompt for prompts in itertools.zip_longest(*streams) for prompt in prompts if prompt)
    return list(itertools.islice(in_turn, count))


def documents(batch: Batch) -> Iterator[tuple[int, Tensor]]:
    """Yields (row, positions (S,) bool) for each document, row by row: its tokens with EOS."""
    for row in range(len(batch)):
        for number in range(int(batch.document[row].max()) + 1):
            yield row, batch.text[row] & (batch.document[row] == number)


def _prompts(batch: Batch, shift: int) -> Iterator[list[int]]:
    for row, columns in documents(batch):
        tokens = batch.tokens[row][columns].tolist()
        given = int(batch.prompt[row][columns].sum())
        if given < len(tokens):  # otherwise the document was cut at the end of a row, within its prompt
            yield tokens[: given + shift if given else min(len(tokens) // 2, FIRST_PART)]


def shared_prompts(
    model: TwoTowerForCausalLM,
    sources: Sequence[Sequence[Batch]],
    count: int,
    params: GenerationParams,
    world: World,
    shift: int = 0,
) -> list[list[int]]:
    """The prompts for all processes, cut from the documents of the first process."""
    room = model.spec.max_position_embeddings - params.max_new_tokens
    if count and room < 1:
        raise ArgumentError(
            f"max_new_tokens is {params.max_new_tokens}, which leaves no room for a prompt in the context window of "
            f"{room + params.max_new_tokens}; lower max_new_tokens"
        )
    prompts: list[list[int]] = world.broadcast(cut_prompts(sources, count, room, shift))
    if prompts:
        params.check_against(model.spec, list(map(len, prompts)))
    return prompts


def write_samples(
    model: TwoTowerForCausalLM, prompts: Sequence[list[int]], params: GenerationParams, world: World
) -> Validation:
    """Continues all prompts, divided among the processes. Every process calls this function and gets the same result.

    Returns tokens_per_pass (not for AR: new tokens up to and with EOS, over all prompts, per denoising pass in
    diffusion, per pass of either tower in verified decoding) and sample (the first prompt, its continuation and, in
    diffusion, the trace of its denoising passes).
    """
    own = list(prompts[world.rank :: world.size])
    passes: Counter[int] = Counter()

    def count(step: int, steps: int, block: Tensor, *, t: object, logits: object, block_idx: int) -> None:
        passes[block_idx] += logits is not None and bool((block[0] == params.mask_token_id).any())

    diffusion = params.mode == "diffusion"
    results = generate(model, own, params, step_callback=count if diffusion else None) if own else []
    record: Validation = {}
    if params.mode != "ar":
        tokens = world.total(sum(len(result.tokens) for result in results))
        record["tokens_per_pass"] = tokens / world.total(sum(result.passes for result in results))
    sample: Sample = {}
    if world.is_main:
        first = results[0]
        sample = {
            "prompt": _text(model.tokenizer, prompts[0]),
            "text": _text(model.tokenizer, first.tokens) if model.tokenizer is None else first.text,
            "finish_reason": first.finish_reason,
            "tokens": len(first.tokens),
        }
        if diffusion:
            sample["passes"] = first.denoiser_passes
            sample["trace"] = trace(first, params.block_size, passes, model.tokenizer)
    record["sample"] = world.broadcast(sample)
    return record


def trace(result: Generation, block_size: int, passes: Counter[int], tokenizer: Tokenizer | None) -> Trace:
    """The denoising passes of one text as plain data."""
    blocks = -(-len(result.tokens) // block_size)
    return {
        "block_size": block_size,
        "passes": [passes[block] for block in range(blocks)],
        "tokens": [_text(tokenizer, [token]) for token in result.tokens],
        "step": result.committed_at,
    }


def _text(tokenizer: Tokenizer | None, tokens: Sequence[int]) -> str:
    """Tokens as text, with special tokens; as numbers without a tokenizer."""
    return " ".join(map(str, tokens)) if tokenizer is None else str(tokenizer.decode(list(tokens)))
