"""Part 9: losses as on a CPU, tokens a second of training steps, and a run that is killed and resumed.

Each runs in a process of its own, because a run is a command line.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import train
from common.models import BLOCK, MIDSIZE, config_of

from gpu_parts.choices import TRAINING, sides, title
from gpu_parts.clock import timed
from gpu_parts.parallel import start, wait_until
from gpu_parts.record import Figures, Record
from gpu_parts.setting import Setting
from twotower import options
from twotower.cli.main import run_cli
from twotower.evaluation.tasks import make_problems
from twotower.training import fsdp
from twotower.training.optimizer import ShardedAdamW

RECORDED = Path(__file__).parents[1] / "gpu_losses.json"
DIALOGUES = Path(__file__).parents[2] / "build" / "gpu-data" / "dialogues.jsonl"
RECORD_COMMAND = "python benchmarks/gpu.py --record-losses"
STEPS, ROWS, LENGTH, LR = 5, 2, 64, 1e-3  # of the recorded losses
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}  # relative, after five steps
KINDS = ("denoiser", "adapters", "ar")


def run(setting: Setting, record: Record) -> None:
    """The seconds of the part are shared: losses 15 %, steps 45 %, the run the rest."""
    share = record.left()
    apart(record, "losses", lambda: losses_as_recorded(setting, record), share * 0.2)
    apart(record, "steps", lambda: speeds(setting, record, share * 0.45), share * 0.5)
    with tempfile.TemporaryDirectory(prefix="gpu-run-") as folder:
        record.measure("a run, killed and resumed", lambda: killed_and_resumed(setting, record, Path(folder)))


def apart(record: Record, what: str, work: Callable[[], None], seconds: float) -> None:
    """Calls `work` in a new process and kills it after `seconds`."""
    child = start(work)
    status = wait_until(child, time.monotonic() + seconds)
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        record.add(what, error=f"cut off after {seconds:.0f} s")
    elif status:
        record.add(what, error="its process failed; log.txt has the reason")


# --- losses -----------------------------------------------------------------------------------------------------------


def losses_as_recorded(setting: Setting, record: Record) -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    world = fsdp.start(setting.device.type)
    for dtype in ("float32",) if setting.small else ("float32", "bfloat16"):
        for kind in KINDS:
            what = f"{STEPS} steps of {kind}, {dtype}, beside a CPU's losses"
            record.measure(what, lambda kind=kind, dtype=dtype: compared(recorded, world, kind, dtype))
    fsdp.stop()


def compared(recorded: dict[str, Any], world: fsdp.World, kind: str, dtype: str) -> Figures:
    """The losses, and the largest relative difference to the recorded ones."""
    found, expected = losses(world, kind, getattr(torch, dtype)), recorded["losses"][kind]
    off = max(abs(one - other) / abs(other) for one, other in zip(found, expected, strict=True))
    good = off <= TOLERANCE[dtype]
    return {"verdict": "agrees" if good else "DIFFERS", "by": off, "first": found[0], "last": found[-1]}


def losses(world: fsdp.World, kind: str, dtype: torch.dtype) -> list[float]:
    """Nats a token of the first steps of the bundled shape. Weights and noise are drawn on the CPU."""
    shape = train.shapes()["bundled"]
    objective = train.objectives(shape, world, dtype, False, (kind,))[kind]
    batch, noise = train.batch_for(objective, ROWS, LENGTH, shape.vocab_size)
    optimizer, found = ShardedAdamW(objective, world, 0.1, 1.0), []
    for _ in range(STEPS):
        loss = objective(batch, noise, BLOCK) / batch.tokens.numel()
        loss.backward()
        optimizer.step(LR, optimizer.gradient_norm())
        found.append(float(loss.detach()))
    return found


def record_losses() -> Figures:
    """Writes `RECORDED` from this machine's CPU."""
    world = fsdp.start("cpu")
    found = {kind: losses(world, kind, torch.float32) for kind in KINDS}
    fsdp.stop()
    facts = {
        "command": RECORD_COMMAND, "torch": torch.__version__, "dtype": "float32", "rows": ROWS, "row_length": LENGTH,
        "learning_rate": LR, "losses": found,
    }  # fmt: skip
    RECORDED.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


# --- speed of steps ---------------------------------------------------------------------------------------------------


def speeds(setting: Setting, record: Record, seconds: float) -> None:
    """Tokens a second of a step, by shape, objective, rows and choice; the most important first."""
    end = time.monotonic() + seconds
    world = fsdp.start(setting.device.type)
    length = 32 if setting.small else 512
    made: dict[tuple[str, str], tuple[Any, int]] = {}
    cases = cases_of(setting)
    for number, (shape, kind, rows, side) in enumerate(cases):
        left = (end - time.monotonic()) / (len(cases) - number)
        what = f"steps of {shape}, {kind}, {rows} rows of {length}" + ", " * bool(side) + title(side)
        if left <= (0 if setting.small else 1):
            record.add(what, skipped="no time left")
            continue
        if (shape, kind) not in made:
            made.clear()
            made[shape, kind] = objective_of(setting, world, shape, kind)
        with options.override(**side):
            record.measure(what, lambda o=made[shape, kind], r=rows, s=0.6 * left: speed(world, *o, r, length, s))
    fsdp.stop()


