"""Loads the checkpoint of an autoregressive model as a context tower, without a conversion to two towers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from twotower.checkpoint import gguf_file, one_tower
from twotower.checkpoint.generation_config import GenerationDefaults
from twotower.checkpoint.mask_token import choose as choose_mask_token
from twotower.checkpoint.quantize import quantize_
from twotower.checkpoint.source import resolve_source
from twotower.config import ARCHITECTURE, GENERIC_MODEL_TYPE, TwoTowerConfig, read_object
from twotower.errors import CheckpointError
from twotower.model.fp32_tensors import named_tensors, target_dtype
from twotower.model.towers import TowerSet, TwoTowerModel
from twotower.tokenizer import Tokenizer

Model = TypeVar("Model", bound=TwoTowerModel)


def is_one_tower(path: Path) -> bool:
    """Whether a directory or a GGUF file is the checkpoint of an autoregressive model."""
    if path.suffix == gguf_file.SUFFIX:
        return True
    if not (path / "config.json").is_file():
        return False
    fields = read_object(path / "config.json", "give a checkpoint directory")
    return ARCHITECTURE not in (fields.get("architectures") or ()) and fields.get("model_type") != GENERIC_MODEL_TYPE


def refuse_one_tower(path: Path, part: str) -> None:
    """Raises CheckpointError if a directory has an autoregressive model. part: the part that is to be exported."""
    if is_one_tower(path):
        raise CheckpointError(
            f"{path}: is an autoregressive model, so it has no {part} to export; twotower init makes a two-tower "
            "checkpoint of it"
        )


def local_source(source: str | Path) -> Path:
    """A GGUF file or a directory: the source itself, or a snapshot of the files of a hub id."""
    return Path(source) if str(source).endswith(gguf_file.SUFFIX) else resolve_source(source, {})


def load(
    build: Callable[[TwoTowerConfig, TowerSet], Model],
    origin: Path,
    *,
    dtype: str | torch.dtype | None,
    device: torch.device,
    quantization: str | None = None,
) -> tuple[Model, Tokenizer | None, GenerationDefaults]:
    """Loads a context tower from a directory or file → the model, its tokenizer and generation defaults.

    The mask token is the one that `twotower init` would choose. dtype: "auto" or None: that of the embeddings.

    Raises:
        ConfigError, CheckpointError, ArgumentError: as `twotower init`.
    """
    stored = one_tower.read(origin)
    config = stored.model.config
    config.mask_token_id = choose_mask_token(None, config, stored.defaults, stored.tokenizer).id
    wanted = stored.weights.dtype(stored.places["embeddings.weight", None]) if dtype in (None, "auto") else dtype
    wanted = getattr(torch, wanted) if isinstance(wanted, str) else wanted
    assert isinstance(wanted, torch.dtype)
    if wanted == torch.float16:
        raise CheckpointError(f"{origin}: is stored as F16; give --dtype bfloat16 or --dtype float32")
    with torch.device("meta"):
        model = build(config, "context")
    memory = {
        name: torch.empty(tensor.shape, dtype=target_dtype(name, wanted), device=device)
        for name, tensor in named_tensors(model)
    }
    for (name, expert), entry in stored.places.items():
        tensor = memory[f"context.{name}"]
        (tensor if expert is None else tensor[expert]).copy_(stored.weights.read(entry))
    model.load_state_dict(memory, strict=True, assign=True)
    if quantization is not None:
        quantize_(model, quantization)
    model.config.dtype = model.dtype
    return model, stored.tokenizer, stored.defaults
