"""The procedural suite: generated text problems with one right answer, to compare diffusion decoding with AR.

    python -m twotower.evaluation.tasks --split train --count 1000 --seed 1 -o train.jsonl

An answer takes one to five blocks of 16 tokens and writes out each intermediate result, so a token that was committed
too early is visible. `families.py` defines the tasks, `problem_sets.py` draws seeded, disjoint train and test sets, and
`scoring.py` counts right answers.
"""

from twotower.evaluation.tasks.families import FAMILIES, LEVELS, SUITE
from twotower.evaluation.tasks.problem_sets import Problem, Split, make_problems, split_of, stream_problems, write_jsonl
from twotower.evaluation.tasks.scoring import Score, accuracy, score, wilson

__all__ = [
    "FAMILIES",
    "LEVELS",
    "SUITE",
    "Problem",
    "Score",
    "Split",
    "accuracy",
    "make_problems",
    "score",
    "split_of",
    "stream_problems",
    "wilson",
    "write_jsonl",
]
