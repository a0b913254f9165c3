"""Accuracy of decoding settings on the procedural suite, paired with AR, and the passes that each setting needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from twotower.decoding.output import Generation
from twotower.decoding.presets import Setting, with_ar
from twotower.engine import Request
from twotower.errors import ArgumentError
from twotower.evaluation.comparison import PairedComparison, compare
from twotower.evaluation.likelihood import continuation_nats
from twotower.evaluation.running import generate_all
from twotower.evaluation.tasks import FAMILIES, SUITE
from twotower.evaluation.tasks.problem_sets import Problem, stream_problems
from twotower.evaluation.tasks.scoring import OVERALL, is_right, wilson
from twotower.model_loading import eos_of
from twotower.modeling_twotower import TwoTowerForCausalLM
from twotower.tokenizer import require_tokenizer


@dataclass(frozen=True)
class SettingAccuracy:
    """Results of one setting, for each family of problems and overall.

    accuracy: share of right answers, 0 to 1; interval: its 95 % interval; against_ar: comparison with AR on the same
    problems. Passes do not include prefill. Over all problems: nll, −ln p of the answers under the context tower in
    nats per token; accepted, drafted tokens accepted per draft.
    """

    setting: str
    accuracy: dict[str, float]
    interval: dict[str, tuple[float, float]]
    against_ar: dict[str, PairedComparison]
    tokens: dict[str, int]
    denoiser_passes: dict[str, int]
    context_passes: dict[str, int]
    accepted: float
    nll: float
    repeated_4grams: float

    @property
    def tokens_per_pass(self) -> dict[str, float]:
        """New tokens per pass; passes of both towers count."""
        return {
            name: tokens / max(self.denoiser_passes[name] + self.context_passes[name], 1)
            for name, tokens in self.tokens.items()
        }

    def to_dict(self) -> dict[str, object]:
        """Plain data, with the derived figures."""
        pairs = {
            name: asdict(pair) | {"difference": pair.difference, "interval": pair.interval, "kept": pair.kept}
            for name, pair in self.against_ar.items()
        }
        return asdict(self) | {"tokens_per_pass": self.tokens_per_pass, "against_ar": pairs}


def chosen_problems(families: Sequence[str], per_family: int, difficulties: Sequence[int], seed: int) -> list[Problem]:
    """`per_family` test problems of each family, spread evenly over the difficulties."""
    if per_family < 1:
        raise ArgumentError(f"problems is {per_family}; it must be at least 1 of each family")
    out: list[Problem] = []
    for family in families or SUITE:
        problems = stream_problems("test", seed, (family,), difficulties)
        out += [next(problems) for _ in range(per_family)]
    return out


def measure_accuracy(
    model: TwoTowerForCausalLM,
    settings: Sequence[Setting],
    problems: Sequence[Problem],
    *,
    max_new_tokens: int = 160,
    rows: int = 64,
    likelihood: bool = True,
    progress: Callable[[str, int], object] | None = None,
) -> list[SettingAccuracy]:
    """Results for AR, which is always run, and for each other setting, in order.

    progress: called with the setting's label and the number of its problems that are done.
    """
    base: list[bool] = []
    lines = []
    for setting in with_ar(settings):
        tell = None if progress is None else partial(progress, setting.label)
        requests, outputs = answer_problems(
            model, setting, problems, max_new_tokens=max_new_tokens, rows=rows, progress=tell
        )
        right = answers_right(problems, outputs)
        base = base or right
        prompts = [list(request.prompt) for request in requests]
        lines.append(_line(model, setting, problems, prompts, outputs, right, base, likelihood))
    return lines


def answer_problems(
    model: TwoTowerForCausalLM,
    setting: Setting,
    problems: Sequence[Problem],
    *,
    max_new_tokens: int = 160,
    rows: int = 64,
    progress: Callable[[int], object] | None = None,
) -> tuple[list[Request], list[Generation]]:
    """The requests for the problems, and one setting's answers to them, in the same order."""
    shared = {"eos_token_id": eos_of(model), "mask_token_id": model.config.mask_token, "seed": 0}
    params = setting.params(max_new_tokens=max_new_tokens, **shared)
    tokenizer = require_tokenizer(model.tokenizer)
    requests = [Request(tokenizer(problem.prompt)["input_ids"], params) for problem in problems]
    return requests, generate_all(model, requests, rows, progress)


def answers_right(problems: Sequence[Problem], outputs: Sequence[Generation]) -> list[bool]:
    """Whether each answer is right."""
    return [is_right(problem, out.text) for problem, out in zip(problems, outputs, strict=True)]


def _line(
    model: TwoTowerForCausalLM,
    setting: Setting,
    problems: Sequence[Problem],
    prompts: Sequence[list[int]],
    outputs: Sequence[Generation],
    right: Sequence[bool],
    base: Sequence[bool],
    likelihood: bool,
) -> SettingAccuracy:
    groups = {family: [i for i, p in enumerate(problems) if p.family == family] for family in FAMILIES}
    groups = {family: places for family, places in groups.items() if places} | {OVERALL: list(range(len(problems)))}
    hits = {name: [right[i] for i in places] for name, places in groups.items()}
    nats, tokens = continuation_nats(model, prompts, outputs) if likelihood else (float("nan"), 1)

    def summed(count: Callable[[Generation], int]) -> dict[str, int]:
        return {name: sum(count(outputs[i]) for i in places) for name, places in groups.items()}

    drafts = sum(out.drafts for out in outputs)
    return SettingAccuracy(
        setting=setting.label,
        accuracy={name: sum(own) / len(own) for name, own in hits.items()},
        interval={name: wilson(sum(own), len(own)) for name, own in hits.items()},
        against_ar={name: compare([base[i] for i in places], hits[name]) for name, places in groups.items()},
        tokens=summed(lambda out: len(out.tokens)),
        denoiser_passes=summed(lambda out: out.denoiser_passes),
        context_passes=summed(lambda out: out.context_passes),
        accepted=sum(out.accepted for out in outputs) / drafts if drafts else 0.0,
        nll=nats / tokens,
        repeated_4grams=repeated_share(outputs),
    )


def repeated_share(results: Sequence[Generation], size: int = 4) -> float:
    """Share of n-grams of `size` tokens that occurred before in the same text."""
    grams = repeats = 0
    for result in results:
        seen = set()
        for gram in zip(*(result.tokens[k:] for k in range(size)), strict=False):
            grams, repeats = grams + 1, repeats + (gram in seen)
            seen.add(gram)
    return repeats / max(grams, 1)
