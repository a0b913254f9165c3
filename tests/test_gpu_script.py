"""`benchmarks/gpu.py` on a CPU: all parts in their small form, and parts that fail, crash or hang."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from preloaded import run_script

from twotower.checkpoint.quantize import large_weights, quantization_of
from twotower.ops import self_check
from twotower.ops.self_check import Case

ROOT = Path(__file__).parent.parent
PARTS = [
    "machine", "kernels", "tests", "bundled", "micro", "full", "engine", "adapters", "int8", "training", "midsize",
]  # fmt: skip
GIB = 1 << 30


@pytest.fixture(autouse=True)
def _modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes `benchmarks/` importable inside the test only."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "benchmarks")):
            del sys.modules[name]


def lines(out: Path, part: str) -> list[dict[str, Any]]:
    """The measurements of a part in the file."""
    found = map(json.loads, (out / "measurements.jsonl").read_text().splitlines())
    return [line for line in found if line["part"] == part]


# --- all parts --------------------------------------------------------------------------------------------------------


def test_all_parts_in_their_small_form(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "gpu.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    out = os.path.relpath(tmp_path)
    done = run_script(script, "--small", "--device", "cpu", "--minutes", "30", "--out", out, environment=environment)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["parts"]) == PARTS
    assert {name: part["state"] for name, part in results["parts"].items()} == dict.fromkeys(PARTS, "done")
    assert {file.name for file in tmp_path.iterdir()} == {"measurements.jsonl", "results.json", "results.md", "log.txt"}
    measured = {name: {one["what"]: one for one in part["measured"]} for name, part in results["parts"].items()}
    failed = {(name, what) for name, own in measured.items() for what, one in own.items() if "error" in one}
    assert all(name == "machine" and what.startswith("attention of torch") for name, what in failed), failed
    check_figures(measured)
    for name in PARTS:
        assert f"\n== {name}: done" in f"\n{done.stdout}"
        assert f"\n## {name}: done" in (tmp_path / "results.md").read_text()


def check_figures(measured: dict[str, dict[str, dict[str, Any]]]) -> None:
    """The figures of all parts are there and plausible."""
    versions, ceilings = measured["machine"]["versions"], measured["machine"]["ceilings"]
    assert versions["torch"] == torch.__version__
    assert ceilings["bytes_per_second"] > 1e8
    assert measured["machine"]["grouped product, 4 tokens, captured"]["ms"] > 0
    verdicts = {one["verdict"] for one in measured["kernels"].values() if "verdict" in one}
    assert verdicts == {"agrees"}
    assert sum(one.get("passed", 0) for one in measured["tests"].values()) == 2
    texts = {name: value for one in measured["bundled"].values() for name, value in one.items() if "texts" in name}
    assert set(texts.values()) == {"2 of 2"}
    assert {"small, float32: verified", "adapters, float32: AR, waiting"} <= set(measured["bundled"])
    assert any(name.startswith("experts_int8, 4 tokens") for name in measured["micro"])
    assert all(one["% of ceiling"] > 0 for one in measured["micro"].values())
    for part in ("full", "int8"):
        for rows in (1, 2):
            assert measured[part][f"{rows} × 64 tokens: AR step"]["ms"] > 0
            assert set(measured[part][f"{rows} × 64 tokens: × AR"]) == {"what", "1.9 a pass", "3 a pass", "5 a pass"}
    assert "1 × 64 tokens, graphs False: denoiser pass" in measured["full"]
    assert measured["full"]["1 × 64 tokens: profile of commit"]["kernels"] > 0
    for rows in (1, 2):  # each text ends with the others, and still has a rate
        diffusion = measured["engine"][f"{rows} rows: 3 a pass"]
        assert diffusion["× AR"] == pytest.approx(
            diffusion["tokens/s"] / measured["engine"][f"{rows} rows: AR"]["tokens/s"]
        )
        assert diffusion["tokens per pass"] == pytest.approx(3, rel=0.1)
        assert measured["engine"][f"{rows} rows: AR, graph_steps True"]["tokens/s"] > 0
    assert measured["full"]["1 × 64 tokens, grouped_pairs 1073741824: AR step"]["ms"] > 0
    for what in ("1 × 8 tokens after 64", "2 × 4 tokens after 64", "1 × 8 tokens after 64, graphs False"):
        own, plain = (measured["adapters"][f"{what}: {name}"]["ms"] for name in ("round", "plain pass"))
        assert measured["adapters"][f"{what}: round ÷ plain pass"] == {
            "what": f"{what}: round ÷ plain pass", "ratio": own / plain, "wanted": 1.15,
        }  # fmt: skip
    training = measured["training"]
    compared = [one for what, one in training.items() if "beside a CPU's losses" in what]
    assert [one["verdict"] for one in compared] == ["agrees"] * 3
    assert all(one["last"] < one["first"] for one in compared)
    for form in ("", ", training_attention padded", ", training_attention repeated"):
        assert training[f"steps of bundled, denoiser, 1 rows of 32{form}"]["tokens/s"] > 0
    run = training["a run, killed and resumed"]
    assert run["kept steps equal"]
    assert run["ended after"] > run["resumed after"] >= 2
    assert measured["midsize"]["denoiser pass against the naive reference"]["logits differ by"] < 1e-3
    assert measured["midsize"]["AR against transformers"]["same tokens"]


def test_options_that_cannot_work(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "gpu.py"
    for given, words in (
        (["--parts", "full,fast"], "fast: choose from machine, kernels"),
        (["--device", "cpu"], "the published shape needs one"),
    ):
        done = run_script(script, *given, "--out", str(tmp_path), environment=os.environ)
        assert done.returncode == 2
        assert words in done.stderr
    assert not list(tmp_path.iterdir())


# --- parts that do not end well ---------------------------------------------------------------------------------------


def driven(out: Path, minutes: float, **parts: Callable[[Any, Any], None]) -> dict[str, Any]:
    """The results of parts with these names, each with the same share of the time."""
    from gpu_parts.driver import Driver, Part

    driver = Driver([Part(name, 1.0, name, run) for name, run in parts.items()], None, minutes, out)
    driver.run()
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    assert found == driver.results()
    return found["parts"]


def fails(setting: Any, record: Any) -> None:
    record.add("before", ms=1.0)
    raise ValueError("broken part")


def crashes(setting: Any, record: Any) -> None:
    record.add("before", ms=1.0)
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(setting: Any, record: Any) -> None:
    record.add("before", ms=1.0)
    time.sleep(600)


def works(setting: Any, record: Any) -> None:
    record.measure("after", lambda: {"ms": 2.0})


def test_parts_that_fail_crash_or_hang_stop_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_parts import driver

    monkeypatch.setattr(driver, "GRACE", 0.1)
    started = time.monotonic()
    parts = driven(tmp_path, 0.1, fails=fails, crashes=crashes, hangs=hangs, works=works)
    assert time.monotonic() - started < 30
    states = {name: part["state"] for name, part in parts.items()}
    assert re.fullmatch(r"cut off after \d+ s", states.pop("hangs"))
    assert states == {"fails": "failed", "crashes": "died: SIGKILL", "works": "done"}
    for name in ("fails", "crashes", "hangs"):
        assert parts[name]["measured"][0] == {"what": "before", "ms": 1.0}
    assert "ValueError: broken part" in parts["fails"]["measured"][1]["error"]
    assert parts["works"]["measured"] == [{"what": "after", "ms": 2.0}]
    assert "broken part" in (tmp_path / "log.txt").read_text()


def test_a_device_that_is_lost_ends_its_own_part_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a sticky CUDA error, every call on the device fails; the next part has another process."""

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def breaks(setting: Any, record: Any) -> None:
        torch.cuda.is_initialized, torch.cuda.synchronize = (lambda: True), lost  # type: ignore[assignment]
        record.measure("one", lost)
        record.measure("two", lambda: {"ms": 1.0})

    parts = driven(tmp_path, 1.0, breaks=breaks, works=works)
    assert parts["breaks"]["state"] == "failed"
    assert [one["what"] for one in parts["breaks"]["measured"]] == ["one", "the rest of this part"]
    assert "illegal memory access" in parts["breaks"]["measured"][1]["error"]
    assert parts["works"]["state"] == "done"


