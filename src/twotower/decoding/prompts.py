"""Converts prompts in any accepted form to rows of token ids of any lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.errors import ArgumentError
from twotower.tokenizer import Tokenizer

Prompts = Tensor | str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class PromptRows:
    """ids: the tokens of each row, without padding. padded (B, S): the batch, returned before the new tokens."""

    ids: list[list[int]]
    padded: Tensor


def read_prompts(
    prompts: Prompts, attention_mask: Tensor | None, tokenizer: Tokenizer | None, vocab_size: int, pad_token_id: int
) -> PromptRows:
    """Reads a tensor (B, S) with an optional attention mask (padding on either side), token lists, or strings.

    Raises:
        ArgumentError: an empty prompt, ids outside the vocabulary, a mask of another shape, or text without a
            tokenizer.
    """
    if isinstance(prompts, Tensor):
        rows = _from_tensor(prompts, attention_mask)
    elif attention_mask is not None:
        raise ArgumentError(
            "attention_mask needs a tensor of input_ids; omit it for a list of prompts", param="attention_mask"
        )
    else:
        rows = _from_list(prompts, tokenizer)
    if not rows:
        raise ArgumentError("no prompts; give at least one", param="input_ids")
    for i, row in enumerate(rows):
        if not row:
            raise ArgumentError(f"prompt {i} is empty; give at least one token", param="input_ids")
        outside = [token for token in row if not 0 <= token < vocab_size]
        if outside:
            raise ArgumentError(
                f"prompt {i} has token id {outside[0]}; the vocabulary is 0 to {vocab_size - 1}", param="input_ids"
            )
    if isinstance(prompts, Tensor):
        holds_any_id = prompts.dtype in (torch.int32, torch.int64)
        return PromptRows(rows, prompts if holds_any_id else prompts.long())
    width = max(map(len, rows))
    padded = [[pad_token_id] * (width - len(row)) + row for row in rows]
    return PromptRows(rows, torch.tensor(padded, dtype=torch.long))


def _from_tensor(ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ArgumentError(
            f"input_ids is {tuple(ids.shape)} of {ids.dtype}; give a (batch, length) integer tensor",
            param="input_ids",
        )
    if mask is None:
        return ids.tolist()
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ArgumentError(
            f"attention_mask is {found} but input_ids is {tuple(ids.shape)}; give both the same shape",
            param="attention_mask",
        )
    real = mask.bool()
    starts = (real & ~torch.nn.functional.pad(real, (1, 0))[:, :-1]).sum(1)
    if (starts > 1).any():
        row = int((starts > 1).nonzero()[0])
        raise ArgumentError(
            f"attention_mask of row {row} has a gap; pad only on the left or only on the right",
            param="attention_mask",
        )
    return [row[keep].tolist() for row, keep in zip(ids.cpu(), real.cpu(), strict=True)]


def _from_list(prompts: object, tokenizer: Tokenizer | None) -> list[list[int]]:
    if isinstance(prompts, str):
        prompts = [prompts]
    if not isinstance(prompts, list | tuple):
        raise ArgumentError(
            f"input_ids is a {type(prompts).__name__}; give a (batch, length) tensor, a string, or a list of prompts",
            param="input_ids",
        )
    if prompts and all(map(_is_id, prompts)):
        prompts = [prompts]
    return [_row(i, prompt, tokenizer) for i, prompt in enumerate(prompts)]


def _row(i: int, prompt: object, tokenizer: Tokenizer | None) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ArgumentError(
                f"prompt {i} is text, but the model has no tokenizer; set model.tokenizer or give token ids",
                param="input_ids",
            )
        return list(tokenizer(prompt)["input_ids"])
    ids = prompt.tolist() if isinstance(prompt, Tensor) and prompt.dim() == 1 else prompt
    if not isinstance(ids, list | tuple):
        raise ArgumentError(
            f"prompt {i} is a {type(prompt).__name__}; give a string or a list of token ids", param="input_ids"
        )
    strange = [token for token in ids if not _is_id(token)]
    if strange:
        raise ArgumentError(f"prompt {i} has {strange[0]!r}; token ids are whole numbers", param="input_ids")
    return list(ids)


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
