"""Part 8: the published shape in int8, made layer by layer in a fresh process, so that bf16 weights never all exist."""

from __future__ import annotations

import time

import torch
from common.models import TimeConditioning, fill_time
from torch import nn

from gpu_parts import full
from gpu_parts.clock import wait
from gpu_parts.record import Figures, Record
from gpu_parts.setting import Setting
from twotower import TwoTowerConfig, TwoTowerForCausalLM
from twotower.checkpoint.quantize import quantization_of, quantize_
from twotower.model.tower import Tower


@torch.no_grad()
def run(setting: Setting, record: Record) -> None:
    rates = setting.rates(record)
    made: list[TwoTowerForCausalLM] = []
    record.measure("making it", lambda: making(setting, made))
    if not made:
        return
    shapes = full.SMALL if setting.small else full.SHAPES[:3]
    seconds = setting.budget(record, 3 * len(shapes))
    for shape in shapes:
        full.measure_shape(setting, record, made[0], rates, shape, seconds)


def making(setting: Setting, made: list[TwoTowerForCausalLM]) -> Figures:
    """Makes the model; says how much memory it takes, and how much it took at most."""
    started = time.perf_counter()
    model = int8_model(setting.config(), setting.dtype, setting.device)
    wait(setting.device)
    held = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    found: Figures = {"weights GB": sum(held.values()) / 1e9, "seconds": time.perf_counter() - started}
    if setting.cuda:
        found["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
    made.append(model)
    return found | {"note": f"both towers, weights of their own, {quantization_of(model)}"}


@torch.no_grad()
def int8_model(config: TwoTowerConfig, dtype: torch.dtype, device: torch.device) -> TwoTowerForCausalLM:
    """Both towers with random weights in int8. At most one layer has plain weights at a time."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = TwoTowerForCausalLM(config)
    model.to(dtype)
    assert model.denoiser is not None
    assert isinstance(model.time, TimeConditioning)
    for tower in (model.context, model.denoiser):
        quantize_tower(tower, device)
    model.time.to_empty(device=device)
    fill_time(model.time)
    model.config.dtype = dtype
    return model.eval()


def quantize_tower(tower: Tower, device: torch.device) -> None:
    """Gives a tower on the meta device random weights, layer by layer, and quantizes each layer at once."""
    std = tower.spec.initializer_range
    for name, part in tower.named_children():
        parts = part.values() if isinstance(part, nn.ModuleDict) else part if isinstance(part, nn.ModuleList) else ()
        for layer in parts:
            random_weights(layer, device, std)
            quantize_(layer, "int8")
        if not parts:
            random_weights(part, device, std)
            alone = nn.ModuleDict({name: part})
            setattr(tower, name, quantize_(alone, "int8")[name])


def random_weights(module: nn.Module, device: torch.device, std: float) -> None:
    """Random matrices; vectors as after the initialization of a model: norms 1, biases 0, and those of Mamba."""
    module.to_empty(device=device)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.dim() > 1:
            tensor.normal_(0, std)
        else:
            tensor.fill_(1.0 if name.endswith(("D", "norm.weight", "norm_f.weight")) or name == "weight" else 0.0)
    for part in module.modules():
        if hasattr(part, "A_log"):
            part.reset_parameters()
