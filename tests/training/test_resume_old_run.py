"""This version resumes a training run of an earlier version (tests/golden/training-run).

The directory and the command line have the names of the earlier version: `--rows`, `--rate`, keys of JSON files.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from tiny_run import log, run_cli

from twotower.training.old_names import LOG_RECORD, with_present_names

COMMAND = (
    "train model --data data.jsonl -o run --stages 16:4,8:6 --rows 2 --row-length 32 --rate 1e-2 --warmup 2 "
    "--held-out 0.1 --dtype float32 --device cpu --checkpoint-every 6 --validate-every 5 --validation-documents 4 "
    "--no-tensorboard --no-generate"
)  # of the run that was recorded
REACHED, STEPS = 6, 10  # steps of the stored checkpoint and of the whole run
# The recording machine gives the same bits. Another processor rounds differently; four steps enlarge the difference.
TOLERANCE = 1e-3


def test_a_run_of_an_earlier_version_goes_on(
    tmp_path: Path, golden_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """The steps after the checkpoint have the losses, gradient norms and validation of the run that was not stopped."""
    golden = golden_dir / "training-run"
    with tarfile.open(golden / f"step-{REACHED}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    assert run_cli(COMMAND.split()) == 0
    assert capfd.readouterr().err.splitlines()[:3] == [
        "--rows is deprecated; use --batch-size",
        "--rate is deprecated; use --lr",
        f"resuming after step {REACHED}",
    ]
    records = log(tmp_path / "run")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    expected = [
        with_present_names(json.loads(line), LOG_RECORD)
        for line in (golden / "expected.jsonl").read_text().splitlines()
    ]
    assert all({"lr", "grad_norm"} <= record.keys() for record in records)
    for record, wanted in zip(records[REACHED:], expected, strict=True):
        validation, wanted_validation = (one.pop("validation", {}) for one in (record, wanted))
        by_level, wanted_by_level = (one.pop("masked_nll_by_t", {}) for one in (validation, wanted_validation))
        assert record == pytest.approx(wanted, rel=TOLERANCE)
        assert validation == pytest.approx(wanted_validation, rel=TOLERANCE)
        assert by_level == pytest.approx(wanted_by_level, rel=TOLERANCE)
