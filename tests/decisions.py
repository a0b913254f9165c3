"""Records every discrete decision of a generation: experts, candidates, commits. For tests that explain a difference.

A run can also be made to follow another run's decisions; the scores it records then say how close each of them was to
falling otherwise, given all the decisions before it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from twotower import TwoTowerForCausalLM
from twotower.decoding.sampling import confidence, noise
from twotower.decoding.unmasking import Unmasking
from twotower.model.moe import Router

# The package gives two of its functions the names of their modules, so the modules are asked for by name.
diffusion, autoregressive, speculative = (
    importlib.import_module(f"twotower.engine.loops.{name}") for name in ("diffusion", "autoregressive", "speculative")
)

Key = tuple[Any, ...]  # (kind of pass, block, step, what)


class Difference(NamedTuple):
    """The first decision that fell differently, and at which positions (L,)."""

    key: Key
    mine: Tensor
    theirs: Tensor
    where: Tensor


class Decisions:
    """taken: experts (B, L, k), token (B, L), commit (B, L) bool, in the order they were taken; open (B, L): where a
    candidate could be committed. scores: what each was taken by: an expert margin (B, L), scores (B, L, V) in units
    of a logit, confidences (B, L)."""

    def __init__(self) -> None:
        self.taken: dict[Key, Tensor] = {}
        self.open: dict[Key, Tensor] = {}
        self.scores: dict[Key, Tensor] = {}

    def first_difference(self, batch: Decisions, row: int) -> Difference | None:
        """Between this run of one row and the same row of a batch, whose padding is left out."""
        for key, mine in self.taken.items():
            theirs = batch.taken[key][row, : mine.shape[1]]
            where = mine[0] != theirs
            if where.dim() == 2:
                where = where.any(-1)
            where = where & self.open.get(key, where.new_ones(1, 1))[0]
            if where.any():
                return Difference(key, mine[0], theirs, where)
        return None

    def margin(self, found: Difference, threshold: float) -> float:
        """By how much the scores of this run decide what `found` says fell differently: the largest over positions."""
        scores, where = self.scores[found.key][0], found.where
        what = found.key[-1]
        if what == "token":
            pair = torch.stack([found.mine, found.theirs], -1)
            return float(scores.gather(-1, pair).diff(dim=-1)[where].abs().max())
        if what == "commit":  # crossing the threshold, or changing places with one that fell the other way
            near = []
            for i in where.nonzero()[:, 0]:
                others = scores[where & (found.mine != found.mine[i])]
                near.append(min([abs(scores[i] - threshold), *(scores[i] - others).abs()]))
            return float(max(near))
        return float(scores[where].max())


@contextmanager
def watching(model: TwoTowerForCausalLM, follow: Decisions | None = None) -> Iterator[Decisions]:
    """Records what `model` decides inside the block; with `follow`, makes it decide as that run did."""
    run = Decisions()
    now: list[Any] = ["start", 0, 0]  # kind of pass, block, step
    rows = [1]

    def decided(what: str, value: Tensor, scores: Tensor) -> Tensor:
        key = (*now, what)
        run.taken[key] = value if follow is None else follow.taken[key]
        run.scores[key] = scores
        return run.taken[key]

    def passing(kind: str, verb: Any) -> Any:
        def call(tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
            block = now[1] + (kind == "extend")
            now[:] = [kind, block, now[2] + 1 if now[0] == kind == "denoise" else 0]
            rows[0] = tokens.shape[0]
            return verb(tokens, *args, **kwargs)

        return call

    def routing(name: str) -> Any:
        def hook(router: Router, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            scores = torch.sigmoid(inputs[0] @ router.weight.T)
            margin = expert_margin(router, scores + router.e_score_correction_bias)
            chosen = output[0].sort(-1).values.unflatten(0, (rows[0], -1))
            choice = decided(name, chosen, margin.unflatten(0, (rows[0], -1))).flatten(0, 1)
            if follow is None:
                return output
            weight = scores.gather(-1, choice)
            if router.config.norm_topk_prob:
                weight = weight / weight.sum(-1, keepdim=True)
            return choice, weight * router.config.routed_scaling_factor

        return hook

    def choosing(pick: Any) -> Any:
        def call(
            logits: Tensor, sampling: Any, positions: Tensor, purpose: int, step: int = 0
        ) -> tuple[Tensor, Tensor]:
            scores = logits.double()
            if sampling.temperature > 0:
                uniform = noise(sampling.seeds, positions, purpose, step, logits.shape[-1])
                scores = scores - sampling.temperature * torch.log(-torch.log(uniform))
            tokens, sure = pick(logits, sampling, positions, purpose, step)
            chosen = decided("token", tokens, scores)
            return chosen, sure if follow is None else confidence(logits, chosen)

        return call

    def committing(policies: Any) -> Any:
        def call(unmasking: Any, seen: Any) -> Tensor:
            run.open[(*now, "token")] = seen.masked
            return decided("commit", policies(unmasking, seen), seen.confidence)

        return call

    routers = [(name, module) for name, module in model.named_modules() if isinstance(module, Router)]
    hooks = [
        router.register_forward_hook(routing(f"experts of {name.removesuffix('.mixer.gate')}"))
        for name, router in routers
    ]
    with (
        patch.object(model, "prefill", passing("prefill", model.prefill)),
        patch.object(model, "extend", passing("extend", model.extend)),
        patch.object(model, "denoise", passing("denoise", model.denoise)),
        patch.object(diffusion, "pick", choosing(diffusion.pick)),
        patch.object(Unmasking, "__call__", committing(Unmasking.__call__)),
        patch.object(autoregressive, "pick", choosing(autoregressive.pick)),
        patch.object(speculative, "pick", choosing(speculative.pick)),
    ):
        yield run
    for hook in hooks:
        hook.remove()


def nearest_tie(run: Decisions) -> float:
    """The smallest margin by which an expert or a token of the run was chosen."""
    margins = []
    for key, scores in run.scores.items():
        if key[-1] == "token":
            best, second = scores.topk(2, dim=-1).values.unbind(-1)
            margins.append(float((best - second).min()))
        elif key[-1] != "commit":
            margins.append(float(scores.min()))
    return min(margins)


def expert_margin(router: Router, biased: Tensor) -> Tensor:
    """biased scores (T, E) → (T,): how near a token's set of experts was to another, by one score or a group's sum."""
    config = router.config
    grouped = biased.unflatten(-1, (config.n_group, -1))
    sums = grouped.topk(min(2, grouped.shape[-1])).values.sum(-1)
    kept = torch.zeros_like(sums).scatter(-1, sums.topk(config.topk_group).indices, 1.0)
    margin = _gap(sums, config.topk_group)
    return torch.minimum(margin, _gap((grouped * kept[..., None]).flatten(-2), config.num_experts_per_tok))


def _gap(scores: Tensor, kept: int) -> Tensor:
    """Between the last one kept and the first one left out."""
    if kept == scores.shape[-1]:
        return scores.new_full(scores.shape[:-1], torch.inf)
    ordered = scores.sort(descending=True).values
    return ordered[..., kept - 1] - ordered[..., kept]
