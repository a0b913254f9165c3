"""`twotower eval --task …`: published tasks under several settings."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from twotower.cli.terminal import status_line
from twotower.errors import ArgumentError, install_command

if TYPE_CHECKING:
    from rich.table import Table

    from twotower.decoding.presets import Setting
    from twotower.evaluation.lm_eval.task_scores import TaskScore
    from twotower.modeling_twotower import TwoTowerForCausalLM

ALL_TASKS = "all"  # stands for all names of tasks


def require_lm_eval() -> None:
    """Raises ArgumentError if lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ArgumentError(f"this command needs lm-evaluation-harness; install it: {install_command('eval')}")


def check_tasks(names: Sequence[str], data: Path | None, run_code: bool) -> None:
    """Checks the names of tasks and their files before a model is loaded."""
    require_lm_eval()
    from twotower.evaluation.lm_eval.tasks import check_tasks as check_choice

    check_choice(_chosen(names), data, run_code)


def measure_tasks(
    model: TwoTowerForCausalLM,
    settings: Sequence[Setting],
    names: Sequence[str],
    *,
    data: Path | None,
    limit: int | None,
    run_code: bool,
    likelihood: str,
    rows: int,
) -> list[TaskScore]:
    """Scores of all tasks under AR and the other settings."""
    from twotower.evaluation.lm_eval.task_scores import run_tasks

    with status_line() as update:
        return run_tasks(
            model,
            settings,
            _chosen(names),
            data=data,
            limit=limit,
            run_code=run_code,
            likelihood=likelihood,
            rows=rows,
            progress=update,
        )


def task_table(scores: Sequence[TaskScore]) -> Table:
    """A row for each task with the score and tokens per pass of each setting, and a row of means."""
    from rich import box
    from rich.table import Table

    from twotower.evaluation.lm_eval.tasks import TASKS

    settings = list(dict.fromkeys(score.setting for score in scores))
    found = {(score.task, score.setting): score for score in scores}
    tasks = list(dict.fromkeys(score.task for score in scores))
    out = Table(box=box.SIMPLE_HEAD, header_style="dim")
    out.add_column("task")
    out.add_column("items", justify="right")
    for setting in settings:
        out.add_column(setting.replace(",", ",\n"), justify="right")
        if setting != "ar":
            out.add_column("95 % of − AR", justify="right", no_wrap=True)
            out.add_column("tokens/pass", justify="right")
    for task in tasks:
        cells = [f"{TASKS[task].title} {TASKS[task].shots}-shot", str(found[task, settings[0]].items)]
        for setting in settings:
            score = found[task, setting]
            cells.append(f"{score.score:.1%}")
            if score.against_ar is not None:
                low, high = score.against_ar.interval
                cells.append(f"{100 * low:+.1f}…{100 * high:+.1f}" if score.scored_by != "context" else "as AR")
                cells.append(f"{score.tokens_per_pass:.2f}" if score.tokens_per_pass is not None else "")
        out.add_row(*cells)
    means = {setting: fmean(found[task, setting].score for task in tasks) for setting in settings}
    kept = ["mean", ""]
    for setting in settings:
        kept.append(f"{means[setting]:.1%}")
        if setting != "ar":
            kept += [f"{means[setting] / means['ar']:.1%} of AR" if means["ar"] else "", ""]
    out.add_section()
    out.add_row(*kept)
    if truncated := sum(score.truncated_prompts for score in scores):
        out.caption = f"{truncated} prompts did not fit into the context window and lost their beginning"
    return out


def _chosen(names: Sequence[str]) -> list[str]:
    from twotower.evaluation.lm_eval.tasks import TASKS

    return list(TASKS) if ALL_TASKS in names else list(dict.fromkeys(names))
