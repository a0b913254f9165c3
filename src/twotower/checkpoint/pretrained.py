"""`from_pretrained` and `save_pretrained`: loads and saves a model, from a directory or a hub id."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PretrainedConfig

from twotower.checkpoint import atomic, generation_config, names, reader
from twotower.checkpoint.generation_config import GenerationDefaults
from twotower.checkpoint.load_arguments import LoadArguments, check_save_arguments
from twotower.checkpoint.quantize import quantization_of, quantize_, schemes_of
from twotower.checkpoint.source import resolve_source
from twotower.checkpoint.stored_quantization import KEY, quantization_config, stored_entries, stored_plan
from twotower.checkpoint.tokenizer_files import TEMPLATE_FILE, TEMPLATE_FOLDER, save_tokenizer
from twotower.checkpoint.writer import stale_weights
from twotower.config import (
    ARCHITECTURE,
    GENERIC_ARCHITECTURE,
    GENERIC_MODEL_TYPE,
    MODEL_TYPE,
    GenericTwoTowerConfig,
    TwoTowerConfig,
    errors_of,
)
from twotower.errors import ArgumentError, CheckpointError, init_command
from twotower.model.denoisers import check_one_device
from twotower.model.towers import TowerSet, TwoTowerModel
from twotower.quantization import INT8_ACTIVATIONS, QuantizationPlan
from twotower.tokenizer import Tokenizer

Model = TypeVar("Model", bound=TwoTowerModel)

CODE_FILE = "modeling_twotower.py"
CODE = '''"""Lets transformers' AutoModelForCausalLM load this directory; needs `pip install twotower`."""

from twotower import GenericTwoTowerConfig, TwoTowerConfig, TwoTowerForCausalLM

