"""Jobs and servers on a Ray cluster, by `make test-ray`, with actors and replicas that are killed.

RAY_PYTHON is a Python with the packages of the extra `ray`. Everything runs in processes of that Python.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

PYTHON = os.environ.get("RAY_PYTHON")
ROOT = Path(__file__).resolve().parents[2]
LINES = 200
SERVED = 200
SECONDS = 300.0  # in which a step must be done: a start on two busy CPUs takes a minute
MODEL = ["-m", "bundled/small", "--dtype", "float32", "--threads", "1"]
TOKEN = secrets.token_hex(32)  # of the test's own clusters
HEAD = """
import logging, ray
context = ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200 * 2**20, logging_level=logging.ERROR)
print(context.address_info["gcs_address"], flush=True)
input()
"""
PROMPTS = (
    "User: I need a taxi to the airport.\nAssistant:",
    "User: Find me a restaurant in San Jose.\nAssistant:",
    "User: Which films run tonight?\nAssistant: In which city?\nUser: Oakland.\nAssistant:",
    "User: Book a table for {} people.\nAssistant:",
    "User: I want to hear song number {}.\nAssistant:",
)
MODES: tuple[dict[str, object], ...] = (
    {},
    {"mode": "ar"},
    {"mode": "diffusion", "policy_value": 0.9},
    {"mode": "mock_ar", "max_new_tokens": 12},
    {"temperature": 0.8},
    {"mode": "verified", "stop": ["?"]},
)

if not PYTHON:
    pytest.skip("`make test-ray` runs jobs and servers on a Ray cluster", allow_module_level=True)
if not shutil.which(PYTHON):
    raise pytest.UsageError(f"RAY_PYTHON is {PYTHON}, no program; give a Python with the extra ray")


def environment(**more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "RAY_"))}
    own = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "RAY_raylet_start_wait_time_s": "240"}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    return clean | own | token | more


@contextmanager
def head(folder: Path, **more: str) -> Iterator[tuple[str, int]]:
    """A cluster of one node with 2 CPUs → its address, and the process that ends it."""
    with (folder / "head.log").open("w") as log:
        child = subprocess.Popen(
            [str(PYTHON), "-c", HEAD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment(**more),
            cwd=folder,
        )
        try:
            assert child.stdout is not None
            address = child.stdout.readline().strip()
            assert address, (folder / "head.log").read_text()
            yield address, child.pid
        finally:
            child.communicate("\n", timeout=SECONDS)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    with head(tmp_path_factory.mktemp("head")) as found:
        yield found


def start(arguments: Sequence[str], folder: Path, address: str = "") -> subprocess.Popen[str]:
    more = {"RAY_ADDRESS": address} if address else {}
    command = [str(PYTHON), "-m", "twotower", *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment(**more), **pipes)


def run(arguments: Sequence[str], folder: Path, address: str = "") -> tuple[int, str]:
    """→ exit code and stderr."""
    child = start(arguments, folder, address)
    _, err = child.communicate(timeout=SECONDS)
    return child.returncode, err


def wait_for(what: Callable[[], Any], child: subprocess.Popen[str] | None = None) -> Any:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if found := what():
            return found
        if child is not None and child.poll() is not None:
            said = child.stderr.read() if child.stderr is not None else ""
            pytest.fail(f"the program ended with exit code {child.returncode}: {said}")
        time.sleep(0.05)
    return pytest.fail(f"not within {SECONDS:.0f} s")


def workers(title: str, ancestor: int) -> list[int]:
    """Ray's processes with this title below a process."""
    parents, titled = {}, []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat, command = (folder / "stat").read_text(), (folder / "cmdline").read_bytes()
            except OSError:
                continue
            parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
            if command.startswith(title.encode()):
                titled.append(int(folder.name))

    def below(process: int) -> bool:
        return process == ancestor or (process in parents and below(parents[process]))

    return sorted(process for process in titled if below(process))


