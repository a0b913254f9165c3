"""The training loop: an objective, a loader of batches, many steps; resumable after a kill at any moment."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from twotower.errors import ArgumentError, TwoTowerError
from twotower.training import checkpoints
from twotower.training.balance import LoadBalance
from twotower.training.data.batch import Batch
from twotower.training.data.state import LoaderState
from twotower.training.fsdp import World
from twotower.training.log import LOG_FILE, TENSORBOARD_FOLDER, Log, Progress
from twotower.training.log_schema import StepRecord, Validation
from twotower.training.objective import Objective
from twotower.training.old_names import SETTINGS, with_present_names
from twotower.training.optimizer import Schedule, ShardedAdamW

SETTINGS_FILE = "settings.json"
TOKENIZER_FILE = "tokenizer.json"  # of a run that trains one


class Loader(Protocol):
    """This process's rows of each global batch (`data.RowLoader`)."""

    def use(self, block_size: int) -> None: ...

    def next(self) -> Batch: ...

    def state_dict(self) -> LoaderState: ...

    def load_state_dict(self, state: LoaderState) -> None: ...


@dataclass(frozen=True)
class Stage:
    """So many steps with blocks of one size."""

    block_size: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """Where a run keeps itself, and how it goes.

    micro_batch_size: rows of one forward pass on a process (0: all at once).
    """

    directory: Path
    schedule: Schedule
    stages: tuple[Stage, ...]
    weight_decay: float = 0.1
    clip: float = 1.0
    balance_rate: float = 1e-3
    micro_batch_size: int = 0
    checkpoint_every: int = 200
    validate_every: int = 500
    tensorboard: bool = True

    def __post_init__(self) -> None:
        if sum(stage.steps for stage in self.stages) != self.schedule.steps:
            raise ArgumentError(f"the stages' steps do not add up to {self.schedule.steps}")

    def block_size(self, step: int) -> int:
        """The block size of step 0, 1, …"""
        for stage in self.stages:
            if step < stage.steps:
                return stage.block_size
            step -= stage.steps
        return self.stages[-1].block_size


Validate = Callable[[int], Validation]  # after a step, on every process → what goes into its log record


def train(
    options: TrainerOptions, objective: Objective, loader: Loader, world: World, validate: Validate | None = None
) -> None:
    """Minimises a sharded objective (`fsdp.shard`); continues from the run's last whole checkpoint, if any.

    Raises:
        TwoTowerError: the loss or gradient is no longer finite (names the checkpoint to go back to); a checkpoint
            cannot be written; the run's directory belongs to other settings.
    """
    assert isinstance(objective, nn.Module)
    if world.is_main:
        options.directory.mkdir(parents=True, exist_ok=True)
    optimizer = ShardedAdamW(objective, world, options.weight_decay, options.clip)
    balance = LoadBalance(objective, options.balance_rate, world)
    done, notes = _resume(options, objective, optimizer, loader, world)
    log = Log(options.directory, done, options.tensorboard) if world.is_main else None
    progress = Progress(options.schedule.steps, done, shown=world.is_main)
    for note in notes:
        progress.say(note)
    if done:
        progress.say(f"continuing after step {done}")
    try:
        for step in range(done, options.schedule.steps):
            record = _step(options, objective, optimizer, loader, world, step)
            balance.step()
            timing = progress.step(step + 1, record["loss"], record["tokens"])
            last = step + 1 == options.schedule.steps
            if validate is not None and (last or (options.validate_every and (step + 1) % options.validate_every == 0)):
                record["validation"] = validate(step + 1)
                progress.say(f"step {step + 1}: " + summary(record["validation"]))
            if log is not None:
                record["timing"] = timing
                log.write(record)
            if last or (step + 1) % options.checkpoint_every == 0:
                checkpoints.save(
                    options.directory / "checkpoints", step + 1, state(objective, optimizer), loader.state_dict(), world
                )
    finally:
        balance.close()
        progress.close()
        if log is not None:
            log.close()


