"""What all parts share: the device, the sizes, the ceilings of the device, and the model of the published shape."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from common import roofline
from common.models import PUBLISHED, config_of, cut_to, random_model, tower_bytes

from gpu_parts.record import MEASUREMENTS, Record, read
from twotower import TwoTowerConfig, TwoTowerForCausalLM

SPARE = 8 << 30  # bytes of the device that stay free for states, logits and libraries
CEILINGS = "ceilings"  # the measurement of the part "machine"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """small: tiny shapes. out: the folder of the results. memory: bytes of the device to use, None: what is free."""

    device: torch.device
    small: bool
    out: Path
    memory: int | None = None

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.small else torch.bfloat16

    def config(self) -> TwoTowerConfig:
        """The published shape, or the tiny one."""
        return config_of(None if self.small else PUBLISHED)

    def free(self) -> int:
        """Free bytes of the device."""
        if self.memory is not None:
            return self.memory
        if self.cuda:
            return int(torch.cuda.mem_get_info()[0])
        return 1 << 30

    def rates(self, record: Record) -> roofline.Rates:
        """The ceilings that the part "machine" measured; measured here if it did not run."""
        for line in read(self.out / MEASUREMENTS):
            if line["what"] == CEILINGS and "bytes_per_second" in line:
                return roofline.Rates(line["bytes_per_second"], line["operations_per_second"], {}, {})
        return measured_rates(self)

    def budget(self, record: Record, measurements: int) -> float:
        """Seconds for each of so many measurements."""
        return 0.005 if self.small else max(0.05, 0.7 * record.left() / measurements)


def measured_rates(setting: Setting) -> roofline.Rates:
    return roofline.measure(setting.device, setting.dtype, quick=setting.small, repeats=3)


class Form(NamedTuple):
    """How a model fits the memory. layers: None: all. text: in words, for the table."""

    shared: bool
    layers: int | None
    text: str


def form_of(config: TwoTowerConfig, dtype: torch.dtype, free: int, spare: int = SPARE) -> Form:
    """Two towers if they fit; one set of weights for both towers, which reads as much a pass; or the first layers."""
    tower, room = tower_bytes(config, dtype), free - spare
    if 2 * tower <= room:
        return Form(False, None, "both towers, weights of their own")
    text = "one set of weights serves both towers"
    if tower <= room:
        return Form(True, None, text)
    layers = cut_to(config, room, dtype).num_hidden_layers
    return Form(True, layers, f"{text}, the first {layers} layers")


def full_model(setting: Setting) -> tuple[TwoTowerForCausalLM, Form]:
    """The published shape with random weights, in the form that fits."""
    torch.manual_seed(0)
    form = form_of(setting.config(), setting.dtype, setting.free(), 0 if setting.small else SPARE)
    config = setting.config()
    if form.layers is not None:
        config = cut_to(config, setting.free() - (0 if setting.small else SPARE), setting.dtype)
    return random_model(config, setting.dtype, setting.device, shared=form.shared), form


def single_tower(setting: Setting) -> tuple[TwoTowerConfig, str]:
    """The config of one tower that fits the memory, with fewer layers if it must, and its form in words."""
    config, room = setting.config(), setting.free() - (0 if setting.small else SPARE)
    if tower_bytes(config, setting.dtype) <= room:
        return config, "one tower"
    config = cut_to(config, room, setting.dtype)
    return config, f"one tower, the first {config.num_hidden_layers} layers"


def release(*models: TwoTowerForCausalLM) -> None:
    """Frees the graphs of models, and what the allocator keeps."""
    for model in models:
        model.release()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
