"""The denoiser as a next-token predictor, for the mode mock-AR."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from twotower.cache.pools import ContextView
from twotower.decoding.output import BlockEvent
from twotower.decoding.sampling import AR_TOKEN, NoiseKeys, sample_rows
from twotower.engine import changed_logits
from twotower.engine.row_constants import RowConstants
from twotower.engine.sequence import Phase, RunningSequence
from twotower.engine.slots import at, slots_of
from twotower.engine.towers import Towers
from twotower.ops.host_transfer import AsyncHostCopy, to_device_async


def launch(
    model: Towers, constants: RowConstants, sequences: Sequence[RunningSequence], view: ContextView
) -> AsyncHostCopy:
    """Launches one pass over the pending tokens → the next tokens (n, 1) and their confidences."""
    device = view.lengths.device
    pending = to_device_async([[sequence.pending] for sequence in sequences], device)
    logits = model.denoise(pending, None, view, causal=True, upcast_logits=False)
    logits, head = changed_logits.for_pending(sequences, logits), model.draft_head
    if head is not None and not model.config.denoiser.acts_at_masks:  # a pending token has no masks after it
        logits = logits + head(pending).to(logits.dtype)

    def keys() -> NoiseKeys:
        seeds = at(constants.seeds, slots_of(sequences, constants.rows, device))
        purpose = torch.full((len(sequences), 1), AR_TOKEN, device=device)
        return NoiseKeys(seeds, view.lengths[:, None] + 1, purpose, torch.zeros_like(purpose))

    return AsyncHostCopy(*sample_rows(logits, [sequence.rule for sequence in sequences], keys))


def collect(sequences: Sequence[RunningSequence], proposed: AsyncHostCopy) -> list[BlockEvent]:
    """Waits for the tokens and records them. The context tower reads the pending tokens next."""
    events = []
    for sequence, (token,), sure in zip(sequences, *proposed.tolist(), strict=True):
        sequence.output.denoiser_passes += 1
        failed = sequence.fail_if_not_finite(sure, "denoiser")
        if failed is not None:
            events.append(failed)
            continue
        if sequence.request.logprobs is None:
            events.append(sequence.output.take([token], [0], sure))
        else:
            sequence.held_tokens, sequence.committed_at, sequence.confidence = [token], [0], sure
        sequence.block, sequence.pending, sequence.phase = [sequence.pending], token, Phase.COMMIT
    return events