def _step(
    options: TrainerOptions, objective: Objective, optimizer: ShardedAdamW, loader: Loader, world: World, step: int
) -> StepRecord:
    """One update → its log record (but for the timing)."""
    size = options.block_size(step)
    loader.use(size)
    batch = loader.next()
    noise = objective.draw_noise(batch, size)
    targets = world.total(objective.targets(batch, noise))
    ratio = targets / max(world.total(objective.ar_targets(batch)), 1.0)
    micro = options.micro_batch_size or len(batch)
    starts = range(0, len(batch), micro)
    loss = 0.0
    for start in starts:
        part = slice(start, start + micro)
        noisy = None if noise is None else noise.rows(part).to(world.device)
        share = objective(batch.rows(part).to(world.device), noisy, size, ratio) / max(targets, 1.0)
        share.backward()
        loss += float(share.detach())
    loss = world.total(loss)
    norm = optimizer.gradient_norm()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        optimizer.zero_grad()
        kept = checkpoints.latest(options.directory / "checkpoints", step)
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm} (loss {loss:.4f})"
        raise TwoTowerError(
            f"{what} at step {step + 1}; "
            + (f"the last good checkpoint is {kept}" if kept else "no checkpoint was written yet")
            + "; a lower learning rate or a longer warm-up may help"
        )
    lr = options.schedule.lr(step)
    optimizer.step(lr, norm)
    tokens = int(world.total(batch.text.sum()))
    return {
        "step": step + 1,
        "loss": loss,
        "targets": int(targets),
        "tokens": tokens,
        "lr": lr,
        "grad_norm": norm,
        "block_size": size,
    }


def state(objective: nn.Module, optimizer: ShardedAdamW) -> dict[str, Tensor]:
    """What a checkpoint holds: what trains, its moments, and buffers. Frozen weights are in the model trained from."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            tensors[f"parameters.{name}"] = parameter.detach()
            moments = optimizer.moments(parameter)
            tensors |= {f"optimizer.{name}.{key}": value for key, value in moments.items()}
    return tensors | {f"buffers.{name}": buffer for name, buffer in objective.named_buffers()}


def summary(validation: Mapping[str, object]) -> str:
    """The numbers of a validation in one line."""
    return "  ".join(f"{k} {v:.4g}" for k, v in validation.items() if isinstance(v, int | float))


def _resume(
    options: TrainerOptions, objective: nn.Module, optimizer: ShardedAdamW, loader: Loader, world: World
) -> tuple[int, list[str]]:
    found, notes = checkpoints.find_intact(options.directory / "checkpoints", world)
    if found is None:
        return 0, notes
    done, where = checkpoints.load(found, state(objective, optimizer), world)
    loader.load_state_dict(where)
    return done, notes


def lock_run_dir(directory: Path, settings: dict[str, object], world: World) -> None:
    """Writes what a new run depends on into its directory, or compares it with what it was begun with.

    A run that has no checkpoint yet (a mistake in the command, say, or a loss that was not finite) holds nothing that
    other settings could spoil: it begins anew.

    Raises:
        ArgumentError: the directory holds a run with other settings; names the first that differs.
    """
    problem: str | None = None
    if world.is_main:
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / SETTINGS_FILE
        wanted = json.loads(json.dumps(settings))
        begun = with_present_names(json.loads(file.read_text()), SETTINGS) if file.exists() else {}
        changed = [name for name in sorted(set(begun) | set(wanted)) if begun.get(name) != wanted.get(name)]
        if changed and begun and (checkpoints.has_any(directory / "checkpoints") or (directory / "model").exists()):
            problem = (
                f"{directory} holds a run with {changed[0]} {begun.get(changed[0])!r}, and this command says "
                f"{wanted.get(changed[0])!r}; continue it with the same command, or give another directory"
            )
        elif changed:
            for left in (TOKENIZER_FILE, LOG_FILE):  # of the other settings
                (directory / left).unlink(missing_ok=True)
            shutil.rmtree(directory / TENSORBOARD_FOLDER, ignore_errors=True)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(wanted, indent=2, sort_keys=True) + "\n")
            partial.replace(file)
    problem = world.broadcast(problem)
    if problem:
        raise ArgumentError(problem)
