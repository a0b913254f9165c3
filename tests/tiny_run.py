"""Tiny training runs: data, models, command lines, and processes that can be killed.

Processes are forked from a process that has imported everything, because a new interpreter takes seconds.
"""

from __future__ import annotations

import atexit
import functools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conftest import build_random_model
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from twotower.cli.main import run_cli
from twotower.training.data import train_tokenizer

VOCABULARY = 301  # odd, like the widths below, so that two processes cannot share it evenly
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 33,
    "intermediate_size": 41,
    "n_routed_experts": 5,
    "n_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 17,
    "moe_shared_expert_intermediate_size": 19,
}
BACKBONE = {
    "model_type": "nemotron_h", "hybrid_override_pattern": "M*E-", "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 12, "mamba_num_heads": 3, "mamba_head_dim": 10, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16,
    **SHAPE,
}  # fmt: skip
PRELOADED = (
    "pytest", "torch.distributed.checkpoint", "torch.utils.tensorboard", "twotower.cli.main",
    "twotower.training.validation", "twotower.training.runs",
)  # fmt: skip
NAMES = ["Ada", "Bo", "Cy", "Dot", "Eve", "Flo", "Gus", "Hal", "Ivy", "Jo"]


# --- input of a run ------------------------------------------------------------------------------------------------


def texts(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Different records, half of them with a prompt."""
    rng = random.Random(seed)
    out: list[dict[str, str]] = []
    for i in range(count):
        names = rng.sample(NAMES, rng.randint(2, 6))
        if i % 2:
            out.append({"prompt": f"{i}. Sort: {' '.join(names)} =>", "text": f" {' '.join(sorted(names))}"})
        else:
            out.append({"text": f"{i}. {' and '.join(names)} went {rng.choice(('home', 'away', 'to sea'))}."})
    return out


def write_data(file: Path, records: Sequence[dict[str, str]]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with special tokens 0 to 3, all bytes, and some merges of `texts`."""
    words = [record.get("prompt", "") + record["text"] for record in texts(200)]
    names = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(words, VOCABULARY), **names)


def two_towers(directory: Path, pattern: str = "M*E-", dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Writes a checkpoint with random weights and a tokenizer."""
    model = build_random_model(pattern, seed=3, dtype=dtype, **{**SHAPE, **overrides})
    own = tokenizer()
    for name in ("bos", "eos", "pad", "mask"):
        setattr(model.config, f"{name}_token_id", getattr(own, f"{name}_token_id"))
    model.save_pretrained(directory)
    own.save_pretrained(directory)
    return directory


class Given(NamedTuple):
    """Input of every run. The commands compute in fp32, with a few validations."""

    data: Path
    config: Path
    model: Path
    tokenizer: Path

    def train(self, output: Path, *more: str, model: Path | None = None) -> list[str]:
        """A command line of `train`; options in `more` take precedence."""
        return [
            "train",
            str(model or self.model),
            *self._common(output),
            "--stages",
            "32:8,16:14",
            "--no-generate",
            *more,
        ]

    def pretrain(self, output: Path, *more: str) -> list[str]:
        """A command line of `pretrain`; options in `more` take precedence."""
        given = ["--config", str(self.config), "--tokenizer", str(self.tokenizer), "--steps", "22"]
        return ["pretrain", *given, *self._common(output), *more]

    def _common(self, output: Path) -> list[str]:
        return [
            "--data", str(self.data), "-o", str(output), "--batch-size", "4", "--row-length", "64", "--lr", "1e-3",
            "--warmup", "3", "--held-out", "0.05", "--dtype", "float32", "--device", "cpu", "--checkpoint-every", "4",
            "--validate-every", "11", "--validation-documents", "4", "--no-tensorboard",
        ]  # fmt: skip


@functools.cache
def folder() -> Path:
    """A folder for all tests of a session, removed at its end."""
    path = tempfile.mkdtemp(prefix="twotower-runs-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


@functools.cache
def given() -> Given:
    config = folder() / "config.json"
    config.write_text(json.dumps(BACKBONE))
    model = two_towers(folder() / "two")
    return Given(write_data(folder() / "data.jsonl", texts(300)), config, model, model / "tokenizer.json")


@functools.cache
def uninterrupted(verb: str, *more: str) -> Path:
    """The directory of a run of one process, with which other tests compare their runs; do not change it."""
    output = folder() / "-".join([verb, *more]).replace("/", "_")
    assert run_cli(getattr(given(), verb)(output, *more)) == 0
    return output


# --- output of a run -----------------------------------------------------------------------------------------------


def log_text(directory: Path) -> str:
    """The log without fields of measured time."""
    return re.sub(r', "timing": \{[^}]*\}', "", (directory / "log.jsonl").read_text())


def log(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log_text(directory).splitlines()]


def column(directory: Path, name: str) -> torch.Tensor:
    """One field of all records of a log, in float64."""
    return torch.tensor([record[name] for record in log(directory)], dtype=torch.float64)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Weights of a run or of a checkpoint directory."""
    inner = directory / "model"
    return load_file((inner if inner.is_dir() else directory) / "model.safetensors")


def model_bytes(directory: Path) -> dict[str, bytes]:
    """Content of every file of a run's model."""
    return {file.name: file.read_bytes() for file in sorted((directory / "model").iterdir())}


def checkpoints(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


# --- processes -----------------------------------------------------------------------------------------------------


class Launched(NamedTuple):
    """Processes of one command line; the stderr of each is in a file."""

    processes: list[Any]
    stderr_files: list[Path]

    def kill(self, *ranks: int) -> None:
        """Sends SIGKILL to some or all processes, without waiting."""
        for rank in ranks or range(len(self.processes)):
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, signal.SIGKILL)

    def codes(self, timeout: float = 120) -> list[int]:
        """Waits, kills processes that are still running, and returns the exit codes."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        self.kill()
        for process in self.processes:
            process.join()
        return [process.exitcode for process in self.processes]

    def stderr(self, rank: int = 0) -> list[str]:
        return self.stderr_files[rank].read_text().splitlines()

    def running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def kill_when(self, moment: Callable[[], bool]) -> bool:
        """Kills all processes when a condition holds (checked every half millisecond); returns whether it held."""
        while self.running():
            if moment():
                self.kill()
                self.codes()
                return True
            time.sleep(0.0005)
        return False


def launch(
    args: Sequence[str], stderr: Path, processes: int = 1, file_limits: dict[int, int] | None = None
) -> Launched:
    """Starts `twotower` with these arguments, in one process or as torchrun would in several.

    stderr: path for stderr; each file has the rank as suffix. file_limits: by rank, the maximum size of a file in
    bytes (simulates a full disk).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outputs = [stderr.with_name(f"{stderr.name}.{rank}") for rank in range(processes)]
    started = [
        context.Process(
            target=_be_rank,
            args=(list(args), rank, processes, port, str(outputs[rank]), (file_limits or {}).get(rank)),
            daemon=True,
        )
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    return Launched(started, outputs)


def _be_rank(args: list[str], rank: int, size: int, port: int, stderr: str, file_limit: int | None) -> None:
    for fd in (1, 2):
        os.dup2(os.open(stderr if fd == 2 else os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    if size > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    torch.set_num_threads(1)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.exit(run_cli(args))
