"""The training loop: one loss function, many steps, resumable at any checkpoint."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from twotower.errors import TwoTowerError
from twotower.model.moe import Router
from twotower.training.optimizer import MasterWeights, Schedule

LossAt = Callable[[int], tuple[Tensor, int]]  # step → (summed loss, number of targets)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where a run keeps itself, and how often."""

    directory: Path
    schedule: Schedule
    checkpoint_every: int = 200
    log_every: int = 20


class LoadBalance:
    """Auxiliary-loss-free balancing (DeepSeek-V3): after each step an over-used expert's selection bias goes
    down by `rate`, an under-used one's up. The bias is part of the released router, so nothing is added."""

    def __init__(self, modules: list[nn.Module], rate: float = 1e-3) -> None:
        self.rate = rate
        self.routers = [m for module in modules for m in module.modules() if isinstance(m, Router)]
        self.loads = [torch.zeros_like(r.e_score_correction_bias) for r in self.routers]
        self._hooks = [
            router.register_forward_hook(partial(self._count, load))
            for router, load in zip(self.routers, self.loads, strict=True)
        ]

    @staticmethod
    def _count(load: Tensor, module: nn.Module, inputs: object, output: tuple[Tensor, Tensor]) -> None:
        load += torch.bincount(output[0].flatten(), minlength=len(load))

    def step(self) -> None:
        for router, load in zip(self.routers, self.loads, strict=True):
            router.e_score_correction_bias += self.rate * torch.sign(load.mean() - load)
            load.zero_()

    def close(self) -> None:
        """Stops counting."""
        for hook in self._hooks:
            hook.remove()


def train(run: Run, modules: list[nn.Module], loss_at: LossAt) -> None:
    """Minimises loss_at(step) over `modules`; continues from the run's checkpoint if there is one.

    Raises:
        TwoTowerError: the loss is no longer finite; names the checkpoint to go back to.
    """
    run.directory.mkdir(parents=True, exist_ok=True)
    optimizer, balance = MasterWeights(modules), LoadBalance(modules)
    saved = run.directory / "checkpoint.pt"
    first, window, targets = _resume(saved, modules, optimizer)
    log = run.directory / "log.jsonl"
    _drop_after(log, first)
    started, seen = time.perf_counter(), 0
    for step in range(first, run.schedule.steps):
        loss, count = loss_at(step)
        value = loss.item()
        if not math.isfinite(value):
            raise TwoTowerError(f"loss is {value} at step {step}; the last good checkpoint is {saved}")
        loss.backward()
        rate = run.schedule.rate(step)
        norm = optimizer.step(rate, 1.0 / max(count, 1))
        balance.step()
        window, targets, seen = window + value, targets + count, seen + count
        if (step + 1) % run.log_every == 0 or step + 1 == run.schedule.steps:
            speed = seen / (time.perf_counter() - started)
            record = {"step": step + 1, "loss": window / max(targets, 1), "rate": rate, "norm": norm.item()}
            record |= {"targets_per_second": round(speed, 1), "seconds": round(time.perf_counter() - started, 1)}
            with log.open("a") as out:
                out.write(json.dumps(record) + "\n")
            left = (run.schedule.steps - step - 1) * (time.perf_counter() - started) / (step + 1 - first)
            print(
                f"step {step + 1}/{run.schedule.steps}  loss {record['loss']:.4f}  {speed:.0f} targets/s  "
                f"{left / 60:.1f} min left",
                flush=True,
            )
            window, targets = 0.0, 0
        if (step + 1) % run.checkpoint_every == 0 or step + 1 == run.schedule.steps:
            _save(saved, step + 1, modules, optimizer, (window, targets))
    balance.close()


def _save(path: Path, step: int, modules: list[nn.Module], optimizer: MasterWeights, window: tuple[float, int]) -> None:
    """Written beside and renamed, so a kill leaves the old checkpoint or the new one, never half of one."""
    partial = path.with_suffix(".partial")
    buffers = [[b.clone() for b in m.buffers()] for m in modules]
    state = {"step": step, "optimizer": optimizer.state_dict(), "buffers": buffers, "window": window}
    torch.save(state, partial)
    os.replace(partial, path)


def _resume(path: Path, modules: list[nn.Module], optimizer: MasterWeights) -> tuple[int, float, int]:
    """→ the next step, and the loss and number of targets since the last log line."""
    if not path.exists():
        return 0, 0.0, 0
    state = torch.load(path, weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    for module, buffers in zip(modules, state["buffers"], strict=True):
        for buffer, value in zip(module.buffers(), buffers, strict=True):
            buffer.copy_(value)
    return (int(state["step"]), *state.get("window", (0.0, 0)))


def _drop_after(log: Path, step: int) -> None:
    """Steps after the checkpoint will be done again: their log lines go, and so does one cut short by a kill."""
    if log.exists():
        whole = [line for line in log.read_text().splitlines() if line.endswith("}")]
        log.write_text("".join(line + "\n" for line in whole if json.loads(line)["step"] <= step))
