"""The matmuls of a pass alone: the modules with weights, called one after the other on random inputs.

For N rows, N · seconds(1) ÷ seconds(N) is the gain that the matmuls allow if N requests share a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from common.models import BLOCK
from common.timing import TimedCall, ratio
from twotower import TwoTowerForCausalLM
from twotower.model.moe import Experts
from twotower.model.tower import Tower


def matmuls(tower: Tower, tokens: int, head: bool) -> tuple[list[Callable[[], object]], int]:
    """A tower's modules with weights, each with a number of tokens of random input; and the bytes of these weights."""
    calls: list[Callable[[], object]] = []
    covered = 0
    weight = next(tower.parameters())
    for name, module in tower.named_modules():
        if name == "head" and not head:
            continue
        if isinstance(module, nn.Linear):
            x = torch.randn(1, tokens, module.in_features, device=weight.device, dtype=weight.dtype)
            calls.append(lambda module=module, x=x: module(x))
        elif isinstance(module, Experts):
            moe = tower.spec.moe
            assert moe is not None
            x = torch.randn(tokens, moe.latent or tower.spec.hidden_size, device=weight.device, dtype=weight.dtype)
            scores = torch.rand(tokens, moe.experts, device=weight.device)
            share, choice = scores.topk(moe.top_k, -1)
            calls.append(lambda module=module, x=x, choice=choice, share=share: module(x, choice, share))
        else:
            continue  # routers have few rows: neither timed nor counted as covered
        covered += sum(parameter.nbytes for parameter in module.parameters())
    return calls, covered


def matmul_runs(model: TwoTowerForCausalLM, rows: int) -> dict[str, TimedCall]:
    """The passes at a number of rows: the denoiser over blocks, the context tower over blocks or tokens."""
    assert model.denoiser is not None
    made = {
        "step": matmuls(model.context, rows, True),
        "denoise": matmuls(model.denoiser, rows * BLOCK, True),
        "commit": matmuls(model.context, rows * BLOCK, False),
        "check": matmuls(model.context, rows * BLOCK, True),
    }
    return {
        f"{kind} {rows}": TimedCall(lambda calls=calls: [call() for call in calls]) for kind, (calls, _) in made.items()
    }


def covered_share(model: TwoTowerForCausalLM) -> float:
    """The share of a tower's weights, without the embedding, that the timed matmuls read."""
    _, covered = matmuls(model.context, 1, True)
    every = sum(parameter.nbytes for parameter in model.context.parameters())
    return covered / (every - model.context.embeddings.weight.nbytes)


def matmul_ratios(times: dict[str, list[float]], at_once: Sequence[int], passes: float) -> dict[str, dict[int, float]]:
    """The rate of N rows ÷ the rate of one row, by the matmuls alone.

    A block of diffusion has `passes` denoising passes and a commit; a round of verified mode has one pass and a check.
    """

    def of(rows: int, weights: dict[str, float]) -> list[float]:
        columns = [[share * value for value in times[f"{kind} {rows}"]] for kind, share in weights.items()]
        return [sum(column) for column in zip(*columns, strict=True)]

    kinds = {
        "ar": {"step": 1.0},
        "diffusion": {"denoise": passes, "commit": 1.0},
        "verified": {"denoise": 1.0, "check": 1.0},
    }
    return {
        mode: {rows: rows * ratio(of(1, weights), of(rows, weights)) for rows in at_once}
        for mode, weights in kinds.items()
    }
