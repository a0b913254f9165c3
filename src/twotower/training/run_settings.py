"""The settings of a training run, validated. The options of the command line are these fields."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from twotower.errors import ArgumentError
from twotower.training.noise import NoiseScope
from twotower.training.optimizer import Schedule
from twotower.training.recipe import AS_USUAL, RecipeChoices
from twotower.training.trainer import Stage

Dtype = Literal["auto", "bfloat16", "float32", "float64"]
Offset = Literal["random", "fixed"]

# These settings may change when a run is resumed, because they do not change the result.
CHANGEABLE = ("checkpoint_every", "tensorboard")
# Settings that earlier versions did not have, and the values that runs of those versions had.
ADDED: dict[str, object] = {"messages_field": "messages", "chat_template": None, "source": None, "on_policy": None}


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Settings that `pretrain` and `train` share.

    data, validation: `PATH|HUB_ID[:SPLIT][@CONFIG][=WEIGHT]` items. held_out: without validation data, this share of
    the training data is held out for validation. batch_size: rows of one optimizer step, over all processes; each has
    row_length tokens. chat_template: a file with the template of conversations; None: that of the tokenizer.
    micro_batch_size: rows of one forward pass on one process, 0 for all. warmup: in steps. decay: a
    fraction of the steps.
    """

    data: tuple[str, ...]
    validation: tuple[str, ...] = ()
    held_out: float = 0.01
    text_field: str = "text"
    prompt_field: str | None = "prompt"
    messages_field: str | None = "messages"
    chat_template: Path | None = None
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
            raise ArgumentError(f"held_out is {self.held_out}; give a share from 0 up to 1, like 0.01")
        for name in ("batch_size", "row_length", "checkpoint_every", "validation_documents"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} is {getattr(self, name)}; give at least 1")
        for name in ("micro_batch_size", "validate_every", "warmup", "clip", "weight_decay", "balance_rate", "seed"):
            if getattr(self, name) < 0:
                raise ArgumentError(f"{name} is {getattr(self, name)}; give 0 or more")
        for stage in self.stages:
            if self.row_length % stage.block_size:
                raise ArgumentError(
                    f"row_length is {self.row_length}, not a multiple of the block size {stage.block_size}; "
                    f"give {-(-self.row_length // stage.block_size) * stage.block_size}"
                )
        self.schedule()

    def schedule(self) -> Schedule:
        """The learning rate schedule over all stages."""
        steps = sum(stage.steps for stage in self.stages)
        return Schedule(
            steps=steps,
            peak_lr=self.lr,
            warmup=min(self.warmup, steps),
            decay=self.decay,
            final_lr_ratio=self.final_lr_ratio,
        )

    def fixed(self) -> dict[str, object]:
        """The settings that must not change when a run is resumed."""
        fixed = {name: value for name, value in asdict(self).items() if name not in CHANGEABLE}
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in fixed.items()}
        return {name: value for name, value in plain.items() if name not in ADDED or value != ADDED[name]}


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(RunSettings):
    """Training of an autoregressive backbone: from scratch with a config, or from the weights of a checkpoint.

    source: the directory or hub id of an autoregressive model of any supported family; it has its own config and
    tokenizer. prompt_loss: prompts are trained too.
    """

    config: Path | None = None
    source: str | None = None
    tokenizer: Path | None = None
    vocab_size: int | None = None
    split_digits: bool = False
    prompt_loss: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.config is None) == (self.source is None):
            raise ArgumentError("give either --config FILE, to train from scratch, or --from MODEL")
        for name in ("tokenizer", "vocab_size", "split_digits"):
            if self.source is not None and getattr(self, name):
                raise ArgumentError(
                    f"--{name.replace('_', '-')} has no effect with --from, whose model has a tokenizer; leave it out"
                )


@dataclass(frozen=True, kw_only=True)
class OnPolicySettings:
    """Stages of on-policy training (`training.on_policy`).

    every: steps of a stage. prompts: of a stage. rows: rows of rollouts that each step adds to its batch, over all
    processes. tokens: new tokens of a rollout, at most. setting: of decoding, as in `twotower batch`; None: verified
    with adapters at masks, diffusion:0.9 with other denoisers. replay: earlier stages whose refused states are trained
    again.
    """

    every: int
    prompts: int = 32
    rows: int = 1
    tokens: int = 128
    setting: str | None = None
    replay: int = 1

    def __post_init__(self) -> None:
        for name in ("every", "prompts", "rows", "tokens"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"on_policy_{name} is {getattr(self, name)}; give at least 1")
        if self.replay < 0:
            raise ArgumentError(f"on_policy_replay is {self.replay}; give 0 or more")


@dataclass(frozen=True, kw_only=True)
class DenoiserSettings(RunSettings):
    """Training of the denoiser of a two-tower checkpoint.

    noise: what shares one noise level. offset: blocks begin at a random position of a text, or at its start. tie: one
    network for both towers. train_context, ar_weight, elbo: see `objective.DenoisingOptions`. choices: of the recipe.
    generate: validation also generates; then each process holds the whole model for a short time. on_policy: None: no
    stages.
    """

    model: str
    noise: NoiseScope = "document"
    offset: Offset = "random"
    elbo: bool = False
    train_context: bool = False
    tie: bool = False
    ar_weight: float = 0.0
    generate: bool = True
    choices: RecipeChoices = AS_USUAL
    on_policy: OnPolicySettings | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        recipe = self.choices.resolve(gated=False)
        if self.elbo:
            recipe.check_likelihood_bound()
        for name in ("elbo", "tie", "train_context"):
            if self.on_policy is not None and getattr(self, name):
                raise ArgumentError(
                    f"--{name.replace('_', '-')} does not go with on-policy training, whose target is a frozen AR "
                    "model; leave one out"
                )
        if self.ar_weight < 0:
            raise ArgumentError(f"ar_weight is {self.ar_weight}; give 0 or more")
        if self.ar_weight and not (self.train_context or self.tie):
            raise ArgumentError(
                "ar_weight has no effect on a frozen context tower; add --train-context or --tie, or give 0"
            )

    def fixed(self) -> dict[str, object]:
        """Only choices that were made: runs of earlier versions have none."""
        fields = super().fixed()
        chosen, usual = (asdict(choices) for choices in (self.choices, AS_USUAL))
        del fields["choices"]
        return fields | {name: value for name, value in chosen.items() if value != usual[name]}


def parse_stages(text: str) -> tuple[Stage, ...]:
    """`32:1000,16:2000` → blocks of 32 for 1,000 steps, then blocks of 16 for 2,000 steps.

    Raises:
        ArgumentError: the text does not have this form.
    """
    try:
        stages = tuple(Stage(*(int(part) for part in item.split(":"))) for item in text.split(","))
    except (ValueError, TypeError):
        stages = ()
    if not stages or any(stage.block_size < 1 or stage.steps < 1 for stage in stages):
        raise ArgumentError(f"stages are {text!r}; give BLOCK:STEPS,…, like 32:1000,16:2000")
    return stages
