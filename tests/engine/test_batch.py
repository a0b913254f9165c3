"""`twotower batch`: answers in order, errors in their place, and no line lost or repeated after a kill."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import Result, assert_one_line_error

from twotower import TwoTowerForCausalLM, bundled_model
from twotower.decoding.params import GenerationParams
from twotower.engine import jobs
from twotower.engine.generation import generate
from twotower.engine.jobs import count_answered, engine_for, read_lines, run_job
from twotower.engine.llm import LLM
from twotower.errors import ArgumentError
from twotower.evaluation.tasks import make_problems
from twotower.file_lock import exclusive_lock

pytestmark = pytest.mark.skipif(
    not bundled_model("small").is_dir(), reason="there is no bundled model in this checkout"
)

Cli = Callable[..., Result]
FP32 = ("-m", "bundled/small", "--dtype", "float32")


@pytest.fixture(scope="module")
def model() -> TwoTowerForCausalLM:
    return TwoTowerForCausalLM.from_pretrained(bundled_model("small"), dtype="float32")


def shared(model: TwoTowerForCausalLM, **given: Any) -> dict[str, Any]:
    usual = {"mode": "verified", "draft_steps": 1, "max_new_tokens": 24, "seed": 0}
    return usual | {"eos_token_id": model.config.eos_token_id, "mask_token_id": model.config.mask_token} | given


def asked(folder: Path, *lines: dict[str, Any] | str) -> Path:
    path = folder / "in.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def some(count: int) -> list[dict[str, Any]]:
    return [{"prompt": problem.prompt, "id": f"p{i}"} for i, problem in enumerate(make_problems("test", count, 0))]


def said(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_and_errors_in_order(cli: Cli, tmp_path: Path, model: TwoTowerForCausalLM) -> None:
    path = asked(
        tmp_path,
        {"prompt": "User: I need a taxi.", "id": 7},
        {"prompt": "User: hello", "mode": "ar", "temperature": 0.8, "max_new_tokens": 60},
        "nonsense",
        "",
        {"prompt": "x", "mode": "dance"},
        {"text": "x"},
        {"prompt": "x", "colour": "red"},
        {"prompt": "User: a", "mode": "diffusion", "confidence_threshold": 0.5, "stop": ["\n"]},
        {"prompt": "a " * 5000},
        {"prompt": ""},  # this tokenizer begins every text with a special token
    )
    out = tmp_path / "out.jsonl"
    result = cli("batch", path, "-o", out, "-n", "20", "--rows", "2", "-s", "verified:draft_steps=1", *FP32)
    assert (result.code, result.out) == (0, "")
    assert "9 lines written, 5 with an error" in result.err
    lines = said(out)
    assert [line["line"] for line in lines] == [1, 2, 3, 5, 6, 7, 8, 9, 10]
    assert lines[0]["id"] == 7
    assert "id" not in lines[1]
    errors = {line["line"]: line["error"] for line in lines if "error" in line}
    assert "not JSON" in errors[3]
    assert "mode is 'dance'" in errors[5]
    assert 'no "prompt"' in errors[6]
    assert "unknown field colour" in errors[7]
    assert "beyond the context window" in errors[9]
    assert len(errors) == 5
    texts = {
        1: ("User: I need a taxi.", {"mode": "verified", "draft_steps": 1}, 20),
        2: ("User: hello", {"mode": "ar", "temperature": 0.8, "seed": 2}, 60),
        8: ("User: a", {"mode": "diffusion", "confidence_threshold": 0.5, "stop": ["\n"]}, 20),
    }
    for line in lines:
        if line["line"] in texts:
            prompt, given, new = texts[line["line"]]
            params = GenerationParams.of(**shared(model) | given | {"max_new_tokens": new} | {"seed": line["line"]})
            (alone,) = generate(model, [model.tokenizer(prompt)["input_ids"]], params)
            assert line["text"] == alone.text
            assert line["new_tokens"] == len(alone.tokens)
            assert line["finish_reason"] == alone.finish_reason


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "x", "policy": {"a": 1}}, "policy is {'a': 1}"),
        ({"prompt": "x", "policy_value": {"a": 1}}, "it must be between 0 and 1"),
        ({"prompt": "x", "seed": [1, 2]}, "2 seeds for 1 prompts"),
        ({"prompt": "x", "block_size": 100_000}, "block_size is 100000; give at most 4096, the context window"),
        ({"prompt": "x", "stop": 5}, "each stop must be a non-empty string"),
        ({"prompt": "x", "mode": ["ar"]}, "mode is ['ar']"),
        ({"prompt": "\ud800"}, "surrogates not allowed"),
        (["x"], 'no "prompt"'),
    ],
)
def test_whatever_a_line_holds(tmp_path: Path, model: TwoTowerForCausalLM, line: Any, message: str) -> None:
    """JSON of the wrong kind is an error of its line, not of the job."""
    (found,) = read_lines(asked(tmp_path, line), model, shared(model))
    assert found.request is None
    assert message in found.error


def test_a_line_may_say_knob(tmp_path: Path, model: TwoTowerForCausalLM) -> None:
    """`knob` is the deprecated name of policy_value."""
    (line,) = read_lines(asked(tmp_path, {"prompt": "x", "policy": "margin", "knob": 0.4}), model, shared(model))
    assert line.request is not None
    assert line.request.params.policy_value == 0.4


def test_a_job_that_was_stopped_goes_on(tmp_path: Path, model: TwoTowerForCausalLM) -> None:
    """A job is stopped after any step, with its last line cut short. The final file equals that of an unstopped job."""
    lines = read_lines(asked(tmp_path, *some(14)), model, shared(model))
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert run_job(engine_for(model, lines, 3), lines, whole) == (14, 0)

    class Stop(Exception):
        pass

    def stop_after(count: int) -> Callable[[int, int], None]:
        def progress(written: int, tokens: int) -> None:
            if written >= count:
                raise Stop

        return progress

    for count in (1, 5, 9):
        with pytest.raises(Stop):
            run_job(engine_for(model, lines, 3), lines, out, stop_after(count))
        with out.open("a") as file:
            file.write('{"line": 99, "as')
    before = count_answered(out, lines)
    assert 9 <= before < 14
    assert run_job(engine_for(model, lines, 3), lines, out) == (14 - before, 0)
    assert out.read_bytes() == whole.read_bytes()
    assert run_job(engine_for(model, lines, 3), lines, out) == (0, 0)


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_killed_and_started_again(cli: Cli, tmp_path: Path) -> None:
    path, out, whole = asked(tmp_path, *some(40)), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"

    def command(target: Path) -> list[str]:
        return [
            sys.executable, "-m", "twotower", "batch", str(path), "-o", str(target), "-s", "ar", "-n", "60",
            "--rows", "2", "--threads", "1", *FP32,
        ]  # fmt: skip

    job = subprocess.Popen(command(out), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out.exists() and out.read_bytes().count(b"\n") >= 3):
        assert job.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(signal.SIGKILL)
    job.wait()
    before = out.read_bytes().count(b"\n")
    assert 3 <= before < 40
    again = subprocess.run(command(out), capture_output=True, text=True, check=True)
    assert f"{40 - before} lines written, {before} more by an earlier run" in again.stderr
    assert cli(*command(whole)[3:]).code == 0
    assert out.read_bytes() == whole.read_bytes()


def test_a_file_that_answers_something_else_is_left_alone(cli: Cli, tmp_path: Path) -> None:
    path, out = asked(tmp_path, *some(3)), tmp_path / "out.jsonl"
    assert cli("batch", path, "-o", out, "-n", "4", *FP32).code == 0
    before = out.read_bytes()
    assert_one_line_error(
        cli("batch", path, "-o", out, "-n", "5", *FP32), "its answer to line 1 is for another request"
    )
    asked(tmp_path, *some(2))
    assert_one_line_error(cli("batch", path, "-o", out, "-n", "4", *FP32), "has 3 lines for 2 of input")
    assert out.read_bytes() == before


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_utf8_with_and_without_byte_order_mark(
    tmp_path: Path, model: TwoTowerForCausalLM, mark: bytes, newline: str
) -> None:
    """A byte order mark made line 1 an error. It changes no digest."""
    path = tmp_path / "in.jsonl"
    content = newline.join(json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in ("Grüße", "世界")) + newline
    path.write_bytes(mark + content.encode())
    lines = read_lines(path, model, shared(model))
    plain = read_lines(asked(tmp_path, *content.splitlines()), model, shared(model))
    assert [(line.number, line.digest, line.error) for line in lines] == [(x.number, x.digest, "") for x in plain]
    assert lines[0].request is not None
    assert lines[0].request.prompt == model.tokenizer("Grüße")["input_ids"]


def test_bytes_that_are_not_utf8_are_an_error_beside_their_line(cli: Cli, tmp_path: Path) -> None:
    """Latin-1 was answered with U+FFFD in the prompt."""
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    good = b'{"prompt": "User: hello"}\n'
    path.write_bytes('{"prompt": "Grüße"}\n'.encode("latin-1") + good + b"[" * 100_000 + b"\n")
    result = cli("batch", path, "-o", out, "-n", "4", *FP32)
    assert result.code == 0
    first, second, third = said(out)
    assert first["error"].startswith("not UTF-8 (invalid start byte at byte 14); convert the file")
    assert second["new_tokens"] == 4
    assert third["error"].startswith("not JSON")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_no_line_answered_is_exit_code_1(cli: Cli, tmp_path: Path, encoding: str) -> None:
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"prompt": "Grüße"}\n{"prompt": "x"}\n', encoding=encoding)
    for _ in range(2):  # also if the job was finished before
        result = cli("batch", path, "-o", out, "-n", "4", *FP32)
        assert result.code == 1
        assert "no line was answered" in result.err
        assert "Traceback" not in result.err
    assert all("error" in line for line in said(out))


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_a_line_that_is_too_long_is_an_error_beside_it(
    tmp_path: Path, model: TwoTowerForCausalLM, monkeypatch: pytest.MonkeyPatch, newline: str
) -> None:
    """The lines around it are read, and no digest depends on the limit."""
    contents = [json.dumps({"prompt": prompt}) for prompt in ("hello", "x" * 300, "世" * 9, "", "y" * 83, "z" * 84)]
    path = tmp_path / "in.jsonl"
    path.write_bytes(newline.join([*contents[:3], "", *contents[3:]]).encode())
    expected = read_lines(path, model, shared(model))
    monkeypatch.setattr(jobs, "MAX_LINE_BYTES", 97)
    lines = read_lines(path, model, shared(model))
    assert [(line.number, line.digest) for line in lines] == [(line.number, line.digest) for line in expected]
    assert [line.number for line in lines] == [1, 2, 3, 5, 6, 7]
    reason = "the line has {} bytes; at most 97 are allowed, so shorten its prompt"
    assert [line.error for line in lines] == ["", reason.format(314), "", "", "", reason.format(98)]
    assert [line.request for line in lines if not line.error] == [
        line.request for line in expected if line.number not in (2, 7)
    ]


def test_a_line_that_is_too_long_is_not_read_into_memory(tmp_path: Path, model: TwoTowerForCausalLM) -> None:
    path = tmp_path / "in.jsonl"
    with path.open("wb") as file:
        file.truncate(8 * jobs.MAX_LINE_BYTES)  # zeros, in one line
        file.seek(0, os.SEEK_END)
        file.write(b'\n{"prompt": "hello"}\n')
    tracemalloc.start()
    try:
        long, good = read_lines(path, model, shared(model))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert f"the line has {8 * jobs.MAX_LINE_BYTES} bytes" in long.error
    assert (good.number, good.error) == (2, "")
    assert peak < 4.5 * jobs.MAX_LINE_BYTES


def test_a_prompt_beyond_the_window_is_not_encoded(
    tmp_path: Path, model: TwoTowerForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoding 16 MB takes seconds and gigabytes."""
    path = asked(tmp_path, {"prompt": "ab " * 2**20, "id": 7}, {"prompt": "hello"})
    encode = type(model.tokenizer).__call__

    def encode_short(self: object, text: str, **options: Any) -> Any:
        assert len(text) < 2**20
        return encode(self, text, **options)

    monkeypatch.setattr(type(model.tokenizer), "__call__", encode_short)
    long, good = read_lines(path, model, shared(model))
    assert long.id == 7
    assert long.error == (
        "the prompt has 3145728 characters, more than the 4096 tokens of the context window can hold; shorten it"
    )
    assert good.error == ""


