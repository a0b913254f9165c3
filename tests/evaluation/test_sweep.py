"""`twotower report`: Pareto front, tables and picture, and continuation after an interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from command import Result, assert_one_line_error

from twotower import TwoTowerForCausalLM
from twotower.decoding.block_rule import BlockRule
from twotower.decoding.presets import parse_setting
from twotower.errors import ArgumentError
from twotower.evaluation import sweep as module
from twotower.evaluation.report import draw_report, report_markdown
from twotower.evaluation.sweep import Point, fingerprint, grid, pareto_front, read_points, sweep_settings, write_points


def point(setting: str, kept: float, passes: float, times: float) -> Point:
    return Point(setting, {"overall": kept * 0.8, "sorting": 0.8}, (kept, kept - 0.02, kept + 0.02), passes, times)


POINTS = [
    point("ar", 1.0, 1.0, 1.0),
    point("diffusion:threshold=0.8", 0.97, 3.0, 1.9),
    point("diffusion:threshold=0.5", 0.80, 5.0, 3.1),
    point("diffusion:top-k=8", 0.70, 4.5, 2.9),
    point("verified:draft_steps=1", 1.0, 2.2, 1.4),
    point("verified:draft_steps=1,acceptance=0.2", 0.99, 2.9, 1.8),
    point("diffusion:0.8,block_size=32,steps_per_block=32", 0.2, 9.0, 2.0),
]


def test_no_point_beats_the_front_in_quality_and_speed() -> None:
    best = pareto_front(POINTS, lambda p: p.times_ar)
    assert [p.setting for p in best] == [
        "verified:draft_steps=1", "verified:draft_steps=1,acceptance=0.2", "diffusion:threshold=0.8",
        "diffusion:threshold=0.5",
    ]  # fmt: skip
    for one in POINTS:
        beaten = any(p.kept[0] >= one.kept[0] and p.times_ar > one.times_ar for p in POINTS)
        beaten |= any(p.kept[0] > one.kept[0] and p.times_ar >= one.times_ar for p in POINTS)
        assert (one in best) != beaten


def test_settings_that_differ_in_the_policy_value_are_one_series() -> None:
    assert [p.series for p in POINTS] == [
        "ar", "threshold", "threshold", "top-k", "verified", "verified, relaxed", "block size",
    ]  # fmt: skip
    labels = [setting.label for setting in grid()]
    assert len(labels) == len(set(labels)) > 35
    for words in ("klass", "decay", "block_size=64", "verified", "acceptance"):
        assert any(words in label for label in labels)


def test_tables_and_picture_of_a_report(tmp_path: Path) -> None:
    text = report_markdown(POINTS, ["measured on a slate"], "tiny")
    assert "| setting | sorting | overall | quality kept | tokens per pass | × AR |" in text
    front = [line.split(" | ")[0].strip("| `") for line in text.split("## ")[1].splitlines() if "| `" in line]
    assert front == ["ar", *(point.setting for point in pareto_front(POINTS[1:], lambda p: p.times_ar))]
    assert "| `diffusion:threshold=0.5` | 80.0 | 64.0 | 80.0% | 5.00 | 3.10 |" in text
    assert "| `diffusion:threshold=0.8` | 97.0% | 95.0% to 99.0% | 3.00 | 1.90 |" in text
    assert text.startswith("# Quality and speed of settings: tiny\n\nmeasured on a slate\n")
    draw_report(POINTS, tmp_path / "report.png", "a title")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_an_earlier_report_is_drawn_beside_a_new_one(tmp_path: Path) -> None:
    write_points(tmp_path / "points.json", "before", POINTS[:3])
    name, points = read_points(tmp_path / "points.json")
    assert (name, points) == ("before", POINTS[:3])
    draw_report(POINTS, tmp_path / "alone.png", "a title")
    draw_report(POINTS, tmp_path / "both.png", "a title", (name, points))
    assert (tmp_path / "alone.png").read_bytes() != (tmp_path / "both.png").read_bytes()
    text = report_markdown(POINTS, [], "tiny", (name, points))
    assert text.startswith(report_markdown(POINTS, [], "tiny"))
    third = text.split("## before, from its own report")[1]
    assert [line.split("`")[1] for line in third.splitlines() if "`" in line] == [point.setting for point in points]
    with pytest.raises(ArgumentError, match="no such file"):
        read_points(tmp_path / "missing.json")
    (tmp_path / "other.json").write_text('{"points": [1]}')
    with pytest.raises(ArgumentError, match="not the points of a report"):
        read_points(tmp_path / "other.json")


def test_settings_of_a_model_that_commits_from_the_left_have_its_policy() -> None:
    for rule in (BlockRule(shift=1, one_pass=True), BlockRule(draft_head=True)):
        params = [setting.params() for setting in grid(rule)]
        assert {one.policy for one in params if one.mode == "diffusion"} == {"threshold"}
        assert {one.mode for one in params} == {"diffusion", "verified"}


def test_a_sweep_continues_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TwoTowerForCausalLM.from_pretrained(module_model(), dtype="float32")
    settings = [parse_setting(text) for text in ("diffusion:0.9", "verified:draft_steps=1")]
    asked: list[str] = []
    real = module.answer_problems

    def answer(model, setting, problems, **more):  # type: ignore[no-untyped-def]
        asked.append(setting.label)
        if len(asked) == 3:
            raise KeyboardInterrupt
        requests, outputs = real(model, setting, problems, max_new_tokens=8, **more)
        return requests, outputs

    monkeypatch.setattr(module, "answer_problems", answer)
    monkeypatch.setattr(module, "answers_right", lambda problems, outputs: [i % 2 == 0 for i in range(len(problems))])
    file = tmp_path / "answers.jsonl"

    def again(**facts: object) -> list[Point]:
        return sweep_settings(model, settings, per_family=1, timed=1, answers_file=file, facts={"model": "m", **facts})

    with pytest.raises(KeyboardInterrupt):
        again()
    assert len(file.read_text().splitlines()) == 3  # facts, the answers of AR and of one setting
    points = again()
    assert asked[:3] == ["ar", "diffusion:0.9", "verified:draft_steps=1"]
    assert asked[3] == "verified:draft_steps=1"
    assert asked[4:] == ["ar", "diffusion:0.9", "verified:draft_steps=1"] * 2  # timing in turns, with one warm-up round
    assert [p.setting for p in points] == ["ar", "diffusion:0.9", "verified:draft_steps=1"]
    assert points[0].times_ar == 1
    assert points[0].tokens_per_pass == 1
    assert points[1].kept[0] == 1  # the same right answers as AR
    with pytest.raises(ArgumentError, match=r"answers\.jsonl: its answers differ in model"):
        again(model="other")
    file.write_text("not json\n")
    with pytest.raises(ArgumentError, match="not a file of report answers"):
        again()


def test_a_model_without_right_answers_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TwoTowerForCausalLM.from_pretrained(module_model(), dtype="float32")
    monkeypatch.setattr(module, "answers_right", lambda problems, outputs: [False] * len(problems))
    with pytest.raises(ArgumentError, match="AR answers none of the 6 problems"):
        sweep_settings(model, [], per_family=1, timed=1)


def test_the_fingerprint_depends_on_both_towers() -> None:
    model = TwoTowerForCausalLM.from_pretrained(module_model(), dtype="float32")
    before = fingerprint(model)
    assert before == fingerprint(TwoTowerForCausalLM.from_pretrained(module_model(), dtype="float32"))
    assert model.denoiser is not None
    model.denoiser.norm_f.weight.data[0] += 1
    assert fingerprint(model) != before


def module_model() -> Path:
    from twotower import bundled_model

    return bundled_model("small")


def test_the_verb_writes_picture_and_table(
    cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "answers_right", lambda problems, outputs: [True] * len(problems))
    monkeypatch.setattr(module, "answer_problems", partial(module.answer_problems, max_new_tokens=8))
    out = tmp_path / "new" / "report"
    options = ("-n", "1", "--timed", "1", "--difficulty", "1", "-o", str(out), "--dtype", "float32")
    result = cli("report", *options, "-s", "diffusion:0.8", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert [p["setting"] for p in found["points"]] == ["ar", "diffusion:0.8"]
    assert sorted(path.name for path in out.iterdir()) == [
        ".lock", "answers.jsonl", "points.json", "report.md", "report.png",
    ]  # fmt: skip
    assert "quality kept" in (out / "report.md").read_text()
    result = cli("report", *options, "-s", "diffusion:0.8")
    assert result.out.splitlines() == [str(out / name) for name in ("report.png", "report.md", "points.json")]


@pytest.mark.skipif(os.name != "posix", reason="needs flock")
def test_two_reports_never_write_one_folder(cli: Callable[..., Result], tmp_path: Path) -> None:
    """The answers of one replaced those of the other. A report that was killed releases the folder at once."""
    out, known = tmp_path / "report", tmp_path / "report" / "answers.jsonl"
    command = ["report", "-n", "3", "--timed", "1", "--difficulty", "1", "-o", str(out), "--dtype", "float32"]
    more = [part for text in ("diffusion:0.8", "diffusion:0.9", "verified:draft_steps=1") for part in ("-s", text)]
    first = subprocess.Popen([sys.executable, "-m", "twotower", *command, *more], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not known.exists():
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    before = known.read_bytes()
    second = cli(*command, "-s", "diffusion:0.8")
    first.send_signal(signal.SIGKILL)
    assert_one_line_error(second, f"{out} is being written by another process; wait until it ends, or name another")
    assert known.read_bytes() == before
    first.wait()
    assert cli(*command, "-s", "diffusion:0.8").code == 0
    assert known.read_bytes().startswith(before)


def test_bad_input_is_a_one_line_error(cli: Callable[..., Result]) -> None:
    assert_one_line_error(cli("report", "--quick", "-s", "ar"), "--quick and --setting")
    assert_one_line_error(cli("report", "-s", "fast"), "mode is 'fast'")
