"""The arguments of `from_pretrained` and `save_pretrained`, also those of transformers and the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, cast

import torch
from transformers import PretrainedConfig

from twotower.checkpoint.source import HubArguments
from twotower.errors import ArgumentError
from twotower.model.towers import TowerSet
from twotower.quantization import QuantizationPlan

DeviceName = str | int | torch.device | None
# Values of arguments that ask for what this package does anyway. None is accepted for every argument.
_LOADING: dict[str, tuple[object, ...]] = {
    "adapter_name": ("default",),
    "allow_all_kernels": (False,),
    "disable_mmap": (False,),
    "from_flax": (False,),
    "from_tf": (False,),
    "ignore_mismatched_sizes": (False,),
    "load_in_4bit": (False,),
    "load_in_8bit": (False,),
    "offload_buffers": (False,),
    "offload_state_dict": (False,),
    "output_loading_info": (False,),
    "use_kernels": (False,),
    "use_safetensors": (True,),
    "variant": ("",),
}
_SAVING: dict[str, tuple[object, ...]] = {
    "distributed_checkpoint": (False,),
    "push_to_hub": (False,),
    "safe_serialization": (True,),
    "save_original_format": (True,),
}
# Arguments of which every value means the same here. The Auto classes and pipelines pass those with an underscore.
_LOADING_ANY = {"_commit_hash", "_fast_init", "_from_auto", "_from_pipeline", "code_revision", "low_cpu_mem_usage"}
_LOADING_ANY |= {"resume_download", "weights_only"}
# Keys of `adapter_kwargs` that the Auto classes add wherever peft is installed: where adapters would be read.
_AUTO_ADAPTER = {"revision", "token"}
_SAVING_ANY = {"is_main_process", "save_peft_format", "token"}


@dataclass(frozen=True, kw_only=True)
class LoadArguments:
    """The arguments of `from_pretrained`.

    quantization: a plan; None: that of the checkpoint. config: a configuration, or where to read it; None: that of the
    checkpoint. denoiser: the name of the one to load, of several; None: all.
    """

    hub: HubArguments
    subfolder: str | None
    dtype: str | torch.dtype
    towers: TowerSet
    quantization: QuantizationPlan | None
    config: PretrainedConfig | str | PathLike[str] | None
    devices: dict[str, torch.device]
    trust_remote_code: bool
    denoiser: str | None = None

    @classmethod
    def of(cls, kwargs: dict[str, Any]) -> LoadArguments:
        """Reads keyword arguments.

        Raises:
            ArgumentError: an unknown argument, or one whose value means something that is not supported.
        """
        hub = cast(HubArguments, {name: kwargs.pop(name) for name in HubArguments.__annotations__ if name in kwargs})
        dtypes = [kwargs.pop(name, None) for name in ("dtype", "torch_dtype")]
        given = [dtype for dtype in dtypes if dtype is not None]
        if len({str(dtype).removeprefix("torch.") for dtype in given}) > 1:
            raise ArgumentError(f"dtype is {given[0]!r} and torch_dtype {given[1]!r}; give one of them")
        towers: TowerSet = kwargs.pop("towers", None) or "both"
        quantization = kwargs.pop("quantization", None)
        device_map = kwargs.pop("device_map", None)
        found = cls(
            hub=hub,
            subfolder=kwargs.pop("subfolder", None),
            dtype=given[0] if given else "auto",
            towers=towers,
            quantization=None if quantization is None else QuantizationPlan.parse(quantization),
            config=kwargs.pop("config", None),
            devices={
                "context": _device(kwargs.pop("context_device", None), device_map),
                "denoiser": _device(kwargs.pop("denoiser_device", None), device_map),
            },
            trust_remote_code=bool(kwargs.pop("trust_remote_code", None)),
            denoiser=kwargs.pop("denoiser", None),
        )
        if (kwargs.get("adapter_kwargs") or {}).keys() <= _AUTO_ADAPTER:
            kwargs.pop("adapter_kwargs", None)
        if unknown := _unsupported(kwargs, _LOADING, _LOADING_ANY):
            raise ArgumentError(
                f"from_pretrained: {', '.join(unknown)} is not supported by a two-tower model; remove it"
            )
        if towers not in ("both", "context"):
            raise ArgumentError(f'towers is {towers!r}; choose "both" or "context"')
        return found


def check_save_arguments(kwargs: Mapping[str, object]) -> None:
    """Raises ArgumentError for arguments of `save_pretrained` that would have to do something else."""
    if unknown := _unsupported(kwargs, _SAVING, _SAVING_ANY):
        raise ArgumentError(
            f"save_pretrained: {', '.join(unknown)} is not supported; it writes local safetensors files"
        )


def _unsupported(kwargs: Mapping[str, object], neutral: dict[str, tuple[object, ...]], ignored: set[str]) -> list[str]:
    """Names of arguments that are neither neutral nor without effect."""
    return sorted(
        name
        for name, value in kwargs.items()
        if value is not None and name not in ignored and value not in neutral.get(name, ())
    )


def _device(named: DeviceName, device_map: DeviceName | dict[str, DeviceName]) -> torch.device:
    """The device of a tower: its own argument, else device_map, else the CPU."""
    if isinstance(device_map, dict) and set(device_map) == {""}:  # transformers' spelling of one device for the model
        return _device(named, device_map[""])
    name, value = ("device_map", device_map) if named is None else ("device", named)
    try:
        if isinstance(value, dict):
            raise TypeError("a map of several devices")
        return torch.device("cpu" if value is None else value)
    except (RuntimeError, TypeError):
        raise ArgumentError(
            f"{name} is {value!r}; give one device, such as cuda:0, or use context_device and denoiser_device"
        ) from None
