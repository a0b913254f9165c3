"""The training loop. A run can be resumed after its processes were killed at any moment."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from twotower.errors import ArgumentError, TwoTowerError
from twotower.file_lock import exclusive_lock
from twotower.file_writes import output_errors, replace_text
from twotower.training import checkpoints
from twotower.training.balance import LoadBalance
from twotower.training.data.batch import Batch
from twotower.training.data.state import LoaderState
from twotower.training.fsdp import World
from twotower.training.log import LOG_FILE, TENSORBOARD_FOLDER, Log, Progress
from twotower.training.log_schema import StepRecord, Validation
from twotower.training.noise import Corruption
from twotower.training.objective import Objective
from twotower.training.old_names import SETTINGS, with_present_names
from twotower.training.optimizer import Schedule, ShardedAdamW
from twotower.training.stop_request import StopRequest

SETTINGS_FILE = "settings.json"
LOCK_FILE = ".lock"
MODEL_SETTINGS = ("model", "source", "config")  # of `train`, of `pretrain --from` and `--config`
ROLLOUTS_FOLDER = "rollouts"  # of on-policy training
TOKENIZER_FILE = "tokenizer.json"  # only of a run that trains its tokenizer


class Loader(Protocol):
    """Loads this process's rows of each global batch (`data.RowLoader`)."""

    def set_block_size(self, block_size: int) -> None: ...

    def next(self) -> Batch: ...

    def state_dict(self) -> LoaderState: ...

    def load_state_dict(self, state: LoaderState) -> None: ...


@dataclass(frozen=True)
class Stage:
    """A number of steps with one block size."""

    block_size: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """Options of the training loop. directory: the run directory.

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
            raise ArgumentError(f"the stages' steps do not add up to the schedule's {self.schedule.steps}")

    def block_size(self, step: int) -> int:
        """The block size of step 0, 1, …"""
        for stage in self.stages:
            if step < stage.steps:
                return stage.block_size
            step -= stage.steps
        return self.stages[-1].block_size


# Called before step 0, 1, … with its batch, on every process; returns further rows with their masks, or None.
MoreRows = Callable[[int, Batch], tuple[Batch, Corruption] | None]
Validate = Callable[[int], Validation]  # called after a step, on every process; returns fields of the log record


def train(
    options: TrainerOptions,
    objective: Objective,
    loader: Loader,
    world: World,
    validate: Validate | None = None,
    more_rows: MoreRows | None = None,
) -> None:
    """Minimizes a sharded objective (`fsdp.shard`). Resumes from the run's last intact checkpoint, if there is one.

    SIGTERM or Ctrl-C ends the run after the step, with a checkpoint (`stop_request`).

    Raises:
        TwoTowerError: the loss or gradient is not finite (the message names the last checkpoint); a checkpoint cannot
            be written; the checkpoint does not fit the objective.
    """
    assert isinstance(objective, nn.Module)
    if world.is_main:
        options.directory.mkdir(parents=True, exist_ok=True)
    optimizer = ShardedAdamW(objective, world, options.weight_decay, options.clip)
    balance = LoadBalance(objective, options.balance_rate, world)
    done, notes = _resume(options, objective, optimizer, loader, world)
    log = Log(options.directory, done, options.tensorboard) if world.is_main else None
    progress = Progress(options.schedule.steps, done, shown=world.is_main)
    for note in notes if balance.note is None else [*notes, balance.note]:
        progress.print_line(note)
    if done:
        progress.print_line(f"resuming after step {done}")
    with ExitStack() as parts:
        for part in (balance, progress, log):
            if part is not None:
                parts.callback(part.close)
        stop = parts.enter_context(StopRequest(world))
        for step in range(done, options.schedule.steps):
            record = _step(options, objective, optimizer, loader, world, step, more_rows)
            balance.step()
            timing = progress.step(step + 1, record["loss"], record["tokens"])
            last = step + 1 == options.schedule.steps
            if validate is not None and (last or (options.validate_every and (step + 1) % options.validate_every == 0)):
                record["validation"] = validate(step + 1)
                progress.print_line(f"step {step + 1}: " + validation_summary(record["validation"]))
            if log is not None:
                record["timing"] = timing
                log.write(record)
            stopped = not last and stop.came()
            if last or stopped or (step + 1) % options.checkpoint_every == 0:
                checkpoints.save(
                    options.directory / "checkpoints",
                    step + 1,
                    checkpoint_tensors(objective, optimizer),
                    loader.state_dict(),
                    world,
                )
            if stopped:
                progress.print_line(f"stopped after step {step + 1}; the same command resumes the run")
                stop.end()


def _step(
    options: TrainerOptions,
    objective: Objective,
    optimizer: ShardedAdamW,
    loader: Loader,
    world: World,
    step: int,
    more_rows: MoreRows | None,
) -> StepRecord:
    """Makes one optimizer step. Returns its log record, without the timing."""
    size = options.block_size(step)
    loader.set_block_size(size)
    batch = loader.next()
    noise = objective.draw_noise(batch, size)
    parts: list[tuple[Batch, Corruption | None]] = [(batch, noise)]
    if more_rows is not None and (found := more_rows(step, batch)) is not None:
        parts.append(found)
    known = [objective.targets(*part) for part in parts], objective.ar_targets(batch), batch.text.sum()
    *counts, ar_count, tokens = world.totals([*known[0], *known[1:]])
    ratio = counts[0] / max(ar_count, 1.0)
    shares = [_accumulate(options, objective, *part, size, ratio, max(sum(counts), 1.0)) for part in parts]
    losses, norm = optimizer.read_with_norm(shares)
    loss = sum(losses)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        optimizer.zero_grad()
        raise _not_finite(options, loss, norm, step)
    lr = options.schedule.lr(step)
    optimizer.step(lr, norm)
    record: StepRecord = {
        "step": step + 1,
        "loss": loss,
        "targets": round(sum(counts)),
        "tokens": int(tokens),
        "lr": lr,
        "grad_norm": norm,
        "block_size": size,
    }
    if len(parts) > 1:
        record["on_policy_loss"] = losses[1] * sum(counts) / max(counts[1], 1.0)
    return record


def _accumulate(
    options: TrainerOptions,
    objective: Objective,
    batch: Batch,
    noise: Corruption | None,
    block_size: int,
    ratio: float,
    divisor: float,
) -> Tensor:
    """Adds the gradients of a batch, micro-batch by micro-batch → its summed loss / divisor on this process, float64.

    The batch stays on the host: its masks decide the shapes of a pass. The loss stays on the device.
    """
    size = block_size if noise is None else batch.tokens.shape[1] // noise.t.shape[1]
    micro = options.micro_batch_size or len(batch)
    loss = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(batch), micro):
        part = slice(start, start + micro)
        share = objective(batch.rows(part), None if noise is None else noise.rows(part), size, ratio) / divisor
        share.backward()
        loss = share.detach().double() if start == 0 else loss + share.detach().double()
    return loss


def _not_finite(options: TrainerOptions, loss: float, norm: float, step: int) -> TwoTowerError:
    kept = checkpoints.latest(options.directory / "checkpoints", step)
    what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm} (loss {loss:.4f})"
    return TwoTowerError(
        f"{what} at step {step + 1}; "
        + (f"the last good checkpoint is {kept}" if kept else "no checkpoint was written yet")
        + "; a lower learning rate or a longer warmup may help"
    )


def checkpoint_tensors(objective: nn.Module, optimizer: ShardedAdamW) -> dict[str, Tensor]:
    """The tensors of a checkpoint: trained parameters, their moments, and buffers. Frozen weights are not stored."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            tensors[f"parameters.{name}"] = parameter.detach()
            moments = optimizer.moments(parameter)
            tensors |= {f"optimizer.{name}.{key}": value for key, value in moments.items()}
    return tensors | {f"buffers.{name}": buffer for name, buffer in objective.named_buffers()}


