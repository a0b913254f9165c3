"""Converts the checkpoint of an autoregressive model to the two-tower checkpoint that training starts from.

Both towers are copies of the source, and the time conditioning is the identity. The denoiser therefore starts exactly
as the backbone. Tensors are copied one by one from memory-mapped files, so the memory need is small for any model.

One row may differ. If the mask token is a row of the embedding beyond the tokenizer, no training has touched the row.
The denoiser reads its copy of the row at every masked position, so there the row is the mean of the tokenizer's rows.
The context tower, which never reads the row, stays equal to the source. If the denoiser's head is its embedding, the
row also changes the denoiser's logit of the mask token, which decoding and training bar.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from twotower.checkpoint import gguf_file, names, one_tower, peft_adapters, pretrained, reader
from twotower.checkpoint.mask_token import MaskToken, is_ordinary_token
from twotower.checkpoint.mask_token import choose as choose_mask_token
from twotower.checkpoint.names import TensorEntry
from twotower.checkpoint.one_tower import OneTowerCheckpoint
from twotower.checkpoint.output_folder import check_target, unfinished_folder
from twotower.checkpoint.peft_adapters import AdapterFolder
from twotower.checkpoint.source import resolve_source
from twotower.checkpoint.writer import TensorToWrite, write_shards
from twotower.config import GenericTwoTowerConfig, TwoTowerConfig
from twotower.denoiser_fields import AdapterConfig, DenoiserConfig
from twotower.deprecation import renamed_argument
from twotower.errors import ArgumentError, CheckpointError
from twotower.model.adapters import LowRank
from twotower.model.conditioning import TimeConditioning
from twotower.model.fp32_tensors import target_dtype
from twotower.model.towers import TwoTowerModel
from twotower.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ConversionResult:
    """Facts of a written checkpoint.

    mask_token: its text; None if the tokenizer has none. mask_reason: why this token. adapter_rank: None if the
    denoiser is a tower. bytes: of all tensors. notes: remarks for the user, one sentence each.
    """

    source: str
    directory: Path
    pattern: str
    dtype: str
    mask_token_id: int
    mask_token: str | None
    mask_reason: str
    parameters_per_tower: int
    time_parameters: int
    adapter_rank: int | None
    adapter_parameters: int
    bytes: int
    files: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """The fields as plain data for `--json`."""
        return asdict(self) | {"directory": str(self.directory)}


@renamed_argument("mask_token_id", "mask_token")
def convert(
    source: str | Path,
    directory: str | Path,
    *,
    mask_token: int | str | None = None,
    denoiser_lora: int | None = None,
    adapters: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ConversionResult:
    """Converts an autoregressive checkpoint, a directory or a hub id, to a two-tower checkpoint in `directory`.

    mask_token: its id or text; None: see `mask_token.choose`. denoiser_lora: rank of adapters on the context tower,
    which are the denoiser; None: a second tower. adapters: a directory or hub id with such adapters, as `export_peft`
    writes them; they bring their mask token. dtype: bfloat16, float32 or float64, for all tensors but those of
    `fp32_tensors`, which get at least fp32; None keeps the dtype of each tensor. seed: of the random part, the time
    embedder or new adapters. overwrite: whether to replace a checkpoint in `directory`. progress(done, total):
    bytes, called after each tensor. An unfinished checkpoint is in `<directory>.partial`.

    Raises:
        ConfigError, CheckpointError: the source is not a valid checkpoint of a supported family, or its
            tokenizer does not match.
        ArgumentError: a wrong argument, a directory that may not be replaced, or not enough disk space.
    """
    target = check_target(Path(directory), overwrite)
    origin = Path(source) if str(source).endswith(gguf_file.SUFFIX) else resolve_source(source, {})
    if origin.resolve() == target or target in origin.resolve().parents:
        raise ArgumentError(f"{directory}: the directory contains the source checkpoint; choose another directory")
    stored = peft_adapters.given_adapters(adapters, mask_token, denoiser_lora)
    tower, mask = _prepared(one_tower.read(origin), mask_token, denoiser_lora, stored)
    config = tower.model.config
    wanted = None if dtype is None else pretrained._dtype(dtype, config)
    _check_stored(tower, wanted, origin)
    model_dtype = wanted or tower.weights.dtype(tower.places["embeddings.weight", None])

    fresh = _fresh_tensors(tower, seed, model_dtype) if stored is None else stored.tensors(tower.model, origin, wanted)
    known = names.tensor_entries(tower.model)
    to_write = list(_tensors_to_write(tower, known, wanted, fresh, mask, origin))
    total = sum(entry.nbytes for entry in to_write)
    with unfinished_folder(Path(directory), overwrite, total) as folder:
        written = counter(total, progress)
        weights = write_shards(folder, to_write, max_shard_size, written)
        _write_rest(tower, folder, model_dtype)
        reader.check(folder, reader.read_headers(folder), known, known, config)
    notes = (
        *tower.notes,
        *_text_notes(mask, tower.tokenizer, tower.model.has_adapters),
        *_adapter_notes(stored, tower),
    )
    return _result(source, directory, tower.model, mask, model_dtype, total, weights, notes)


def _result(
    source: str | Path,
    directory: str | Path,
    model: TwoTowerModel,
    mask: MaskToken,
    dtype: torch.dtype,
    size: int,
    weights: list[Path],
    notes: tuple[str, ...],
) -> ConversionResult:
    known, adapters = names.tensor_entries(model), model.config.denoiser.adapters
    return ConversionResult(
        source=str(source),
        directory=Path(directory),
        pattern=model.spec.pattern,
        dtype=str(dtype).removeprefix("torch."),
        mask_token_id=mask.id,
        mask_token=mask.text,
        mask_reason=mask.reason,
        parameters_per_tower=_parameters(entry for entry in known if _of_context(entry)),
        time_parameters=_parameters(entry for entry in known if entry.memory.startswith("time.")),
        adapter_rank=None if adapters is None else adapters.rank,
        adapter_parameters=_parameters(entry for entry in known if names.of_adapters(entry.memory)),
        bytes=size,
        files=tuple(file.name for file in weights),
        notes=notes,
    )


def _prepared(
    tower: OneTowerCheckpoint, mask_token: int | str | None, denoiser_lora: int | None, stored: AdapterFolder | None
) -> tuple[OneTowerCheckpoint, MaskToken]:
    """The source with the model of the conversion, whose mask token and adapters are chosen."""
    config = tower.model.config
    given = mask_token if stored is None else stored.mask_token_id
    mask = choose_mask_token(given, config, tower.defaults, tower.tokenizer)
    config.mask_token_id = mask.id
    if stored is not None:
        mask = replace(mask, reason="the mask token of the adapters")
        return _with_denoiser(tower, config, stored.denoiser, stored.block_size), mask
    if denoiser_lora is not None:
        return _with_denoiser(tower, config, DenoiserConfig(adapters=AdapterConfig(denoiser_lora)), None), mask
    return tower, mask


def _with_denoiser(
    tower: OneTowerCheckpoint, config: TwoTowerConfig, denoiser: DenoiserConfig, block_size: int | None
) -> OneTowerCheckpoint:
    """The source whose conversion gets another denoiser than the released one."""
    if isinstance(config, GenericTwoTowerConfig):
        backbone = config.backbone
    else:
        dtype = str(tower.weights.dtype(tower.places["embeddings.weight", None])).removeprefix("torch.")
        backbone = one_tower.nemotron_h_values(tower.model, dtype)
    changed = GenericTwoTowerConfig(
        backbone=backbone, mask_token_id=config.mask_token, block_size=block_size, **denoiser.to_json()
    )
    changed.dtype = config.dtype
    with torch.device("meta"):
        return replace(tower, model=TwoTowerModel(changed))


# --- tensors -------------------------------------------------------------------------------------------------------


def _tensors_to_write(
    tower: OneTowerCheckpoint,
    entries: list[TensorEntry],
    dtype: torch.dtype | None,
    fresh: dict[str, Tensor],
    mask: MaskToken,
    origin: Path,
) -> Iterator[TensorToWrite]:
    """The entries of the two-tower checkpoint, read on demand."""

    def piece(entry: TensorEntry) -> Tensor:
        which, _, part = entry.memory.partition(".")
        if entry.memory in fresh:
            return fresh[entry.memory]
        place = tower.places[part, entry.expert]
        tensor = tower.weights.read(place)
        if which == "context":
            _check_finite(tensor, place, origin)
        if entry.memory == "denoiser.embeddings.weight" and mask.known_rows:
            tensor = _with_mean_row(tensor, mask.id, mask.known_rows)
        return tensor

    for group in names.by_tensor_on_disk(entries).values():
        _, _, part = group[0].memory.partition(".")
        if group[0].memory in fresh:
            kept = fresh[group[0].memory].dtype
        else:
            stored = tower.weights.dtype(tower.places[part, group[0].expert])
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


def _fresh_tensors(tower: OneTowerCheckpoint, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that the source lacks, by name: identity time conditioning, or adapters that add nothing.

    The mask embedding of adapters is the mean of all rows. Random weights are drawn in fp32, so that a seed gives the
    same in every dtype.
    """
    out: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not tower.model.has_adapters:
            time = TimeConditioning(tower.model.config.hidden_size, tower.model.spec.num_layers)
            return {f"time.{name}": tensor.to(dtype) for name, tensor in time.state_dict().items()}
        for path, module in tower.model.named_modules():
            if isinstance(module, LowRank):
                own = module.to_empty(device="cpu")
                own.reset_parameters()
                out |= {f"{path}.{name}": tensor.to(dtype) for name, tensor in own.state_dict().items()}
    embeddings = tower.weights.read(tower.places["embeddings.weight", None])
    out["context.mask_embedding.weight"] = _mean_row(embeddings, len(embeddings)).to(dtype)
    return out


