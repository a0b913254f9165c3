"""What the context tower reads for the rows of an engine: prompts, pending tokens, drafts and finished blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from twotower.decoding.output import BlockEvent, TokenLogprob
from twotower.decoding.sampling import AR_TOKEN, confidence, pick_by_rule
from twotower.engine.logprobs import Scores, Told
from twotower.engine.loops.speculative import keep
from twotower.engine.scheduled import ScheduledTokens
from twotower.engine.sequence import Phase, Row
from twotower.engine.structured import follow, restrict
from twotower.ops.host_transfer import Fetched, placed

if TYPE_CHECKING:
    from twotower.cache.hybrid_cache import TowerState
    from twotower.modeling_twotower import TwoTowerForCausalLM

SMALL = 64  # tokens: a pass of so few costs hardly more than one of a single token, so padding it is free


def following(row: Row, count: int) -> list[int] | None:
    """What follows each of the next `count` tokens of its prompt, where anybody asks how likely that is."""
    end = row.read + count
    if row.request.prompt_logprobs:
        return list(row.request.prompt[row.read + 1 : end + 1])
    first_block = row.request.logprobs is not None and row.mode == "diffusion" and end == row.prompt_end
    return [] if first_block else None


def grouped(works: Sequence[ScheduledTokens]) -> list[list[ScheduledTokens]]:
    """Passes: works of like width together, so that little of a pass is padding."""
    groups: list[list[ScheduledTokens]] = []
    for work in sorted(works, key=lambda work: len(work.tokens)):
        group = groups[-1] if groups else []
        tokens = sum(len(other.tokens) for other in group) + len(work.tokens)
        padded = (len(group) + 1) * len(work.tokens)
        if group and (padded <= SMALL or padded <= 1.5 * tokens):
            group.append(work)
        else:
            groups.append([work])
    return [sorted(group, key=lambda work: work.row.slot) for group in groups]


@dataclass(frozen=True)
class Reading:
    """A context pass on its way. choosing: the works whose next token the AR model chooses, and of each the tokens,
    the confidence in them, and how many drafted ones are kept; asking: those that want log-probabilities."""

    choosing: Sequence[ScheduledTokens]
    choice: Fetched | None
    asking: Sequence[ScheduledTokens]
    told: Told | None


def launch(model: TwoTowerForCausalLM, state: TowerState, works: Sequence[ScheduledTokens]) -> Reading:
    """Puts one context pass over the works' tokens on its way; scored rows choose and check. From here on the state,
    and each row, count the tokens as read."""
    device = state.lengths.device
    width = max(len(work.tokens) for work in works)
    tokens = placed([work.tokens + [0] * (width - len(work.tokens)) for work in works], device)
    lengths = placed([len(work.tokens) for work in works], device)
    scored = [i for i, work in enumerate(works) if work.scored or work.asks]
    scored.sort(key=lambda i: works[i].asks + (not works[i].scored))  # those that choose are a slice, and who asks too
    places = placed(scored, device, torch.long)
    choosing = [works[i] for i in scored if works[i].scored]
    asking = [works[i] for i in scored if works[i].asks]
    state.bound = max(work.row.read for work in works)  # of the rows of this pass; the others are not looked at
    rows = some([work.row for work in works], state.rows, device)
    ragged = any(len(work.tokens) < width for work in works)
    before = state.lengths
    choice = told = chosen = None
    try:
        wanted = places if scored else False
        logits = model.extend(tokens, state, lengths if ragged else None, rows=rows, logits=wanted, wide=False)
        if logits is not None:
            scores = Scores(asking, logits[-len(asking) :]) if asking else None
            if choosing:
                own = places[: len(choosing)]
                chosen, *others = _choose(state, choosing, tokens[own], lengths[own], logits[: len(choosing)])
                choice = Fetched(chosen, *others)
            if scores is not None:
                silent = sum(not work.asks for work in choosing)
                told = scores.ask(None if chosen is None else chosen[silent:])
    except Exception:
        if state.lengths is not before:  # the tokens are in, but nobody knows what follows: a later attempt reads them
            state.rollback(before)
        raise
    for work in works:
        work.row.read += len(work.tokens)
        work.row.record.context_passes += work.row.phase is not Phase.PROMPT
    return Reading(choosing, choice, asking, told)


def collect(reading: Reading) -> list[BlockEvent]:
    """Books what the pass gave, once it is done."""
    new, sure, kept = reading.choice.lists() if reading.choice is not None else ([], [], [])
    told: dict[int, list[TokenLogprob]] = {}
    if reading.told is not None:
        taken = zip(reading.choosing, new, kept, strict=True)
        told = reading.told.by_number([tokens[: count + 1] for work, tokens, count in taken if work.asks])
        for work in reading.asking:
            work.row.after = reading.told.afters.get(work.row.record.row)
    return _book([work.row for work in reading.choosing], (new, sure, kept), told) + _book_told(reading.asking, told)


def some(rows: Sequence[Row], every: int, device: torch.device) -> Tensor | None:
    """The rows' slots (B,) of a pool of `every`; None where they are all of it, in order: nothing is gathered then."""
    slots = [row.slot for row in rows]
    return None if slots == list(range(every)) else placed(slots, device)


