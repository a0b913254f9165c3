"""What the Ray parts check before a cluster is needed, and the predictor without Ray."""

from __future__ import annotations

import pickle
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from command import Result, assert_one_line_error
from prometheus_client.parser import text_string_to_metric_families

from twotower import GenerationParams, Request, bundled_model, options
from twotower.cli.main import run_cli
from twotower.errors import ArgumentError
from twotower.ray import TwoTowerPredictor, actor_options
from twotower.ray.batch_job import JobPredictor
from twotower.ray.builder import named_gpus
from twotower.ray.cluster import ActorSize, check_address, last_line
from twotower.ray.replica_metrics import merged
from twotower.server.options import ServiceOptions

ARGUMENTS = {"model": "bundled/small", "dtype": "float32", "max_new_tokens": 8, "threads": 1}


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ray", "ray.data", "ray.serve"):
        monkeypatch.setitem(sys.modules, name, None)


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> Result:
    code = run_cli(list(arguments))
    return Result(code, *capsys.readouterr())


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("batch", "--ray"), "--ray needs ray; install it"),
        (("batch", "--actors", "2"), "--actors is 2, and the job runs in this process; add --ray"),
        (("batch", "--ray", "--actors", "0"), "--actors"),
        (("serve", "--replicas", "2"), "--replicas needs ray; install it"),
        (("serve", "--replicas", "0"), "--replicas"),
        (("serve", "--replicas", "2", "--port", "0"), "--port 0 does not go with --replicas"),
        (("serve", "--replicas", "2", "--per-key", "3", "--api-keys", "keys"), "--per-key counts the requests of one"),
    ],
)
def test_options_that_cannot_work_are_one_line(
    arguments: tuple[str, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"prompt": "a"}\n')
    Path("keys").write_text("secret\n")
    with socket.socket() as probe:  # a free port
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    more = ("prompts.jsonl", "-o", "out.jsonl") if arguments[0] == "batch" else ("--port", port)
    given = arguments if "--port" in arguments else (*arguments, *more)
    assert_one_line_error(failed(capsys, *given, "-m", "bundled/small"), said)
    assert not Path("out.jsonl").exists()


@pytest.mark.usefixtures("no_ray")
def test_a_model_that_is_not_there_is_found_before_ray(capsys: pytest.CaptureFixture[str]) -> None:
    said = "no/such/model: no such directory"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    assert_one_line_error(failed(capsys, "serve", "--replicas", "2", "-m", "no/such/model", "--port", port), said)


@pytest.mark.usefixtures("no_ray")
def test_the_application_without_ray() -> None:
    import click

    from twotower.ray import app

    with pytest.raises(click.ClickException, match=r"twotower\.ray:app needs ray; install it"):
        app({"replicas": "2"})
    with pytest.raises(ArgumentError, match="Ray Data needs ray"):
        actor_options(2)


@pytest.mark.parametrize("actors", [0, -1, True, 1.5])
def test_numbers_of_actors(actors: int) -> None:
    with pytest.raises(ArgumentError, match="actors is"):
        actor_options(actors)


def test_an_actor_leaves_half_a_cpu_for_reads_and_writes() -> None:
    two = {"CPU": 2.0, "GPU": 1.0}
    assert ActorSize.of(None).fits_in(two) == 4
    assert ActorSize.of(2).fits_in(two) == 1
    assert ActorSize.of(3).fits_in(two) == 0
    assert ActorSize.of(1, gpus=1).fits_in(two) == 1
    assert ActorSize.of(1, gpus=1).fits_in({"CPU": 8.0}) == 0


def test_an_address_where_nothing_listens() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(ArgumentError, match=f"RAY_ADDRESS is '{address}', and nothing answers there"):
            check_address(address)
        probe.listen()
        check_address(address)
    for other in ("", "auto", "ray://example:10001", "local"):
        check_address(other)


def test_workers_get_the_variables_of_this_package_without_secrets() -> None:
    given = {"TWOTOWER_NATIVE": "0", "TWOTOWER_API_KEYS": "secret", "TWOTOWER_PACK": "", "HOME": "/root"}
    assert options.set_variables(given) == {"TWOTOWER_NATIVE": "0"}


def test_last_line_of_a_traceback() -> None:
    assert last_line("Traceback\n  File\nValueError: it is wrong\n\n") == "ValueError: it is wrong"
    assert last_line("Traceback\ntwotower.errors.CheckpointError: no such model") == "no such model"
    assert last_line("") == ""


# --- options of replicas ----------------------------------------------------------------------------------------------


def test_options_as_text() -> None:
    read = ServiceOptions.of_text({"rows": "4", "memory": "0.5", "name": "a,b", "log-prompts": "true", "length": 64})
    assert read == ServiceOptions(rows=4, memory=0.5, name=("a", "b"), log_prompts=True, length=64)
    assert read.for_nodes().model == "bundled/adapters"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rowz": "1"}, "no option 'rowz' of a replica; choose one of model, name"),
        ({"rows": "x"}, "rows is 'x'; its type is int"),
        ({"rows": "0"}, "--rows is 0; give at least 1"),
        ({"log_prompts": "maybe"}, "log_prompts is 'maybe'; its type is bool"),
        ({"timeout": "inf"}, "--timeout is inf; it must be a finite number above 0"),
        ({"dtype": "float8"}, "--dtype is 'float8'; choose one of auto"),
        ({"quantization": "int3"}, "int3"),
    ],
)
def test_wrong_options_as_text(given: dict[str, object], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        ServiceOptions.of_text(given)


def test_files_of_replicas_are_checked_and_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="which is no file; give a file"):
        ServiceOptions(chat_template=Path("none.jinja")).check()
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("chat.jinja").touch()
    options = ServiceOptions(model="model", chat_template=Path("chat.jinja"), generation_config="none").for_nodes()
    assert (options.model, options.chat_template) == (str(tmp_path / "model"), tmp_path / "chat.jinja")
    assert options.generation_config == "none"


