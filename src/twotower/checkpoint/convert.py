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
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from twotower.checkpoint import denoiser_tensors, names, one_tower, peft_adapters, pretrained, reader
from twotower.checkpoint.converted_tensors import check_stored, fresh_tensors, tensors_to_write
from twotower.checkpoint.denoiser_choices import NO_CHOICES, DenoiserChoices, given_adapters
from twotower.checkpoint.denoiser_tensors import DenoiserTensors, FeedForwardMaker
from twotower.checkpoint.mask_token import MaskToken, is_ordinary_token
from twotower.checkpoint.mask_token import choose as choose_mask_token
from twotower.checkpoint.names import TensorEntry
from twotower.checkpoint.one_tower import OneTowerCheckpoint
from twotower.checkpoint.one_tower_model import local_source
from twotower.checkpoint.output_folder import check_target, unfinished_folder
from twotower.checkpoint.peft_adapters import AdapterFolder
from twotower.checkpoint.writer import write_shards
from twotower.config import GenericTwoTowerConfig, TwoTowerConfig
from twotower.denoiser_fields import DenoiserConfig
from twotower.deprecation import renamed_argument
from twotower.errors import ArgumentError
from twotower.model.towers import TwoTowerModel
from twotower.tokenizer import Tokenizer

CALIBRATED = "calibrated"  # folder of the calibration's files, inside the unfinished checkpoint


