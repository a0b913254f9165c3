"""The suite's exact-match accuracy of a model, by AR and by diffusion at several thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twotower.evaluation.running import Request, run
from twotower.evaluation.suite.problems import Problem
from twotower.evaluation.suite.scoring import score
from twotower.generation import Generation, GenerationParams
from twotower.model.two_tower import TwoTowerForCausalLM


def measure_suite(
    model: TwoTowerForCausalLM,
    problems: Sequence[Problem],
    *,
    thresholds: Sequence[float] = (0.8, 0.9),
    block_size: int = 16,
    max_new_tokens: int = 128,
    rows: int = 64,
) -> dict[str, Any]:
    """Greedy answers → for "ar" and each "diffusion_<γ>": accuracy (share exactly right) by family and overall, and new
    tokens per pass (denoiser passes; for AR context passes), EOS counted, over all problems and by family."""
    prompts = [model.tokenizer(problem.prompt)["input_ids"] for problem in problems]
    runs: dict[str, dict[str, Any]] = {"ar": {"mode": "ar"}}
    for threshold in thresholds:
        runs[f"diffusion_{threshold:g}"] = {
            "mode": "diffusion",
            "confidence_threshold": threshold,
            "block_size": block_size,
        }
    figures: dict[str, Any] = {"problems": len(problems)}
    for name, settings in runs.items():
        params = GenerationParams.of(max_new_tokens=max_new_tokens, eos_token_id=model.config.eos_token_id, **settings)
        figures[name] = _figures(problems, run(model, [Request(prompt, params) for prompt in prompts], rows))
    return figures


def _figures(problems: Sequence[Problem], results: Sequence[Generation]) -> dict[str, Any]:
    table = score(problems, [result.text for result in results])
    passes = [result.passes for result in results]
    tokens = [len(result.tokens) for result in results]
    families = sorted({problem.family for problem in problems})
    chosen = {family: [i for i, p in enumerate(problems) if p.family == family] for family in families}
    return {
        "accuracy": {name: entry.share for name, entry in table.items()},
        "interval": list(table["overall"].interval),
        "tokens_per_pass": sum(tokens) / sum(passes),
        "tokens_per_pass_by_family": {
            family: sum(tokens[i] for i in at) / sum(passes[i] for i in at) for family, at in chosen.items()
        },
    }
