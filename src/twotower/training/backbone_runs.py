"""Runs of next-token prediction: a backbone from scratch, or an existing autoregressive model further."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from twotower.checkpoint import one_tower
from twotower.checkpoint.one_tower import OneTowerCheckpoint
from twotower.config import MODEL_TYPE, TwoTowerConfig, read_object
from twotower.errors import ConfigError
from twotower.modeling_twotower import TwoTowerForCausalLM
from twotower.training import fine_tuning, weights
from twotower.training.data import Batch, Encoder, RowLoader, Source
from twotower.training.fsdp import World, shard
from twotower.training.objective import AutoregressiveObjective
from twotower.training.run_data import open_held_out, open_loader, open_sources, report_skipped
from twotower.training.run_settings import PretrainSettings, RunSettings
from twotower.training.run_tokenizer import encoder_for, set_special_token_ids, tokenizer_of_run, with_template
from twotower.training.runs import (
    MakeValidation,
    ValidationInputs,
    backbone_fields,
    compute_dtype,
    publish,
    set_determinism,
    trainer_options,
)
from twotower.training.trainer import lock_run_dir, train


def pretrain(
    settings: PretrainSettings, directory: Path, world: World, validation: MakeValidation | None = None
) -> Path:
    """Trains an autoregressive backbone. Returns RUN/model, a checkpoint in Nemotron-H's layout or the source's."""
    if settings.source is not None:
        start, source = fine_tuning.read_source(settings.source)
        with lock_run_dir(directory, settings.fixed() | backbone_fields(start.model.config), world):
            return _fine_tune(settings, start, source, directory, world, validation)
    assert settings.config is not None
    config = _config_to_pretrain(settings.config)
    with lock_run_dir(directory, settings.fixed() | backbone_fields(config), world):
        return _pretrain(settings, config, directory, world, validation)


def _config_to_pretrain(path: Path) -> TwoTowerConfig:
    """The configuration of a backbone that is trained from scratch.

    Raises:
        ConfigError: it is not a Nemotron-H configuration, or has a value that is not allowed.
    """
    file = path / "config.json" if path.is_dir() else path
    kind = read_object(file, "give the backbone's config.json").get("model_type", MODEL_TYPE)
    if kind != MODEL_TYPE:
        raise ConfigError(
            f"{file}: model_type is {kind!r}; twotower pretrain trains only {MODEL_TYPE!r} from scratch. "
            "Make two towers of a trained model with twotower init"
        )
    return TwoTowerConfig.read(file)


def _pretrain(
    settings: PretrainSettings,
    config: TwoTowerConfig,
    directory: Path,
    world: World,
    validation: MakeValidation | None,
) -> Path:
    sources, held_out = open_sources(settings)
    tokenizer = tokenizer_of_run(settings, config, sources, directory, world)
    set_special_token_ids(config, tokenizer)
    encoder = encoder_for(tokenizer, config, align_turns=False)
    data = _Data.of(settings, sources, held_out, encoder, world)
    torch.manual_seed(settings.seed)
    model = TwoTowerForCausalLM(config, towers="context")
    model.tokenizer = tokenizer
    objective = _autoregressive_objective(model, settings)
    dtype = compute_dtype(settings.dtype, world.device)
    set_determinism(settings)
    shard(objective, objective.units, world, dtype)
    _train_backbone(settings, model, objective, data, directory, world, validation)
    whole = weights.gather_weights(model.context, dtype, world)
    if world.is_main:
        publish(directory, lambda folder: one_tower.write(folder, whole, config, tokenizer))
    world.barrier()
    return directory / "model"


def _fine_tune(
    settings: PretrainSettings,
    start: OneTowerCheckpoint,
    source: Path,
    directory: Path,
    world: World,
    validation: MakeValidation | None,
) -> Path:
    assert start.tokenizer is not None
    config, tokenizer = start.model.config, with_template(start.tokenizer, settings)
    sources, held_out = open_sources(settings)
    encoder = encoder_for(tokenizer, config, start.defaults, align_turns=False)
    data = _Data.of(settings, sources, held_out, encoder, world)
    with torch.device("meta"):
        model = TwoTowerForCausalLM(config, towers="context")
    model.tokenizer = tokenizer
    objective = _autoregressive_objective(model, settings)
    set_determinism(settings)
    shard(objective, objective.units, world, compute_dtype(settings.dtype, world.device))
    weights.load_one_tower(model, objective, start, world)
    _train_backbone(settings, model, objective, data, directory, world, validation)
    whole = weights.gather_weights(model.context, torch.float32, world)
    if world.is_main:
        publish(directory, lambda folder: fine_tuning.write(folder, whole, start, source, settings.chat_template))
    world.barrier()
    return directory / "model"


@dataclass(frozen=True, kw_only=True)
class _Data:
    """The data of next-token prediction. held_out: this process's batches, by validation source."""

    sources: list[Source]
    loader: RowLoader
    held_out: dict[str, list[Batch]]
    encoder: Encoder

    @classmethod
    def of(
        cls, settings: RunSettings, sources: list[Source], held_out: list[Source], encoder: Encoder, world: World
    ) -> _Data:
        return cls(
            sources=[*sources, *held_out],
            loader=open_loader(settings, sources, encoder, "fixed", world),
            held_out=open_held_out(settings, held_out, encoder, world),
            encoder=encoder,
        )


def _autoregressive_objective(model: TwoTowerForCausalLM, settings: PretrainSettings) -> AutoregressiveObjective:
    return AutoregressiveObjective(
        model.context, activation_checkpointing=settings.activation_checkpointing, prompt_loss=settings.prompt_loss
    )


def _train_backbone(
    settings: PretrainSettings,
    model: TwoTowerForCausalLM,
    objective: AutoregressiveObjective,
    data: _Data,
    directory: Path,
    world: World,
    validation: MakeValidation | None,
) -> None:
    inputs = ValidationInputs(
        settings=settings,
        model=model,
        objective=objective,
        held_out=data.held_out,
        world=world,
        eos_token_id=data.encoder.eos_token_id,
    )
    train(
        trainer_options(settings, directory),
        objective,
        data.loader,
        world,
        validation(inputs) if validation and data.held_out else None,
    )
    report_skipped(data.sources, world)
