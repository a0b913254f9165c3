"""The eleven tasks of the published table (arXiv 2606.26493) by name, from the hub or from a folder of JSONL files.

Prompts, extraction of answers and metrics are those of lm-evaluation-harness; a folder replaces only the data set.
HumanEval and MBPP are defined here with its prompts, because its own tasks run generated programs without a sandbox.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from twotower.errors import ArgumentError
from twotower.evaluation.lm_eval import offline
from twotower.evaluation.lm_eval.sandbox import NoSandboxError, run_program

Spec = dict[str, object]  # a task's config in lm-evaluation-harness
LANGUAGES = ("bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh")
GLOBAL_LANGUAGES = ("ar", "bn", "de", "en", "es", "fr", "hi", "id", "it", "ja", "ko", "pt", "sw", "yo", "zh")
CATEGORIES = (
    "biology",
    "business",
    "chemistry",
    "computer_science",
    "economics",
    "engineering",
    "health",
    "history",
    "law",
    "math",
    "other",
    "philosophy",
    "physics",
    "psychology",
)


@dataclass(frozen=True, kw_only=True)
class PublishedTask:
    """One line of the published table.

    shots: few-shot examples in the prompt. metric: lm-evaluation-harness's key of the score. kind: "generate", or
    "choose" if likelihoods of given answers are compared. leaves: configs of the task's parts, from a folder or, for
    None, from the hub. published: scores of AR and TwoTower in the paper, in per cent. code: the task runs programs
    that the model wrote.
    """

    title: str
    shots: int
    metric: str
    kind: Literal["generate", "choose"]
    leaves: Callable[[Path | None], list[Spec]]
    published: tuple[float, float]
    code: bool = False


def _one(name: str, folder_name: str, **more: object) -> Callable[[Path | None], list[Spec]]:
    """A task of lm-evaluation-harness without parts."""

    def leaves(data: Path | None) -> list[Spec]:
        if data is None:
            return [{"task": name}]
        folder = offline.dataset_folder(data, folder_name)
        return [{"task": name, "custom_dataset": offline.custom_dataset(folder_name, folder), **more}]

    return leaves


def _mmlu(data: Path | None) -> list[Spec]:
    if data is None:
        return [{"group": "mmlu"}]
    folder = offline.dataset_folder(data, "mmlu")
    return [
        {"task": f"mmlu_{subject}", "custom_dataset": offline.custom_dataset("mmlu", folder, subject)}
        for subject in offline.subjects(folder)
    ]


def _mmlu_pro(data: Path | None) -> list[Spec]:
    if data is None:
        return [{"task": f"mmlu_pro_{category}"} for category in CATEGORIES]
    folder = offline.dataset_folder(data, "mmlu_pro")
    own = offline.custom_dataset("mmlu_pro", folder)
    there = {record["category"].replace(" ", "_") for record in offline.mmlu_pro(folder)["test"]}
    return [{"task": f"mmlu_pro_{category}", "custom_dataset": own} for category in CATEGORIES if category in there]


def _mgsm(data: Path | None) -> list[Spec]:
    folder = None if data is None else offline.dataset_folder(data, "mgsm")
    return [
        {"task": f"mgsm_native_cot_{language}"}
        | ({} if folder is None else {"custom_dataset": offline.custom_dataset("mgsm", folder, language)})
        for language in LANGUAGES
    ]


def _winogrande(data: Path | None) -> list[Spec]:
    if data is None:
        return [{"task": "winogrande"}]
    folder = offline.dataset_folder(data, "winogrande")
    spec: Spec = {"task": "winogrande", "custom_dataset": offline.custom_dataset("winogrande", folder)}
    if not (
        folder / "train.jsonl"
    ).exists():  # examples from the same split: lm-evaluation-harness leaves out the item itself
        spec |= {"training_split": None, "fewshot_split": "validation"}
    return [spec]


def _hub_only(*specs: Mapping[str, object]) -> Callable[[Path | None], list[Spec]]:
    def leaves(data: Path | None) -> list[Spec]:
        if data is not None:
            names = ", ".join(str(next(iter(spec.values()))) for spec in specs[:1])
            raise ArgumentError(f"{names}: cannot be read from files; leave out --data to use the hub")
        return [dict(spec) for spec in specs]

    return leaves


# --- programs -------------------------------------------------------------------------------------------------------


def _humaneval(data: Path | None) -> list[Spec]:
    return [
        _source(data, "humaneval", "openai/openai_humaneval", None)
        | {
            "task": "humaneval_sandboxed",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{test}}\ncheck({{entry_point}})",
            "process_results": _humaneval_passed,
            "num_fewshot": 0,
            "generation_kwargs": {
                "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
                "max_gen_toks": 1024,
                "do_sample": False,
            },
        }
    ]


def _mbpp(data: Path | None) -> list[Spec]:
    return [
        _source(data, "mbpp", "google-research-datasets/mbpp", "sanitized")
        | {
            "task": "mbpp_sandboxed",
            "fewshot_split": "prompt",
            "fewshot_config": {"sampler": "first_n"},
            "doc_to_text": "You are an expert Python programmer, and here is your task: {{prompt}} Your code should "
            "pass these tests:\n\n{{test_list|join('\\n')}}\n[BEGIN]\n",
            "doc_to_target": "{{code}}\n[DONE]",
            "target_delimiter": "",
            "process_results": _mbpp_passed,
            "num_fewshot": 3,
            "generation_kwargs": {"until": ["[DONE]"], "max_gen_toks": 512, "do_sample": False},
        }
    ]


def _source(data: Path | None, name: str, hub: str, part: str | None) -> Spec:
    spec: Spec = {
        "output_type": "generate_until",
        "test_split": "test",
        "unsafe_code": True,
        "metric_list": [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    if data is None:
        return spec | {"dataset_path": hub} | ({} if part is None else {"dataset_name": part})
    return spec | {"custom_dataset": offline.custom_dataset(name, offline.dataset_folder(data, name))}


def _humaneval_passed(doc: dict[str, object], results: list[str]) -> dict[str, float]:
    program = f"{doc['prompt']}{results[0]}\n{doc['test']}\ncheck({doc['entry_point']})\n"
    return {"pass@1": float(run_program(program).passed)}


def _mbpp_passed(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    lines = [results[0], *doc["test_imports"], *doc["test_list"]]
    return {"pass@1": float(run_program("\n".join(lines) + "\n").passed)}


TASKS: dict[str, PublishedTask] = {
    "mmlu": PublishedTask(
        title="MMLU", shots=5, metric="acc,none", kind="choose", leaves=_mmlu, published=(78.56, 78.24)
    ),
    "mmlu_pro": PublishedTask(
        title="MMLU-Pro",
        shots=5,
        metric="exact_match,custom-extract",
        kind="generate",
        leaves=_mmlu_pro,
        published=(62.59, 60.93),
    ),
    "arc_challenge": PublishedTask(
        title="ARC-Challenge",
        shots=25,
        metric="acc_norm,none",
        kind="choose",
        leaves=_one("arc_challenge", "arc_challenge", validation_split=None),
        published=(91.72, 92.66),
    ),
    "winogrande": PublishedTask(
        title="WinoGrande", shots=5, metric="acc,none", kind="choose", leaves=_winogrande, published=(76.09, 76.09)
    ),
    "race": PublishedTask(
        title="RACE",
        shots=0,
        metric="acc,none",
        kind="choose",
        leaves=_hub_only({"task": "race"}),
        published=(88.90, 88.90),
    ),
    "humaneval": PublishedTask(
        title="HumanEval",
        shots=0,
        metric="pass@1,none",
        kind="generate",
        leaves=_humaneval,
        published=(79.27, 75.58),
        code=True,
    ),
    "mbpp": PublishedTask(
        title="MBPP sanitized",
        shots=3,
        metric="pass@1,none",
        kind="generate",
        leaves=_mbpp,
        published=(74.71, 74.28),
        code=True,
    ),
    "gsm8k": PublishedTask(
        title="GSM8K",
        shots=8,
        metric="exact_match,flexible-extract",
        kind="generate",
        leaves=_one("gsm8k_cot", "gsm8k"),
        published=(92.49, 90.14),
    ),
    "math500": PublishedTask(
        title="MATH-500",
        shots=4,
        metric="math_verify,none",
        kind="generate",
        leaves=_one("minerva_math500", "math500"),
        published=(84.40, 80.60),
    ),
    "global_mmlu_lite": PublishedTask(
        title="Global-MMLU-Lite",
        shots=5,
        metric="acc,none",
        kind="choose",
        leaves=_hub_only(*({"group": f"global_mmlu_{language}"} for language in GLOBAL_LANGUAGES)),
        published=(73.97, 73.94),
    ),
    "mgsm": PublishedTask(
        title="MGSM",
        shots=8,
        metric="exact_match,flexible-extract",
        kind="generate",
        leaves=_mgsm,
        published=(80.80, 80.40),
    ),
}


def task_parts(name: str, data: Path | None) -> list[Spec]:
    """Configs of a task's parts.

    Raises:
        ArgumentError: an unknown task, or `data` lacks its files.
    """
    if name not in TASKS:
        raise ArgumentError(f"task is {name!r}; choose one of {', '.join(TASKS)}")
    return [leaf | {"num_fewshot": TASKS[name].shots} for leaf in TASKS[name].leaves(data)]


def lm_eval_tasks(name: str, data: Path | None) -> list[object]:
    """A task in the form that lm-evaluation-harness loads: a config over its own task, or a task object."""
    from lm_eval.api.task import ConfigurableTask

    parts = task_parts(name, data)
    if TASKS[name].code:
        return [ConfigurableTask(config=part) for part in parts]
    return [{"group": f"twotower_{name}", "task": parts}]


def check_tasks(names: Sequence[str], data: Path | None, run_code: bool) -> None:
    """Checks a choice of tasks before a model is loaded.

    Raises:
        ArgumentError: an unknown task, missing files, or a task that runs programs without run_code or a sandbox.
    """
    for name in names:
        task_parts(name, data)
        if TASKS[name].code and not run_code:
            raise ArgumentError(f"{name} runs programs that the model writes, in a sandbox; add --run-code to allow it")
    if any(TASKS[name].code for name in names):
        try:
            run_program("pass")
        except NoSandboxError as error:
            raise ArgumentError(f"programs of the model cannot be run: {error}") from None