def answers(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def comparable(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without the numbers of passes: the drafts of mode verified depend on measured times."""
    return {name: value for name, value in answer.items() if "pass" not in name}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The prompts of a job, and the answers of one process."""
    folder = tmp_path_factory.mktemp("job")
    lines: list[dict[str, object]] = [
        {"id": i, "prompt": PROMPTS[i % len(PROMPTS)].format(i), **MODES[i % len(MODES)]} for i in range(LINES)
    ]
    lines[7] = {"id": 7, "prompt": "a", "mode": "guess"}  # its answer is an error
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, err = run(["batch", "prompts.jsonl", "-o", "one.jsonl", "-n", "24", *MODEL], folder)
    assert code == 0, err
    return folder, answers(folder / "one.jsonl")


def test_a_job_survives_a_killed_actor(cluster: tuple[str, int], job: tuple[Path, list[dict[str, Any]]]) -> None:
    """It continues the file that one process began, whose last line is incomplete."""
    address, process = cluster
    folder, expected = job
    out = folder / "cluster.jsonl"
    before = (folder / "one.jsonl").read_bytes().splitlines(keepends=True)[:24]
    out.write_bytes(b"".join(before)[:-9])
    command = ["batch", "prompts.jsonl", "-o", out.name, "-n", "24", *MODEL, "--ray", "--actors", "2"]
    child = start(command, folder, address)
    wait_for(lambda: out.read_bytes().count(b"\n") > 23, child)
    actors = workers("ray::MapWorker", process)
    assert len(actors) == 2
    os.kill(actors[0], signal.SIGKILL)
    _, err = child.communicate(timeout=SECONDS)
    assert child.returncode == 0, err
    assert f"{LINES - 23} lines written, 23 more by an earlier run" in err
    found = answers(out)
    different = len({answer["id"] for answer in found})
    print(f"\n{len(found)} lines, {different} of them different; one of {len(actors)} actors killed")
    assert [answer["line"] for answer in found] == list(range(1, LINES + 1))
    assert list(map(comparable, found)) == list(map(comparable, expected))


def test_what_cannot_run_is_one_line(cluster: tuple[str, int], job: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, _ = job
    command = ["batch", "prompts.jsonl", "-o", "refused.jsonl", "-n", "24", *MODEL, "--ray"]
    code, err = run([*command, "--actors", "5"], folder, cluster[0])
    assert (code, err.count("\n")) == (2, 1), err
    assert "--actors 5 needs 2.5 CPUs, and the Ray cluster has 2 CPUs" in err
    code, err = run(["serve", *MODEL, "--replicas", "5", "--port", str(free_port())], folder, cluster[0])
    assert (code, err.count("\n")) == (2, 1), err
    assert "--replicas 5 needs 2.5 CPUs" in err
    code, err = run([*command, "--memory", "0.0001"], folder, cluster[0])  # found by the actors
    assert code == 2
    assert "Error: a text of" in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize(("version", "said"), [("", "lacks twotower; install it"), ("0.0.1", "has twotower 0.0.1")])
def test_nodes_without_this_package(
    tmp_path: Path, job: tuple[Path, list[dict[str, Any]]], version: str, said: str
) -> None:
    package = tmp_path / "twotower"
    package.mkdir()
    (package / "__init__.py").touch()
    if version:
        (package / "version.py").write_text(f"VERSION = {version!r}\n")
    command = ["batch", "prompts.jsonl", "-o", "refused.jsonl", "-n", "24", *MODEL, "--ray"]
    with head(tmp_path, PYTHONPATH=str(tmp_path)) as (address, _):
        code, err = run(command, job[0], address)
    assert (code, err.count("\n")) == (2, 1), err
    assert said in err


def test_the_example_reads_and_writes_parquet(cluster: tuple[str, int], tmp_path: Path) -> None:
    """With as many actors as CPUs, which must not hang."""
    make = "import pyarrow as a, pyarrow.parquet as p; p.write_table(a.table({0!r}), 'prompts.parquet')"
    rows = {"id": list(range(24)), "prompt": list(PROMPTS[:2]) * 12, "mode": ["ar", "verified", None] * 8}
    subprocess.run([str(PYTHON), "-c", make.format(rows)], cwd=tmp_path, check=True)
    places = [f"file://{tmp_path}/prompts.parquet", f"file://{tmp_path}/answers"]
    command = [str(PYTHON), str(ROOT / "examples" / "ray_batch.py"), *places, "--model", "bundled/small"]
    own = environment(RAY_ADDRESS=cluster[0])
    ended = subprocess.run([*command, "--actors", "2"], env=own, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    show = "import json, pyarrow.parquet as p; print(json.dumps(p.read_table('answers').to_pylist()))"
    shown = subprocess.run([str(PYTHON), "-c", show], cwd=tmp_path, check=True, capture_output=True, text=True)
    found = json.loads(shown.stdout)
    assert sorted(row["id"] for row in found) == list(range(24))
    assert {row["error"] for row in found} == {""}
    texts = {(row["prompt"], row["text"]) for row in found}
    assert len(texts) == 2  # AR and verified give one text


# --- Ray Serve -------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def replicas(cluster: str, folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    port = free_port()
    command = ["serve", *MODEL, "--replicas", "2", "--port", str(port), "--rows", "4", "--drain", "60"]
    child = start(command, folder, cluster)
    seen: list[str] = []
    assert child.stderr is not None
    reader = threading.Thread(target=lambda: seen.extend(iter(child.stderr.readline, "")), daemon=True)  # type: ignore[union-attr]
    reader.start()
    try:
        wait_for(lambda: any("2 replicas of 4 sequences" in line for line in seen), child)
        yield child, f"http://127.0.0.1:{port}"
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(SECONDS)
        reader.join(10)
        if child.returncode:
            print("".join(seen))


def complete(address: str, prompt: str, stream: bool) -> str:
    body = {"prompt": prompt, "max_tokens": 24, "temperature": 0, "stream": stream}
    reply = httpx.post(f"{address}/v1/completions", json=body, timeout=SECONDS)
    reply.raise_for_status()
    if not stream:
        return str(reply.json()["choices"][0]["text"])
    assert reply.text.rstrip().endswith("data: [DONE]"), "the stream was cut"
    events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    return "".join(choice["text"] for event in events for choice in event["choices"])


def test_replicas_of_which_one_is_killed(
    cluster: tuple[str, int], job: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """All requests are answered, because clients send a failed request again; metrics have both replicas."""
    greedy = {line["id"]: line["text"] for line in job[1] if line["id"] % len(MODES) < 2 and "text" in line}
    failed: Counter[str] = Counter()

    def ask(number: int) -> bool:
        i = sorted(greedy)[number % len(greedy)]
        prompt = PROMPTS[i % len(PROMPTS)].format(i)
        for attempt in range(20):
            try:
                return complete(address, prompt, stream=number % 2 == 1) == greedy[i]
            except (httpx.HTTPError, AssertionError) as error:
                code = getattr(getattr(error, "response", None), "status_code", "")
                failed[f"{type(error).__name__} {code} {'stream' if number % 2 else 'whole'}"] += 1
                time.sleep(0.2 * (attempt + 1))
        return False

    with replicas(cluster[0], tmp_path) as (child, address):
        reply = httpx.post(f"{address}/v1/completions", json={"prompt": PROMPTS[0], "max_tokens": 4}, timeout=SECONDS)
        assert len(reply.headers.get_list("x-request-id")) == 1
        assert httpx.post(f"{address}/v1/completions", json={"promt": ""}).json()["error"]["param"] == "prompt"
        before = workers("ray::ServeReplica:twotower:TwoTower", cluster[1])
        assert len(before) == 2
        with ThreadPoolExecutor(12) as threads:
            asked = [threads.submit(ask, number) for number in range(SERVED)]
            wait_for(lambda: sum(each.done() for each in asked) > SERVED // 4, child)
            os.kill(before[0], signal.SIGKILL)
            right = sum(each.result() for each in asked)
        print(f"\n{right} of {SERVED} answered with AR's text; failed and sent again: {dict(failed)}")
        assert right == SERVED
        now = wait_for(lambda: len(set(workers("ray::ServeReplica:twotower:TwoTower", cluster[1]))) == 2, child)
        assert now

        def labels() -> set[str]:
            text = httpx.get(f"{address}/metrics", timeout=SECONDS).text
            counts = [line for line in text.splitlines() if line.startswith("twotower_running_requests{")]
            return {line.partition('replica="')[2].partition('"')[0] for line in counts}

        wait_for(lambda: len(labels()) == 2, child)
        with httpx.stream(
            "POST", f"{address}/v1/completions", json={"prompt": "a", "max_tokens": 4000, "stream": True, "mode": "ar"}
        ) as stream:
            next(stream.iter_lines())  # and the client disconnects

        def running() -> float:
            text = httpx.get(f"{address}/metrics", timeout=SECONDS).text
            return sum(float(line.split()[-1]) for line in text.splitlines() if "twotower_running_requests{" in line)

        wait_for(lambda: running() == 0, child)
        with ThreadPoolExecutor(1) as threads:  # SIGTERM lets it finish
            last = threads.submit(complete, address, PROMPTS[1], True)
            wait_for(lambda: running() > 0 or last.done(), child)
            child.send_signal(signal.SIGTERM)
            assert last.result()
        assert child.wait(SECONDS) == 0


def test_serve_run(cluster: tuple[str, int], tmp_path: Path) -> None:
    """The application of `serve run`: a wrong argument is one line, and a good one is served."""
    command = [str(PYTHON), "-m", "ray.serve.scripts", "run", "--address", cluster[0], "twotower.ray:app"]
    options: dict[str, Any] = {"cwd": tmp_path, "env": environment(), "stdout": subprocess.PIPE, "text": True}
    for wrong, said in (("replicas=0", "replicas is 0"), ("rowz=3", "there is no option 'rowz'")):
        found = subprocess.run([*command, wrong], stderr=subprocess.PIPE, timeout=SECONDS, check=False, **options)
        assert found.returncode != 0
        assert said in found.stderr
        assert "Traceback" not in found.stderr
    child = subprocess.Popen([*command, "model=bundled/small", "setting=ar", "name=mine"], stderr=None, **options)
    try:

        def names() -> list[str]:
            try:
                found = httpx.get("http://127.0.0.1:8000/v1/models", timeout=30).json()
                return [model["id"] for model in found["data"]]
            except (httpx.HTTPError, ValueError, KeyError):
                return []

        assert wait_for(names, child) == ["mine"]
    finally:
        child.send_signal(signal.SIGINT)
        child.wait(SECONDS)


HEALTH = """
import asyncio
from types import SimpleNamespace
from twotower import LLM, AsyncLLM, bundled_model
from twotower.model_loading import load_model
from twotower.ray.replica import TwoTower
from twotower.server.service import Service
from twotower.server.settings import ServerSettings

engine = AsyncLLM(LLM(load_model(bundled_model("small")), rows=1, length=64))
replica = SimpleNamespace(service=Service(engine, ServerSettings(name="a")))
asyncio.run(TwoTower.check_health(replica))
engine.close()
try:
    asyncio.run(TwoTower.check_health(replica))
except RuntimeError as error:
    print(error)
"""


def test_the_health_check_is_that_of_the_engine() -> None:
    found = subprocess.run(
        [str(PYTHON), "-c", HEALTH], env=environment(), capture_output=True, text=True, check=False, timeout=SECONDS
    )
    assert found.stdout.strip() == "the engine is closed", found.stderr
