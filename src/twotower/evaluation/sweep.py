"""The quality/speed trade-off: accuracy, passes and speed of many settings, compared with AR on the same problems."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

from twotower.decoding.block_rule import RELEASED, BlockRule
from twotower.decoding.output import Generation
from twotower.decoding.presets import AR, Setting, parse_setting, with_ar
from twotower.errors import ArgumentError
from twotower.evaluation.accuracy import answer_problems, answers_right, chosen_problems
from twotower.evaluation.comparison import compare
from twotower.evaluation.tasks.problem_sets import Problem
from twotower.evaluation.tasks.scoring import OVERALL
from twotower.file_writes import replace_text
from twotower.json_text import to_json
from twotower.model.adapters import MaskEmbedding
from twotower.model.norm import RMSNorm
from twotower.modeling_twotower import TwoTowerForCausalLM

# All policies over their useful ranges. The other constants: block sizes, acceptances and draft depths of `grid`.
POLICY_VALUES: dict[str, tuple[float, ...]] = {
    "threshold": (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99),
    "top-k": (1, 2, 4, 8),
    "factor": (0.25, 0.5, 1.0, 2.0),
    "entropy": (0.03, 0.1, 0.3, 1.0),
    "margin": (0.4, 0.6, 0.8, 0.95),
    "klass": (0.5, 0.7, 0.9),
    "span": (0.5, 0.7, 0.9),
    "decay": (0.8, 0.95, 0.99),
}
BLOCK_SIZES = (8, 16, 32, 64)
ADAPTER_THRESHOLDS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
ADAPTER_BLOCK_SIZES = (4, 6, 8, 12, 24, 32)
ACCEPTANCES = (0.5, 0.2, 0.1, 0.03)
DRAFT_STEPS = (1, 2, 4)
QUICK = (
    "diffusion:0.8",
    "diffusion:0.9",
    "verified:draft_steps=1",
    "verified:draft_steps=1,acceptance=0.2",
)


@dataclass(frozen=True)
class Point:
    """Results of one setting.

    accuracy: of each family and overall, 0 to 1. kept: accuracy as a share of AR's overall accuracy, then the ends of
    its 95 % interval. tokens_per_pass counts passes of both towers. times_ar: tokens per second of single requests ÷
    AR's, measured in turns. For a setting that adapts to measured speed, tokens_per_pass is that of single requests.
    """

    setting: str
    accuracy: dict[str, float]
    kept: tuple[float, float, float]
    tokens_per_pass: float
    times_ar: float

    @property
    def series(self) -> str:
        """Name of the line of a picture that joins this point: settings that differ in the policy value."""
        mode, _, rest = self.setting.partition(":")
        if mode == "verified":
            return "verified, relaxed" if "acceptance" in rest else "verified"
        if mode != "diffusion":
            return mode
        if "block_size" in rest:
            return "block size"
        return rest.split("=")[0] if "=" in rest else "threshold"


def grid(rule: BlockRule = RELEASED) -> list[Setting]:
    """All settings of a full report that a model with this rule supports."""
    if rule.one_pass:
        texts = [f"diffusion:{value:g}" for value in ADAPTER_THRESHOLDS]
        texts += [f"diffusion:{value:g},block_size={size}" for size in ADAPTER_BLOCK_SIZES for value in (0.9, 0.98)]
        texts += ["verified:draft_steps=1", "verified"]
        texts += [f"verified:draft_steps=1,block_size={size}" for size in ADAPTER_BLOCK_SIZES]
        texts += [f"verified:draft_steps=1,acceptance={acceptance:g}" for acceptance in ACCEPTANCES]
        return [parse_setting(text) for text in texts]
    policies = ("threshold",) if rule.commits_from_left else POLICY_VALUES
    texts = [f"diffusion:{policy}={value:g}" for policy in policies for value in POLICY_VALUES[policy]]
    texts += [f"diffusion:0.8,block_size={size},steps_per_block={size}" for size in BLOCK_SIZES]
    texts += [f"verified:draft_steps={steps}" for steps in DRAFT_STEPS] + ["verified"]
    texts += [f"verified:draft_steps=1,acceptance={acceptance:g}" for acceptance in ACCEPTANCES]
    return [parse_setting(text) for text in texts]


class AnswerRecord(TypedDict):
    """Answers of one setting. right: one digit per problem, 1 for a right answer. passes: of both towers."""

    setting: str
    right: str
    tokens: int
    passes: int


def sweep_settings(
    model: TwoTowerForCausalLM,
    settings: Sequence[Setting],
    *,
    per_family: int,
    timed: int,
    families: Sequence[str] = (),
    difficulties: Sequence[int] = (1, 2),
    seed: int = 0,
    rows: int = 64,
    answers_file: Path | None = None,
    facts: Mapping[str, object] | None = None,
    progress: Callable[[str], object] | None = None,
) -> list[Point]:
    """Measures AR and each setting; one point for each.

    per_family: problems per family, answered in batches of `rows`, for accuracy. families: none: those of the suite.
    timed: problems of all families that every setting answers in turn, one at a time, for speed. answers_file: each
    setting's answers are saved there when they are complete, and a call with the same facts continues from the file.

    Raises:
        ArgumentError: answers_file belongs to another model or to other problems; AR answers no problem right.
    """
    report_progress = progress or (lambda text: None)
    problems = chosen_problems(families, per_family, difficulties, seed)
    facts = {
        **(facts or {}),
        "weights": fingerprint(model),
        "per_family": per_family,
        **({"families": list(families)} if families else {}),
        "difficulties": list(difficulties),
        "seed": seed,
    }
    known = _read(answers_file, facts)
    chosen = with_ar(settings)
    for number, setting in enumerate(chosen, 1):
        if setting.label not in known:
            report_progress(f"setting {number} of {len(chosen)}, {setting.label}: {len(problems)} problems")
            _, outputs = answer_problems(model, setting, problems, rows=rows)
            known[setting.label] = _record(setting, problems, outputs)
            _append(answers_file, facts, known)
        if "1" not in known[AR.label]["right"]:
            raise ArgumentError(
                f"AR answers none of the {len(problems)} problems right, so accuracy cannot be compared; choose easier "
                "problems (--difficulty) or a model that was trained on such problems"
            )
    alone = time_single_requests(
        model, chosen, random.Random(seed).sample(problems, min(timed, len(problems))), report_progress
    )
    points = []
    for setting in chosen:
        record, (speed, per_pass) = known[setting.label], alone[setting.label]
        if not setting.params().depends_on_timing:
            per_pass = record["tokens"] / max(record["passes"], 1)
        points.append(_point(record, known[AR.label], problems, per_pass, speed / alone[AR.label][0]))
    return points


def time_single_requests(
    model: TwoTowerForCausalLM,
    settings: Sequence[Setting],
    problems: Sequence[Problem],
    report_progress: Callable[[str], object],
) -> dict[str, tuple[float, float]]:
    """Decoding tokens per second, and tokens per pass of both towers, of single requests, by setting.

    All settings answer each problem in turn. The first problem is answered once more before, to warm up.
    """
    seconds, tokens, passes = (dict.fromkeys((setting.label for setting in settings), 0.0) for _ in range(3))
    for number, problem in enumerate([problems[0], *problems]):
        report_progress(f"timing: problem {number} of {len(problems)}")
        for setting in settings:
            _, (output,) = answer_problems(model, setting, [problem], rows=1)
            if number:
                seconds[setting.label] += output.decode_seconds
                tokens[setting.label] += len(output.tokens)
                passes[setting.label] += output.passes_of_both
    return {label: (tokens[label] / seconds[label], tokens[label] / max(passes[label], 1)) for label in seconds}


def pareto_front(points: Sequence[Point], speed: Callable[[Point], float]) -> list[Point]:
    """The Pareto front: points that no other point beats in both quality kept and speed, slowest first."""
    out: list[Point] = []
    for point in sorted(points, key=lambda p: (-speed(p), -p.kept[0])):
        if not out or point.kept[0] > out[-1].kept[0]:
            out.append(point)
    return out[::-1]


def write_points(path: Path, name: str, points: Sequence[Point]) -> None:
    """Writes the points of a report and the name of its model."""
    replace_text(path, to_json({"model": name, "points": [asdict(point) for point in points]}) + "\n")


def read_points(path: Path) -> tuple[str, list[Point]]:
    """The name of the model, and the points that `write_points` has written.

    Raises:
        ArgumentError: the file does not exist, or is not such a file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        points = [Point(**point | {"kept": tuple(point["kept"])}) for point in found["points"]]
        return str(found["model"]), points
    except FileNotFoundError:
        raise ArgumentError(f"{path}: no such file; give the folder of a finished report") from None
    except (OSError, ValueError, TypeError, LookupError):
        raise ArgumentError(f"{path}: not the points of a report; make the report again") from None


