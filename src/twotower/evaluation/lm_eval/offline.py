"""Evaluation sets from a folder of JSONL files, in the columns of their hub data sets, so that tasks need no network.

The folder has one folder a set: gsm8k/test.jsonl, mmlu/{dev,test*}.jsonl[.gz], mgsm/mgsm_<language>.jsonl, …
(`READERS` says which files). An official set that is there whole (`test_full.jsonl.gz`) is preferred to a part of it.
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
    """The folder of one set: DATA/name, or DATA/eval/name.

    Raises:
        ArgumentError: neither is there.
    """
    for folder in (data / name, data / "eval" / name):
        if folder.is_dir():
            return folder
    there = sorted({path.name for base in (data, data / "eval") if base.is_dir() for path in base.iterdir()})
    raise ArgumentError(f"{data}: no folder {name} in it (there are {', '.join(there) or 'none'}); name another --data")


@lru_cache(maxsize=4)  # a set is asked for once for each of its parts
def read_records(folder: Path, *names: str) -> Records:
    """The records of the first of these files that is there, with or without .gz.

    Raises:
        ArgumentError: none is, or a line is no JSON.
    """
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
                    try:
                        return [json.loads(line) for line in lines if line.strip()]
                    except ValueError as error:
                        raise ArgumentError(f"{path}: a line is no JSON ({error})") from None
    raise ArgumentError(f"{folder}: none of {', '.join(names)} is there")


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
    """answer: only of the examples, whose questions begin with the language's word for one."""
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
    """The labelled development set. Where there is no train.jsonl, its other items are the examples."""
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
    """What lm-evaluation-harness calls in place of the hub (its `custom_dataset`)."""
    return partial(_data_set, name, str(folder), which)


def _data_set(name: str, folder: str, which: tuple[str, ...], **_: object) -> object:
    from datasets import Dataset, DatasetDict

    splits = READERS[name](Path(folder), *which)
    return DatasetDict({split: Dataset.from_list(records) for split, records in splits.items()})


def subjects(folder: Path) -> list[str]:
    """MMLU's, by name."""
    return sorted({record["subject"] for record in read_records(folder, "dev.jsonl")})
