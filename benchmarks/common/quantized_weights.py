"""Models with random quantised weights, written in place in the layout of the kernels.

Neither a copy in another dtype nor a second copy exists at any time, and the random numbers are bytes, so a tower of
the published shape takes seconds. Integers are uniform; scales are those of weights with a deviation of about 0.02, the
project's initialization, so activations stay finite.
"""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn

from common.models import fill
from twotower import TwoTowerConfig, TwoTowerForCausalLM
from twotower.checkpoint.quantize import quantize_, schemes_of
from twotower.model.conditioning import TimeConditioning
from twotower.model.fp32_tensors import named_tensors
from twotower.model.linear import Int4Linear, Int8Linear
from twotower.model.moe import Int4Experts, Int8Experts
from twotower.ops.cpu import huge_pages
from twotower.ops.reference import int4, int8

DEVIATION = 0.02
# A bf16 of either sign in 2⁻⁹…2⁻⁸. With uniform integers −8…7, weights have a deviation of 0.014.
KEPT_BITS, SCALE_BITS = 0x807F - 2**16, (127 - 9) << 7


def quantized_shape(config: TwoTowerConfig, plan: str, dtype: torch.dtype, *, shared: bool) -> TwoTowerForCausalLM:
    """The context tower on the meta device, quantised. shared: the same weights serve as the denoiser too."""
    with torch.device("meta"):
        model = TwoTowerForCausalLM(config, towers="context")
        if shared:
            model.denoiser = model.context
            model.time = TimeConditioning(config.hidden_size, config.num_hidden_layers)
    model.to(dtype)
    model.config.dtype = dtype
    return quantize_(model, plan)


def unquantized_parts(model: TwoTowerForCausalLM) -> list[str]:
    """The parts whose large weights are not quantised. Their packed copies would be second copies."""
    return sorted(".".join(part) for part, scheme in schemes_of(model).items() if scheme == "none")


def weight_bytes(model: TwoTowerForCausalLM) -> int:
    """Bytes of all weights, each counted once."""
    return sum(tensor.nbytes for _, tensor in named_tensors(model))


@torch.no_grad()
def materialize(model: TwoTowerForCausalLM) -> None:
    """Allocates the weights of a quantised model on the meta device, and fills them at random."""
    for module in model.modules():
        for name, tensor in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(_allocated(tensor)))
        for name, tensor in list(module.named_buffers(recurse=False)):
            setattr(module, name, _allocated(tensor))
    fill(model)
    for module in model.modules():
        if isinstance(module, Int4Linear | Int4Experts):
            for name, shape in module.shapes.items():
                fill_int4(getattr(module, name), *shape[-2:])
        elif isinstance(module, Int8Linear | Int8Experts):
            for name, q in module.named_buffers():
                if q.dtype == torch.int8:
                    fill_int8(q, getattr(module, f"{name}_scale"))
    model.eval()


def _allocated(tensor: Tensor) -> Tensor:
    return huge_pages.empty(tensor.numel(), tensor.dtype).view(tensor.shape)


def fill_int4(data: Tensor, out: int, width: int) -> None:
    """Random data of a weight (…, out, width) in the layout of `ops.reference.int4`."""
    data.view(torch.int64).random_(-(2**63), None)
    data[..., : int4.SCALES].view(torch.int16).bitwise_and_(KEPT_BITS).bitwise_or_(SCALE_BITS)
    missing_rows, missing_inputs = -out % int4.PANEL, -width % int4.GROUP
    if missing_inputs:
        _clear_padding(data[..., -1:, :], out, int4.GROUP - missing_inputs)
    if missing_rows:
        _clear_padding(data[..., -1:, :, :], int4.PANEL - missing_rows, width)


def _clear_padding(part: Tensor, out: int, width: int) -> None:
    """Sets the rows and inputs that the weight does not have to 0, as `int4.quantize` does."""
    fresh = torch.empty_like(part, memory_format=torch.contiguous_format)
    int4.pack_into(fresh, int4.integers(part, out, width), int4.scales(part, out))
    part.copy_(fresh)


def fill_int8(q: Tensor, scale: Tensor) -> None:
    """Random q and scale of a weight (…, out, in) in the layout of `ops.reference.int8`."""
    q.view(torch.int64).random_(-(2**63), None)
    q.clamp_(min=-int8.QMAX)
    missing = -scale.shape[-1] % int8.PANEL
    if missing:
        q[..., -1, :, int8.PANEL - missing :] = 0
    scale.uniform_(0.5, 1.5).mul_(DEVIATION * 3**0.5 / int8.QMAX)


def bytes_read(model: TwoTowerForCausalLM, experts: list[float], *, head: bool, denoiser: bool) -> dict[str, float]:
    """Bytes of the weights that a pass of a quantised tower reads, by part, without its embeddings.

    experts: how many experts each MoE layer visits. denoiser: with time conditioning.
    """
    tower, routed, visited = model.context, 0.0, iter(experts)
    stacked = [module for module in tower.modules() if isinstance(module, Int8Experts | Int4Experts)]
    for module in stacked:
        routed += next(visited) / len(module.up_proj) * _held(module)
    every = _held(tower) - _held(tower.embeddings) - _held(tower.head) - sum(map(_held, stacked))
    return {
        "layers": every + (_held(model.time) if denoiser and model.time is not None else 0),
        "experts": routed,
        "head": _held(tower.head) * head,
    }


def _held(module: nn.Module) -> float:
    return float(sum(tensor.nbytes for tensor in chain(module.parameters(), module.buffers())))
