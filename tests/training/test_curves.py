"""The curves: pictures of any log that a run can leave, and a one-line error for anything else."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from twotower.cli.curves import curves
from twotower.errors import ArgumentError
from twotower.training.plots.curves import draw
from twotower.training.plots.log_records import load, smoothed, stages, step_seconds, summary
from twotower.training.plots.validation_figure import short_names

SAMPLE = {
    "prompt": "a $5 bill^2 \x07 she said:\n", "text": "one two", "finish_reason": "eos", "tokens": 21, "passes": 7,
    "trace": {
        "block_size": 16, "passes": [5, 2], "tokens": [" one", "\n", "$", "\ufffd", " x_1^{日"] * 4 + ["<eos>"],
        "step": [0, 1, 2, 3] * 4 + [1, 0, 0, 0, 0],
    },
}  # fmt: skip


def record(step: int, size: int = 16, seconds: float | None = None, **found: Any) -> dict[str, Any]:
    return {
        "step": step, "loss": 6.0 / step, "targets": 90, "tokens": 100, "lr": 1e-3, "grad_norm": 0.5 + 1 / step,
        "block_size": size, **found, "timing": {"seconds": seconds or 0.5 * step, "tokens_per_second": 200.0},
    }  # fmt: skip


def denoiser(**changes: Any) -> dict[str, Any]:
    by_t = {"0.1": 2.0, "0.5": 2.0001, "1.0": 4.0}
    found = {"masked_nll": 3.0, "masked_nll_by_t": by_t, "ar_nll": 2.0, "agreement": 0.4, "tokens_per_pass": 3.0}
    return {"validation": found | {"sample": SAMPLE} | changes}


def backbone() -> dict[str, Any]:
    found = {"nll": 3.0, "nll_by_source": {"data/a/x.jsonl": 2.0, "data/b/x.jsonl=0.5": 4.0}, "bits_per_byte": 1.5}
    return {"validation": found | {"sample": {"prompt": "a", "text": "b $c", "finish_reason": "eos", "tokens": 2}}}


def write(run: Path, records: list[dict[str, Any]], tail: str = "") -> Path:
    run.mkdir(exist_ok=True)
    (run / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in records) + tail)
    return run


def adapters(**changes: Any) -> dict[str, Any]:
    found = {"masked_nll": 2.0, "agreement": 0.4, "draft_tokens": 2.5, "tokens_per_pass": 1.8, "free_tokens": 2.1}
    kept = {"texts_kept": 0.7, "ar_accuracy": 0.5, "sample": {k: v for k, v in SAMPLE.items() if k != "trace"}}
    return {"validation": found | kept | changes}


LOGS = {
    "one step": [record(1)],
    "not yet validated": [record(i, 32 if i < 5 else 16) for i in range(1, 9)],
    "denoiser": [record(1), record(2, **denoiser()), record(3), record(4, 8, **denoiser(agreement=0.5))],
    "nothing written": [record(2, **{"validation": {"masked_nll": 3.0, "masked_nll_by_t": {}, "ar_nll": 2.0}})],
    "an empty sample": [record(1, **denoiser(sample=SAMPLE | {"trace": SAMPLE["trace"] | {"tokens": [], "step": []}}))],
    "adapters": [record(1, **adapters()), record(2, **adapters(accuracy_kept=0.9))],
    "large blocks": [
        record(1, **denoiser(sample=SAMPLE | {"trace": SAMPLE["trace"] | {"block_size": 32, "passes": [6]}}))
    ],
    "backbone": [record(1, **backbone()), record(2, **backbone())],
}


@pytest.mark.parametrize("name", LOGS)
@pytest.mark.filterwarnings("error")
def test_whatever_a_run_has_logged_is_drawn(name: str, tmp_path: Path) -> None:
    from matplotlib.image import imread

    pictures = draw(write(tmp_path, LOGS[name]), tmp_path / "out")
    validated = any("validation" in entry for entry in LOGS[name])
    assert [path.name for path in pictures] == ["training.png", "validation.png"][: 1 + validated]
    for picture in pictures:
        assert imread(picture).shape[1] == 1200
    assert len(summary(load(tmp_path))) == 3


def test_the_verb(tmp_path: Path) -> None:
    run = write(
        tmp_path / "run", LOGS["denoiser"], tail='{"step": 5, "loss"'
    )  # the process was killed in the middle of a line
    said = CliRunner().invoke(curves, [str(run)])
    assert said.exit_code == 0
    assert said.stdout.split() == [str(run / "training.png"), str(run / "validation.png")]
    assert said.stderr.splitlines() == [
        "steps 1 to 4, blocks of 16 then 8: 400 tokens in 2 s, 200 tokens/s",
        "loss 1.5 (at first 6), gradient norm 0.75, learning rate 0.001",
        "validation at step 4: masked nll 3, ar nll 2, agreement 0.5, tokens per pass 3",
    ]
    assert (run / "training.png").exists()
    said = CliRunner().invoke(curves, [str(run), "-o", str(tmp_path / "new" / "to_piece"), "--json"])
    assert [Path(path).exists() for path in json.loads(said.stdout)["pictures"]] == [True, True]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; give the directory of a training run"),
        ("", "contains no step yet"),
        ('{"loss": 1}\n', "not a training log"),
        ("[1]\n", "not a training log"),
    ],
)
def test_no_log_is_one_line(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(ArgumentError, match=message):
        draw(tmp_path)


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ArgumentError, match=r"pip install 'twotower\[plots\]'"):
        draw(write(tmp_path, LOGS["one step"]))


def test_small_things() -> None:
    assert smoothed([4.0] * 200) == pytest.approx(4.0)
    assert smoothed([8.0] + [4.0] * 199)[[0, 199]] == pytest.approx([8.0, 4.0], abs=1e-3)
    assert stages([record(1, 32), record(2, 32), record(3, 16), record(4, 32)]) == [(1, 32), (3, 16), (4, 32)]
    assert step_seconds([record(1), record(2), record(3, seconds=0.2), record(4, seconds=0.5)]) == [
        0.5, 0.5, 0.2, pytest.approx(0.3)
    ]  # fmt: skip
    assert short_names(["data/a/x.jsonl", "data/b/x.jsonl=0.5"]) == ["a/x", "b/x"]
    assert short_names(["/data/corpus/train.jsonl.gz"]) == ["train"]
