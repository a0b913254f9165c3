"""Whether a request can ever run in an engine, and how much of its memory it can need."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twotower.engine.generation import check as check_parameters
from twotower.engine.sequence import Request
from twotower.engine.structured import check_constraint
from twotower.errors import ArgumentError

if TYPE_CHECKING:
    from twotower.model.towers import TwoTowerModel


def columns(request: Request, block_size: int) -> int:
    """Tokens whose keys and values a request can need: its last block may go beyond the tokens it asks for.
    block_size: the engine's longest block."""
    params = request.params
    return len(request.prompt) + params.max_new_tokens + min(params.block_size, block_size)


def check(model: TwoTowerModel, request: Request, length: int, block_size: int, most_columns: int) -> None:
    """length, block_size: of the engine's longest text and block; most_columns: that its memory holds.

    Raises:
        ArgumentError: the request can never run there; says why, with the numbers.
    """
    params, prompt = request.params, len(request.prompt)
    check_parameters(model, params, [prompt])
    if prompt + params.max_new_tokens > length:
        raise ArgumentError(
            f"a prompt of {prompt} tokens plus max_new_tokens {params.max_new_tokens} is longer than the {length} "
            "tokens that this engine keeps for a text; shorten one of them or raise length"
        )
    if params.block_size > block_size and params.mode not in ("ar", "mock_ar"):
        raise ArgumentError(f"block_size is {params.block_size}; this engine's blocks have at most {block_size}")
    if not prompt:
        raise ArgumentError("the prompt is empty; give at least one token")
    if request.constraint is not None:
        check_constraint(request.constraint, params.mode, model.config.backbone.vocab_size)
    need = columns(request, block_size)
    if need > most_columns:
        raise ArgumentError(
            f"a prompt of {prompt} tokens plus max_new_tokens {params.max_new_tokens} can need the keys and values of "
            f"{need} tokens, and this engine's memory holds {most_columns}; shorten one of them or raise memory"
        )