@pytest.mark.skipif(os.name != "posix", reason="needs flock")
def test_two_jobs_never_write_one_output(cli: Cli, tmp_path: Path) -> None:
    """Two jobs wrote 120 lines of 60. A job that was killed releases the output at once."""
    path, out = asked(tmp_path, *some(60)), tmp_path / "out.jsonl"
    command = ["batch", str(path), "-o", str(out), "-s", "ar", "-n", "60", "--rows", "1", "--threads", "1", *FP32]
    job = subprocess.Popen([sys.executable, "-m", "twotower", *command], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out.exists() and out.read_bytes()):
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(signal.SIGSTOP)
    second = cli(*command)
    job.send_signal(signal.SIGKILL)
    assert_one_line_error(second, f"{out} is being written by another process; wait until it ends, or name another")
    job.wait()
    assert cli(*command).code == 0
    assert [line["line"] for line in said(out)] == list(range(1, 61))


def test_a_file_system_without_locks_gets_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*given: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with exclusive_lock(tmp_path / "out", tmp_path / "out"):
        pass
    assert capsys.readouterr().err == (
        f"Warning: {tmp_path / 'out'} cannot be locked (Operation not supported); no second process may write it\n"
    )


def test_nothing_to_answer(cli: Cli, tmp_path: Path) -> None:
    assert_one_line_error(cli("batch", asked(tmp_path, "", ""), "-o", tmp_path / "out.jsonl"), "has no lines")
    assert_one_line_error(
        cli("batch", asked(tmp_path, *some(1)), "-o", tmp_path / "none" / "out.jsonl"), "No such file"
    )


