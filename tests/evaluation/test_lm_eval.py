"""lm-evaluation-harness: the adapter compared with its Hugging Face model, published tasks from files, `--task`."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Result, assert_one_line_error
from tiny_backbones import save, save_tokenizer

from twotower import TwoTowerForCausalLM, bundled_model
from twotower.checkpoint.convert import convert
from twotower.decoding.output import Generation
from twotower.decoding.presets import parse_setting
from twotower.engine import Request
from twotower.errors import ArgumentError
from twotower.evaluation.likelihood import continuation_bound
from twotower.evaluation.lm_eval import model as adapter
from twotower.evaluation.lm_eval.model import TwoTowerLM
from twotower.evaluation.lm_eval.task_scores import run_tasks
from twotower.evaluation.lm_eval.tasks import TASKS, task_parts

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def model() -> TwoTowerForCausalLM:
    return TwoTowerForCausalLM.from_pretrained(bundled_model("small"), dtype="float32")


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


# --- the adapter ----------------------------------------------------------------------------------------------------


def test_lm_eval_finds_the_model_by_name(model: TwoTowerForCausalLM) -> None:
    from lm_eval.api.registry import get_model

    made = get_model("twotower").create_from_arg_string("setting=verified,max_length=64", {"batch_size": "auto:4"})
    assert (made.setting.label, made.max_length, made.rows) == ("verified", 64, 16)
    assert made.tokenizer_name == f"bundled__{bundled_model().name}"


def test_likelihoods_equal_those_of_the_hugging_face_adapter(model: TwoTowerForCausalLM) -> None:
    """HFLM of lm-evaluation-harness on the context tower, as an ordinary causal model."""
    from lm_eval.models.huggingface import HFLM

    window = 96  # long texts are truncated
    theirs = HFLM(pretrained=model, tokenizer=model.tokenizer, batch_size=2, max_length=window, device="cpu")
    ours = TwoTowerLM(model, max_length=window)
    asked = instances(
        "loglikelihood",
        ("User: I need a taxi to the", " airport."),
        ("User: I need a taxi to the ", "station"),
        ("", "Hello"),
        ("Assistant: What time", " would you like? Any time is fine."),
    )
    for mine, other in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert mine[0] == pytest.approx(other[0], rel=1e-4)
        assert mine[1] == other[1]
    long = "User: I want to eat something good tonight. " * 14
    (cut,) = instances("loglikelihood", (long, " Please."))
    assert ours.loglikelihood([cut])[0][0] == pytest.approx(theirs.loglikelihood([cut])[0][0], rel=1e-4)
    assert ours.cost.truncated_prompts == 1
    rolling, whole = (instances("", words) for words in (("User: hello there.",), ("", "User: hello there.")))
    assert ours.loglikelihood_rolling(rolling)[0] == pytest.approx(theirs.loglikelihood(whole)[0][0], rel=1e-4)
    windows = ours._windows(ours.tok_encode(long, add_special_tokens=False))
    assert len(windows) > 2
    assert sum(len(text) for _, text in windows) == len(ours.tok_encode(long, add_special_tokens=False))
    assert all(len(given) + len(text) <= window + 1 and given for given, text in windows)


@pytest.mark.parametrize("name", ["llama", "mamba2", pytest.param("gemma3_text", marks=pytest.mark.slow)])
def test_another_backbone(name: str, tmp_path: Path) -> None:
    """Likelihoods are those of transformers' model; there are a bound and texts of every mode."""
    from lm_eval.models.huggingface import HFLM

    theirs = save(name, tmp_path / "ar")
    tokenizer = save_tokenizer(tmp_path / "ar", "<mask>", mask_token="<mask>")
    convert(tmp_path / "ar", tmp_path / "two")
    asked = instances("loglikelihood", ("User: I need", " a taxi"), ("", "Hello"), ("abc def " * 15, "end of it"))
    expected = HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=1, max_length=80, device="cpu")
    ours = TwoTowerLM(str(tmp_path / "two"), setting="ar", max_length=80, dtype="float32")
    for mine, other in zip(ours.loglikelihood(asked), expected.loglikelihood(asked), strict=True):
        assert mine[0] == pytest.approx(other[0], rel=1e-4)
        assert mine[1] == other[1]
    bound = TwoTowerLM(ours.model, likelihood="bound", samples=2, max_length=80).loglikelihood(asked)
    assert all(value < 0 for value, _ in bound)
    prompt = instances("generate_until", ("User: hello", {"until": ["\n"], "max_gen_toks": 8}))
    settings = ("ar", "verified", "diffusion:0.8")
    texts = [TwoTowerLM(ours.model, setting=setting, max_length=80).generate_until(prompt)[0] for setting in settings]
    assert texts[0] == texts[1]
    assert all(texts)


