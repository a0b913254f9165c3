"""Speed of decoding settings, compared with AR with the same kernels in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import cast

from twotower.decoding.presets import AR, Setting, with_ar
from twotower.engine import LLM, Request
from twotower.engine.mode_choice import resolve
from twotower.evaluation.running import generate_all
from twotower.evaluation.timed_towers import TimedTowers, TowerName
from twotower.evaluation.workloads import Workload
from twotower.model_loading import eos_of
from twotower.modeling_twotower import TwoTowerForCausalLM


@dataclass(frozen=True)
class SpeedResult:
    """Speed of one setting on one workload: medians over rounds.

    title, prompts, rows, context: of the workload; prompts is its file's name, and context the tokens of a prompt.
    tokens: new tokens of a round, up to the end of each row. seconds: decoding time of a round, summed over its
    batches, each from the end of its prefill to the end of its last row; spread: the lowest and the highest.
    prefill_seconds: of a batch. first_seconds: until the first row of a batch has ended, prefill included.
    times_ar: median over rounds of this setting's tokens per second ÷ AR's in the same round. tokens_per_pass: new
    tokens of a row per pass, passes of both towers counted. pass_seconds: mean time of a pass of each tower, from a
    separate run; pass_cost: the same in AR steps.
    """

    setting: str
    title: str
    prompts: str
    rows: int
    context: int
    tokens: int
    seconds: float
    spread: tuple[float, float]
    prefill_seconds: float
    first_seconds: float
    tokens_per_second: float
    times_ar: float
    times_ar_spread: tuple[float, float]
    tokens_per_pass: float
    equal: float
    pass_seconds: dict[TowerName, float]
    pass_cost: dict[TowerName, float]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class RoundResult:
    """One run of one setting over all batches; prefill and first: mean seconds of a batch."""

    tokens: int
    seconds: float
    prefill: float
    first: float
    per_pass: float
    texts: list[list[int]]


def measure_speed(
    model: TwoTowerForCausalLM,
    settings: Sequence[Setting],
    workloads: Iterable[Workload],
    *,
    new_tokens: int = 128,
    rounds: int = 5,
    ignore_eos: bool = False,
    progress: Callable[[str], object] | None = None,
) -> list[SpeedResult]:
    """Measures every setting and AR on every workload.

    In each round all settings run in turn, so that other load on the machine affects all of them. One round before
    the measured rounds warms up, and one round after them times the passes of each tower.
    """
    chosen = with_ar(settings)
    shared: dict[str, object] = {"max_new_tokens": new_tokens, "mask_token_id": model.config.mask_token, "seed": 0}
    if not ignore_eos:
        shared["eos_token_id"] = eos_of(model)
    found = []
    for workload in workloads:
        texts, rows = workload.texts, workload.rows
        runs: dict[str, list[RoundResult]] = {setting.label: [] for setting in chosen}
        for number in range(rounds + 1):
            for setting in chosen:
                if progress is not None:
                    progress(f"{workload.title}, round {number} of {rounds}, {setting.label}")
                measured = run_round(model, texts, rows, setting, shared)
                if number:
                    runs[setting.label].append(measured)
        passes = {setting.label: pass_seconds(model, texts, rows, setting, shared) for setting in chosen}
        for label, own in runs.items():
            found.append(_measured(label, workload, own, runs[AR.label], passes))
    return found


def run_round(
    model: TwoTowerForCausalLM, texts: list[list[int]], rows: int, setting: Setting, shared: dict[str, object]
) -> RoundResult:
    """Runs one setting over all texts, in batches of `rows`."""
    params = setting.params(**shared)
    requests = [Request(text, params) for text in texts]
    batches = [generate_all(model, requests[start : start + rows], rows) for start in range(0, len(requests), rows)]
    results = [result for batch in batches for result in batch]
    passes = sum(result.passes_of_both for result in results)
    tokens = sum(len(result.tokens) for result in results)
    prefill = [batch[0].prefill_seconds for batch in batches]
    ends = [[result.decode_seconds for result in batch] for batch in batches]
    return RoundResult(
        tokens=tokens,
        seconds=sum(map(max, ends)),
        prefill=statistics.mean(prefill),
        first=statistics.mean(before + min(own) for before, own in zip(prefill, ends, strict=True)),
        per_pass=tokens / max(passes, 1),
        texts=[result.tokens for result in results],
    )


def pass_seconds(
    model: TwoTowerForCausalLM, texts: list[list[int]], rows: int, setting: Setting, shared: dict[str, object]
) -> dict[TowerName, float]:
    """Mean seconds of a pass of each tower, 0 for a tower without passes; mode "auto" times the mode it chooses now."""
    params, _ = resolve(model, setting.params(**shared), 1)
    timed = TimedTowers(model)
    for start in range(0, len(texts), rows):
        requests = [Request(text, params) for text in texts[start : start + rows]]
        LLM.fitting(cast(TwoTowerForCausalLM, timed), requests, rows).generate(requests)
    return timed.times.means()


def _measured(
    label: str,
    workload: Workload,
    own: Sequence[RoundResult],
    ar: Sequence[RoundResult],
    passes: dict[str, dict[TowerName, float]],
) -> SpeedResult:
    ratios = [(a.tokens / a.seconds) / (b.tokens / b.seconds) for a, b in zip(own, ar, strict=True)]
    seconds = [one.seconds for one in own]
    return SpeedResult(
        setting=label,
        title=workload.title,
        prompts=workload.name,
        rows=workload.rows,
        context=workload.context,
        tokens=own[0].tokens,
        seconds=statistics.median(seconds),
        spread=(min(seconds), max(seconds)),
        prefill_seconds=statistics.median(one.prefill for one in own),
        first_seconds=statistics.median(one.first for one in own),
        tokens_per_second=statistics.median(one.tokens / one.seconds for one in own),
        times_ar=statistics.median(ratios),
        times_ar_spread=(min(ratios), max(ratios)),
        tokens_per_pass=statistics.median(one.per_pass for one in own),
        equal=statistics.mean(a == b for a, b in zip(own[0].texts, ar[0].texts, strict=True)),
        pass_seconds=passes[label],
        pass_cost={tower: seconds / passes[AR.label]["context"] for tower, seconds in passes[label].items()},
    )