def test_rows_are_as_many_as_memory_allows(tmp_path: Path, model: TwoTowerForCausalLM) -> None:
    lines = read_lines(asked(tmp_path, *some(9)), model, shared(model))
    requests = [line.request for line in lines if line.request is not None]
    roomy = engine_for(model, lines, 6)
    assert roomy.rows == 6
    each = LLM.memory_for(model, 1, roomy.length, roomy.core.blocks.size)
    few = engine_for(model, lines, 6, memory=2 * each)
    assert few.core.state.nbytes + few.core.prefixes.budget <= 2 * each + 1000 < 6 * each
    assert [output.tokens for output in few.generate(requests)] == [o.tokens for o in roomy.generate(requests)]
    assert engine_for(model, lines, 60).rows == 9
    with pytest.raises(ArgumentError, match="MiB of state, more than the"):
        engine_for(model, lines, 6, memory=each - 1)


def test_results_with_their_prompts_are_training_data(cli: Cli, tmp_path: Path, model: TwoTowerForCausalLM) -> None:
    """An answer has the prompt and the text; an error has neither."""
    source, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    lines = [{"prompt": "User: Hello.\nAssistant:"}, {"prompt": "User: Bye.\nAssistant:", "mode": "no mode"}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli("batch", source, "-o", out, "-n", "4", "--with-prompt", "--dtype", "float32").code == 0
    answer, error = map(json.loads, out.read_text().splitlines())
    assert answer["prompt"] == lines[0]["prompt"]
    assert answer["text"]
    assert "prompt" not in error