def test_a_self_check_without_end_refuses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit ends the process. It is no exception, which a self-check would take for a wrong kernel."""
    from gpu_parts import driver

    monkeypatch.setattr(driver, "GRACE", 0.1)
    cases = [Case("one", lambda: (torch.ones(3),))]

    def check(record: Any, kernel: Callable[[torch.Tensor], object]) -> None:
        record.measure("kernel", lambda: {"wrong": self_check.find_mismatch(kernel, lambda x: 2 * x, cases)})

    def slow(setting: Any, record: Any) -> None:
        check(record, lambda x: time.sleep(600))

    def quick(setting: Any, record: Any) -> None:
        check(record, lambda x: 2 * x)

    parts = driven(tmp_path, 0.05, slow=slow, quick=quick)
    assert parts["slow"]["state"].startswith("cut off after")
    assert parts["slow"]["measured"] == []
    assert parts["quick"]["measured"] == [{"what": "kernel", "wrong": None}]


def test_time_is_shared_in_proportion(tmp_path: Path) -> None:
    from gpu_parts.driver import Driver, Part

    def given(setting: Any, record: Any) -> None:
        record.add("seconds", value=record.left())

    parts = [Part("long", 90.0, "", given), Part("short", 10.0, "", given)]
    for minutes in (1.0, 6.0):
        Driver(parts, None, minutes, tmp_path).run()
        seconds = {part.name: lines(tmp_path, part.name)[0]["value"] for part in parts}
        assert seconds["long"] == pytest.approx(0.9 * 60 * minutes, rel=0.1)
        assert seconds["short"] == pytest.approx(60 * minutes, rel=0.1)  # what the first part left
    Driver(parts, None, 1e-9, tmp_path).run()
    assert "not begun: no time left" in (tmp_path / "results.md").read_text()


def test_measurements_that_fail_or_do_not_fit_are_named(tmp_path: Path) -> None:
    from gpu_parts.record import Record, read

    file = tmp_path / "lines"
    record = Record(file, "part", 100.0)

    def too_large() -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    assert record.measure("fits", lambda: {"ms": float("nan")}) is not None
    assert record.measure("large", too_large) is None
    assert record.measure("late", lambda: {"ms": 1.0}, least=200.0) is None
    with file.open("a") as unfinished:
        unfinished.write('{"part": "part", "what": "torn')
    assert [(one["what"], one.get("skipped")) for one in read(file)] == [
        ("fits", None), ("large", "does not fit: OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB"),
        ("late", "no time left"),
    ]  # fmt: skip
    assert read(file)[0]["ms"] is None


def test_a_task_that_kills_its_process_loses_itself_only(tmp_path: Path) -> None:
    from gpu_parts.parallel import in_processes

    def work(task: int) -> None:
        if task in (1, 4):
            os.kill(os.getpid(), signal.SIGKILL)
        (tmp_path / str(task)).touch()

    assert sorted(in_processes(range(9), work, 2)) == [1, 4]
    assert sorted(int(file.name) for file in tmp_path.iterdir()) == [0, 2, 3, 5, 6, 7, 8]


# --- what the parts measure -------------------------------------------------------------------------------------------


def test_the_model_takes_the_form_that_fits_the_card() -> None:
    from common.models import PUBLISHED, config_of, tower_bytes
    from gpu_parts.setting import form_of

    config = config_of(PUBLISHED)
    forms = {gib: form_of(config, torch.bfloat16, gib * GIB) for gib in (139, 78)}
    assert {gib: (form.shared, form.layers) for gib, form in forms.items()} == {139: (False, None), 78: (True, None)}
    tiny = config_of(None)
    cut = form_of(tiny, torch.float32, tower_bytes(tiny, torch.float32) - 1, spare=0)
    assert (cut.shared, cut.layers) == (True, 4)
    assert cut.text == "one set of weights serves both towers, the first 4 layers"


def test_int8_weights_are_made_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """At no time more than one layer has plain weights, so that both towers in int8 fit 78 GiB."""
    from common.models import config_of
    from gpu_parts import int8

    made, real = [], int8.quantize_
    models: list[torch.nn.Module] = []
    real_model = int8.TwoTowerForCausalLM
    monkeypatch.setattr(int8, "TwoTowerForCausalLM", lambda config: models.append(real_model(config)) or models[-1])

    def quantize(module: torch.nn.Module, plan: str) -> torch.nn.Module:
        plain = [own for _, own in large_weights(models[0]) if hasattr(own, "reset_parameters") or _is_plain(own)]
        made.append(sum(_bytes(own) for own in plain))
        return real(module, plan)

    monkeypatch.setattr(int8, "quantize_", quantize)
    config = config_of(None)
    model = int8.int8_model(config, torch.float32, torch.device("cpu"))
    assert quantization_of(model) == "int8"
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    layers = max(sum(p.nbytes for p in layer.parameters()) for layer in real_model(config).context.layers)
    head = config.vocab_size * config.hidden_size * 4
    assert 0 < max(made) <= max(layers, head)
    with torch.no_grad():
        assert model.extend(torch.ones(1, 3, dtype=torch.long), model.new_state(1, 8)).isfinite().all()


def _is_plain(module: torch.nn.Module) -> bool:
    return "Int8" not in type(module).__name__


def _bytes(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.parameters() if not tensor.is_meta)


def test_times_ar_at_the_roofline_depends_on_the_rows() -> None:
    """The published shape in bf16: what one row suggests is far from what 64 rows give."""
    from common.models import PUBLISHED, config_of
    from common.roofline import Rates
    from common.times_ar import at_roofline

    rates = Rates(4.8e12, 990e12, {}, {})
    found = at_roofline(config_of(PUBLISHED).layer_fields, torch.bfloat16, rates, context=1024, per_pass=3.0)
    assert {rows: round(value, 2) for rows, value in found.items()} == {1: 0.47, 8: 0.92, 64: 2.42}


def test_rows_and_noise_of_a_benchmark_stay_on_the_host() -> None:
    """As in training: a pass computes its indices where the rows are."""
    import train

    from twotower.training import fsdp

    world = fsdp.start("cpu")
    for kind, objective in train.objectives(train.shapes()["bundled"], world, torch.float32, False).items():
        batch, noise = train.batch_for(objective, 2, 32, 64)
        assert batch.tokens.device.type == "cpu"
        assert noise.masked.device.type == "cpu" if kind != "ar" else noise is None
    fsdp.stop()


def test_both_sides_of_each_choice_are_measured() -> None:
    """At least one value beside the default, and each is allowed."""
    from gpu_parts import choices

    from twotower import options

    every = choices.PASSES | choices.AR_STEPS | choices.TRAINING
    found = list(choices.sides(every))
    assert {name for side in found for name in side} == every.keys()
    for side in found:
        with options.override(**side):
            assert options.current() != options.Options()


def test_the_files_whose_tests_use_cuda() -> None:
    from gpu_parts.cuda_tests import cuda_files

    found = cuda_files()
    assert {f"tests/ops/test_triton{name}.py" for name in ("", "_attention", "_experts", "_rope")} <= set(found)
    assert {"tests/engine/test_overlap.py", "tests/cache/test_two_devices.py"} <= set(found)
    assert not {"tests/test_gpu_script.py", "tests/training/test_train_cli.py"} & set(found)


class FakeEvent:
    """An event of a device whose kernels take 3 ms."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        calls.append("record")

    def elapsed_time(self, other: FakeEvent) -> float:
        return 3.0


