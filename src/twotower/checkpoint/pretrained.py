"""`from_pretrained` and `save_pretrained`: loads and saves a model, from a directory or a hub id."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import torch
from transformers import PretrainedConfig

from twotower.checkpoint import generation_config, names, reader, tokenizer_files
from twotower.checkpoint.generation_config import GenerationDefaults
from twotower.checkpoint.quantize import Quantization, quantization_of, quantize_
from twotower.checkpoint.source import HubArguments, resolve_source
from twotower.config import ARCHITECTURE, MODEL_TYPE, TwoTowerConfig
from twotower.errors import ArgumentError, CheckpointError
from twotower.model.towers import TowerSet, TwoTowerModel
from twotower.tokenizer import Tokenizer

Model = TypeVar("Model", bound=TwoTowerModel)
DeviceName = str | int | torch.device | None

CODE_FILE = "modeling_twotower.py"
CODE = '''"""Lets transformers' AutoModelForCausalLM load this directory; needs `pip install twotower`."""

from twotower import TwoTowerConfig, TwoTowerForCausalLM

__all__ = ["TwoTowerConfig", "TwoTowerForCausalLM"]
'''
AUTO_MAP = {
    "AutoConfig": "modeling_twotower.TwoTowerConfig",
    "AutoModel": "modeling_twotower.TwoTowerForCausalLM",
    "AutoModelForCausalLM": "modeling_twotower.TwoTowerForCausalLM",
}
# Arguments that the Auto classes pass and that have no effect here.
_IGNORED = {
    "trust_remote_code",
    "adapter_kwargs",
    "_from_auto",
    "_commit_hash",
    "code_revision",
    "subfolder",
    "low_cpu_mem_usage",
    "use_safetensors",
    "_from_pipeline",
}


def from_pretrained(
    build: Callable[[TwoTowerConfig, TowerSet], Model], source: str | PathLike[str], *args: object, **kwargs: Any
) -> tuple[Model, Path, GenerationDefaults]:
    """Loads a model that `build` constructs → the model, the local directory of the checkpoint, generation defaults.

    For the arguments see `TwoTowerForCausalLM.from_pretrained`.
    """
    if args:
        raise ArgumentError("from_pretrained takes one positional argument, the checkpoint; name the others")
    hub = cast(HubArguments, {name: kwargs.pop(name) for name in HubArguments.__annotations__ if name in kwargs})
    dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or "auto"
    kwargs.pop("torch_dtype", None)
    towers = kwargs.pop("towers", "both")
    quantization = kwargs.pop("quantization", None) or "none"
    given = kwargs.pop("config", None)
    device_map = kwargs.pop("device_map", None)
    devices = {
        "context": _device(kwargs.pop("context_device", None), device_map),
        "denoiser": _device(kwargs.pop("denoiser_device", None), device_map),
    }
    unknown = sorted(name for name, value in kwargs.items() if name not in _IGNORED and value is not None)
    if unknown:
        raise ArgumentError(f"from_pretrained: {', '.join(unknown)} is not supported by a two-tower model; remove it")
    if towers not in ("both", "context"):
        raise ArgumentError(f'towers is {towers!r}; choose "both" or "context"')
    if quantization not in get_args(Quantization):
        raise ArgumentError(f"quantization is {quantization!r}; choose {' or '.join(get_args(Quantization))}")

    directory = resolve_source(source, hub)
    config = _config(directory, given)
    if ARCHITECTURE not in (config.architectures or [ARCHITECTURE]):
        raise CheckpointError(
            f"{directory}: architectures in config.json is {config.architectures}; it must be [{ARCHITECTURE!r}]"
        )
    defaults = GenerationDefaults.read(directory, config.vocab_size)
    config._name_or_path = str(source)
    with torch.device("meta"):
        model = build(config, towers)
        known = names.tensor_entries(model if towers == "both" else build(config, "both"))
        if quantization == "int8":
            quantize_(model)
    wanted = _dtype(dtype, config)
    reader.load_weights(model, directory, config.hybrid_override_pattern, known, wanted, devices)
    model.config.dtype = model.dtype
    return model, directory, defaults


def save_pretrained(
    model: TwoTowerModel,
    tokenizer: Tokenizer | None,
    defaults: GenerationDefaults,
    directory: Path,
    max_shard_size: int | str,
    **kwargs: object,
) -> None:
    """See `TwoTowerForCausalLM.save_pretrained`."""
    unknown = sorted(set(kwargs) - {"safe_serialization", "is_main_process", "push_to_hub"})
    if unknown or kwargs.get("push_to_hub") or kwargs.get("safe_serialization") is False:
        raise ArgumentError(
            f"save_pretrained: {', '.join(unknown or kwargs)} is not supported; it writes local safetensors files"
        )
    quantization = quantization_of(model)
    if quantization != "none":
        raise ArgumentError(
            f"save_pretrained: the weights are {quantization}, which a checkpoint cannot store; keep the checkpoint "
            "that the model was loaded from"
        )
    if model.denoiser is None:
        raise ArgumentError(
            'save_pretrained: the model was loaded with towers="context"; load it with towers="both" to save it'
        )
    if directory.is_file():
        raise ArgumentError(f"save_pretrained: {directory} is a file; give a directory")
    if not kwargs.get("is_main_process", True):
        return
    directory.mkdir(parents=True, exist_ok=True)
    reader.save_weights(model, directory, max_shard_size)
    (directory / CODE_FILE).write_text(CODE, encoding="utf-8")
    (directory / "config.json").write_text(
        json.dumps(config_to_write(model), indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    if defaults.values:
        (directory / generation_config.FILE).write_text(defaults.text(), encoding="utf-8")
    if tokenizer is not None:
        tokenizer_files.save_tokenizer(tokenizer, directory)


def config_to_write(model: TwoTowerModel) -> dict[str, object]:
    """The values of config.json: the released keys and an auto_map. Infinity is written as `Infinity`."""
    plain = PretrainedConfig().to_dict()  # without the defaults that transformers adds to every config
    values = {key: value for key, value in model.config.to_dict().items() if value != plain.get(key, ...)}
    for transient in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config"):
        values.pop(transient, None)
    dtype = str(model.dtype).removeprefix("torch.")
    return values | {
        "architectures": [ARCHITECTURE],
        "auto_map": AUTO_MAP,
        "model_type": MODEL_TYPE,
        "torch_dtype": dtype,
    }


def stored_dtype(directory: Path) -> torch.dtype:
    """The dtype of a checkpoint: that of its config, else that of its embeddings."""
    said = TwoTowerConfig.read(directory).dtype
    if said is None:
        said = reader.read_headers(directory)["context_tower.embeddings.weight"].torch_dtype
    found = getattr(torch, said) if isinstance(said, str) else said
    assert isinstance(found, torch.dtype)
    return found


def _config(directory: Path, given: PretrainedConfig | None) -> TwoTowerConfig:
    """The given configuration, else that of the directory.

    The Auto classes give transformers' own class, which has values changed by the caller but lacks some keys of the
    file. The result has all keys of the file, with the given values where there are any.
    """
    if isinstance(given, TwoTowerConfig):
        return copy.deepcopy(given)
    config = TwoTowerConfig.read(directory)
    if given is not None:
        values = TwoTowerConfig.of(given).to_dict()
        config = TwoTowerConfig(**{key: values.get(key, value) for key, value in config.to_dict().items()})
    return config


def _device(named: DeviceName, device_map: DeviceName | dict[str, DeviceName]) -> torch.device:
    """The device of a tower: its own argument, else device_map, else the CPU."""
    if isinstance(device_map, dict) and set(device_map) == {
        ""
    }:  # transformers' spelling of one device for the whole model
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


def _dtype(dtype: str | torch.dtype | None, config: TwoTowerConfig) -> torch.dtype | None:
    """The requested dtype. "auto": that of the config; None if the config has none: that of the stored embeddings."""
    said = "dtype"
    if dtype == "auto":
        dtype, said = config.dtype, "config.json's torch_dtype"
        if dtype is None:
            return None
    found: torch.dtype | None = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.bfloat16, torch.float32, torch.float64):
        raise ArgumentError(f"{said} is {dtype!r}; choose dtype bfloat16, float32 or float64")
    return found