def test_a_replica_has_a_gpu_for_each_named_device() -> None:
    assert named_gpus(ServiceOptions()) == 0
    assert named_gpus(ServiceOptions(context_device="cuda:0")) == 1
    assert named_gpus(ServiceOptions(context_device="cuda:0", denoiser_device="cuda:1")) == 2
    assert named_gpus(ServiceOptions(context_device="cuda:0", denoiser_device="cpu")) == 1


def test_metrics_of_replicas_are_one_page() -> None:
    text = '# HELP a_total Texts\n# TYPE a_total counter\na_total{{kind="x"}} {0}\n'
    text += "# HELP b Rows\n# TYPE b gauge\nb {0}\n"
    page = merged([("second", text.format("2.0").encode()), ("first", text.format("1.0").encode())]).decode()
    assert page.count("# TYPE a_total counter") == page.count("# TYPE b gauge") == 1
    found = {metric.name: metric.samples for metric in text_string_to_metric_families(page)}
    assert [(each.labels, each.value) for each in found["a"]] == [
        ({"kind": "x", "replica": "first"}, 1.0),
        ({"kind": "x", "replica": "second"}, 2.0),
    ]
    assert [each.value for each in found["b"]] == [1.0, 2.0]


# --- the predictor without Ray ---------------------------------------------------------------------------------------


def test_the_predictor_in_every_mode() -> None:
    """Columns have the values of a row, null means the predictor's value, and a bad row is an error of its own."""
    predictor = TwoTowerPredictor(**ARGUMENTS, prompt_column="text_in", rows=4)
    prompt = "User: I need a taxi.\nAssistant:"
    batch = {
        "id": np.arange(7),
        "text_in": np.array([prompt] * 6 + [None], dtype=object),
        "mode": np.array(["ar", "verified", "diffusion", "mock_ar", "guess", None, "ar"], dtype=object),
        "max_new_tokens": np.array([np.nan, 8.0, 4.0, 4.0, 4.0, 3.0, 3.0]),
    }
    found = predictor(batch)
    assert found["id"] is batch["id"]
    texts, errors = list(found["text"]), list(found["error"])
    assert texts[0] == texts[1]
    assert texts[0].startswith(texts[5])
    assert list(found["new_tokens"]) == [8, 8, 4, 4, 0, 3, 0]
    assert list(found["mode"]) == ["ar", "verified", "diffusion", "mock_ar", "", "verified", ""]
    assert [bool(error) for error in errors] == [False] * 4 + [True, False, True]
    assert "guess" in errors[4]
    assert "the prompt is None; give a string" in errors[6]
    assert {name: column.dtype.kind for name, column in found.items() if name in ("text", "new_tokens")} == {
        "text": "O",
        "new_tokens": "i",
    }
    with pytest.raises(ArgumentError, match="no column 'text_in'; its columns are prompt"):
        predictor({"prompt": batch["text_in"]})


def test_failures_of_a_job_are_results() -> None:
    """Ray logs an exception of an actor at length, so an actor of a job raises none."""
    request = pickle.dumps(Request([5, 6], GenerationParams.of(mode="ar", max_new_tokens=2)))
    batch = {"place": np.array([3, 4]), "request": np.array([request, request], dtype=object)}
    found = JobPredictor(model="no/such/model/here")(batch)
    assert found["place"] == [3, 4]
    assert "no such directory" in str(found["failure"][0])
    job = JobPredictor(model=str(bundled_model("small")), dtype="float32", threads=1, rows=2, length=8)
    assert job(batch)["tokens"] == [2, 2]
    job.predictor.engine.step = lambda: 1 / 0  # type: ignore[assignment, method-assign]
    assert job(batch)["failure"] == ["ZeroDivisionError: division by zero"] * 2
