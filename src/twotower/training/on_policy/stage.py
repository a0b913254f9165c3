"""Stages of on-policy training: every N steps the model decodes prompts, and the run keeps the rollouts.

    RUN/rollouts/step-00000200.json   the rollouts of the model after 200 steps

The prompts are those of the documents of the step's batch. The rollouts of a row depend on (seed, row number) and on
the weights alone. They are stored before they are used. So a resumed run reads them, and any number of processes reads
the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch

from twotower.decoding.params import GenerationParams
from twotower.errors import ArgumentError, CheckpointError
from twotower.file_writes import replace_text
from twotower.modeling_twotower import TwoTowerForCausalLM
from twotower.training.data.batch import Batch
from twotower.training.fsdp import World
from twotower.training.noise import Corruption
from twotower.training.on_policy.rollouts import Prompt, Rollout, State, decode
from twotower.training.on_policy.states import collate_states, pack
from twotower.training.trainer import ROLLOUTS_FOLDER
from twotower.training.validation.samples import FIRST_PART, documents

DECODED_ROWS = 16  # texts that a process decodes at once


@dataclass(frozen=True, kw_only=True)
class OnPolicyOptions:
    """every: steps of a stage; the first begins after so many steps. prompts: of a stage, over all processes.

    rows: rows of rollouts that each step adds to its batch, over all processes. replay: earlier stages whose refused
    states are trained again. shift: of the predictions.
    """

    every: int
    prompts: int
    rows: int
    replay: int
    params: GenerationParams
    row_length: int
    shift: int
    seed: int
    eos: int
    pad: int


class Unshard(Protocol):
    """Unshards the weights of the model on every process, for a `with` block."""

    def __call__(self) -> AbstractContextManager[None]: ...


class OnPolicy:
    """The rollouts of a run, and the rows of them that each step trains.

    Raises:
        ArgumentError: the rows cannot be shared by the processes.
    """

    def __init__(
        self, model: TwoTowerForCausalLM, unshard: Unshard, options: OnPolicyOptions, directory: Path, world: World
    ) -> None:
        if options.rows % world.size:
            raise ArgumentError(
                f"{options.rows} on-policy rows cannot be shared by {world.size} processes; give a multiple"
            )
        self.model, self.unshard, self.options, self.world = model, unshard, options, world
        self.folder = directory / ROLLOUTS_FOLDER
        self._stage = -1
        self._rows: list[list[Rollout]] = []

    def next(self, step: int, batch: Batch) -> tuple[Batch, Corruption] | None:
        """This process's rows of rollouts for step 0, 1, … and their masks; None if there are none yet.

        batch: of the step. Every process must call this method.
        """
        options = self.options
        stage = step // options.every
        if not stage:
            return None
        if stage != self._stage:
            own = self._read(stage)
            if own is None:
                if step % options.every:
                    raise self._missing(stage)
                own = self._decode(stage, batch)
            pool = [*own, *self._replayed(stage)]
            self._rows = pack([rollout for rollout in pool if rollout.states], options.row_length, self.block_size)
            self._stage = stage
        if not self._rows:
            return None
        slots = range(step * options.rows + self.world.rank, (step + 1) * options.rows, self.world.size)
        chosen = [self._rows[slot % len(self._rows)] for slot in slots]
        ids = {"shift": options.shift, "eos": options.eos, "pad": options.pad}
        return collate_states(chosen, options.row_length, self.block_size, **ids)

    def _replayed(self, stage: int) -> Iterator[Rollout]:
        """The refused states of earlier stages."""
        for number in range(max(stage - self.options.replay, 1), stage):
            found = self._read(number)
            if found is None:
                raise self._missing(number)
            yield from (rollout.refused for rollout in found)

    def _missing(self, stage: int) -> CheckpointError:
        where = self.file(stage)
        return CheckpointError(f"{where}: is missing, and the run needs it; restore the file, or start a new run")

    @property
    def block_size(self) -> int:
        """The block size of the rollouts."""
        return self.options.params.block_size

    def file(self, stage: int) -> Path:
        return self.folder / f"step-{stage * self.options.every:08d}.json"

    def _decode(self, stage: int, batch: Batch) -> list[Rollout]:
        """Decodes the prompts of a batch, each process those of its rows, and stores the rollouts."""
        options = self.options
        rows = len(batch) * self.world.size
        prompts = list(self._prompts(batch, -(-options.prompts // rows)))
        with torch.no_grad(), self.unshard():
            self.model.release()  # what was prepared from other weights
            own = decode(self.model, prompts, options.params, options.seed, DECODED_ROWS)
            self.model.release()
        every = [rollout for part in self.world.gather(own) for rollout in part]
        every.sort(key=lambda rollout: (rollout.row, rollout.document))
        if self.world.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_text(self.file(stage), _text(every))
        self.world.barrier()
        return every

    def _prompts(self, batch: Batch, count: int) -> Iterator[Prompt]:
        """The beginnings of the first `count` documents of each row, as generation gets them."""
        params = self.options.params
        longest = min(self.model.spec.max_position_embeddings - params.max_new_tokens, self.options.row_length)
        taken: dict[int, int] = {}
        for row, columns in documents(batch):
            number = int(batch.document[row][columns][0])
            tokens = batch.tokens[row][columns].tolist()
            given = int(batch.prompt[row][columns].sum())
            end = given + self.options.shift if given else min(len(tokens) // 2, FIRST_PART)
            if 0 < end < len(tokens) and end <= longest and taken.get(row, 0) < count:
                taken[row] = taken.get(row, 0) + 1
                yield Prompt(row=int(batch.index[row]), document=number, tokens=tuple(tokens[:end]))

    def _read(self, stage: int) -> list[Rollout] | None:
        """The stored rollouts of a stage, on every process; None if there are none.

        Raises:
            CheckpointError: the file is damaged.
        """
        found: tuple[list[Rollout] | None, str | None] = (None, None)
        if self.world.is_main and (file := self.file(stage)).is_file():
            try:
                found = _rollouts(file.read_text(encoding="utf-8")), None
            except (ValueError, KeyError, TypeError) as error:
                found = None, f"{file}: is damaged ({error}); restore the file, or start a new run"
        rollouts, problem = self.world.broadcast(found)
        if problem:
            raise CheckpointError(problem)
        return rollouts


def _text(rollouts: Sequence[Rollout]) -> str:
    content = json.dumps([asdict(rollout) for rollout in rollouts])
    return json.dumps({"sha256": hashlib.sha256(content.encode()).hexdigest(), "rollouts": content}) + "\n"


def _rollouts(text: str) -> list[Rollout]:
    stored = json.loads(text)
    if hashlib.sha256(stored["rollouts"].encode()).hexdigest() != stored["sha256"]:
        raise ValueError("the checksum differs")
    return [
        Rollout(
            row=fields["row"],
            document=fields["document"],
            given=fields["given"],
            tokens=tuple(fields["tokens"]),
            ended=fields["ended"],
            states=tuple(State(state["start"], tuple(state["masked"]), state["refused"]) for state in fields["states"]),
        )
        for fields in json.loads(stored["rollouts"])
    ]
