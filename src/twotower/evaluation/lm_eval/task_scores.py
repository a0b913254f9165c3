"""Runs tasks of the published table under several settings, paired with AR item by item."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from statistics import fmean

from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from twotower.decoding.presets import AR, Setting, beside_ar
from twotower.errors import ArgumentError
from twotower.evaluation.comparison import PairedComparison, compare
from twotower.evaluation.lm_eval.model import GenerationCost, TwoTowerLM
from twotower.evaluation.lm_eval.tasks import TASKS, check_tasks, lm_eval_tasks
from twotower.modeling_twotower import TwoTowerForCausalLM

EXAMPLES_SEED = 1234  # lm-evaluation-harness's default: which examples stand in the prompts


@dataclass(frozen=True)
class TaskScore:
    """One task under one setting. score: a share in 0..1; items: how many there were. against_ar: the same items paired
    with AR's. tokens_per_pass: of both towers, None where nothing was generated. by: who gave the likelihoods, of tasks
    whose answers are chosen by them. shortened: prompts whose beginning did not fit."""

    task: str
    setting: str
    score: float
    items: int
    against_ar: PairedComparison | None
    tokens_per_pass: float | None
    scored_by: str | None
    truncated_prompts: int
    seconds: float

    def to_dict(self) -> dict[str, object]:
        pair = self.against_ar
        extra = {} if pair is None else {"difference": pair.difference, "interval": pair.interval}
        return asdict(self) | extra


def run_tasks(
    model: TwoTowerForCausalLM,
    settings: Sequence[Setting],
    names: Sequence[str],
    *,
    data: Path | None = None,
    limit: int | None = None,
    run_code: bool = False,
    likelihood: str = "context",
    rows: int = 16,
    progress: Callable[[str], object] | None = None,
) -> list[TaskScore]:
    """Every task under AR and every other setting, task by task. limit: items of each part of a task (of each language,
    each subject), at most.

    A task whose answers are chosen by likelihood does not depend on the setting: it is scored once, by the context
    tower, or with likelihood "bound" once more by the denoiser for the settings other than AR.

    Raises:
        ArgumentError: an unknown task, a task that runs programs without run_code, or files that are missing.
    """
    check_tasks(names, data, run_code)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.ERROR)
    manager = _manager()
    scores = []
    for name in names:
        known: dict[tuple[str, str], tuple[list[float], GenerationCost, float]] = {}
        base: list[float] = []
        for setting in beside_ar(settings):
            scorer = None if TASKS[name].kind == "generate" else "context" if setting is AR else likelihood
            key = (setting.label, "") if scorer is None else ("", scorer)
            if key not in known:
                what = f"{name}, {setting.label if scorer is None else scorer}"
                lm = TwoTowerLM(
                    model,
                    setting=setting,
                    likelihood=scorer or "context",
                    batch_size=rows,
                    progress=None if progress is None else partial(_tell, progress, what),
                )
                began = time.perf_counter()
                items = _items(lm, manager, name, data, limit, run_code)
                known[key] = items, lm.cost, time.perf_counter() - began
            items, cost, seconds = known[key]
            base = base or items
            scores.append(
                TaskScore(
                    task=name,
                    setting=setting.label,
                    score=fmean(items),
                    items=len(items),
                    against_ar=None if setting is AR else compare([x > 0.5 for x in base], [x > 0.5 for x in items]),
                    tokens_per_pass=cost.tokens_per_pass if scorer is None else None,
                    scored_by=scorer,
                    truncated_prompts=cost.truncated_prompts,
                    seconds=seconds,
                )
            )
    return scores


def _tell(progress: Callable[[str], object], what: str, done: int, count: int) -> None:
    progress(f"{what}: {done} of {count}")


@cache
def _manager() -> TaskManager:
    """The index of all of lm-evaluation-harness's tasks, which takes seconds to read."""
    return TaskManager()


def _items(
    lm: TwoTowerLM, manager: TaskManager, name: str, data: Path | None, limit: int | None, run_code: bool
) -> list[float]:
    """The score of each item, in an order that depends on the task alone."""
    try:
        with redirect_stderr(io.StringIO()):  # a bar for each part, which says less than our line
            loaded = manager.load(lm_eval_tasks(name, data))
            for task in loaded["tasks"].values():
                task.set_fewshot_seed(seed=EXAMPLES_SEED)
            found = evaluate(lm, loaded, limit=limit, bootstrap_iters=0, confirm_run_unsafe_code=run_code)
    except OSError as error:  # of which the hub's are
        raise ArgumentError(f"{name}: {error}; --data reads it from a folder of files instead") from None
    assert found is not None
    metric, wanted_filter = TASKS[name].metric.rsplit(",", 1)
    out = []
    for part in sorted(found["samples"]):
        own = [sample for sample in found["samples"][part] if sample["filter"] == wanted_filter]
        out += [float(sample[metric]) for sample in sorted(own, key=lambda sample: sample["doc_id"])]
    if not out:
        raise ArgumentError(
            f"{name}: lm-evaluation-harness gave no {TASKS[name].metric}; is its version newer than known?"
        )
    return out
