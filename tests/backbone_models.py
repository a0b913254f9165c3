"""Two-tower models of every family of backbones, from the tiny checkpoints of `tiny_backbones`."""

from __future__ import annotations

import copy
import zlib
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tiny_backbones import SHAPES, VOCAB, save

from twotower import TwoTowerForCausalLM
from twotower.checkpoint.convert import convert

MASK = 3
# For the short form: every kind of layer and option that changes the caches or the passes.
NAMES = tuple(SHAPES)


@cache
def initialised(name: str, dtype: torch.dtype = torch.float64) -> TwoTowerForCausalLM:
    """The model that `twotower init` makes: the denoiser is a copy of the backbone."""
    with TemporaryDirectory() as folder:
        ar, two = Path(folder, "ar"), Path(folder, "two")
        save(name, ar)
        convert(ar, two, mask_token=MASK)
        return TwoTowerForCausalLM.from_pretrained(two, dtype=dtype).eval().requires_grad_(False)


@cache
def trained(name: str, dtype: torch.dtype = torch.float64) -> TwoTowerForCausalLM:
    """As `initialised`, but the denoiser's weights differ from the backbone's, and it has random time conditioning."""
    model = copy.deepcopy(initialised(name))
    assert model.denoiser is not None
    assert model.time is not None
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)

    for tensor in model.denoiser.parameters():
        spread = float(tensor.std()) if tensor.numel() > 1 else 0.0
        tensor += 0.3 * max(spread, 0.05) * noise(tensor)
    for tensor in model.time.t_block.parameters():
        tensor += 0.02 * noise(tensor)
    for tensor in model.time.scale_shift_tables:
        tensor += 0.2 * noise(tensor)
    return model.to(dtype)


def some_text(length: int, seed: int = 0) -> list[int]:
    """Random tokens without special ones."""
    return torch.randint(4, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
