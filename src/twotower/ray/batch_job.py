"""`twotower batch --ray`: the lines of a job, answered by the actors of a cluster."""

from __future__ import annotations

import json
import logging
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Unpack

from twotower.errors import TwoTowerError
from twotower.json_text import to_json
from twotower.model_loading import same_dtype
from twotower.ray.cluster import (
    ActorSize,
    actor_options,
    check_room,
    check_workers,
    connected,
    gpus_of_cluster,
    last_line,
    nodes_of_cluster,
)
from twotower.ray.predictor import EngineArguments, TwoTowerPredictor

if TYPE_CHECKING:
    import numpy as np

    from twotower.engine.jobs import Line, Step
    from twotower.engine.sequence import Request
    from twotower.modeling_twotower import TwoTowerForCausalLM

BATCHES_PER_ACTOR = 4  # at least, if there are so many lines: an actor that is killed loses little work
ROUNDS = 4  # batch size by rows of an engine: at the end of a batch, rows are idle


@dataclass(frozen=True, kw_only=True)
class ClusterJob:
    """A job on a cluster. actors: None: one for each GPU, or without GPUs one for each node. rows: of each engine.

    model: its name on the nodes. checked: the same model without weights. memory: bytes of state of each engine.
    """

    model: str
    checked: TwoTowerForCausalLM
    actors: int | None
    rows: int
    memory: int | None
    dtype: str
    quantization: str | None
    threads: int | None

    def steps(self, lines: Sequence[Line], start: int = 0) -> Iterator[Step]:
        """Answers the lines from `start` on, in any order, while this process is connected to the cluster.

        Raises:
            TwoTowerError: a node lacks the package, the cluster has no room, or an actor cannot load the model.
        """
        from twotower.engine.jobs import Step

        rest = [(place, line.request) for place, line in enumerate(lines[start:], start)]
        yield Step([(place, {"error": lines[place].error}) for place, request in rest if request is None], 0)
        requests = {place: request for place, request in rest if request is not None}
        if requests:
            with connected(worker_logs=False):
                yield from self._answers(requests)

    def _answers(self, requests: Mapping[int, Request]) -> Iterator[Step]:
        from ray.data import from_items
        from ray.exceptions import RayError

        gpus = gpus_of_cluster()
        actors = min(self.actors or gpus or nodes_of_cluster(), len(requests))
        size = ActorSize.of(self.threads, int(gpus > 0))
        check_room("--actors", actors, size)
        check_workers()
        quiet()
        batch = max(min(ROUNDS * self.rows, math.ceil(len(requests) / (BATCHES_PER_ACTOR * actors))), 1)
        rows = [{"place": place, "request": pickle.dumps(request)} for place, request in requests.items()]
        answered = from_items(rows, override_num_blocks=math.ceil(len(rows) / batch)).map_batches(
            JobPredictor,
            fn_constructor_kwargs=self._arguments(list(requests.values()), on_cpu=not gpus),
            batch_size=batch,
            **actor_options(actors, gpus=size.gpus, threads=self.threads),
        )
        try:
            for found in answered.iter_batches(batch_size=None, prefetch_batches=0):
                yield _step(found)
        except RayError as error:
            reason = last_line(str(error))
            raise TwoTowerError(f"the Ray job failed ({reason}); the same command continues it") from None

    def _arguments(self, requests: Sequence[Request], on_cpu: bool) -> EngineArguments:
        """Arguments of the actors, whose engines all requests fit."""
        return {
            "model": self.model,
            "rows": self.rows,
            "length": max(len(request.prompt) + request.params.max_new_tokens for request in requests),
            "block_size": max(request.params.block_size for request in requests),
            "memory": self.memory,
            "dtype": same_dtype(self.checked, self.dtype, on_cpu),
            "quantization": self.quantization,
            "threads": self.threads,
        }


class JobPredictor:
    """Answers requests that were made before. A failure is a result, because Ray logs an exception at length.

    A row has the place of a line and its pickled request. Its result has the answer as JSON and the new tokens; or
    `failure`, why this actor can answer nothing.
    """

    def __init__(self, **arguments: Unpack[EngineArguments]) -> None:
        self.failure = ""
        try:
            self.predictor = TwoTowerPredictor(**arguments)
        except Exception as error:
            self.failure = _reason(error)

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, list[object]]:
        from twotower.engine.jobs import Line, engine_steps

        places = batch["place"].tolist()
        answers: dict[int, dict[str, object]] = {}
        if not self.failure:
            requests = map(pickle.loads, batch["request"].tolist())
            lines = [Line(number, "", request=request) for number, request in enumerate(requests, 1)]
            try:
                for step in engine_steps(self.predictor.engine, lines):
                    answers.update(step.answers)
            except Exception as error:
                self.failure = _reason(error)  # the engine may be damaged
        found = [answers.get(number, {}) for number in range(len(places))]
        return {
            "place": places,
            "answer": [to_json(answer) for answer in found],
            "tokens": [answer.get("new_tokens", 0) for answer in found],
            "failure": [self.failure] * len(places),
        }


def _reason(error: Exception) -> str:
    """One line for the user, with the name of an error that is not the user's."""
    text = " ".join(str(error).split())
    return text if isinstance(error, TwoTowerError | OSError) else f"{type(error).__name__}: {text}"


def _step(found: Mapping[str, np.ndarray]) -> Step:
    from twotower.engine.jobs import Step

    for failure in found["failure"].tolist():
        if failure:
            raise TwoTowerError(failure)
    answers = map(json.loads, found["answer"].tolist())
    return Step(list(zip(found["place"].tolist(), answers, strict=True)), sum(found["tokens"].tolist()))


def quiet() -> None:
    """Turns off the log and the progress bars of Ray Data, which the status line of a job replaces."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