@dataclass(frozen=True, kw_only=True)
class ConversionResult:
    """Facts of a written checkpoint.

    mask_token: its text; None if the tokenizer has none. mask_reason: why this token. adapter_rank: None if the
    denoiser is a tower. draft_head_rank: None without a draft head. denoiser_parameters: of a second tower.
    denoiser_layers, denoiser_feed_forward: None as in the release. feed_forward_errors: see `MadeFeedForward.errors`.
    bytes: of all tensors. notes: remarks for the user, one sentence each.
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
    draft_head_rank: int | None
    adapter_parameters: int
    denoiser_parameters: int
    denoiser_layers: tuple[int, ...] | None
    denoiser_feed_forward: str | None
    feed_forward_errors: Mapping[int, float]
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
    choices: DenoiserChoices = NO_CHOICES,
    adapters: str | Path | None = None,
    denoiser_layers: str | None = None,
    denoiser_feed_forward: str | None = None,
    calibration: FeedForwardMaker | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ConversionResult:
    """Converts an autoregressive checkpoint, a directory or a hub id, to a two-tower checkpoint in `directory`.

    mask_token: its id or text; None: see `mask_token.choose`. denoiser_lora: rank of adapters on the context tower,
    which are the denoiser; None: a second tower. choices: of a new denoiser. adapters: a directory or hub id with
    such adapters, as `export_peft` writes them; they bring their mask token. denoiser_layers: the layers of a smaller
    second tower, as text such as "every:4" (`denoiser_shape.parse_layers`). denoiser_feed_forward: in the place of its
    MoE layers, "experts:K" or "dense:WIDTH", made by `calibration`. dtype: of all tensors but those of `fp32_tensors`,
    which get at least fp32; None: as stored. seed: of the time embedder or new adapters. overwrite: whether to replace
    a checkpoint. progress(done, total): in bytes. An unfinished checkpoint is in `<directory>.partial`.

    Raises:
        ConfigError, CheckpointError: the source is not a valid checkpoint of a supported family, or its
            tokenizer does not match.
        ArgumentError: a wrong argument, a directory that may not be replaced, or not enough disk space.
    """
    target = check_target(Path(directory), overwrite)
    origin = local_source(source)
    if origin.resolve() == target or target in origin.resolve().parents:
        raise ArgumentError(f"{directory}: the directory contains the source checkpoint; choose another directory")
    stored = given_adapters(adapters, mask_token, denoiser_lora, choices.given)
    source_tower = one_tower.read(origin)
    shape = denoiser_tensors.shape_of(source_tower, denoiser_layers, denoiser_feed_forward, calibration)
    tower, mask = _prepared(source_tower, mask_token, choices.config(denoiser_lora), stored, shape)
    config = tower.model.config
    wanted = None if dtype is None else pretrained._dtype(dtype, config)
    check_stored(tower, wanted, origin)
    model_dtype = wanted or tower.weights.dtype(tower.places["embeddings.weight", None])

    fresh = fresh_tensors(tower, seed, model_dtype) if stored is None else stored.tensors(tower.model, origin, wanted)
    known = names.tensor_entries(tower.model)
    source_tensors = DenoiserTensors(tower)
    to_write = list(tensors_to_write(source_tensors, known, wanted, fresh, mask, origin))
    total = sum(entry.nbytes for entry in to_write)
    with unfinished_folder(Path(directory), overwrite, total) as folder:
        if calibration is not None:
            (folder / CALIBRATED).mkdir()
            source_tensors.made = calibration(tower, origin, folder / CALIBRATED)
        weights = write_shards(folder, to_write, max_shard_size, counter(total, progress))
        shutil.rmtree(folder / CALIBRATED, ignore_errors=True)
        _write_rest(tower, folder, model_dtype)
        reader.check(folder, reader.read_headers(folder), known, known, config)
    text_notes = _text_notes(mask, tower.tokenizer, tower.model.has_adapters)
    notes = *tower.notes, *text_notes, *_adapter_notes(stored, tower)
    return _result(source, directory, source_tensors, mask, model_dtype, total, weights, notes)


def _result(
    source: str | Path,
    directory: str | Path,
    made: DenoiserTensors,
    mask: MaskToken,
    dtype: torch.dtype,
    size: int,
    weights: list[Path],
    notes: tuple[str, ...],
) -> ConversionResult:
    model = made.tower.model
    shape = model.config.denoiser
    known, adapters = names.tensor_entries(model), model.config.denoiser.adapters
    head = model.config.denoiser.draft_head
    return ConversionResult(
        source=str(source),
        directory=Path(directory),
        pattern=model.spec.pattern,
        dtype=str(dtype).removeprefix("torch."),
        mask_token_id=mask.id,
        mask_token=mask.text,
        mask_reason=mask.reason,
        parameters_per_tower=_parameters(entry for entry in known if names.of_context(entry)),
        time_parameters=_parameters(entry for entry in known if entry.memory.startswith("time.")),
        adapter_rank=None if adapters is None else adapters.rank,
        draft_head_rank=None if head is None else head.rank,
        adapter_parameters=_parameters(entry for entry in known if names.of_adapters(entry.memory)),
        denoiser_parameters=_parameters(entry for entry in known if entry.memory.startswith("denoiser.")),
        denoiser_layers=shape.denoiser_layers,
        denoiser_feed_forward=None if shape.denoiser_feed_forward is None else str(shape.denoiser_feed_forward),
        feed_forward_errors=made.made.errors,
        bytes=size,
        files=tuple(file.name for file in weights),
        notes=notes,
    )


def _prepared(
    tower: OneTowerCheckpoint,
    mask_token: int | str | None,
    denoiser: DenoiserConfig,
    stored: AdapterFolder | None,
    shape: DenoiserConfig | None,
) -> tuple[OneTowerCheckpoint, MaskToken]:
    """The source with the model of the conversion, whose mask token and adapters are chosen."""
    config = tower.model.config
    denoiser = denoiser if stored is None else stored.denoiser
    given = mask_token if stored is None else stored.mask_token_id
    if shape is not None and denoiser.adapters is not None:
        raise ArgumentError(
            "--denoiser-layers and --denoiser-feed-forward describe a second tower, and the denoiser is adapters; "
            "leave them out, or leave out --denoiser adapters, --denoiser-lora and --adapters",
            param="denoiser_layers",
        )
    mask = choose_mask_token(given, config, tower.defaults, tower.tokenizer)
    config.mask_token_id = mask.id
    if stored is not None:
        mask = replace(mask, reason="the mask token of the adapters")
        return _with_denoiser(tower, config, denoiser, stored.block_size), mask
    if shape is not None:
        layers, feed_forward = shape.denoiser_layers, shape.denoiser_feed_forward
        denoiser = replace(denoiser, denoiser_layers=layers, denoiser_feed_forward=feed_forward)
    return (tower if denoiser == DenoiserConfig() else _with_denoiser(tower, config, denoiser, None)), mask


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