__all__ = ["GenericTwoTowerConfig", "TwoTowerConfig", "TwoTowerForCausalLM"]
'''
AUTO_MAP = {
    "AutoConfig": "modeling_twotower.TwoTowerConfig",
    "AutoModel": "modeling_twotower.TwoTowerForCausalLM",
    "AutoModelForCausalLM": "modeling_twotower.TwoTowerForCausalLM",
}


def from_pretrained(
    build: Callable[[TwoTowerConfig, TowerSet], Model], source: str | PathLike[str], *args: object, **kwargs: Any
) -> tuple[Model, Path, GenerationDefaults]:
    """Loads a model that `build` constructs → the model, the local directory of the checkpoint, generation defaults.

    For the arguments see `TwoTowerForCausalLM.from_pretrained`.
    """
    if args:
        raise ArgumentError("from_pretrained takes one positional argument, the checkpoint; name the others")
    asked = LoadArguments.of(kwargs)
    directory = resolve_source(source, asked.hub, asked.subfolder, asked.trust_remote_code)
    config = _config(directory, asked.config)
    expected = architecture(config)
    if expected not in (config.architectures or [expected]):
        raise CheckpointError(
            f"{directory}: architectures in config.json is {config.architectures}, not [{expected!r}], so it is no "
            f"two-tower model; make one of an autoregressive model: {init_command(directory)}"
        )
    defaults = GenerationDefaults.read(directory, config.vocab_size)
    config._name_or_path = str(source)
    own = _with_denoiser(config, asked.denoiser)
    if asked.towers == "both" and _has_adapters(own):
        check_one_device(asked.devices["context"], asked.devices["denoiser"])
    stored = stored_plan(config, directory / "config.json")
    with torch.device("meta"), errors_of(directory / "config.json"):
        model = build(own, asked.towers)
        both = model if own is config and asked.towers == "both" else build(config, "both")
        known = _quantize(model, both, stored, asked)
    wanted = _dtype(asked.dtype, config)
    needed = names.tensor_entries(model)
    if asked.denoiser is not None:
        needed = names.among_several(needed, asked.denoiser)
    if stored is not None:
        needed = list(stored_entries(model, needed))
    reader.load_weights(model, directory, known, needed, wanted, asked.devices)
    model.config.dtype = model.dtype
    return model, directory, defaults


def _quantize(
    model: TwoTowerModel, both: TwoTowerModel, stored: QuantizationPlan | None, asked: LoadArguments
) -> list[names.TensorEntry]:
    """Quantises a model on the meta device; returns the entries of `both`, the same model with both towers, on disk."""
    if stored is None:
        known = names.tensor_entries(both)
        quantize_(model, asked.quantization or QuantizationPlan.parse("none"))
        return known
    wanted = asked.quantization
    plan = stored if wanted is None else replace(stored, int8_activations=wanted.int8_activations)
    quantize_(both, plan)
    quantize_(model, plan)
    if wanted is not None and any(wanted.schemes[part] != scheme for part, scheme in schemes_of(model).items()):
        raise ArgumentError(
            f"quantization is {str(wanted)!r}, and the checkpoint is stored in {str(stored)!r}; leave it out, change "
            f"its {INT8_ACTIVATIONS} only, or load the original checkpoint"
        )
    return list(stored_entries(both, names.tensor_entries(both)))


def save_pretrained(
    model: TwoTowerModel,
    tokenizer: Tokenizer | None,
    defaults: GenerationDefaults,
    directory: Path,
    max_shard_size: int | str,
    **kwargs: object,
) -> None:
    """See `TwoTowerForCausalLM.save_pretrained`."""
    check_save_arguments(kwargs)
    if not model.has_denoiser:
        raise ArgumentError(
            'save_pretrained: the model was loaded with towers="context"; load it with towers="both" to save it'
        )
    if directory.is_file():
        raise ArgumentError(f"save_pretrained: {directory} is a file; give a directory")
    if not kwargs.get("is_main_process", True):
        return
    config = json.dumps(config_to_write(model), indent=2, sort_keys=True) + "\n"
    with atomic.replaced_files(directory, lambda new: _stale(directory, new)) as folder:
        reader.save_weights(model, folder, max_shard_size)
        (folder / CODE_FILE).write_text(CODE, encoding="utf-8")
        (folder / "config.json").write_text(config, encoding="utf-8")
        if defaults.values:
            (folder / generation_config.FILE).write_text(defaults.text(), encoding="utf-8")
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)


def _stale(directory: Path, new: set[str]) -> list[Path]:
    """The weights and chat templates of a directory that new files of these names make obsolete."""
    templates = [directory / TEMPLATE_FILE, *directory.glob(f"{TEMPLATE_FOLDER}/*.jinja")]
    others = [file for file in templates if file.exists() and str(file.relative_to(directory)) not in new]
    return stale_weights(directory, new) + (others if "tokenizer_config.json" in new else [])


def config_to_write(model: TwoTowerModel) -> dict[str, object]:
    """The values of config.json: the released keys and an auto_map. Infinity is written as `Infinity`."""
    plain = PretrainedConfig().to_dict()  # without the defaults that transformers adds to every config
    values = {key: value for key, value in model.config.to_dict().items() if value != plain.get(key, ...)}
    for transient in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", KEY):
        values.pop(transient, None)
    if quantization_of(model) != "none":
        values[KEY] = quantization_config(model)
    dtype = str(model.dtype).removeprefix("torch.")
    generic = isinstance(model.config, GenericTwoTowerConfig)
    return values | {
        "architectures": [architecture(model.config)],
        "auto_map": AUTO_MAP | {"AutoConfig": f"modeling_twotower.{type(model.config).__name__}"},
        "model_type": GENERIC_MODEL_TYPE if generic else MODEL_TYPE,
        "torch_dtype": dtype,
    }


def architecture(config: TwoTowerConfig) -> str:
    """The name in `architectures` of a checkpoint with this configuration."""
    return GENERIC_ARCHITECTURE if isinstance(config, GenericTwoTowerConfig) else ARCHITECTURE


def stored_dtype(directory: Path) -> torch.dtype:
    """The dtype of a checkpoint: that of its config, else that of its embeddings."""
    said = TwoTowerConfig.read(directory).dtype
    if said is None:
        config = TwoTowerConfig.read(directory)
        with torch.device("meta"):
            known = names.tensor_entries(TwoTowerModel(config, "context"))
        said = reader.read_headers(directory)[reader.embeddings(known).disk].torch_dtype
    found = getattr(torch, said) if isinstance(said, str) else said
    assert isinstance(found, torch.dtype)
    return found


def _config(directory: Path, given: PretrainedConfig | str | PathLike[str] | None) -> TwoTowerConfig:
    """The given configuration, read if it is a path, else that of the directory.

    The Auto classes give transformers' own class, which has values changed by the caller but lacks some keys of the
    file. The result has all keys of the file, with the given values where there are any.
    """
    if isinstance(given, str | PathLike):
        return TwoTowerConfig.read(Path(given))
    if given is not None and not isinstance(given, PretrainedConfig):
        raise ArgumentError(f"config is a {type(given).__name__}; give a TwoTowerConfig, or the path of a config.json")
    if isinstance(given, TwoTowerConfig):
        return copy.deepcopy(given)
    config = TwoTowerConfig.read(directory)
    if given is not None:
        values = TwoTowerConfig.of(given).to_dict()
        config = type(config)(**{key: values.get(key, value) for key, value in config.to_dict().items()})
    return config


def _with_denoiser(config: TwoTowerConfig, name: str | None) -> TwoTowerConfig:
    """The configuration with one of its denoisers alone, if one is named."""
    if name is None:
        return config
    if not isinstance(config, GenericTwoTowerConfig) or config.denoisers is None:
        raise ArgumentError(
            f"denoiser is {name!r}, and the checkpoint has one denoiser, without a name; leave it out", param="denoiser"
        )
    return config.with_denoiser(name)


def _has_adapters(config: TwoTowerConfig) -> bool:
    several = config.denoisers
    choices = [config.denoiser] if several is None else [one.choices for _, one in several.items()]
    return any(each.adapters is not None for each in choices)


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
