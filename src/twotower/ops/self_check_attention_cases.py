"""The inputs of the self-check (`self_check`) for attention."""

from __future__ import annotations

import torch

from twotower.ops.reference.attention import PLAIN, AttentionOptions, CachedKV
from twotower.ops.self_check import Case
from twotower.ops.self_check_inputs import Randn, make_case


def attention_cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """Rows without cache, with a short and with a long cache, anywhere in a pool; a block and a single token.

    Also rows with causal prefixes of different lengths. On a GPU also the released sizes with a long cache. The values
    of long rows are larger. Otherwise their small means would hide errors beside the values of short rows.
    """

    def arguments(
        length: int,
        heads: int,
        width: int,
        causal: bool,
        ragged: bool,
        longest: int = 1300,
        options: AttentionOptions = PLAIN,
        prefix: bool = False,
    ) -> tuple[object, ...]:
        randn = Randn(9, device)
        lengths = torch.tensor([0, 5, longest], device=device)
        pool = randn(2, 2 * (longest + 100), width).to(dtype)
        pool[1, 30:48] /= 16
        start, stride = torch.tensor([[2 * longest + 100, 30, 60], [1, 9, longest + 5]], device=device)
        cached = CachedKV(pool[0], pool[1], start, stride, lengths, longest, 0)
        token_mask = None
        if ragged:
            token_mask = torch.arange(length, device=device) < torch.tensor(
                [[length], [1], [length - 1]], device=device
            )
        q, k, v = randn(3, length, heads, width) / 2, randn(3, length, 2, width), randn(3, length, 2, width) / 16
        plain = q.to(dtype), k.to(dtype), v.to(dtype), token_mask, causal, cached
        if prefix:
            return *plain, options, torch.tensor([length // 2, length, 1], device=device)
        return plain if options == PLAIN else (*plain, options)

    sizes: tuple[tuple[object, ...], ...] = (
        (1, 2, 24, True, False),
        (1, 8, 64, False, False),
        (7, 6, 37, True, True),
        (16, 4, 64, False, True),
    )
    if device.type == "cuda":
        sizes += (1, 32, 128, True, False, 5000), (16, 32, 128, False, True, 5000), (16, 32, 128, True, True, 5000)
        sizes += ((16, 32, 128, True, True, 5000, PLAIN, True),)
    options = AttentionOptions(0.3, 9, 2.0)
    sizes += (
        (1, 8, 24, True, False, 1300, options._replace(window=1100)),
        (7, 6, 24, True, True, 1300, options._replace(window=5)),
        (16, 4, 24, False, True, 1300, options),
        (5, 2, 24, False, False, 1300, options._replace(window=None)),
        (7, 6, 37, True, True, 1300, PLAIN, True),
        (9, 4, 24, True, False, 1300, options._replace(window=5), True),
    )
    return [make_case(_describe(*size), arguments, *size) for size in sizes]


def _describe(length: object, heads: object, width: object, *options: object) -> str:
    return f"{length} tokens, {heads} heads of {width}, {', '.join(map(str, options))}"
