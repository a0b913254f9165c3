"""The tensors of a model that stay in at least fp32, whatever the dtype of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

# Rounding a decay rate or a selection bias would change the output of a layer.
FP32_SUFFIXES = (".A_log", ".dt_bias", ".D", ".e_score_correction_bias", "_scale")


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers with their names in memory."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def keeps_fp32(memory: str) -> bool:
    """Whether the tensor of this name stays in at least fp32."""
    return f".{memory}".endswith(FP32_SUFFIXES)


def target_dtype(memory: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the tensor of this name in a model of `dtype`."""
    return torch.promote_types(dtype, torch.float32) if keeps_fp32(memory) else dtype


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Casts a model to `dtype` in place, except for the fp32 tensors; returns the model."""
    for name, tensor in named_tensors(model):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(target_dtype(name, dtype))
    return model


def preserving_fp32(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wraps a function for `Module._apply` (`.to`, `.bfloat16`, …) so that the fp32 tensors stay in at least fp32."""
    names = {id(part): name for name, tensor in named_tensors(model) for part in (tensor, tensor.grad)}

    def changed(tensor: Tensor) -> Tensor:
        out = change(tensor)
        dtype = target_dtype(names.get(id(tensor), ""), out.dtype)
        return out if out.dtype == dtype else tensor.to(out.device, dtype)

    return changed