def fingerprint(model: TwoTowerForCausalLM) -> str:
    """Hash of both final norms' weights, or of the mask embedding of adapters, which every training changes."""
    several = model.config.denoisers
    parts: list[RMSNorm | MaskEmbedding | None] = [model.context.norm_f]
    for one in [model] if several is None else [model.with_denoiser(name) for name in several.names]:
        parts.append(one.context.mask_embedding if one.denoiser is None else one.denoiser.norm_f)
    data = b"".join(part.weight.detach().double().cpu().numpy().tobytes() for part in parts if part is not None)
    return hashlib.sha256(data).hexdigest()[:16]


def _record(setting: Setting, problems: Sequence[Problem], outputs: Sequence[Generation]) -> AnswerRecord:
    return {
        "setting": setting.label,
        "right": "".join("01"[right] for right in answers_right(problems, outputs)),
        "tokens": sum(len(out.tokens) for out in outputs),
        "passes": sum(out.passes_of_both for out in outputs),
    }


def _point(
    record: AnswerRecord,
    ar: AnswerRecord,
    problems: Sequence[Problem],
    tokens_per_pass: float,
    times_ar: float,
) -> Point:
    right, base = ([mark == "1" for mark in each["right"]] for each in (record, ar))
    hits: dict[str, list[bool]] = {OVERALL: right}
    for problem, mark in zip(problems, right, strict=True):
        hits.setdefault(problem.family, []).append(mark)
    return Point(
        setting=record["setting"],
        accuracy={name: sum(own) / len(own) for name, own in hits.items()},
        kept=compare(base, right).kept,
        tokens_per_pass=tokens_per_pass,
        times_ar=times_ar,
    )


def _read(path: Path | None, facts: Mapping[str, object]) -> dict[str, AnswerRecord]:
    if path is None or not path.exists():
        return {}
    try:
        head, *records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError:
        raise ArgumentError(f"{path}: not a file of report answers; remove it or choose another --output") from None
    if head != facts:
        differs = ", ".join(sorted(name for name in {*head, *facts} if head.get(name) != facts.get(name)))
        raise ArgumentError(f"{path}: its answers differ in {differs}; remove it or choose another --output")
    return {record["setting"]: record for record in records}


def _append(path: Path | None, facts: Mapping[str, object], known: dict[str, AnswerRecord]) -> None:
    """Replaces the whole file, so that an interrupted run leaves a readable one."""
    if path is not None:
        replace_text(path, "".join(to_json(line) + "\n" for line in (facts, *known.values())))
