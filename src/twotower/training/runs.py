"""Carries out a run from its settings: opens data and model, shards, trains, writes the trained checkpoint."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from twotower.checkpoint import atomic, pretrained, tokenizer_files
from twotower.checkpoint.generation_config import GenerationDefaults
from twotower.checkpoint.source import resolve_source
from twotower.checkpoint.stored_quantization import refuse_quantized
from twotower.config import GenericTwoTowerConfig, TwoTowerConfig
from twotower.decoding.block_rule import BlockRule
from twotower.errors import ArgumentError
from twotower.modeling_twotower import TwoTowerForCausalLM
from twotower.ops.precision import has_fast_bf16_matmul
from twotower.training import weights
from twotower.training.adapter_objective import AdapterObjective, AdapterOptions
from twotower.training.data import Batch, Encoder
from twotower.training.fsdp import World, shard
from twotower.training.objective import AutoregressiveObjective, DenoisingObjective, DenoisingOptions
from twotower.training.on_policy.setup import on_policy_stages
from twotower.training.recipe import Recipe
from twotower.training.run_data import open_held_out, open_loader, open_sources, report_skipped
from twotower.training.run_settings import DenoiserSettings, RunSettings
from twotower.training.run_tokenizer import encoder_for, with_template
from twotower.training.trainer import MoreRows, TrainerOptions, Validate, lock_run_dir, train

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class ValidationInputs:
    """What a validation is made from. objective: sharded. held_out: this process's batches, by validation source.

    eos_token_id: the tokens that end a generated sample.
    """

    settings: RunSettings
    model: TwoTowerForCausalLM
    objective: AutoregressiveObjective | DenoisingObjective | AdapterObjective
    held_out: dict[str, list[Batch]]
    world: World
    eos_token_id: int | Sequence[int]

    @property
    def block_size(self) -> int:
        """The block size of the last stage."""
        return self.settings.stages[-1].block_size


MakeValidation = Callable[[ValidationInputs], Validate]


def train_denoiser(
    settings: DenoiserSettings, directory: Path, world: World, validation: MakeValidation | None = None
) -> Path:
    """Trains the denoiser of a two-tower checkpoint. Returns RUN/model, the checkpoint in the source's dtype."""
    source = resolve_source(settings.model, {})
    config = TwoTowerConfig.read(source)
    refuse_quantized(config, source, "training")
    if config.denoisers is not None:
        raise config.denoisers.ambiguous(str(source))
    if config.denoiser.adapters is not None:
        _check_adapters(settings, source, BlockRule.of(config.denoiser).one_pass)
    elif settings.tie and (config.denoiser.denoiser_layers or config.denoiser.denoiser_feed_forward):
        raise ArgumentError(f"{source}: its denoiser has other layers than the context tower; leave out --tie")
    if config.denoiser.draft_head is not None:
        _check_draft_head(settings, source)
    with lock_run_dir(directory, settings.fixed() | backbone_fields(config), world):
        return _train_denoiser(settings, config, source, directory, world, validation)


def _train_denoiser(
    settings: DenoiserSettings,
    config: TwoTowerConfig,
    source: Path,
    directory: Path,
    world: World,
    validation: MakeValidation | None,
) -> Path:
    tokenizer = tokenizer_files.load_tokenizer(source)
    defaults = GenerationDefaults.read(source, config.vocab_size)
    if tokenizer is None:
        raise ArgumentError(f"{source}: contains no tokenizer; put the backbone's tokenizer.json beside the weights")
    encoder = encoder_for(with_template(tokenizer, settings), config, defaults)
    rule = BlockRule.of(config.denoiser)
    recipe, shift = settings.choices.resolve(gated=rule.one_pass), rule.shift
    sources, held_out = open_sources(settings)
    encoder.place_blocks(shift)
    batches = open_held_out(settings, held_out, encoder, world)
    encoder.place_blocks(shift, settings.stages[-1].block_size if recipe.block_starts == "anywhere" else 1)
    loader = open_loader(settings, sources, encoder, settings.offset, world)
    with torch.device("meta"):
        model = TwoTowerForCausalLM(config)
    objective = (_adapter_objective if rule.one_pass else _denoising_objective)(model, settings, recipe)
    set_determinism(settings)
    dtype = compute_dtype(settings.dtype, world.device)
    shard(objective, objective.units, world, dtype)
    weights.load_weights(model, objective, source, world)
    model.tokenizer = tokenizer
    inputs = ValidationInputs(
        settings=settings,
        model=model,
        objective=objective,
        held_out=batches,
        world=world,
        eos_token_id=defaults.eos_or(config.eos_token_id) or encoder.eos_token_id,
    )
    train(
        trainer_options(settings, directory),
        objective,
        loader,
        world,
        validation(inputs) if validation and batches else None,
        _on_policy_rows(settings, inputs, encoder, shift, directory),
    )
    report_skipped([*sources, *held_out], world)
    whole = _final_weights(model, source, settings.tie, world)
    if world.is_main:
        publish(directory, lambda folder: _write_two_towers(whole, config, folder, source, settings.chat_template))
    world.barrier()
    return directory / "model"