def test_the_command_knows_the_model(cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command itself registers the model: this test forgets what the other tests have imported."""
    from lm_eval import __main__ as harness
    from lm_eval.api.registry import get_model, model_registry

    monkeypatch.delitem(model_registry._objs, "twotower")
    monkeypatch.delitem(sys.modules, adapter.__name__)
    with pytest.raises(ValueError, match="'twotower'"):
        get_model("twotower")
    seen = []
    monkeypatch.setattr(harness, "cli_evaluate", lambda: seen.append((sys.argv[1:], get_model("twotower").__name__)))
    assert cli("lm-eval", "run", "--model", "twotower").code == 0
    assert seen == [(["run", "--model", "twotower"], "TwoTowerLM")]


def test_generation_uses_the_setting_and_ends_at_stop_strings(model: TwoTowerForCausalLM) -> None:
    arguments = {"until": ["Assistant", ""], "max_gen_toks": 40, "do_sample": False, "temperature": 0.0}
    asked = instances("generate_until", ("User: I need a restaurant in San Jose.\nAssistant:", arguments))
    ar = TwoTowerLM(model, setting="ar")
    verified = TwoTowerLM(model, setting="verified:draft_steps=1")
    (text,), (same,) = ar.generate_until(asked), verified.generate_until(asked)
    assert text == same
    assert text
    assert "Assistant" not in text
    assert ar.cost.tokens == ar.cost.context_passes < 40  # ended by the stop string, not by the limit
    assert verified.cost.tokens_per_pass > ar.cost.tokens_per_pass == 1
    (sampled,) = instances("generate_until", ("User: I", {"do_sample": True, "temperature": 2.0, "max_gen_toks": 8}))
    request = ar._request(*sampled.args)
    assert (request.params.temperature, request.params.max_new_tokens) == (2.0, 8)


def test_likelihood_bound_replaces_the_exact_likelihood(model: TwoTowerForCausalLM) -> None:
    lm = TwoTowerLM(model, likelihood="bound", samples=3, setting="diffusion:block_size=8")
    (pair,) = instances("loglikelihood", ("User: I need a taxi to the", " airport."))
    ((value, greedy),) = lm.loglikelihood([pair])
    given, text = lm._encode_pair(*pair.args)
    assert value == continuation_bound(model, [(given, text)], block_size=8, samples=3)[0]
    assert greedy is False


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"setting": "fast"}, "mode is 'fast'"),
        ({"likelihood": "guess"}, "likelihood is 'guess'; choose one of context, bound"),
        ({"batch_size": "many"}, "batch_size is 'many'"),
        ({"temperature": 1}, "model_args: unknown temperature"),
    ],
)
def test_wrong_arguments_are_errors(model: TwoTowerForCausalLM, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words.replace("(", r"\(")):
        TwoTowerLM(model, **arguments)
    (beams,) = instances("generate_until", ("User", {"num_beams": 4}))
    with pytest.raises(ArgumentError, match="gen_kwargs: unknown num_beams; allowed are"):
        TwoTowerLM(model).generate_until([beams])


# --- the published tasks --------------------------------------------------------------------------------------------


def lines(path: Path, *records: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two items of each data set that has a reader."""
    folder = tmp_path / "data" / "eval"
    lines(folder / "gsm8k/test.jsonl", *({"question": f"{i} apples?", "answer": f"so\n#### {i}"} for i in (12, 34)))
    problem = {"problem": "What is $1+1$?", "solution": "It is $\\boxed{2}$.", "answer": "2"}
    lines(folder / "math500/test.jsonl", problem, problem)
    for i, name in enumerate(("test_full.jsonl.gz", "dev.jsonl")):
        subjects = ("anatomy", "virology")
        record = {"question": "Which?", "choices": ["w", "x", "y", "z"], "answer": "C", "id": str(i)}
        lines(folder / "mmlu" / name, *(record | {"subject": subject} for subject in subjects for _ in range(5)))
    pro = {"question": "Which?", "options": ["w", "x"], "answer": "B", "answer_index": 1, "cot_content": "A: b."}
    categories = ("math", "computer science")
    for name in ("test_subset500.jsonl", "validation.jsonl"):
        lines(folder / "mmlu_pro" / name, *(pro | {"category": c} for c in categories for _ in range(6)))
    arc = {"question": "Which?", "choices": ["w", "x", "y"], "answer": "B"}
    lines(folder / "arc_challenge/test.jsonl", arc, arc)
    lines(folder / "arc_challenge/train.jsonl", *[arc] * 30)
    pronoun = {"sentence": "Ann saw Bea because _ was late.", "option1": "Ann", "option2": "Bea", "answer": "2"}
    lines(folder / "winogrande/dev.jsonl", *(pronoun | {"sentence": f"{i} Ann saw _ go."} for i in range(8)))
    human = {"prompt": 'def add(a, b):\n    """Sum."""\n', "entry_point": "add", "canonical_solution": ""}
    lines(
        folder / "humaneval/HumanEval.jsonl",
        *(human | {"task_id": i, "test": f"def check(f):\n    assert f({i}, 2) == {i + 2}\n"} for i in range(2)),
    )
    task = {"prompt": "Add.", "code": "def f(a): return a + 1", "test_imports": ["import math"], "test_list": []}
    lines(
        folder / "mbpp/sanitized-mbpp.jsonl",
        *(task | {"split": "prompt", "task_id": i, "test_list": [f"assert f({i}) == {i + 1}"]} for i in range(4)),
        *(task | {"split": "test", "task_id": i, "test_list": ["assert f(math.inf) == math.inf"]} for i in (11, 12)),
    )
    for language in ("bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh"):
        number = {"question": "How many?", "answer": "7", "answer_number": 7, "id": 0}
        lines(folder / f"mgsm/mgsm_{language}.jsonl", number)
    example = {"q": "Question: How many more?", "a": "Step-by-Step Answer: The answer is 3.", "index": 1}
    mgsm = folder / "mgsm/exemplars.jsonl"
    lines(mgsm, *(example | {"lang": x.name[5:7]} for x in mgsm.parent.iterdir() for _ in range(8)))
    return tmp_path / "data"


ANSWERS = {
    "gsm8k": "There are some. The answer is 12.",
    "math500": "The final answer is $2$. I hope it is correct.",
    "humaneval": "    return a + b\n",
    "mbpp": "def f(a):\n    return a + 1\n",
    "mmlu_pro": " The answer is (B).",
    "mgsm": " That makes 7.",
}
SCORES = {"gsm8k": 0.5, "math500": 1.0, "humaneval": 1.0, "mbpp": 1.0, "mmlu_pro": 1.0, "mgsm": 1.0}
ITEMS = {"gsm8k": 2, "math500": 2, "humaneval": 2, "mbpp": 2, "mmlu_pro": 12, "mgsm": 11}
PROMPTS = {
    "gsm8k": (8, "Q: ", "Q: 12 apples?\nA:"),
    "math500": (4, "Problem:\n", "Problem:\nWhat is $1+1$?\n\nSolution:"),
    "humaneval": (0, "def add", 'def add(a, b):\n    """Sum."""\n'),
    "mbpp": (3, "[BEGIN]", "pass these tests:\n\nassert f(math.inf) == math.inf\n[BEGIN]\n"),
    "mmlu_pro": (5, "Question:\n", "Question:\nWhich?\nOptions:\nA. w\nB. x\nAnswer: Let's think step by step."),
    "mgsm": (8, "How many", "Question: How many?\nStep-by-Step Answer:"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_task_uses_the_prompts_of_lm_eval_and_counts_right_answers(
    name: str, data: Path, model: TwoTowerForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole task, with given answers instead of a model."""
    seen: list[Request] = []

    def answering(_: Any, requests: Sequence[Request], *more: Any) -> list[Generation]:
        seen.extend(requests)
        return [
            Generation(
                mode="ar", tokens=[5, 6], text=ANSWERS[name], finish_reason="stop", prompt_tokens=1, committed_at=[],
                confidence=[], denoiser_passes=0, context_passes=2, prefill_seconds=0.0, decode_seconds=1.0,
            )
            for _ in requests
        ]  # fmt: skip

    monkeypatch.setattr(adapter, "generate_all", answering)
    (score,) = run_tasks(model, [], [name], data=data, run_code=True)
    assert (score.setting, score.items, score.score) == ("ar", ITEMS[name], SCORES[name])
    assert score.tokens_per_pass == 1.0
    assert score.scored_by is None
    shots, mark, end = PROMPTS[name]
    texts = [model.tokenizer.decode(request.prompt, skip_special_tokens=True) for request in seen]
    text = next(text for text in texts if text.endswith(end))
    assert text.count(mark) == shots + 1
    assert all(request.params.stop for request in seen)


@pytest.mark.parametrize("name", ["mmlu", "arc_challenge", "winogrande"])
def test_given_answers_are_chosen_by_the_context_tower(name: str, data: Path, model: TwoTowerForCausalLM) -> None:
    settings = [parse_setting("diffusion:0.8")]
    ar, diffusion = run_tasks(model, settings, [name], data=data, limit=2)
    assert ar.items == (4 if name == "mmlu" else 2)  # of each subject
    assert (ar.score, ar.scored_by, ar.tokens_per_pass) == (diffusion.score, "context", None)
    assert diffusion.scored_by == "context"
    assert diffusion.against_ar is not None
    assert diffusion.against_ar.difference == 0
    _, bound = run_tasks(model, settings, [name], data=data, limit=1, likelihood="bound")
    assert bound.scored_by == "bound"


def test_tasks_are_those_of_the_published_table() -> None:
    assert len(TASKS) == 11
    ar, two = (sum(task.published[i] for task in TASKS.values()) for i in (0, 1))
    assert two / ar == pytest.approx(0.987, abs=5e-4)  # "quality kept" in the paper
    assert [name for name, task in TASKS.items() if task.code] == ["humaneval", "mbpp"]
    for name in TASKS:
        parts = task_parts(name, None)
        assert all(part["num_fewshot"] == TASKS[name].shots for part in parts)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there: official sets are not counted")
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("gsm8k", [1319]), ("math500", [500]), ("humaneval", [164]), ("mbpp", [257]), ("mgsm", [250] * 11),
        ("arc_challenge", [1172]), ("winogrande", [1267]), ("mmlu", 14042), ("mmlu_pro", [12032] * 14),
    ],
)  # fmt: skip
def test_complete_data_sets_are_read(name: str, counts: Any) -> None:
    parts = task_parts(name, SHARED)
    if name == "mmlu_pro":  # its parts come from one data set
        parts = parts[:1]
        counts = counts[:1]
    sets = [part["custom_dataset"]() for part in parts]
    sizes = [len(one["test" if "test" in one else "validation"]) for one in sets]
    assert (sum(sizes) if name == "mmlu" else sizes) == counts
    if name == "mmlu":
        assert len(sizes) == 57


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there: no reference solution is run")
@pytest.mark.parametrize("count", [4, pytest.param(None, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_reference_solutions_pass_and_others_do_not(name: str, count: int | None) -> None:
    """Runs reference solutions in the sandbox, like programs of a model."""
    (part,) = task_parts(name, SHARED)
    judge = part["process_results"]
    failed = []
    for item in part["custom_dataset"]()["test"].to_list()[:count]:
        solution = item["canonical_solution"] if name == "humaneval" else item["code"]
        if judge(item, [solution])["pass@1"] != 1.0:
            failed.append(item["task_id"])
        assert judge(item, ["    pass\n" if name == "humaneval" else "pass"])["pass@1"] == 0.0
    print(f"\n{name}: reference solutions that fail in the sandbox: {failed}")
    assert not failed


# --- the verb -------------------------------------------------------------------------------------------------------


def test_the_verb_runs_tasks(cli: Callable[..., Result], data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "NEW_TOKENS", 12)
    options = ("--data", str(data), "--limit", "1", "-s", "verified:draft_steps=1", "--dtype", "float32")
    result = cli("eval", "-t", "winogrande", "-t", "gsm8k", *options)
    assert result.code == 0, result.err
    found = json.loads(result.out)["tasks"]
    assert [(one["task"], one["setting"]) for one in found] == [
        (task, setting) for task in ("winogrande", "gsm8k") for setting in ("ar", "verified:draft_steps=1")
    ]
    for words in ("WinoGrande 5-shot", "GSM8K 8-shot", "as AR", "mean", "tokens/pass"):
        assert words in result.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-t", "poetry"), ("task is 'poetry'; choose one of mmlu, mmlu_pro",)),
        (("-t", "gsm8k", "--data", "nowhere"), ("nowhere: has no folder gsm8k",)),
        (("-t", "race", "--data", "."), ("race: cannot be read from files", "leave out --data")),
        (("-t", "humaneval", "--data", "DATA"), ("add --run-code",)),
        (("--limit", "3"), ("--limit needs --task",)),
        (("-t", "gsm8k", "--family", "edits"), ("--family does not go with --task",)),
    ],
)
def test_bad_input_is_a_one_line_error(
    cli: Callable[..., Result], data: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_one_line_error(cli("eval", *(str(data) if word == "DATA" else word for word in arguments)), *words)


def test_an_unreachable_hub_is_a_one_line_error(cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import config

    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("TWOTOWER_DATA", raising=False)
    result = cli("eval", "-t", "gsm8k", "--limit", "1")
    assert_one_line_error(result, "gsm8k: ", "use --data to read the task from a folder")


def test_the_command_line_of_lm_eval_knows_the_model(cli: Callable[..., Result], tmp_path: Path) -> None:
    """A user's own task from a file."""
    lines(tmp_path / "items.jsonl", {"q": "User: I need a taxi to the", "a": " airport."})
    (tmp_path / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'items.jsonl'}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        "metric_list:\n  - metric: acc\n"
    )
    result = cli(
        "lm-eval", "run", "--model", "twotower", "--tasks", "own",
        "--model_args", "setting=ar,dtype=float32,quantization=experts=int4+rest=int8",
        "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"),
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "|own" in result.out
    (report,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(report.read_text())["results"]["own"]["acc,none"] in (0.0, 1.0)


def test_a_plus_separates_the_pairs_of_a_plan() -> None:
    """lm-evaluation-harness separates arguments by commas."""
    made = TwoTowerLM(str(bundled_model("small")), quantization="experts=int4+rest=int8")
    assert made.model.quantization == "experts=int4,rest=int8"
    with pytest.raises(ArgumentError, match="'experts=int5' in 'experts=int5,rest=int8' is not valid"):
        TwoTowerLM(quantization="experts=int5+rest=int8")


def test_the_number_of_torch_threads_is_unchanged() -> None:
    assert torch.get_num_threads() == 1