def _choose(
    state: TowerState, works: Sequence[ScheduledTokens], tokens: Tensor, lengths: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The AR model's choice after each token; of a draft what agrees with it is kept, then its own follows.

    → tokens and the confidence in them (n, L), and how many drafted ones are kept (n,). The state keeps as many.
    """
    device = tokens.device
    allowed = restrict(works, logits)
    rows = [work.row for work in works]
    slots = placed([row.slot for row in rows], device)
    before = state.lengths[slots] - lengths
    seeds = placed([row.seed for row in rows], device)
    purpose = torch.full((len(rows), 1), AR_TOKEN, device=device)
    positions = before[:, None] + torch.arange(1, tokens.shape[1] + 1, device=device)
    rules = [row.rule for row in rows]
    own, sureness = pick_by_rule(logits, rules, seeds, positions, purpose, torch.zeros_like(purpose))
    accepted = torch.zeros_like(lengths)
    chosen = own
    if tokens.shape[1] > 1:
        asked = [row.params.acceptance for row in rows]
        relaxed = placed(asked, device, sureness.dtype)[:, None] if min(asked) < 1 else 1.0
        most = lengths if allowed is None else placed(allowed, device) + 1
        chosen, accepted = keep(tokens, own, logits, relaxed, most)
        if min(asked) < 1:  # what is kept need not be what AR would have chosen
            sureness = confidence(logits, chosen)
        state.rollback(state.lengths.index_copy(0, slots, before + 1 + accepted))
    return chosen, sureness, accepted


def _book(
    rows: Sequence[Row], choice: tuple[list[Any], list[Any], list[Any]], told: dict[int, list[TokenLogprob]]
) -> list[BlockEvent]:
    events = []
    for row, new, sure, kept in zip(rows, *choice, strict=True):
        drafted = len(row.block) - 1 if row.phase is Phase.CHECK else 0
        row.read -= drafted - kept
        row.record.checked(drafted, kept)
        steps = [*row.committed_at[1 : kept + 1], row.allowed] if drafted else [row.allowed]
        draft, logprobs = row.block[1:] if drafted else (), told.get(row.record.row, [])
        row.pending, row.kept = new[kept], kept
        followed = follow(row, new[: kept + 1])
        if isinstance(followed, BlockEvent):
            events.append(followed)
        else:
            text, complete = followed
            events.append(row.record.take(text, steps, sure[: kept + 1], draft, logprobs, complete))
    return events


def _book_told(works: Sequence[ScheduledTokens], told: dict[int, list[TokenLogprob]]) -> list[BlockEvent]:
    """Of works that chose nothing: a prompt's log-probabilities, and blocks that waited for theirs."""
    events = []
    for row in [work.row for work in works if not work.scored]:
        logprobs = told[row.record.row]
        if row.phase is Phase.PROMPT:
            row.record.prompt_logprobs += logprobs
        else:
            events.append(row.record.take(row.held, row.committed_at, row.confidence, logprobs=logprobs))
            row.held = []
    return events