calls: list[str] = []


def test_the_times_of_device_and_host_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels wait behind a sleeping one while the host launches them; nothing waits for the device in between."""
    from gpu_parts import clock

    calls.clear()
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: calls.append(f"sleep {cycles >= clock.CYCLES}"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: calls.append("wait"))

    def call() -> None:
        calls.append("call")
        time.sleep(0.002)

    found = clock.timed(call, torch.device("cuda"), 0.02, before=lambda: calls.append("before"))
    assert found.keys() == {"ms", "device ms", "host ms"}
    assert found["device ms"] == 3.0
    assert found["host ms"] >= 2
    apart = ["before", "wait", "sleep True", "record", "call", "record", "wait"]
    assert calls[-len(apart) :] == apart
    assert calls[: 2 * clock.WARM_UP] == ["before", "call"] * clock.WARM_UP


def test_the_printed_table_fits_the_end_of_a_log() -> None:
    from gpu_parts.table import PRINTED, printed

    rows = [{"what": f"a kernel {i}", "verdict": "agrees"} for i in range(500)]
    rows += [{"what": f"a measurement {i}", "ms": 1.0, "note": "word " * 40} for i in range(150)]
    part = {"state": "done", "seconds": 1.0, "limit": 2.0, "text": "", "measured": rows}
    text = printed({"parts": {"one": part}})
    assert len(text) <= PRINTED + 200
    assert "500 agree with their reference" in text
    assert "a measurement 149: ms 1" in text
