"""What a measurement of speed decodes: few-shot problems of the suite, or prompts of files."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from twotower.engine.generated_data import DataOptions, read_prompts
from twotower.errors import ArgumentError
from twotower.evaluation.tasks import make_problems
from twotower.modeling_twotower import TwoTowerForCausalLM
from twotower.tokenizer import require_tokenizer


@dataclass(frozen=True)
class Workload:
    """Prompts (token ids), decoded in batches of `rows`. name: of their file; "": problems of the suite."""

    rows: int
    texts: list[list[int]]
    name: str = ""

    @property
    def context(self) -> int:
        """Tokens of a prompt, rounded mean."""
        return round(statistics.mean(len(text) for text in self.texts))

    @property
    def title(self) -> str:
        rows = f"{self.rows} rows" if self.rows > 1 else "1 row"
        return f"{self.name}: {rows}" if self.name else f"{rows} after {self.context} tokens"


def few_shot_workloads(
    model: TwoTowerForCausalLM, batch_sizes: Sequence[int], contexts: Sequence[int], batches: int
) -> Iterator[Workload]:
    """Solved problems of the suite and an unsolved one, for each batch size and number of tokens of a prompt."""
    for context in contexts:
        for rows in batch_sizes:
            yield Workload(rows, few_shot_prompts(model, rows * batches, context))


def file_workloads(
    model: TwoTowerForCausalLM, files: Sequence[Path], batch_sizes: Sequence[int], batches: int, new_tokens: int
) -> Iterator[Workload]:
    """The first prompts of each file, for each batch size. The files are those of `twotower generate-data`.

    Raises:
        ArgumentError: a line cannot be answered, or a file has too few of them.
    """
    options = DataOptions(parameters={"max_new_tokens": new_tokens, "mask_token_id": model.config.mask_token})
    for file in files:
        lines, bad = read_prompts(file, model, options)
        if bad:
            raise ArgumentError(f"{file}, line {bad[0].number}: {bad[0].error}")
        texts = [list(line.request.prompt) for line in lines if line.request is not None]
        for rows in batch_sizes:
            if len(texts) < rows * batches:
                raise ArgumentError(
                    f"{file}: has {len(texts)} prompts, and --batches {batches} of --rows {rows} need "
                    f"{rows * batches}; give more prompts, or smaller numbers"
                )
            yield Workload(rows, texts[: rows * batches], file.stem)


def few_shot_prompts(model: TwoTowerForCausalLM, rows: int, context: int) -> list[list[int]]:
    """Prompts of exactly `context` tokens: solved problems of the suite, followed by one unsolved problem."""
    if context < 2:
        raise ArgumentError(f"context is {context}; it must be at least 2 tokens")
    rng = random.Random(0)
    tokenizer = require_tokenizer(model.tokenizer)
    solved = [tokenizer(problem.text + "\n")["input_ids"] for problem in make_problems("test", 120, 0)]
    unsolved = [tokenizer(problem.prompt)["input_ids"] for problem in make_problems("test", rows, 1, difficulties=(1,))]
    out = []
    for last in unsolved:
        text = list(last)
        while len(text) < context:
            text = rng.choice(solved) + text
        out.append(text[-context:])
    return out
