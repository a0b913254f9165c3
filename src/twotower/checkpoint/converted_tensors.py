"""The tensors of the checkpoint that `twotower init` writes: those of the source, and those that it lacks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from twotower.checkpoint import names, reader
from twotower.checkpoint.denoiser_tensors import DenoiserTensors
from twotower.checkpoint.mask_token import MaskToken
from twotower.checkpoint.names import TensorEntry
from twotower.checkpoint.one_tower import OneTowerCheckpoint
from twotower.checkpoint.writer import TensorToWrite
from twotower.errors import CheckpointError
from twotower.model.adapters import LowRank
from twotower.model.conditioning import TimeConditioning
from twotower.model.draft_head import DraftHead
from twotower.model.fp32_tensors import target_dtype


def tensors_to_write(
    denoiser: DenoiserTensors,
    entries: list[TensorEntry],
    dtype: torch.dtype | None,
    fresh: dict[str, Tensor],
    mask: MaskToken,
    origin: Path,
) -> Iterator[TensorToWrite]:
    """The entries of the two-tower checkpoint, read on demand."""
    tower = denoiser.tower

    def piece(entry: TensorEntry) -> Tensor:
        which, _, part = entry.memory.partition(".")
        if entry.memory in fresh:
            return fresh[entry.memory]
        if which == "denoiser":
            tensor = denoiser.read(entry)
        else:
            place = tower.places[part, entry.expert]
            tensor = tower.weights.read(place)
            _check_finite(tensor, place, origin)
        if entry.memory == "denoiser.embeddings.weight" and mask.known_rows:
            tensor = _with_mean_row(tensor, mask.id, mask.known_rows)
        return tensor

    for group in names.by_tensor_on_disk(entries).values():
        which, _, part = group[0].memory.partition(".")
        if group[0].memory in fresh:
            kept = fresh[group[0].memory].dtype
        else:
            place = denoiser.place(group[0]) if which == "denoiser" else tower.places[part, group[0].expert]
            stored = tower.weights.dtype(place)
            kept = stored if dtype is None else target_dtype(group[0].memory, dtype)
        yield reader.tensor_to_write(group, kept, piece)


def _check_finite(tensor: Tensor, place: TensorEntry, origin: Path) -> None:
    """The minimum and the maximum are NaN if a value is, and need no memory."""
    if tensor.numel() and not all(bound.isfinite() for bound in torch.aminmax(tensor)):
        expert = "" if place.expert is None else f" (expert {place.expert})"
        raise CheckpointError(
            f"{origin}: {place.disk}{expert} has a value that is NaN or infinite, so the weights are damaged; download "
            "them again, or take an earlier checkpoint of their training"
        )


def _with_mean_row(embeddings: Tensor, row: int, known_rows: int) -> Tensor:
    """The embeddings (V, H) with the mean of the first `known_rows` in one row."""
    changed = embeddings.clone()
    changed[row] = _mean_row(embeddings, known_rows)
    return changed


def _mean_row(embeddings: Tensor, known_rows: int) -> Tensor:
    """The mean (H,) of the first `known_rows` of the embeddings (V, H), in float64."""
    total = torch.zeros(embeddings.shape[1], dtype=torch.float64)
    for rows in embeddings[:known_rows].split(1024):
        total += rows.sum(0, dtype=torch.float64)
    return total / known_rows


def fresh_tensors(tower: OneTowerCheckpoint, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that the source lacks, by name: identity time conditioning, or adapters that add nothing; and a
    draft head that adds nothing.

    The mask embedding of adapters is the mean of all rows. Random weights are drawn in fp32, so that a seed gives the
    same in every dtype.
    """
    out: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if tower.model.denoiser is not None:
            time = TimeConditioning(tower.model.config.hidden_size, tower.model.denoiser.spec.num_layers)
            out |= {f"time.{name}": tensor.to(dtype) for name, tensor in time.state_dict().items()}
        for path, module in tower.model.named_modules():
            if isinstance(module, LowRank | DraftHead):
                own = module.to_empty(device="cpu")
                own.reset_parameters()
                out |= {f"{path}.{name}": tensor.to(dtype) for name, tensor in own.state_dict().items()}
    if not tower.model.has_adapters:
        return out
    embeddings = tower.weights.read(tower.places["embeddings.weight", None])
    out["context.mask_embedding.weight"] = _mean_row(embeddings, len(embeddings)).to(dtype)
    return out


def check_stored(tower: OneTowerCheckpoint, dtype: torch.dtype | None, origin: Path) -> None:
    for place in tower.places.values():
        if dtype is None and tower.weights.dtype(place) == torch.float16:
            raise CheckpointError(
                f"{origin}: {place.disk} is stored as F16, which a two-tower model does not support; "
                "convert it with --dtype bfloat16 or --dtype float32"
            )
