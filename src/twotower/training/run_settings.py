"""What a training run depends on, validated; the command line's options are these fields."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from twotower.errors import ArgumentError
from twotower.training.noise import NoiseScope
from twotower.training.optimizer import Schedule
from twotower.training.trainer import Stage

Dtype = Literal["auto", "bfloat16", "float32", "float64"]
Offset = Literal["random", "fixed"]

# What may change between the parts of one run: none of it changes what is computed.
FREE = ("checkpoint_every", "tensorboard")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Common to `pretrain` and `train`.

    data, validation: `PATH|HUB_ID[:SPLIT][@CONFIG][=WEIGHT]` items; without validation data, the held_out share of the
    training data serves. batch_size: rows of one optimizer step, over all processes; each has row_length tokens.
    micro_batch_size: rows of one forward pass on one process, 0 for all. warmup in steps, decay as a fraction of them.
    """

    data: tuple[str, ...]
    validation: tuple[str, ...] = ()
    held_out: float = 0.01
    text_field: str = "text"
    prompt_field: str | None = "prompt"
    streaming: bool = False
    epochs: int | None = None
    max_bad_records: int = 100
    batch_size: int = 8
    row_length: int = 1024
    micro_batch_size: int = 0
    stages: tuple[Stage, ...] = (Stage(16, 1000),)
    lr: float = 1e-4
    warmup: int = 100
    decay: float = 0.3
    final_lr_ratio: float = 0.01
    weight_decay: float = 0.1
    clip: float = 1.0
    balance_rate: float = 1e-3
    seed: int = 0
    dtype: Dtype = "auto"
    activation_checkpointing: bool = False
    deterministic: bool = False
    checkpoint_every: int = 200
    validate_every: int = 500
    validation_documents: int = 64
    tensorboard: bool = True

    def __post_init__(self) -> None:
        if not self.data:
            raise ArgumentError("no data; give at least one --data PATH or hub id")
        if not 0 <= self.held_out < 1:
            raise ArgumentError(f"held_out is {self.held_out}; give a share from 0 up to 1, as 0.01")
        for name in ("batch_size", "row_length", "checkpoint_every", "validation_documents"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} is {getattr(self, name)}; give at least 1")
        for name in ("micro_batch_size", "validate_every", "warmup", "clip", "weight_decay", "balance_rate", "seed"):
            if getattr(self, name) < 0:
                raise ArgumentError(f"{name} is {getattr(self, name)}; give 0 or more")
        for stage in self.stages:
            if self.row_length % stage.block_size:
                raise ArgumentError(
                    f"row_length is {self.row_length}, which is no multiple of the block size {stage.block_size}; "
                    f"give {-(-self.row_length // stage.block_size) * stage.block_size}"
                )
        self.schedule()

    def schedule(self) -> Schedule:
        """The learning rate's course over all stages."""
        steps = sum(stage.steps for stage in self.stages)
        return Schedule(
            steps=steps,
            peak_lr=self.lr,
            warmup=min(self.warmup, steps),
            decay=self.decay,
            final_lr_ratio=self.final_lr_ratio,
        )

    def fixed(self) -> dict[str, object]:
        """What must be the same when a run is continued."""
        return {name: value for name, value in asdict(self).items() if name not in FREE}


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(RunSettings):
    """An autoregressive backbone from nothing. prompt_loss: whether prompts that come with a text are learned too."""

    config: Path
    tokenizer: Path | None = None
    vocab_size: int | None = None
    split_digits: bool = False
    prompt_loss: bool = True

    def fixed(self) -> dict[str, object]:
        return super().fixed() | {
            "config": str(self.config),
            "tokenizer": str(self.tokenizer) if self.tokenizer else None,
        }


@dataclass(frozen=True, kw_only=True)
class DenoiserSettings(RunSettings):
    """The denoiser of a two-tower checkpoint.

    noise: what shares one noise level. offset: whether block edges fall anywhere in a text or at its start. tie: one
    network for both towers. train_context, ar_weight, elbo: see `objective.DenoisingOptions`.
    generate: whether validation also generates (needs the whole model on each process for a moment).
    """

    model: str
    noise: NoiseScope = "document"
    offset: Offset = "random"
    elbo: bool = False
    train_context: bool = False
    tie: bool = False
    ar_weight: float = 0.0
    generate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ar_weight < 0:
            raise ArgumentError(f"ar_weight is {self.ar_weight}; give 0 or more")
        if self.ar_weight and not (self.train_context or self.tie):
            raise ArgumentError(
                "ar_weight has no effect on a frozen context tower; add --train-context or --tie, or leave it out"
            )


def parse_stages(text: str) -> tuple[Stage, ...]:
    """`32:1000,16:2000` → blocks of 32 for 1,000 steps, then of 16 for 2,000.

    Raises:
        ArgumentError: not of that form.
    """
    try:
        stages = tuple(Stage(*(int(part) for part in item.split(":"))) for item in text.split(","))
    except (ValueError, TypeError):
        stages = ()
    if not stages or any(stage.block_size < 1 or stage.steps < 1 for stage in stages):
        raise ArgumentError(f"stages are {text!r}; give BLOCK:STEPS, …, as 32:1000,16:2000")
    return stages
