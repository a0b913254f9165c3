"""Tensors of a model that stay in at least fp32 whatever the model's dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

# A rounded decay rate or selection bias changes what a layer does.
FP32_SUFFIXES = (".A_log", ".dt_bias", ".D", ".e_score_correction_bias", "_scale")


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under its name in memory."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def keeps_fp32(memory: str) -> bool:
    """Whether a tensor of this name is kept in at least fp32."""
    return f".{memory}".endswith(FP32_SUFFIXES)


def target_dtype(memory: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype a tensor has in a model of `dtype`."""
    return torch.promote_types(dtype, torch.float32) if keeps_fp32(memory) else dtype


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A model in `dtype`, in place, with the tensors that must stay wide left wide."""
    for name, tensor in named_tensors(model):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(target_dtype(name, dtype))
    return model


def preserving_fp32(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`change` as `Module._apply` takes it (`.to`, `.bfloat16`, …), but it leaves the wide tensors wide."""
    names = {id(part): name for name, tensor in named_tensors(model) for part in (tensor, tensor.grad)}

    def changed(tensor: Tensor) -> Tensor:
        out = change(tensor)
        dtype = target_dtype(names.get(id(tensor), ""), out.dtype)
        return out if out.dtype == dtype else tensor.to(out.device, dtype)

    return changed