def cases_of(setting: Setting) -> list[tuple[str, str, int, dict[str, Any]]]:
    """Shape, objective, rows and the side of a choice. Compilation comes last, because it can take all the time."""
    choices = list(sides(TRAINING))
    if setting.small:
        return [("bundled", "denoiser", 1, side) for side in ({}, *choices) if "training_compile" not in side]
    cases: list[tuple[str, str, int, dict[str, Any]]] = [("bundled", "denoiser", rows, {}) for rows in (64, 8, 256)]
    cases += [("bundled", "denoiser", 64, side) for side in choices if "training_compile" not in side]
    cases += [("midsize", "denoiser", rows, {}) for rows in (64, 8, 256)] + [("bundled", "adapters", 64, {})]
    return cases + [("bundled", "denoiser", 64, side) for side in choices if "training_compile" in side]


def objective_of(setting: Setting, world: fsdp.World, shape: str, kind: str) -> tuple[Any, int]:
    """An objective whose weights are drawn on the device, and its vocabulary."""
    fields = train.shapes()["bundled"] if shape == "bundled" else config_of(MIDSIZE).layer_fields
    dtype = torch.float32 if setting.small else torch.bfloat16
    with world.device:
        return train.objectives(fields, world, dtype, False, (kind,))[kind], fields.vocab_size


def speed(world: fsdp.World, objective: Any, vocabulary: int, rows: int, length: int, seconds: float) -> Figures:
    """A training step: forward, backward, clipping and AdamW."""
    batch, noise = train.batch_for(objective, rows, length, vocabulary)
    optimizer, cuda = ShardedAdamW(objective, world, 0.1, 1.0), world.device.type == "cuda"
    found: Figures = timed(
        lambda: train.step(objective, optimizer, batch, noise),
        world.device,
        min(seconds, 3.0) if cuda else 0.05,
        warm_up=3 if cuda else 1,
    )
    found["tokens/s"] = rows * length / found["ms"] * 1e3
    if cuda:
        found["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
    return found


# --- a real run -------------------------------------------------------------------------------------------------------


def killed_and_resumed(setting: Setting, record: Record, folder: Path) -> Figures:
    """`twotower train`, killed after a checkpoint, and resumed by the same command.

    It trains on dialogues, if `--prepare` copied them, else on the suite's problems.
    """
    data, directory = folder / "data.jsonl", folder / "run"
    if DIALOGUES.exists():
        data = DIALOGUES
    else:
        problems = make_problems("train", 200 if setting.small else 4000, 0)
        data.write_text("".join(json.dumps({"text": one.text}) + "\n" for one in problems), encoding="utf-8")
    every = 2 if setting.small else 20
    rows, length = (2, 64) if setting.small else (64, 512)
    command = (
        f"train {'bundled/small' if setting.small else 'bundled'} --data {data} -o {directory} --steps 1000000 "
        f"--checkpoint-every {every} --batch-size {rows} --row-length {length} --held-out 0 --warmup 2 --no-generate "
        f"--no-tensorboard --device {setting.device.type}"
    ).split()
    left = record.left() - 3
    end = time.monotonic() + left
    first = start(lambda: os._exit(run_cli(command)))
    wait_for_steps(first, directory, every + 1, end - left / 2)
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    before = logged(directory)
    second = start(lambda: os._exit(run_cli(command)))
    wait_for_steps(second, directory, len(before) + every if setting.small else 1_000_000, end)
    os.kill(second, signal.SIGTERM)  # the run stops after its step, with a checkpoint
    if wait_until(second, time.monotonic() + (120 if setting.small else 10)) is None:
        os.kill(second, signal.SIGKILL)
        os.waitpid(second, 0)
        raise TimeoutError("the resumed run did not stop after SIGTERM")
    return resumed(before, logged(directory), every)


def wait_for_steps(child: int, directory: Path, steps: int, end: float) -> None:
    """Waits until a run has made so many steps, until it ends, or until `end`."""
    while time.monotonic() < end and len(logged(directory)) < steps and not _ended(child):
        time.sleep(0.02)


def _ended(child: int) -> bool:
    """Whether a process has ended; it stays to be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def logged(directory: Path) -> list[dict[str, Any]]:
    """The steps in a run's log."""
    log = directory / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")] if log.exists() else []


def resumed(before: list[dict[str, Any]], after: list[dict[str, Any]], every: int) -> Figures:
    """The figures of a resumed run.

    Raises:
        AssertionError: the log has not each step once, or the run did not go on after its last checkpoint.
    """
    assert len(before) >= every, f"killed after {len(before)} steps, before the first checkpoint: no time"
    assert [one["step"] for one in after] == list(range(1, len(after) + 1)), "the log lacks steps or has some twice"
    kept = len(before) // every * every
    assert len(after) > kept, "the run did not go on"
    same = [one["loss"] == other["loss"] for one, other in zip(before[:kept], after, strict=False)]
    return {
        "killed after": len(before), "resumed after": kept, "ended after": len(after), "kept steps equal": all(same),
        "first loss": after[0]["loss"], "last loss": after[-1]["loss"],
        "tokens/s": after[-1]["timing"]["tokens_per_second"],
    }  # fmt: skip