def _on_policy_rows(
    settings: DenoiserSettings, inputs: ValidationInputs, encoder: Encoder, shift: int, directory: Path
) -> MoreRows | None:
    if settings.on_policy is None:
        return None
    ends = inputs.eos_token_id
    return on_policy_stages(
        inputs.model, inputs.objective, settings, encoder, ends, shift, directory, inputs.world
    ).next


def _denoising_objective(model: TwoTowerForCausalLM, settings: DenoiserSettings, recipe: Recipe) -> DenoisingObjective:
    if settings.tie:
        model.denoiser = model.context
    denoiser = model.context if model.has_adapters else model.denoiser
    assert denoiser is not None
    options = DenoisingOptions(
        mask_token_id=model.config.mask_token,
        scope=settings.noise,
        seed=settings.seed,
        elbo=settings.elbo,
        train_context=settings.train_context or settings.tie,
        ar_weight=settings.ar_weight,
        activation_checkpointing=settings.activation_checkpointing,
        time=model.time is not None,
        shift=model.config.denoiser.prediction_shift,
        prefix_causal=model.config.denoiser.block_attention == "prefix_causal",
        on_policy=settings.on_policy is not None,
        recipe=recipe,
    )
    return DenoisingObjective(model.context, denoiser, model.time, options)


def _adapter_objective(model: TwoTowerForCausalLM, settings: DenoiserSettings, recipe: Recipe) -> AdapterObjective:
    options = AdapterOptions(
        mask_token_id=model.config.mask_token,
        seed=settings.seed,
        activation_checkpointing=settings.activation_checkpointing,
        recipe=recipe,
    )
    return AdapterObjective(model.context, options)


def _check_adapters(settings: DenoiserSettings, source: Path, gated: bool) -> None:
    """Raises ArgumentError if adapters, whose context tower stays as it is, cannot be trained with these settings."""
    for name in ("tie", "train_context", "elbo") if gated else ("tie", "train_context"):
        if getattr(settings, name):
            raise ArgumentError(
                f"{source}: its denoiser is adapters on the context tower, which is not trained; leave out "
                f"--{name.replace('_', '-')}"
            )


def _check_draft_head(settings: DenoiserSettings, source: Path) -> None:
    """Raises ArgumentError if a denoiser with a draft head cannot be trained with these settings."""
    if settings.tie:
        raise ArgumentError(f"{source}: its denoiser has a draft head, and --tie has no denoiser; leave out --tie")
    if settings.elbo:
        raise ArgumentError(
            f"{source}: its denoiser has a draft head, which reads tokens under masks, so the weighted loss is no "
            "bound of the likelihood; leave out --elbo"
        )


def _final_weights(model: TwoTowerForCausalLM, source: Path, tied: bool, world: World) -> dict[str, torch.Tensor]:
    """All tensors of the result in the source's dtype, on rank 0; frozen ones are those of the source."""
    stored = pretrained.stored_dtype(source)
    frozen = weights.frozen_names(model)
    whole = weights.gather_weights(model, stored, world, without=frozen)
    whole |= weights.read_frozen(model, source, stored, frozen, world)
    if tied:
        whole |= {  # views, because the same tensor object under two names would be written once
            name.replace("context.", "denoiser.", 1): tensor.view_as(tensor)
            for name, tensor in whole.items()
            if name.startswith("context.")
        }
    return whole


def compute_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype to compute in. "auto": bf16 if the device has fast bf16 matmuls, else fp32."""
    if wanted != "auto":
        return DTYPES[wanted]
    return torch.bfloat16 if has_fast_bf16_matmul(device) else torch.float32


def backbone_fields(config: TwoTowerConfig) -> dict[str, object]:
    """Fields of config.json, on which a run depends: the file may have changed under the same name."""
    fields = config.backbone if isinstance(config, GenericTwoTowerConfig) else asdict(config.layer_fields)
    found = {f"config.{name}": value for name, value in fields.items()}
    own = asdict(config.denoiser)
    shape = {f"config.{name}": own[name] for name in ("denoiser_layers", "denoiser_feed_forward")}
    return found | {name: value for name, value in shape.items() if value is not None}


def set_determinism(settings: RunSettings) -> None:
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, torch refuses matrix products on CUDA
        torch.use_deterministic_algorithms(True)


def trainer_options(settings: RunSettings, directory: Path) -> TrainerOptions:
    return TrainerOptions(
        directory=directory,
        schedule=settings.schedule(),
        stages=settings.stages,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
        balance_rate=settings.balance_rate,
        micro_batch_size=settings.micro_batch_size,
        checkpoint_every=settings.checkpoint_every,
        validate_every=settings.validate_every,
        tensorboard=settings.tensorboard,
    )


def publish(directory: Path, write: Callable[[Path], None]) -> None:
    """Writes RUN/model atomically."""
    partial, final = directory / "model.partial", directory / "model"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    write(partial)
    atomic.replace_folder(partial, final)


def _write_two_towers(
    whole: dict[str, torch.Tensor], config: TwoTowerConfig, folder: Path, source: Path, template: Path | None
) -> None:
    with torch.device("meta"):
        model = TwoTowerForCausalLM(config)
    model.load_state_dict(whole, strict=True, assign=True)
    model.save_pretrained(folder)
    tokenizer_files.copy_model_files(source, folder)
    if template is not None:
        shutil.copyfile(template, folder / tokenizer_files.TEMPLATE_FILE)
