"""Constants of each running request, on the device that reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from twotower.decoding.sampling import AR_TOKEN, DIFFUSION_CANDIDATE
from twotower.engine.sequence import RunningSequence
from twotower.ops.host_transfer import to_device_async


class RowConstants:
    """Constants by slot, written when a request is admitted.

    seeds (R,); block_size, mask_token, policy_value, acceptance (R, 1); purpose (R, 1): the purpose of the noise of the
    candidates.
    """

    def __init__(self, rows: int, device: torch.device, dtype: torch.dtype) -> None:
        self.rows, self.device = rows, device
        self._integers = torch.zeros(rows, 4, dtype=torch.long, device=device)
        self._floats = torch.zeros(rows, 2, dtype=dtype, device=device)
        self.seeds = self._integers[:, 0]
        self.block_size, self.mask_token, self.purpose = (self._integers[:, i : i + 1] for i in range(1, 4))
        self.policy_value, self.acceptance = (self._floats[:, i : i + 1] for i in range(2))

    def admit(self, sequences: Sequence[RunningSequence]) -> None:
        """Writes the constants of new sequences."""
        integers, floats = [], []
        for sequence in sequences:
            params = sequence.params
            as_ar = sequence.mode == "verified" or sequence.block_rule.draft_head
            purpose = AR_TOKEN if as_ar else DIFFUSION_CANDIDATE
            integers.append((sequence.seed, params.block_size, params.mask_token_id, purpose))
            floats.append((sequence.policy_value, sequence.acceptance))
        slots = to_device_async([sequence.slot for sequence in sequences], self.device)
        self._integers[slots] = to_device_async(integers, self.device)
        self._floats[slots] = to_device_async(floats, self.device, self._floats.dtype)
