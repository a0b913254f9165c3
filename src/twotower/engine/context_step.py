"""One pass of the context tower over prompts, pending tokens, drafts and finished blocks together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.cache.hybrid_cache import TowerState
from twotower.decoding.acceptance import accept
from twotower.decoding.output import BlockEvent, TokenLogprob
from twotower.decoding.sampling import AR_TOKEN, NoiseKeys, all_greedy, confidence, sample_rows
from twotower.engine import changed_logits, one_pass
from twotower.engine.constraint_masks import advance, mask_logits
from twotower.engine.logprobs import LogprobRequest, PendingLogprobs, numbers_of
from twotower.engine.row_constants import RowConstants
from twotower.engine.scheduled import ScheduledTokens
from twotower.engine.sequence import Phase, RunningSequence
from twotower.engine.slots import at, slots_of
from twotower.engine.towers import Towers
from twotower.model.draft_head import DraftHead, draw
from twotower.ops.host_transfer import AsyncHostCopy, to_device_async

SMALL_PASS = 64  # tokens: a pass over so few costs little more than over one token, so padding is free


def known_next(sequence: RunningSequence, count: int) -> list[int] | None:
    """The known token after each of the next `count` prompt tokens, if log-probabilities need it."""
    end = sequence.read + count
    if sequence.request.prompt_logprobs and not sequence.output.blocks:
        return list(sequence.request.prompt[sequence.read + 1 : end + 1])
    wanted = sequence.request.logprobs is not None and sequence.mode == "diffusion" and not sequence.begins_with_text
    return [] if wanted and end == sequence.prompt_end else None


def group_by_width(scheduled: Sequence[ScheduledTokens]) -> list[list[ScheduledTokens]]:
    """Groups entries of similar width into passes with little padding. Each group keeps the order of the slots."""
    if len({entry.width for entry in scheduled}) <= 1:
        return [list(scheduled)] if scheduled else []
    groups: list[list[ScheduledTokens]] = []
    for entry in sorted(scheduled, key=lambda entry: entry.width):
        group = groups[-1] if groups else []
        tokens = sum(other.width for other in group) + entry.width
        padded = (len(group) + 1) * entry.width
        if group and (padded <= SMALL_PASS or padded <= 1.5 * tokens):
            group.append(entry)
        else:
            groups.append([entry])
    return [sorted(group, key=lambda entry: entry.sequence.slot) for group in groups]


class PendingContext(NamedTuple):
    """A launched context pass.

    sampling: the entries whose next token the AR model chooses. choice: their tokens, confidences and numbers of
    accepted drafted tokens. with_logprobs: the entries that want log-probabilities. started: the time of the launch.
    """

    sampling: Sequence[ScheduledTokens]
    choice: AsyncHostCopy | None
    with_logprobs: Sequence[ScheduledTokens]
    logprobs: PendingLogprobs | None
    started: float | None = None


class _NeedLogits(NamedTuple):
    """The entries of a pass that need logits.

    places: their indices in the pass (None: all entries, in order). Sampling entries come first, those of them that
    want log-probabilities last.
    """

    sampling: list[ScheduledTokens]
    with_logprobs: list[ScheduledTokens]
    places: list[int] | None

    @classmethod
    def of(cls, scheduled: Sequence[ScheduledTokens]) -> _NeedLogits:
        wants_logprobs = [entry.wants_logprobs for entry in scheduled]
        if not any(wants_logprobs) and all(entry.sampled for entry in scheduled):
            return cls(list(scheduled), [], None)
        places = [i for i, entry in enumerate(scheduled) if entry.sampled or wants_logprobs[i]]
        places.sort(key=lambda i: wants_logprobs[i] + (not scheduled[i].sampled))
        sampling = [scheduled[i] for i in places if scheduled[i].sampled]
        return cls(sampling, [scheduled[i] for i in places if wants_logprobs[i]], places)


def launch(
    model: Towers, state: TowerState, constants: RowConstants, scheduled: Sequence[ScheduledTokens]
) -> PendingContext:
    """Launches one context pass over the scheduled tokens, which then count as read."""
    started, device = time.perf_counter(), state.lengths.device
    counts = [len(entry.tokens) for entry in scheduled]
    width = max(entry.width for entry in scheduled)
    mask = model.config.mask_token
    tokens = to_device_async(
        [entry.tokens + [mask] * entry.masks + [0] * (width - entry.width) for entry in scheduled], device
    )
    lengths, prefix = _lengths(scheduled, width, device)
    needs = _NeedLogits.of(scheduled)
    places = None if needs.places is None else to_device_async(needs.places, device, torch.long)
    wanted: bool | Tensor = True if places is None else places if len(places) else False
    sequences = [entry.sequence for entry in scheduled]
    state.max_seq_len = max([sequence.read for sequence in sequences])  # in this pass
    slots = slots_of(sequences, state.rows, device)
    before = state.lengths
    choice = logprobs = None
    try:
        state.make_room([sequence.slot for sequence in sequences], width)
        logits = model.extend(tokens, state, lengths, rows=slots, logits=wanted, upcast_logits=False, prefix=prefix)
        if logits is not None:
            if prefix is not None:
                _bar_masks(logits, prefix if places is None else prefix[places], mask)
            with_logprobs = needs.with_logprobs
            request = LogprobRequest(with_logprobs, logits[-len(with_logprobs) :]) if with_logprobs else None
            chosen = None
            lengths = lengths if prefix is None else prefix
            if needs.sampling:
                if places is not None:  # some entries only, or another order
                    own = places[: len(needs.sampling)]
                    tokens, lengths = tokens[own], None if lengths is None else lengths[own]
                    slots = own if slots is None else slots[own]
                own_logits = logits[: len(needs.sampling)]
                inputs = _PassInputs(tokens, lengths, slots)
                head = None if prefix is None else model.draft_head
                chosen, *others = _choose(state, constants, needs.sampling, inputs, own_logits, head)
                choice = AsyncHostCopy(chosen, *others)
            if request is not None:
                silent = sum(not entry.wants_logprobs for entry in needs.sampling)
                logprobs = request.gather(None if chosen is None else chosen[silent:])
    except BaseException:  # also KeyboardInterrupt during the pass
        if state.lengths is not before:  # the tokens are appended, but not sampled: a later pass reads them again
            state.rollback(before)
        raise
    original = state.spec.original_length
    for sequence, count in zip(sequences, counts, strict=True):
        if original is not None and sequence.read < original <= sequence.read + count:
            sequence.visible_length = -1  # all keys of the row are new
        sequence.read += count
        sequence.output.context_passes += sequence.phase is not Phase.PROMPT
    return PendingContext(needs.sampling, choice, needs.with_logprobs, logprobs, started)


def _lengths(
    scheduled: Sequence[ScheduledTokens], width: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """The tokens of each entry that the pass reads (None: `width`), and those before its masks (None: no masks)."""
    lengths = [entry.width for entry in scheduled]
    prefix = [len(entry.tokens) for entry in scheduled] if any(entry.masks for entry in scheduled) else None
    return (
        to_device_async(lengths, device) if min(lengths) < width else None,
        None if prefix is None else to_device_async(prefix, device),
    )


def _bar_masks(logits: Tensor, prefix: Tensor, mask: int) -> None:
    """Sets to −∞, in logits (n, L, V), those of the mask token from position prefix (n,) on: no draft has masks."""
    drafted = torch.arange(logits.shape[1], device=logits.device) >= prefix[:, None]
    logits[..., mask].masked_fill_(drafted, -torch.inf)


def collect(pending: PendingContext) -> list[BlockEvent]:
    """Waits for the results of a pass and records them."""
    new, sure, accepted = _chosen(pending)
    if pending.started is not None and pending.sampling:
        width, seconds = max(entry.width for entry in pending.sampling), time.perf_counter() - pending.started
        one_pass.note_cost([entry.sequence for entry in pending.sampling], width, seconds)
    found: dict[int, list[TokenLogprob]] = {}
    if pending.logprobs is not None:
        taken = zip(pending.sampling, new, accepted, strict=True)
        found = pending.logprobs.by_number(
            [tokens[: count + 1] for entry, tokens, count in taken if entry.wants_logprobs]
        )
        for entry in pending.with_logprobs:
            entry.sequence.last_logits = pending.logprobs.last_logits.get(entry.sequence.output.row)
    events = record_tokens(pending.sampling, (new, sure, accepted), found)
    return events + _record_logprobs(pending.with_logprobs, found) if pending.with_logprobs else events


def _chosen(pending: PendingContext) -> tuple[list[list[int]], list[list[float]], list[int]]:
    """Tokens, confidences and numbers of accepted drafted tokens of each sampling entry, on the host."""
    if pending.choice is None:
        return [], [], []
    new, sure, *accepted = pending.choice.tolist()
    return new, sure, accepted[0] if accepted else [0] * len(new)


class _PassInputs(NamedTuple):
    """Input of the sampling entries: tokens (n, L), of which the first lengths (n,) count; slots (n,). None: all."""

    tokens: Tensor
    lengths: Tensor | None
    slots: Tensor | None


def _choose(
    state: TowerState,
    constants: RowConstants,
    scheduled: Sequence[ScheduledTokens],
    read: _PassInputs,
    logits: Tensor,
    head: DraftHead | None,
) -> tuple[Tensor, ...]:
    """Samples the AR model's token after each token, accepts drafted tokens, and rolls the state back to these.

    Returns tokens and confidences (n, L) and, if the pass read drafts, the numbers of accepted drafted tokens (n,). The
    accepted drafted tokens are followed by the AR model's own token. head: draws the tokens at masks.
    """
    tokens, device, width = read.tokens, logits.device, read.tokens.shape[1]
    allowed = mask_logits(scheduled, logits)
    logits = changed_logits.for_reading(scheduled, logits)
    sequences = [entry.sequence for entry in scheduled]

    def before() -> Tensor:
        return at(state.lengths, read.slots) - (width if read.lengths is None else read.lengths)

    def keys() -> NoiseKeys:
        positions = before()[:, None] + torch.arange(1, width + 1, device=device)
        purpose = torch.full((len(scheduled), 1), AR_TOKEN, device=device)
        return NoiseKeys(at(constants.seeds, read.slots), positions, purpose, torch.zeros_like(purpose))

    rules = [sequence.rule for sequence in sequences]
    own, sure = sample_rows(logits, rules, keys)
    if head is not None and read.lengths is not None:

        def choose(logits: Tensor, place: int) -> tuple[Tensor, Tensor]:
            return sample_rows(logits, rules, lambda: keys().at(place))

        masked = torch.arange(width, device=device) >= read.lengths[:, None]
        first = min(len(entry.tokens) for entry in scheduled)
        own, sure = draw(head, logits, (own, sure), masked, own[:, 0], choose, first, all_greedy(rules))
    if width == 1:
        return own, sure
    final = any(sequence.keeps_draft for sequence in sequences)
    relaxed = any(sequence.acceptance < 1 and not sequence.keeps_draft for sequence in sequences)
    most = read.lengths if allowed is None else to_device_async(allowed, device) + 1
    acceptance = at(constants.acceptance, read.slots) if relaxed or final else 1.0
    chosen, accepted = accept(tokens, own, logits, acceptance, most)
    if relaxed:  # an accepted token may differ from the AR model's choice
        sure = sure.where(chosen == own, confidence(logits, chosen))
    kept = before() + 1 + accepted
    state.rollback(kept if read.slots is None else state.lengths.index_copy(0, read.slots, kept))
    return chosen, sure, accepted


def record_tokens(
    scheduled: Sequence[ScheduledTokens],
    choice: tuple[list[list[int]], list[list[float]], list[int]],
    found: dict[int, list[TokenLogprob]],
) -> list[BlockEvent]:
    """Adds the round's tokens to each sequence: the accepted part of its draft, then the AR model's own token."""
    events = []
    for entry, new, sure, accepted in zip(scheduled, *choice, strict=True):
        sequence = entry.sequence
        draft: Sequence[int] = ()
        steps = [sequence.max_passes]
        if sequence.phase is Phase.CHECK:
            draft = sequence.block[1:]
            steps = [*sequence.committed_at[1 : accepted + 1], sequence.max_passes]
            sequence.read -= len(draft) - accepted
            if not sequence.keeps_draft:
                sequence.output.count_verified(len(draft), accepted)
        sequence.pending, sequence.accepted = new[accepted], accepted
        text, confidences, complete = new[: accepted + 1], sure[: accepted + 1], False
        logprobs = found.get(sequence.output.row, [])
        failed = sequence.fail_if_not_finite([*confidences, *numbers_of(logprobs)], "context tower")
        if failed is not None:
            events.append(failed)
            continue
        if sequence.one_pass:
            one_pass.next_draft(entry, new, sure, accepted)
            one_pass.show_draft(entry, new, sure, accepted)
        if sequence.final_drafts:
            text, confidences = one_pass.final_text(entry, new, sure, accepted)
            steps, draft = [0] * len(text), ()
        elif sequence.final_block:
            text = [*draft[:accepted], new[accepted]]
            confidences, draft = [*sequence.confidence[1 : accepted + 1], sure[accepted]], ()
        if sequence.matcher is not None:
            advanced = advance(sequence, sequence.matcher, text)
            if isinstance(advanced, BlockEvent):
                events.append(advanced)
                continue
            text, complete = advanced
        events.append(sequence.output.take(text, steps, confidences, draft, logprobs, complete))
    return events


def _record_logprobs(scheduled: Sequence[ScheduledTokens], found: dict[int, list[TokenLogprob]]) -> list[BlockEvent]:
    """Adds log-probabilities of prompts, and blocks that waited for their log-probabilities."""
    events = []
    for sequence in [entry.sequence for entry in scheduled if not entry.sampled]:
        logprobs = found[sequence.output.row]
        failed = sequence.fail_if_not_finite(numbers_of(logprobs), "context tower")
        if failed is not None:
            events.append(failed)
            continue
        if sequence.phase is Phase.PROMPT:
            sequence.output.prompt_logprobs += logprobs
        else:
            output = sequence.output
            events.append(
                output.take(sequence.held_tokens, sequence.committed_at, sequence.confidence, logprobs=logprobs)
            )
            sequence.held_tokens = []
    return events
