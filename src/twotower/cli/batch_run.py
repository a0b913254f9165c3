"""Runs the jobs of `twotower batch` and `twotower generate-data`: in this process, or on a Ray cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import click

from twotower import model_loading
from twotower.cli.terminal import status_line
from twotower.process import configure_process

if TYPE_CHECKING:
    from twotower.decoding.output import Generation
    from twotower.engine.jobs import Line, Step
    from twotower.modeling_twotower import TwoTowerForCausalLM


class Job(Protocol):
    """Answers the lines from `start` on, in any order."""

    def steps(self, lines: Sequence[Line], start: int) -> Iterator[Step]: ...


@dataclass
class EngineJob:
    """A job in this process. rows: at most, at once. memory: bytes of state. fields: of `engine_steps`.

    note: after the job, what to tell the user beside the number of lines.
    """

    model: TwoTowerForCausalLM
    rows: int
    memory: int | None
    fields: Callable[[Line, Generation], dict[str, object]] | None = None
    note: str = ""

    def steps(self, lines: Sequence[Line], start: int) -> Iterator[Step]:
        from twotower.engine.jobs import engine_for, engine_steps

        engine = engine_for(self.model, lines, self.rows, self.memory)
        yield from engine_steps(engine, lines, start, self.fields)
        stats = engine.stats()
        if stats.reused_tokens:
            self.note = f"{stats.reused_tokens:,} of {stats.prompt_tokens:,} prompt tokens came from the prefix cache"


def run_with_progress(job: Job, lines: Sequence[Line], out: Path, *, with_prompt: bool) -> None:
    """Writes the missing answers of a job, and shows its progress. The exit code is 1 if no line has an answer.

    with_prompt: of `write_answers`.
    """
    from twotower.engine.jobs import count_answered, has_answer, write_answers

    before = count_answered(out, lines)
    started = time.perf_counter()
    with status_line() as update:

        def progress(written: int, tokens: int) -> None:
            seconds = time.perf_counter() - started
            rest = (len(lines) - written) * seconds / max(written - before, 1)
            update(f"{written} of {len(lines)} lines, {tokens / seconds:,.0f} tokens/s, {rest / 60:.1f} min left")

        written, failed = write_answers(job.steps(lines, before), lines, out, progress, before, with_prompt)
    earlier = f", {before} more by an earlier run" if before else ""
    errors = f", {failed} with an error" if failed else ""
    click.echo(f"{out}: {written} lines written{errors}{earlier}", err=True)
    if note := getattr(job, "note", ""):
        click.echo(note, err=True)
    if out.is_file() and not has_answer(out):
        click.echo(f"{out}: no line was answered; its errors say why", err=True)
        click.get_current_context().exit(1)


def cluster_job(
    model: str | None,
    consequence: str,
    actors: int | None,
    rows: int,
    memory: int | None,
    *,
    dtype: str,
    quantization: str | None,
    threads: int | None,
) -> tuple[Job, TwoTowerForCausalLM, Path | str]:
    """A job on a Ray cluster, the model of `--model` without weights, which checks the lines, and its source.

    Raises:
        TwoTowerError: Ray is not installed, or the model is missing, does not fit its config, or has no tokenizer.
    """
    from twotower.ray.batch_job import ClusterJob
    from twotower.ray.cluster import import_ray

    import_ray("--ray", "ray.data")
    configure_process(1)
    source = model_loading.source_of(model)
    found = model_loading.without_weights(source)
    model_loading.need_tokenizer(found, source, consequence)
    job = ClusterJob(
        model=model_loading.name_on_nodes(source),
        checked=found,
        actors=actors,
        rows=rows,
        memory=memory,
        dtype=dtype,
        quantization=quantization,
        threads=threads,
    )
    return job, found, source