def validation_summary(validation: Mapping[str, object]) -> str:
    """The figures of a validation in one line."""
    return "  ".join(f"{k} {v:.4g}" for k, v in validation.items() if isinstance(v, int | float))


def _resume(
    options: TrainerOptions, objective: nn.Module, optimizer: ShardedAdamW, loader: Loader, world: World
) -> tuple[int, list[str]]:
    found, notes = checkpoints.find_intact(options.directory / "checkpoints", world)
    if found is None:
        return 0, notes
    done, where = checkpoints.load(found, checkpoint_tensors(objective, optimizer), world)
    loader.load_state_dict(where)
    return done, notes


@contextmanager
def lock_run_dir(directory: Path, settings: dict[str, object], world: World) -> Iterator[None]:
    """Keeps other runs out of a run directory, for the duration of a `with` block. The processes of a run share it.

    Writes the settings of a new run into its directory, or compares them with the settings of the run there.

    A run without a checkpoint has no results to protect, so other settings start it again.

    Raises:
        ArgumentError: another run has the lock; or the directory has a run with other settings, and the first setting
            that differs is named.
    """
    problem: str | None = None
    with ExitStack() as held:
        if world.is_main:
            try:
                with output_errors(directory):
                    directory.mkdir(parents=True, exist_ok=True)
                    held.enter_context(exclusive_lock(directory / LOCK_FILE, directory))
                    problem = _begin(directory, settings)
            except TwoTowerError as error:
                problem = str(error)
        problem = world.broadcast(problem)
        if problem:
            raise ArgumentError(problem)
        yield


def _begin(directory: Path, settings: dict[str, object]) -> str | None:
    """Writes or compares the settings → why the run may not begin."""
    file = directory / SETTINGS_FILE
    wanted = json.loads(json.dumps(settings))
    begun = with_present_names(json.loads(file.read_text(encoding="utf-8")), SETTINGS) if file.exists() else {}
    changed = [name for name in sorted(set(begun) | set(wanted)) if begun.get(name) != wanted.get(name)]
    if changed and begun and (checkpoints.has_any(directory / "checkpoints") or (directory / "model").exists()):
        was, now = (next(filter(None, map(own.get, MODEL_SETTINGS)), None) for own in (begun, wanted))
        if was != now:
            return (
                f"{directory} contains a run of {was}, and this command trains {now}; give another directory with -o, "
                "or resume the run with its own model"
            )
        return (
            f"{directory} contains a run with {changed[0]} {begun.get(changed[0])!r}, and this command has "
            f"{wanted.get(changed[0])!r}; resume it with the same command, or give another directory"
        )
    if changed:
        for left in (TOKENIZER_FILE, LOG_FILE):  # of the run with other settings
            (directory / left).unlink(missing_ok=True)
        for folder in (TENSORBOARD_FOLDER, ROLLOUTS_FOLDER):
            shutil.rmtree(directory / folder, ignore_errors=True)
        replace_text(file, json.dumps(wanted, indent=2, sort_keys=True) + "\n")
    return None
