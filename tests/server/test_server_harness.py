"""The server with the bundled model: lm-evaluation-harness through its API client, and response formats."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import RunningServer, events_of, serving, texts_of

from twotower import TwoTowerForCausalLM, bundled_model
from twotower.evaluation.lm_eval.model import TwoTowerLM
from twotower.evaluation.tasks.problem_sets import make_problems

# Shared by both tasks: documents from a file, prompts without changes.
TASK: dict[str, Any] = {
    "dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}", "num_fewshot": 0,
    "metadata": {"version": 1.0},
}  # fmt: skip
GENERATIVE = TASK | {
    "task": "suite_written", "output_type": "generate_until", "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False, "temperature": 0.0},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip
LIKELIHOOD = TASK | {
    "task": "suite_chosen", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{0}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> TwoTowerForCausalLM:
    return TwoTowerForCausalLM.from_pretrained(bundled_model("small"), dtype="float64")


@pytest.fixture(scope="module")
def served(model: TwoTowerForCausalLM) -> Iterator[RunningServer]:
    with serving(model=model, decoding={"mode": "verified", "draft_steps": 1}) as served:
        yield served


@pytest.fixture(scope="module")
def client(served: RunningServer) -> Any:
    """The `local-completions` client of lm-evaluation-harness, with BOS before each prompt, as in training."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        base_url=f"{served.address}/v1/completions", model=served.service.settings.name,
        tokenizer=str(bundled_model("small")),
        tokenizer_backend="huggingface", num_concurrent=4, batch_size=1, max_length=500, add_bos_token=True,
    )  # fmt: skip


def evaluated(lm: Any, task: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The logged samples of a task, in order."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    items = make_problems("test", 12, 3, difficulties=(1,))
    lines = [
        {"question": problem.prompt, "answer": problem.answer, "choices": [problem.answer, " 7", " none"]}
        for problem in items
    ]
    file = folder / "suite.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    whole = task | {"dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")}}
    manager = TaskManager(include_defaults=False)  # loading the default tasks takes seconds
    found = simple_evaluate(model=lm, tasks=[whole], bootstrap_iters=0, log_samples=True, task_manager=manager)
    assert found is not None
    return sorted(found["samples"][task["task"]], key=lambda sample: sample["doc_id"])


def test_generative_task_equals_local_model(client: Any, model: TwoTowerForCausalLM, tmp_path: Path) -> None:
    theirs = evaluated(client, GENERATIVE, tmp_path)
    ours = evaluated(TwoTowerLM(model, setting="verified:draft_steps=1"), GENERATIVE, tmp_path)
    assert [item["resps"] for item in theirs] == [item["resps"] for item in ours]
    assert [item["exact_match"] for item in theirs] == [item["exact_match"] for item in ours]
    assert any(item["resps"][0][0] for item in theirs)


def test_likelihood_task_equals_local_model(client: Any, model: TwoTowerForCausalLM, tmp_path: Path) -> None:
    theirs, ours = (evaluated(lm, LIKELIHOOD, tmp_path) for lm in (client, TwoTowerLM(model)))
    assert [item["acc"] for item in theirs] == [item["acc"] for item in ours]
    for one, other in zip(theirs, ours, strict=True):
        for (log_p, greedy), (expected, greedy_too) in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
            assert log_p == pytest.approx(expected, abs=1e-6)
            assert greedy == greedy_too


def test_prompt_logprobs_without_new_tokens(served: RunningServer, model: TwoTowerForCausalLM) -> None:
    """With max_tokens 0, echo and logprobs, the sum is the log-likelihood of the text."""
    text = "User: I need a taxi to the airport.\nAssistant: Where should it pick you up?"
    (choice,) = served.complete(text, max_tokens=0, echo=True, logprobs=1).json()["choices"]
    assert choice["text"] == text
    scores = choice["logprobs"]
    assert scores["token_logprobs"][0] is None
    from lm_eval.api.instance import Instance

    (expected,) = TwoTowerLM(model).loglikelihood_rolling(
        [Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)]
    )
    assert sum(scores["token_logprobs"][1:]) == pytest.approx(expected, abs=1e-6)
    for offset, token in zip(scores["text_offset"][1:], scores["tokens"][1:], strict=True):
        assert text[offset:].startswith(token)


# --- response formats -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_response_format(served: RunningServer, stream: bool) -> None:
    """In ar and verified, complete and streamed, and in a request without a mode."""
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}, "people": {"enum": [1, 2, 3]}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "booking", "schema": schema}}
    texts = {}
    for mode in ("ar", "verified"):
        fields = {"mode": mode, "temperature": 0, "max_tokens": 120, "response_format": wanted, "stream": stream}
        answer = served.chat("I need a table in San Jose for 2.", **fields)
        texts[mode] = texts_of(events_of(answer.text))[0] if stream else text_of(answer)
        found = json.loads(texts[mode])
        assert found.keys() == {"city", "people"}
        assert found["people"] in (1, 2, 3)
    assert texts["ar"] == texts["verified"]
    digits = served.complete(
        "Call ", temperature=1, seed=3, response_format={"type": "regex", "regex": "[0-9]{3}-[0-9]{4}"}
    )
    assert re.fullmatch("[0-9]{3}-[0-9]{4}", text_of(digits))
    assert digits.json()["choices"][0]["finish_reason"] == "stop"


def text_of(answer: Any) -> str:
    (choice,) = answer.json()["choices"]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])
