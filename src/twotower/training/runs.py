"""From settings to a finished run: opens data and model, shards, trains, writes the trained checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from twotower.checkpoint import one_tower, pretrained
from twotower.config import TwoTowerConfig
from twotower.errors import ArgumentError
from twotower.modeling_twotower import TwoTowerForCausalLM
from twotower.ops.precision import multiplies_bf16_fast
from twotower.training import weights
from twotower.training.data import BOS, EOS, MASK, PAD, Batch, Encoder, Rows, Source, held_out_batches, train_tokenizer
from twotower.training.data.readers import whole_pass
from twotower.training.fsdp import World, shard
from twotower.training.objective import AutoregressiveObjective, DenoisingObjective, DenoisingOptions
from twotower.training.settings import DenoiserSettings, PretrainSettings, Settings
from twotower.training.trainer import TOKENIZER_FILE, Run, Validate, claim, train

TOKENIZER_TEXTS = 50_000  # documents that a new tokenizer is trained on, at most


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a validation is made from. objective: an `AutoregressiveObjective` or `DenoisingObjective`, sharded;
    held_out: this process's batches of each validation source."""

    settings: Settings
    model: TwoTowerForCausalLM
    objective: Any
    held_out: dict[str, list[Batch]]
    world: World
    eos_token_id: int

    @property
    def block_size(self) -> int:
        """Of the last stage."""
        return self.settings.stages[-1].block_size


MakeValidation = Callable[[Parts], Validate]


def pretrain(
    settings: PretrainSettings, directory: Path, world: World, validation: MakeValidation | None = None
) -> Path:
    """An autoregressive backbone from random weights → the checkpoint (original Nemotron-H layout) in RUN/model."""
    config = TwoTowerConfig.read(settings.config)
    claim(directory, settings.fixed() | _shape(config), world)
    sources, held_out = open_sources(settings)
    tokenizer = _tokenizer_for(settings, config, sources, directory, world)
    _take_special_ids(config, tokenizer)
    encoder = encoder_for(tokenizer, config)
    rows = _rows(settings, sources, encoder, "fixed", world)
    batches = _held_out(settings, held_out, encoder, world)
    torch.manual_seed(settings.seed)
    model = TwoTowerForCausalLM(config, towers="context")
    model.tokenizer = tokenizer
    objective = AutoregressiveObjective(model.context, recompute=settings.recompute, prompt_loss=settings.prompt_loss)
    dtype = compute_dtype(settings.dtype, world.device)
    _prepare(settings)
    shard(objective, objective.units, world, dtype)
    parts = Parts(
        settings=settings,
        model=model,
        objective=objective,
        held_out=batches,
        world=world,
        eos_token_id=encoder.eos_token_id,
    )
    train(_run(settings, directory), objective, rows, world, validation(parts) if validation and batches else None)
    whole = weights.gather(model.context, dtype, world)
    if world.first:
        _publish(directory, lambda folder: one_tower.write(folder, whole, config, tokenizer))
    world.barrier()
    return directory / "model"


def train_denoiser(
    settings: DenoiserSettings, directory: Path, world: World, validation: MakeValidation | None = None
) -> Path:
    """The denoiser of a two-tower checkpoint → the trained checkpoint in RUN/model, in the source's dtype."""
    source = pretrained.local(settings.model, {})
    config = TwoTowerConfig.read(source)
    claim(directory, settings.fixed() | _shape(config), world)
    tokenizer = one_tower.tokenizer_of(source)
    if tokenizer is None:
        raise ArgumentError(f"{source}: holds no tokenizer; put the backbone's tokenizer.json beside its weights")
    encoder = encoder_for(tokenizer, config)
    sources, held_out = open_sources(settings)
    rows = _rows(settings, sources, encoder, settings.offset, world)
    batches = _held_out(settings, held_out, encoder, world)
    with torch.device("meta"):
        model = TwoTowerForCausalLM(config)
    assert model.denoiser is not None
    assert model.time is not None
    if settings.tie:
        model.denoiser = model.context
    options = DenoisingOptions(
        mask_token_id=config.mask_token,
        scope=settings.noise,
        seed=settings.seed,
        elbo=settings.elbo,
        train_context=settings.train_context or settings.tie,
        ar_weight=settings.ar_weight,
        recompute=settings.recompute,
    )
    objective = DenoisingObjective(model.context, model.denoiser, model.time, options)
    _prepare(settings)
    dtype = compute_dtype(settings.dtype, world.device)
    shard(objective, objective.units, world, dtype)
    weights.fill(model, objective, source, world)
    model.tokenizer = tokenizer
    parts = Parts(
        settings=settings,
        model=model,
        objective=objective,
        held_out=batches,
        world=world,
        eos_token_id=encoder.eos_token_id,
    )
    train(_run(settings, directory), objective, rows, world, validation(parts) if validation and batches else None)
    stored = pretrained.stored_dtype(source)
    whole = weights.gather(model, stored, world)
    if world.first:
        if settings.tie:
            whole |= {  # views: a tensor that is the same object twice would be written once
                name.replace("context.", "denoiser.", 1): tensor.view_as(tensor)
                for name, tensor in whole.items()
                if name.startswith("context.")
            }
        _publish(directory, lambda folder: _write_two_towers(whole, config, folder, source))
    world.barrier()
    return directory / "model"


# --- data ----------------------------------------------------------------------------------------------------------


def open_sources(settings: Settings) -> tuple[list[Source], list[Source]]:
    """Training and validation sources."""
    share = 0.0 if settings.validation else settings.held_out
    open_source = partial(
        Source,
        text_field=settings.text_field,
        prompt_field=settings.prompt_field,
        max_bad_records=settings.max_bad_records,
        streaming=settings.streaming,
    )
    training = [open_source(item, held_out_fraction=share) for item in settings.data]
    if settings.validation:
        return training, [open_source(item) for item in settings.validation]
    if not share:
        return training, []
    return training, [open_source(item, part="valid", held_out_fraction=share) for item in settings.data]