def _adapter_notes(stored: AdapterFolder | None, tower: OneTowerCheckpoint) -> Iterator[str]:
    if stored is None or stored.weights_sha256 is None:
        return
    first = peft_adapters.fingerprint_entry(tower.model)
    weight = tower.weights.read(tower.places[first.removeprefix("context."), None])
    if peft_adapters.weights_fingerprint(weight) != stored.weights_sha256:
        yield (
            "the adapters come from a backbone with other weights than these (another version, or quantised weights); "
            "AR and verified decoding stay exact, and fewer drafts may be accepted"
        )


def _check_stored(tower: OneTowerCheckpoint, dtype: torch.dtype | None, origin: Path) -> None:
    for place in tower.places.values():
        if dtype is None and tower.weights.dtype(place) == torch.float16:
            raise CheckpointError(
                f"{origin}: {place.disk} is stored as F16, which a two-tower model does not support; "
                "convert it with --dtype bfloat16 or --dtype float32"
            )


def _of_context(entry: TensorEntry) -> bool:
    return entry.memory.startswith("context.") and not names.of_adapters(entry.memory)


def _parameters(entries: Iterable[TensorEntry]) -> int:
    return sum(math.prod(entry.shape) for entry in entries)


def counter(total: int, progress: Callable[[int, int], None] | None) -> Callable[[int], None]:
    """A function that adds the bytes of a written tensor, and calls progress(done, total)."""
    done = 0

    def written(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    return written


# --- everything else in the directory ------------------------------------------------------------------------------


def _write_rest(tower: OneTowerCheckpoint, folder: Path, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    config = pretrained.config_to_write(tower.model) | {"torch_dtype": name}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / pretrained.CODE_FILE).write_text(pretrained.CODE, encoding="utf-8")
    tower.copy_files(folder)


def _text_notes(mask: MaskToken, tokenizer: Tokenizer | None, adapters: bool) -> Iterator[str]:
    if tokenizer is None:
        yield "the source has no tokenizer; add tokenizer files to the directory before training on text"
    elif is_ordinary_token(mask.id, tokenizer):
        yield f"the mask token id {mask.id} is {mask.text!r}, an ordinary token that can occur in texts"
    if mask.known_rows and not adapters:
        yield (
            f"row {mask.id} of the denoiser's embedding is the mean of the {mask.known_rows} rows that the tokenizer "
            "uses, because no training has touched it; the context tower is unchanged"
        )
