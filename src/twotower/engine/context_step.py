"""One pass of the context tower: prompts, pending tokens, drafts and finished blocks that it reads together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.cache.hybrid_cache import TowerState
from twotower.decoding.acceptance import accept
from twotower.decoding.output import BlockEvent, TokenLogprob
from twotower.decoding.sampling import AR_TOKEN, NoiseKeys, confidence, pick_rows
from twotower.engine.logprobs import LogprobRequest, PendingLogprobs
from twotower.engine.row_constants import RowConstants
from twotower.engine.scheduled import ScheduledTokens
from twotower.engine.sequence import Phase, RunningSequence
from twotower.engine.slots import at, slots_of
from twotower.engine.structured import advance, mask_logits
from twotower.engine.towers import Towers
from twotower.ops.host_transfer import AsyncHostCopy, to_device_async

SMALL = 64  # tokens: a pass of so few costs hardly more than a pass of one token, so padding it is free


def following(sequence: RunningSequence, count: int) -> list[int] | None:
    """What follows each of the next `count` prompt tokens, where log-probabilities of the prompt are wanted."""
    end = sequence.read + count
    if sequence.request.prompt_logprobs:
        return list(sequence.request.prompt[sequence.read + 1 : end + 1])
    wanted = sequence.request.logprobs is not None and sequence.mode == "diffusion"
    return [] if wanted and end == sequence.prompt_end else None


def grouped(works: Sequence[ScheduledTokens]) -> list[list[ScheduledTokens]]:
    """Passes: works of like width together, so that little of a pass is padding; each in the order of the slots, as the
    works are given."""
    if len({len(work.tokens) for work in works}) <= 1:
        return [list(works)] if works else []
    groups: list[list[ScheduledTokens]] = []
    for work in sorted(works, key=lambda work: len(work.tokens)):
        group = groups[-1] if groups else []
        tokens = sum(len(other.tokens) for other in group) + len(work.tokens)
        padded = (len(group) + 1) * len(work.tokens)
        if group and (padded <= SMALL or padded <= 1.5 * tokens):
            group.append(work)
        else:
            groups.append([work])
    return [sorted(group, key=lambda work: work.sequence.slot) for group in groups]


class PendingContext(NamedTuple):
    """A launched context pass. choosing: the works whose next token the AR model chooses, and of each the tokens, the
    confidence in them, and how many drafted ones are accepted; asking: those that want log-probabilities."""

    choosing: Sequence[ScheduledTokens]
    choice: AsyncHostCopy | None
    asking: Sequence[ScheduledTokens]
    logprobs: PendingLogprobs | None


class _Scored(NamedTuple):
    """The works of a pass that need logits. places: where they stand in the pass (None: all of them, in order), those
    that choose first, and of these the ones that ask last."""

    choosing: list[ScheduledTokens]
    asking: list[ScheduledTokens]
    places: list[int] | None

    @classmethod
    def of(cls, works: Sequence[ScheduledTokens]) -> _Scored:
        asks = [work.asks for work in works]
        if not any(asks) and all(work.scored for work in works):
            return cls(list(works), [], None)
        scored = [i for i, work in enumerate(works) if work.scored or asks[i]]
        scored.sort(key=lambda i: asks[i] + (not works[i].scored))
        choosing = [works[i] for i in scored if works[i].scored]
        return cls(choosing, [works[i] for i in scored if asks[i]], scored)


def launch(
    model: Towers, state: TowerState, constants: RowConstants, works: Sequence[ScheduledTokens]
) -> PendingContext:
    """Launches one context pass over the works' tokens; scored works choose and check. From here on the state, and each
    sequence, count the tokens as read."""
    device = state.lengths.device
    counts = [len(work.tokens) for work in works]
    width = max(counts)
    tokens = to_device_async(
        [work.tokens + [0] * (width - count) for work, count in zip(works, counts, strict=True)], device
    )
    lengths = to_device_async(counts, device) if min(counts) < width else None
    scored = _Scored.of(works)
    places = None if scored.places is None else to_device_async(scored.places, device, torch.long)
    wanted: bool | Tensor = True if places is None else places if len(places) else False
    sequences = [work.sequence for work in works]
    state.max_seq_len = max([sequence.read for sequence in sequences])  # of this pass only
    slots = slots_of(sequences, state.rows, device)
    before = state.lengths
    choice = logprobs = None
    try:
        logits = model.extend(tokens, state, lengths, rows=slots, logits=wanted, upcast_logits=False)
        if logits is not None:
            request = LogprobRequest(scored.asking, logits[-len(scored.asking) :]) if scored.asking else None
            chosen = None
            if scored.choosing:
                if places is not None:  # fewer than all, or in another order
                    own = places[: len(scored.choosing)]
                    tokens, lengths = tokens[own], None if lengths is None else lengths[own]
                    slots = own if slots is None else slots[own]
                own_logits = logits[: len(scored.choosing)]
                chosen, *others = _choose(state, constants, scored.choosing, _Read(tokens, lengths, slots), own_logits)
                choice = AsyncHostCopy(chosen, *others)
            if request is not None:
                silent = sum(not work.asks for work in scored.choosing)
                logprobs = request.gather(None if chosen is None else chosen[silent:])
    except BaseException:  # the user may have interrupted the pass
        if state.lengths is not before:  # the tokens are in, but nobody knows what follows: a later attempt reads them
            state.rollback(before)
        raise
    for sequence, count in zip(sequences, counts, strict=True):
        sequence.read += count
        sequence.output.context_passes += sequence.phase is not Phase.PROMPT
    return PendingContext(scored.choosing, choice, scored.asking, logprobs)


def collect(pending: PendingContext) -> list[BlockEvent]:
    """Books what the pass gave, once it is done."""
    new, sure, accepted = _chosen(pending)
    found: dict[int, list[TokenLogprob]] = {}
    if pending.logprobs is not None:
        taken = zip(pending.choosing, new, accepted, strict=True)
        found = pending.logprobs.by_number([tokens[: count + 1] for work, tokens, count in taken if work.asks])
        for work in pending.asking:
            work.sequence.after = pending.logprobs.afters.get(work.sequence.output.row)
    events = _book([work.sequence for work in pending.choosing], (new, sure, accepted), found)
    return events + _book_logprobs(pending.asking, found) if pending.asking else events


def _chosen(pending: PendingContext) -> tuple[list[list[int]], list[list[float]], list[int]]:
    """On the host: tokens and confidences of each choosing work, and how many drafted tokens are accepted."""
    if pending.choice is None:
        return [], [], []
    new, sure, *accepted = pending.choice.tolist()
    return new, sure, accepted[0] if accepted else [0] * len(new)


class _Read(NamedTuple):
    """What the choosing works read: tokens (n, L), of which the first lengths (n,) count (None: all), slots (n,) (None:
    all)."""

    tokens: Tensor
    lengths: Tensor | None
    slots: Tensor | None


def _choose(
    state: TowerState, constants: RowConstants, works: Sequence[ScheduledTokens], read: _Read, logits: Tensor
) -> tuple[Tensor, ...]:
    """The AR model's choice after each token; what agrees with it is accepted of a draft, then its own token follows.

    → tokens and the confidence in them (n, L), and, where a draft was read, how many of its tokens are accepted (n,).
    The state keeps as many.
    """
    tokens, device, width = read.tokens, logits.device, read.tokens.shape[1]
    allowed = mask_logits(works, logits)
    sequences = [work.sequence for work in works]

    def before() -> Tensor:
        return at(state.lengths, read.slots) - (width if read.lengths is None else read.lengths)

    def keys() -> NoiseKeys:
        positions = before()[:, None] + torch.arange(1, width + 1, device=device)
        purpose = torch.full((len(works), 1), AR_TOKEN, device=device)
        return NoiseKeys(at(constants.seeds, read.slots), positions, purpose, torch.zeros_like(purpose))

    own, sure = pick_rows(logits, [sequence.rule for sequence in sequences], keys)
    if width == 1:
        return own, sure
    relaxed = any(sequence.params.acceptance < 1 for sequence in sequences)
    most = read.lengths if allowed is None else to_device_async(allowed, device) + 1
    acceptance = at(constants.acceptance, read.slots) if relaxed else 1.0
    chosen, accepted = accept(tokens, own, logits, acceptance, most)
    if relaxed:  # what is accepted need not be what the AR model would have chosen
        sure = confidence(logits, chosen)
    kept = before() + 1 + accepted
    state.rollback(kept if read.slots is None else state.lengths.index_copy(0, read.slots, kept))
    return chosen, sure, accepted


def _book(
    sequences: Sequence[RunningSequence],
    choice: tuple[list[list[int]], list[list[float]], list[int]],
    found: dict[int, list[TokenLogprob]],
) -> list[BlockEvent]:
    """The round's tokens of each sequence: the accepted part of its draft, and the AR model's own token."""
    events = []
    for sequence, new, sure, accepted in zip(sequences, *choice, strict=True):
        draft: Sequence[int] = ()
        steps = [sequence.allowed]
        if sequence.phase is Phase.CHECK:
            draft = sequence.block[1:]
            steps = [*sequence.committed_at[1 : accepted + 1], sequence.allowed]
            sequence.read -= len(draft) - accepted
            sequence.output.checked(len(draft), accepted)
        sequence.pending, sequence.accepted = new[accepted], accepted
        text, complete = new[: accepted + 1], False
        if sequence.matcher is not None:
            advanced = advance(sequence, sequence.matcher, text)
            if isinstance(advanced, BlockEvent):
                events.append(advanced)
                continue
            text, complete = advanced
        logprobs = found.get(sequence.output.row, [])
        events.append(sequence.output.take(text, steps, sure[: accepted + 1], draft, logprobs, complete))
    return events


def _book_logprobs(works: Sequence[ScheduledTokens], found: dict[int, list[TokenLogprob]]) -> list[BlockEvent]:
    """Of works that chose nothing: a prompt's log-probabilities, and blocks that waited for theirs."""
    events = []
    for sequence in [work.sequence for work in works if not work.scored]:
        logprobs = found[sequence.output.row]
        if sequence.phase is Phase.PROMPT:
            sequence.output.prompt_logprobs += logprobs
        else:
            output = sequence.output
            events.append(output.take(sequence.held, sequence.committed_at, sequence.confidence, logprobs=logprobs))
            sequence.held = []
    return events