def encoder_for(tokenizer: Any, config: TwoTowerConfig) -> Encoder:
    """Text → documents of this model.

    Raises:
        ArgumentError: the tokenizer does not fit the model, or there is no end-of-text token.
    """
    eos = config.eos_token_id if config.eos_token_id is not None else getattr(tokenizer, "eos_token_id", None)
    eos = eos[0] if isinstance(eos, list) else eos
    if eos is None:
        raise ArgumentError("neither config.json nor the tokenizer names an end-of-text token; set eos_token_id")
    return Encoder(
        tokenizer,
        vocab_size=config.backbone.vocab_size,
        eos_token_id=eos,
        mask_token_id=config.mask_token,
        bos_token_id=config.bos_token_id,
        pad_token_id=config.pad_token_id if config.pad_token_id is not None else 0,
    )


def _rows(settings: Settings, sources: list[Source], encoder: Encoder, offset: Any, world: World) -> Rows:
    return Rows(
        sources,
        encoder,
        rows=settings.rows,
        row_length=settings.row_length,
        block_size=settings.stages[0].block_size,
        seed=settings.seed,
        offset=offset,
        max_epochs=settings.epochs,
        rank=world.rank,
        world=world.size,
    )


def _held_out(settings: Settings, sources: list[Source], encoder: Encoder, world: World) -> dict[str, list[Batch]]:
    """Each validation source's batches under its name."""
    return {
        source.name: list(
            held_out_batches(
                [source],
                encoder,
                rows=settings.rows,
                row_length=settings.row_length,
                block_size=settings.stages[-1].block_size,
                documents=settings.validation_documents,
                rank=world.rank,
                world=world.size,
            )
        )
        for source in sources
    }


def _tokenizer_for(
    settings: PretrainSettings, config: TwoTowerConfig, sources: list[Source], directory: Path, world: World
) -> Any:
    """The tokenizer given, or a new one trained on the data and kept in the run."""
    if settings.tokenizer is not None:
        return load_tokenizer(settings.tokenizer)
    file = directory / TOKENIZER_FILE
    if world.first and not file.exists():
        size = config.backbone.vocab_size if settings.vocab_size is None else settings.vocab_size
        if size > config.backbone.vocab_size:
            raise ArgumentError(
                f"vocab_size is {size}, but the backbone's is {config.backbone.vocab_size}; give one no larger"
            )
        partial = file.with_suffix(".partial")
        train_tokenizer(_texts(sources), size, split_digits=settings.split_digits).save(str(partial))
        partial.replace(file)
    world.barrier()
    return load_tokenizer(file)


def load_tokenizer(path: Path) -> Any:
    """A tokenizer.json, or a directory that transformers can load one from."""
    if path.is_dir():
        tokenizer = pretrained.load_tokenizer(path)
        if tokenizer is None:
            raise ArgumentError(f"{path}: holds no tokenizer")
        return tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise ArgumentError(f"{path}: not a tokenizer.json ({error})") from None
    names = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "mask")}
    known = {key: token for key, token in names.items() if backend.token_to_id(token) is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **known)


def _texts(sources: list[Source]) -> list[str]:
    """Texts of all sources, in the proportion of their weights."""
    total = sum(source.weight for source in sources)
    texts = []
    for source in sources:
        wanted = int(TOKENIZER_TEXTS * source.weight / total)
        for _, record in zip(range(wanted), whole_pass(source), strict=False):
            texts.append((record.prompt or "") + record.text)
    return texts


def _take_special_ids(config: TwoTowerConfig, tokenizer: Any) -> None:
    """The config of a new model names its tokenizer's special tokens."""
    ours = {"bos": BOS, "eos": EOS, "pad": PAD, "mask": MASK}
    for name, default in ours.items():
        value = getattr(tokenizer, f"{name}_token_id", None)
        setattr(config, f"{name}_token_id", default if value is None and name == "mask" else value)


# --- running -------------------------------------------------------------------------------------------------------


def compute_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """ "auto": bf16 where the machine multiplies it fast, else fp32."""
    if wanted != "auto":
        return getattr(torch, wanted)
    return torch.bfloat16 if multiplies_bf16_fast(device) else torch.float32


def _shape(config: TwoTowerConfig) -> dict[str, Any]:
    """What a run also depends on: config.json may be another under the same name."""
    return {f"config.{name}": value for name, value in asdict(config.backbone).items()}


def _prepare(settings: Settings) -> None:
    if settings.deterministic:
        torch.use_deterministic_algorithms(True)


def _run(settings: Settings, directory: Path) -> Run:
    return Run(
        directory=directory,
        schedule=settings.schedule(),
        stages=settings.stages,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
        balance_rate=settings.balance_rate,
        micro_rows=settings.micro_rows,
        checkpoint_every=settings.checkpoint_every,
        validate_every=settings.validate_every,
        tensorboard=settings.tensorboard,
    )


def _publish(directory: Path, write: Callable[[Path], None]) -> None:
    """RUN/model, complete or not there."""
    partial, final = directory / "model.partial", directory / "model"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    write(partial)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)


def _write_two_towers(whole: dict[str, torch.Tensor], config: TwoTowerConfig, folder: Path, source: Path) -> None:
    with torch.device("meta"):
        model = TwoTowerForCausalLM(config)
    model.load_state_dict(whole, strict=True, assign=True)
    model.save_pretrained(folder)
    pretrained.copy_text_files(source, folder)
