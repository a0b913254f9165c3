"""The blocks that the denoiser is filling: one for each row slot, each at its own step.

A pass may be launched before the last one's results are here. A block that the last one finished then has an idle pass:
it counts no tokens, commits nothing, and whoever collects it passes over the row, which is no longer at that block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from twotower.decoding.output import StepEvent
from twotower.decoding.sampling import AR_TOKEN, DIFFUSION_CANDIDATE, pick_by_rule
from twotower.decoding.unmasking import Pass, decide
from twotower.engine.sequence import Phase, Row
from twotower.ops.host_transfer import Fetched, placed
from twotower.ops.precision import accumulation_dtype

if TYPE_CHECKING:
    from twotower.cache.hybrid_cache import ContextView
    from twotower.model.towers import TwoTowerModel


class Blocks:
    """tokens, masked, committed_at, confidence (R, S) for R slots and blocks of up to S positions, on the denoiser's
    device; step, steps, sizes, purpose, mask (R, 1): passes done and allowed, positions, what the noise is for, mask
    token."""

    def __init__(self, model: TwoTowerModel, rows: int, size: int, device: torch.device) -> None:
        self.model = model
        self.size = size
        self.device = device
        self.dtype = accumulation_dtype(model.dtype)

        def whole(*shape: int) -> Tensor:
            return torch.zeros(rows, *shape, dtype=torch.long, device=device)

        self.tokens, self.committed_at = whole(size), whole(size)
        self.masked = torch.zeros(rows, size, dtype=torch.bool, device=device)
        self.confidence = torch.zeros(rows, size, dtype=self.dtype, device=device)
        self.step, self.steps, self.sizes, self.purpose, self.mask = (whole(1) for _ in range(5))

    def begin(self, rows: Sequence[Row]) -> None:
        """Opens a block for each row; in verified decoding it begins with the pending token, which is decided."""
        if not rows:
            return
        slots = placed([row.slot for row in rows], self.device)
        facts = []
        for row in rows:
            drafts = row.mode == "verified"
            purpose = AR_TOKEN if drafts else DIFFUSION_CANDIDATE
            mask = row.params.mask_token_id
            decided = row.pending if drafts else mask
            facts.append((row.allowed, row.params.block_size, purpose, mask, decided, not drafts))
            row.memory = None
        steps_, sizes, purpose_, mask_, decided_, open_ = placed(facts, self.device).T
        self.step[slots] = 0
        for pool, value in (
            (self.steps, steps_), (self.sizes, sizes), (self.purpose, purpose_), (self.mask, mask_),
        ):  # fmt: skip
            pool[slots] = value[:, None]
        tokens = mask_[:, None].repeat(1, self.size)
        tokens[:, 0] = decided_
        masked = torch.arange(self.size, device=self.device) < sizes[:, None]
        masked[:, 0] = open_.bool()
        self.tokens[slots], self.masked[slots] = tokens, masked
        self.committed_at[slots], self.confidence[slots] = 0, 0.0

    def launch(self, rows: Sequence[Row], view: ContextView, ahead: bool = False) -> Look:
        """Puts a pass of the denoiser over the rows' blocks on its way. ahead: whether blocks may turn out to have been
        finished by a pass that nobody has collected yet."""
        slots = placed([row.slot for row in rows], self.device)
        tokens, masked, step, sizes = self.tokens[slots], self.masked[slots], self.step[slots], self.sizes[slots]
        lengths = None
        if ahead:
            lengths = sizes[:, 0] * masked.any(1)
        elif any(row.params.block_size < self.size for row in rows):
            lengths = sizes[:, 0]
        t = masked.sum(1).to(self.dtype) / sizes[:, 0]
        logits = self.model.denoise(tokens, t, view, lengths=lengths, wide=False)
        logits.scatter_(2, self.mask[slots][..., None].expand(-1, self.size, -1), -torch.inf)
        positions = view.lengths[:, None] + torch.arange(self.size, device=self.device)
        purpose, seeds = self.purpose[slots], placed([row.seed for row in rows], self.device)
        noise_step = torch.where(purpose == DIFFUSION_CANDIDATE, step, 0)
        candidate, sure = pick_by_rule(logits, [row.rule for row in rows], seeds, positions, purpose, noise_step)
        chosen, errors = unmask(rows, Pass(logits, candidate, sure, masked, step, self.steps[slots]))
        tokens, masked = torch.where(chosen, candidate, tokens), masked & ~chosen
        committed_at = torch.where(chosen, step, self.committed_at[slots])
        confidence = torch.where(chosen, sure, self.confidence[slots])
        self.tokens[slots], self.masked[slots] = tokens, masked
        self.committed_at[slots], self.confidence[slots] = committed_at, confidence
        self.step[slots] = step + 1
        proposed = (candidate, sure) if any(row.request.watched for row in rows) else ()
        look = Look(
            list(rows), [row.opened for row in rows], [row.taken for row in rows], errors,
            Fetched(masked, tokens, committed_at, confidence, *proposed),
        )  # fmt: skip
        for row in rows:
            row.taken += 1
        return look

    @staticmethod
    def collect(look: Look) -> tuple[list[Row], list[tuple[Row, Exception]]]:
        """What the pass did to the blocks, once it is done → the rows whose block is, with what is in it; and those
        whose policy raised."""
        masked, tokens, committed_at, confidence, *proposed = look.blocks.wait()
        live = look.live()
        for place in live:
            look.rows[place].record.denoiser_passes += 1
        if proposed:
            candidate, sure = proposed
            show(look, live, masked, torch.where(masked, candidate, tokens), torch.where(masked, sure, confidence))
        open_ = masked.any(1).tolist()
        places = [place for place in live if not open_[place] and place not in look.errors]
        done = [look.rows[place] for place in places]
        columns = (column[places].tolist() for column in (tokens, committed_at, confidence)) if places else ((),) * 3
        for row, block, at, believed in zip(done, *columns, strict=True):
            size = row.params.block_size
            row.block, row.committed_at, row.confidence = block[:size], at[:size], believed[:size]
        return done, [(look.rows[place], look.errors[place]) for place in live if place in look.errors]


class Look(NamedTuple):
    """A pass on its way, and what it makes of the rows' blocks: masked, tokens, committed_at, confidence (n, S); where
    a row is watched also the tokens it proposes and its confidence in them.

    opened: which of its blocks each row was at; steps: how many passes that block had had; errors: what policies
    raised, by the row's place.
    """

    rows: Sequence[Row]
    opened: Sequence[int]
    steps: Sequence[int]
    errors: dict[int, Exception]
    blocks: Fetched

    def live(self) -> list[int]:
        """Places of the rows that are still at that block: the others have finished it, ended or been given up."""
        both = zip(self.rows, self.opened, strict=True)
        return [
            place for place, (row, opened) in enumerate(both) if row.phase is Phase.DENOISE and row.opened == opened
        ]


def show(look: Look, places: Sequence[int], masked: Tensor, tokens: Tensor, confidence: Tensor) -> None:
    """Tells those of the rows at `places` that are watched what their blocks look like: all (n, S), on the host."""
    for place in places:
        row = look.rows[place]
        if row.request.watched:
            own = slice(row.params.block_size)
            event = StepEvent(
                row=row.record.row,
                start=len(row.record.progress.tokens) - (row.mode == "verified"),
                step=look.steps[place],
                steps=row.allowed,
                tokens=tokens[place, own].tolist(),
                masked=masked[place, own].tolist(),
                confidence=confidence[place, own].tolist(),
            )
            row.seen.append(event)


def unmask(rows: Sequence[Row], seen: Pass) -> tuple[Tensor, dict[int, Exception]]:
    """→ bool (B, L), what each row's policy commits; rows of one policy are asked together. A row whose policy raises
    commits nothing; what it raised, by the row's place."""
    groups: dict[tuple[str, bool], list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault((row.policy, row.memory is None), []).append(i)
    out = torch.zeros_like(seen.masked)
    errors: dict[int, Exception] = {}
    asked = list(groups.values())
    while asked:
        members = asked.pop()
        places = placed(members, out.device)
        own = seen if len(members) == len(rows) else Pass(*(field[places] for field in seen[:-1]))
        try:
            out[places] = _ask([rows[i] for i in members], own)
        except Exception as error:  # a policy may be a caller's own
            if len(members) > 1:
                asked += [[i] for i in members]
            else:
                errors[members[0]] = error
    return out, errors


def _ask(rows: Sequence[Row], seen: Pass) -> Tensor:
    """What rows of one policy commit; they are in the first pass of their blocks, or none of them is."""
    knobs = placed([[row.knob] for row in rows], seen.masked.device, seen.confidence.dtype)
    if rows[0].memory is not None:
        seen = seen._replace(memory=_joined([row.memory for row in rows]))
    chosen, memory = decide(rows[0].policy, seen, knobs)
    for place, row in enumerate(rows):
        row.memory = _one(memory, place)
    return chosen


def _one(memory: Any, place: int) -> Any:
    """A row's part of what a policy remembers: tensors whose first dimension is the rows, or tuples of them."""
    if isinstance(memory, tuple):
        return tuple(_one(part, place) for part in memory)
    return memory[place : place + 1] if isinstance(memory, Tensor) else memory


def _joined(memories: Sequence[Any]) -> Any:
    """The rows' parts together again."""
    first = memories[0]
    if isinstance(first, tuple):
        return tuple(_joined(parts) for parts in zip(*memories, strict=True))
    return torch.cat(list(memories)) if isinstance(first, Tensor) else first
