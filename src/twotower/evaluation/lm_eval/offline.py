"""Evaluation data sets from a folder of JSONL files, with the columns of the hub's data sets; needs no network.

The folder has one folder per data set: gsm8k/test.jsonl, mmlu/{dev,test*}.jsonl[.gz], mgsm/mgsm_<language>.jsonl, …
(the functions in `READERS` name the files). A complete set (`test_full.jsonl.gz`) is preferred to a subset.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from twotower.errors import ArgumentError

Records = list[dict[str, Any]]
Splits = dict[str, Records]
LETTERS = "ABCDEFGHIJ"


def dataset_folder(data: Path, name: str) -> Path:
    """The folder of one data set: DATA/name, or DATA/eval/name.

    Raises:
        ArgumentError: neither folder exists.
    """
    for folder in (data / name, data / "eval" / name):
        if folder.is_dir():
            return folder
    there = sorted({path.name for base in (data, data / "eval") if base.is_dir() for path in base.iterdir()})
    raise ArgumentError(
        f"{data}: has no folder {name} (it has {', '.join(there) or 'no folders'}); choose another --data"
    )


@lru_cache(maxsize=4)  # each part of a task reads the same file
def read_records(folder: Path, *names: str) -> Records:
    """The records of the first of these files that exists, with or without .gz.

    Raises:
        ArgumentError: none of the files exists, or a line is not JSON.
    """
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                with (
                    gzip.open(path, "rt", encoding="utf-8")
                    if path.suffix == ".gz"
                    else path.open(encoding="utf-8") as lines
                ):
                    try:
                        return [json.loads(line) for line in lines if line.strip()]
                    except ValueError as error:
                        raise ArgumentError(f"{path}: a line is not JSON ({error}); correct the file") from None
    raise ArgumentError(f"{folder}: has none of {', '.join(names)}; add the file, or choose another --data")


def gsm8k(folder: Path) -> Splits:
    return {"test": read_records(folder, "test.jsonl")}


def math500(folder: Path) -> Splits:
    return {"test": read_records(folder, "test.jsonl")}


def humaneval(folder: Path) -> Splits:
    return {"test": read_records(folder, "HumanEval.jsonl")}


def mbpp(folder: Path) -> Splits:
    splits: Splits = {}
    for record in read_records(folder, "sanitized-mbpp.jsonl"):
        splits.setdefault(record["split"], []).append(record)
    return splits


def mgsm(folder: Path, language: str) -> Splits:
    """Only the few-shot examples have an answer; their questions begin with the language's word for "question"."""
    number = [
        {"question": r["question"], "answer": None, "answer_number": r["answer_number"]}
        for r in read_records(folder, f"mgsm_{language}.jsonl")
    ]
    examples = [
        {"question": r["q"], "answer": r["a"], "answer_number": 0}
        for r in read_records(folder, "exemplars.jsonl")
        if r["lang"] == language
    ]
    return {"train": examples, "test": number}


def mmlu(folder: Path, subject: str) -> Splits:
    def of(records: Records) -> Records:
        return [r | {"answer": LETTERS.index(r["answer"])} for r in records if r["subject"] == subject]

    return {
        "dev": of(read_records(folder, "dev.jsonl")),
        "test": of(read_records(folder, "test_full.jsonl", "test_subset500.jsonl")),
    }


def mmlu_pro(folder: Path) -> Splits:
    test = read_records(folder, "test_full.jsonl", "test_subset500.jsonl")
    return {"validation": read_records(folder, "validation.jsonl"), "test": test}


def arc_challenge(folder: Path) -> Splits:
    def of(records: Records) -> Records:
        return [
            {
                "question": r["question"],
                "choices": {"text": r["choices"], "label": list(LETTERS[: len(r["choices"])])},
                "answerKey": r["answer"],
            }
            for r in records
        ]

    return {"train": of(read_records(folder, "train.jsonl")), "test": of(read_records(folder, "test.jsonl"))}


def winogrande(folder: Path) -> Splits:
    """The labelled development set. Without train.jsonl, its other items serve as few-shot examples."""
    splits = {"validation": read_records(folder, "dev.jsonl")}
    if (folder / "train.jsonl").exists():
        splits["train"] = read_records(folder, "train.jsonl")
    return splits


READERS: dict[str, Callable[..., Splits]] = {
    "gsm8k": gsm8k,
    "math500": math500,
    "humaneval": humaneval,
    "mbpp": mbpp,
    "mgsm": mgsm,
    "mmlu": mmlu,
    "mmlu_pro": mmlu_pro,
    "arc_challenge": arc_challenge,
    "winogrande": winogrande,
}


def custom_dataset(name: str, folder: Path, *which: str) -> Callable[..., object]:
    """A loader for lm-evaluation-harness's `custom_dataset`, in place of the hub."""
    return partial(_data_set, name, str(folder), which)


def _data_set(name: str, folder: str, which: tuple[str, ...], **_: object) -> object:
    from datasets import Dataset, DatasetDict

    splits = READERS[name](Path(folder), *which)
    return DatasetDict({split: Dataset.from_list(records) for split, records in splits.items()})


def subjects(folder: Path) -> list[str]:
    """Names of the MMLU subjects, sorted."""
    return sorted({record["subject"] for record in read_records(folder, "dev.jsonl")})
