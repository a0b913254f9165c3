"""Scores of published tasks under several settings, compared with AR item by item."""

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

from twotower.decoding.presets import AR, Setting, with_ar
from twotower.errors import ArgumentError
from twotower.evaluation.comparison import PairedComparison, compare
from twotower.evaluation.lm_eval.model import GenerationCost, TwoTowerLM
from twotower.evaluation.lm_eval.tasks import TASKS, check_tasks, lm_eval_tasks
from twotower.modeling_twotower import TwoTowerForCausalLM

EXAMPLES_SEED = 1234  # selects the few-shot examples; lm-evaluation-harness's default


@dataclass(frozen=True)
class TaskScore:
    """Score of one task under one setting.

    score: 0 to 1; items: their number. against_ar: comparison with AR on the same items. tokens_per_pass: passes of
    both towers count; None if nothing was generated. scored_by: for a task that compares likelihoods of given answers,
    what computed them ("context" or "bound"). truncated_prompts: prompts that did not fit and lost their beginning.
    """

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
    """Scores every task under AR and every other setting.

    limit: the largest number of items of each part of a task (of each language or subject). A task that compares
    likelihoods of given answers does not depend on the setting. It is scored once by the context tower; with likelihood
    "bound" the denoiser scores it once more for the settings other than AR.

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
        for setting in with_ar(settings):
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
    """The index of lm-evaluation-harness's tasks; cached because reading takes seconds."""
    return TaskManager()


def _items(
    lm: TwoTowerLM, manager: TaskManager, name: str, data: Path | None, limit: int | None, run_code: bool
) -> list[float]:
    """The score of each item, in an order that depends only on the task."""
    try:
        with redirect_stderr(io.StringIO()):  # hides one progress bar per part
            loaded = manager.load(lm_eval_tasks(name, data))
            for task in loaded["tasks"].values():
                task.set_fewshot_seed(seed=EXAMPLES_SEED)
            found = evaluate(lm, loaded, limit=limit, bootstrap_iters=0, confirm_run_unsafe_code=run_code)
    except OSError as error:  # errors of the hub are OSErrors
        raise ArgumentError(f"{name}: {error}; use --data to read the task from a folder of files") from None
    assert found is not None
    metric, wanted_filter = TASKS[name].metric.rsplit(",", 1)
    out = []
    for part in sorted(found["samples"]):
        own = [sample for sample in found["samples"][part] if sample["filter"] == wanted_filter]
        out += [float(sample[metric]) for sample in sorted(own, key=lambda sample: sample["doc_id"])]
    if not out:
        raise ArgumentError(f"{name}: lm-evaluation-harness returned no {TASKS[name].metric}; use lm-eval 0.4.13")
    return out
