"""One client cannot harm others: limits, API keys, disconnects, hanging clients, invalid HTTP; shutdown."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import TIMEOUT, RunningServer, captured_log, events_of, expected_output, serving, texts_of, wait_until

from twotower import options
from twotower.errors import ArgumentError
from twotower.server.settings import Limits, read_keys

PATH = "/v1/completions"
LONG = {"prompt": "the quick", "mode": "ar", "max_tokens": 200, "seed": 1}


@pytest.fixture(scope="module")
def served() -> Iterator[RunningServer]:
    """A server with two rows and a queue of two."""
    with serving(rows=2, limits=Limits(queue=2)) as found:
        yield found


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "served" in request.fixturenames:
        wait_until(request.getfixturevalue("served").is_idle, "a request is still active")


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as found:
        yield found


def param_of(answer: httpx.Response, status: int) -> str | None:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]["param"]


def is_served(served: RunningServer) -> bool:
    return served.complete(seed=1, max_tokens=2).json()["choices"][0]["text"] == expected_output(
        "the quick", seed=1, max_tokens=2
    ).text  # fmt: skip


def request(body: bytes, *headers: str) -> bytes:
    lines = [f"POST {PATH} HTTP/1.1", "Host: here", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def whole(**fields: Any) -> bytes:
    body = json.dumps(LONG | fields).encode()
    return request(body, f"Content-Length: {len(body)}")


def read_all(connection: socket.socket) -> bytes:
    """Reads until the server closes the connection."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


# --- bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True])
def test_body_size_limit(served: RunningServer, chunked: bool) -> None:
    with served.limited(body_bytes=1000), served.client() as client:
        body = json.dumps(LONG | {"user": "x" * 1000}).encode()
        content = iter([body[:500], body[500:]]) if chunked else body
        answer = client.post(PATH, content=content, headers={"content-type": "application/json"})
        param_of(answer, 413)
        assert "1000 bytes" in answer.text
        exact = json.dumps(LONG | {"max_tokens": 1, "user": ""}).encode()
        exact = json.dumps(LONG | {"max_tokens": 1, "user": "x" * (1000 - len(exact))}).encode()
        assert len(exact) == 1000
        assert served.post(PATH, exact).status_code == 200


def test_an_endless_body_is_not_read(served: RunningServer) -> None:
    """Neither a body with a large content-length nor an endless chunked body."""
    with served.limited(body_bytes=1000, body_seconds=TIMEOUT):
        for headers in (f"Content-Length: {10**15}", "Transfer-Encoding: chunked"):
            with served.connect() as connection:
                connection.sendall(request(b"", headers))
                piece = b"10000\r\n" + b" " * 0x10000 + b"\r\n" if "chunked" in headers else b" " * 0x10000
                sent = 0
                try:
                    while sent < 2**26:
                        connection.sendall(piece)
                        sent += len(piece)
                except OSError:
                    pass
                assert sent < 2**26
    assert is_served(served)


@pytest.mark.parametrize("headers", ["Content-Length: 500", "Transfer-Encoding: chunked"])
def test_body_time_limit(served: RunningServer, headers: str) -> None:
    with served.limited(body_seconds=0.2), served.connect() as connection:
        connection.sendall(request(b'{"prompt"' if "Length" in headers else b'5\r\n{"pro\r\n', headers))
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in answer.lower()


# --- limits -----------------------------------------------------------------------------------------------------------


def test_token_limits(served: RunningServer) -> None:
    with served.limited(prompt_tokens=4, output_tokens=6):
        assert param_of(served.complete([5] * 5), 400) == "prompt"
        assert param_of(served.complete([5] * 4, max_tokens=7), 400) == "max_tokens"
        assert served.complete([5] * 4, max_tokens=6).status_code == 200
        assert "at most 6" in served.complete([5], max_tokens=7).text


def test_token_limits_of_a_chat(served: RunningServer) -> None:
    with served.limited(prompt_tokens=4, output_tokens=6):
        assert param_of(served.chat("the quick brown fox"), 400) == "messages"
    with served.limited(output_tokens=6):
        assert param_of(served.chat("x", max_completion_tokens=7), 400) == "max_completion_tokens"


def test_default_length_respects_the_limit(served: RunningServer) -> None:
    """A limit below 16, the default of max_tokens, shortens the text."""
    with served.limited(output_tokens=6):
        assert served.complete(seed=1, mode="ar").json()["usage"]["completion_tokens"] <= 6


def test_full_queue_has_retry_after(served: RunningServer, pool: ThreadPoolExecutor) -> None:
    with served.step_gate.closed():
        requests = [pool.submit(served.post, PATH, LONG | {"max_tokens": 2}) for _ in range(4)]  # fills rows and queue
        wait_until(lambda: served.service.active_choices == 4)
        for stream in (False, True):
            answer = served.complete(stream=stream)
            param_of(answer, 429)
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["type"] == "rate_limit_error"
        served.step_gate.wait_blocked()
        counts = served.counts()
        assert counts["twotower_running_requests",] + counts["twotower_queue_requests",] <= 4
    assert [found.result(TIMEOUT).status_code for found in requests] == [200] * 4
    assert is_served(served)
    answer = served.complete(n=5)
    assert param_of(answer, 400) == "n"  # never fits, so there is no retry-after
    assert "retry-after" not in answer.headers


def test_each_choice_counts(served: RunningServer, pool: ThreadPoolExecutor) -> None:
    with served.step_gate.closed():
        requests = pool.submit(served.post, PATH, LONG | {"max_tokens": 2, "n": 3})
        wait_until(lambda: served.service.active_choices == 3)
        assert served.complete(n=2).status_code == 429
        last = pool.submit(served.complete, max_tokens=1)
        wait_until(lambda: served.service.active_choices == 4)
    assert requests.result(TIMEOUT).status_code == last.result(TIMEOUT).status_code == 200


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keyed() -> Iterator[RunningServer]:
    with serving(rows=4, api_keys=("first", "zweiter-ß"), limits=Limits(queue=4, per_key=2)) as found:
        yield found


def key(text: str, kind: str = "Bearer") -> dict[str, Any]:
    return {"headers": {"authorization": f"{kind} {text}".encode()}}


def test_api_keys(keyed: RunningServer) -> None:
    wrongs = ["Bearer other", "Bearer", "Basic first", "Bearer firs", "Bearer first2", "Bearer first first", "first"]
    for wrong in [{}, *({"headers": {"authorization": text}} for text in (*wrongs, b"Bearer \xff\xfe"))]:
        for answer in (keyed.post(PATH, LONG, **wrong), keyed.get("/v1/models", **wrong), keyed.get("/v1/no", **wrong)):
            param_of(answer, 401)
            assert answer.headers["www-authenticate"] == "Bearer"
    for right in (key("first"), key("first", "bearer"), key("zweiter-ß")):
        assert keyed.post(PATH, LONG | {"max_tokens": 1}, **right).status_code == 200
        assert keyed.get("/v1/models", **right).status_code == 200
    for path in ("/health", "/ready", "/metrics", "/openapi.json"):
        assert keyed.get(path).status_code == 200


def test_a_missing_key_is_reported_before_the_body_is_read(keyed: RunningServer) -> None:
    with keyed.connect() as connection:
        connection.sendall(request(b"", "Content-Length: 1000"))
        assert connection.recv(1000).startswith(b"HTTP/1.1 401 ")


def test_limit_per_key(keyed: RunningServer, pool: ThreadPoolExecutor) -> None:
    with keyed.step_gate.closed():
        requests = [pool.submit(keyed.post, PATH, LONG | {"max_tokens": 2}, **key("first")) for _ in range(2)]
        wait_until(lambda: keyed.service.active_choices == 2)
        answer = keyed.post(PATH, LONG, **key("first"))
        param_of(answer, 429)
        assert int(answer.headers["retry-after"]) >= 1
        requests.append(pool.submit(keyed.post, PATH, LONG | {"max_tokens": 2, "n": 2}, **key("zweiter-ß")))
        wait_until(lambda: keyed.service.active_choices == 4)
    assert [found.result(TIMEOUT).status_code for found in requests] == [200] * 3
    assert param_of(keyed.post(PATH, LONG | {"n": 3}, **key("first")), 400) == "n"
    assert not keyed.service.active_choices


def test_read_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# whose\n\n  one \ntwo\none\n", encoding="utf-8")
    given = options.from_environment({"TWOTOWER_API_KEYS": " three, one,, "})
    with options.override(api_keys=given.api_keys):
        assert set(read_keys(file)) == {"one", "two", "three"}
        assert read_keys(None) == ("three", "one")
    assert read_keys(None) == ()
    file.write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(ArgumentError, match="has no key"):
        read_keys(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArgumentError, match="keys"):
        read_keys(file)


# --- time limits and disconnects --------------------------------------------------------------------------------------


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_request_time_limit(served: RunningServer, pool: ThreadPoolExecutor, stream: bool, running: bool) -> None:
    """The client of a running or waiting request gets 504, and the slot is free again."""
    with served.limited(request_seconds=0.3), served.step_gate.closed():
        n = 1 if running else 2
        other = pool.submit(served.post, PATH, LONG | {"n": 2}) if not running else None
        if other is not None:
            wait_until(lambda: served.service.active_choices == 2)
        answer = served.post(PATH, LONG | {"stream": stream, "n": n})
        if stream:
            assert answer.status_code == 200
            error = events_of(answer.text)[-1]["error"]
        else:
            param_of(answer, 504)
            error = answer.json()["error"]
        assert error["code"] == "timeout"
        if other is not None:
            assert other.result(TIMEOUT).status_code == 504
        wait_until(lambda: not served.service.active_choices)
    wait_until(served.is_idle)
    assert is_served(served)


@contextmanager
def asking(served: RunningServer, stream: bool, **fields: Any) -> Iterator[socket.socket]:
    with served.connect() as connection:
        connection.sendall(whole(stream=stream, **fields))
        yield connection


def leave(connection: socket.socket) -> None:
    connection.close()


def reset(connection: socket.socket) -> None:
    """Closes the connection with a TCP reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    connection.close()


def half_close(connection: socket.socket) -> None:
    """Closes the sending side. The server cannot distinguish this from a disconnect."""
    connection.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("go", [leave, reset, half_close])
@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_frees_the_slot_within_a_step(
    served: RunningServer, stream: bool, go: Callable[[socket.socket], None]
) -> None:
    with asking(served, stream) as connection, served.step_gate.closed():
        wait_until(lambda: served.service.active_choices == 1)
        served.step_gate.wait_blocked()
        served.step_gate.allow(3)
        served.step_gate.wait_blocked()
        assert len(served.llm.core.scheduler.running) == 1
        go(connection)
        wait_until(lambda: served.service.active_choices == 0, "the server has not seen the disconnect")
        before = served.step_gate.steps
        served.step_gate.allow(1)  # the step that was blocked
        wait_until(lambda: len(served.llm.core.scheduler.free) == 2, "the slot is not free")
        assert served.step_gate.steps == before + 1
        assert not served.llm.has_work


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_removes_a_waiting_request(served: RunningServer, stream: bool) -> None:
    with ExitStack() as stack:
        first = [stack.enter_context(asking(served, True)) for _ in range(2)]
        stack.enter_context(served.step_gate.closed())
        wait_until(lambda: served.service.active_choices == 2)
        waiting = stack.enter_context(asking(served, stream))
        wait_until(lambda: served.service.active_choices == 3)
        served.step_gate.wait_blocked()
        served.step_gate.allow(2)
        served.step_gate.wait_blocked()
        assert len(served.llm.core.scheduler.waiting) == 1
        waiting.close()
        wait_until(lambda: served.service.active_choices == 2)
        served.step_gate.allow(1)
        served.step_gate.wait_blocked()
        assert not served.llm.core.scheduler.waiting
        assert len(served.llm.core.scheduler.running) == 2
        for connection in first:
            connection.close()


def test_a_disconnect_is_logged(served: RunningServer) -> None:
    with captured_log() as lines, served.step_gate.closed():
        with asking(served, False):
            wait_until(lambda: served.service.active_choices == 1)
        wait_until(lambda: any(line.get("status") == 499 for line in lines))


# --- slow or invalid clients ------------------------------------------------------------------------------------------


def test_hanging_connections_do_not_block_others(served: RunningServer) -> None:
    """Fifty connections that send nothing, half a line, half the headers or half a body."""
    with ExitStack() as stack:
        for number in range(50):
            connection = stack.enter_context(served.connect())
            connection.sendall([b"", b"POST /v1/compl", request(b"")[:-2], whole()[:-9]][number % 4])
        assert is_served(served)
        events = events_of(served.complete(stream=True, seed=2, max_tokens=4).text)
        assert texts_of(events)[0] == expected_output("the quick", seed=2, max_tokens=4).text


def test_header_time_limit(served: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sending one byte now and then does not keep a connection open."""
    monkeypatch.setattr("twotower.server.http_timeouts.HEADER_SECONDS", 0.3)
    for begun in (b"", b"POST /v1/", request(b"")[:-2]):
        with served.connect() as connection:
            connection.sendall(begun)
            stop = threading.Event()

            def drip(connection: socket.socket = connection, stop: threading.Event = stop) -> None:
                while not stop.wait(0.05):
                    try:
                        connection.sendall(b"x")
                    except OSError:
                        return

            thread = threading.Thread(target=drip)
            thread.start()
            try:
                read_all(connection)  # returns, or the socket times out
            except ConnectionResetError:
                pass
            finally:
                stop.set()
                thread.join()


def test_write_time_limit(served: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that does not read its stream is disconnected after the time limit."""
    monkeypatch.setattr("twotower.server.http_timeouts.WRITE_SECONDS", 0.3)
    monkeypatch.setattr(
        "twotower.server.response_builder.sse_event", lambda body: b"data: " + body.ljust(2**20) + b"\n\n"
    )
    with asking(served, True):
        wait_until(lambda: served.service.active_choices == 1)
        wait_until(lambda: served.service.active_choices == 0, "the request is still active")


GARBAGE = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),  # a TLS hello
    b"\x00" * 5000,
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\nHost: a\r\n\r\n",
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda garbage: repr(garbage[:20]))
def test_garbage(served: RunningServer, garbage: bytes) -> None:
    with served.connect() as connection:
        try:
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
            answer = read_all(connection)
        except (ConnectionResetError, BrokenPipeError):
            answer = b""
    assert not answer or re.match(rb"HTTP/1\.1 4\d\d ", answer), answer
    assert is_served(served)


def test_pipelined_requests(served: RunningServer) -> None:
    """Requests that are sent before the first response get their responses in order."""
    bodies = [json.dumps(LONG | {"max_tokens": 3, "seed": seed}).encode() for seed in range(4)]
    lines = [request(body, f"Content-Length: {len(body)}") for body in bodies[:3]]
    lines.append(request(bodies[3], f"Content-Length: {len(bodies[3])}", "Connection: close"))
    with served.connect() as connection:
        connection.sendall(b"".join(lines))
        answer = read_all(connection)
    assert answer.count(b"HTTP/1.1 200 OK") == 4
    found = re.findall(rb'"text": ("(?:[^"\\]|\\.)*")', answer)
    assert [json.loads(text) for text in found] == [
        expected_output("the quick", mode="ar", max_tokens=3, seed=seed).text for seed in range(4)
    ]


# --- metrics and log --------------------------------------------------------------------------------------------------


def test_metrics() -> None:
    with serving(rows=2) as served:
        results = []
        for fields in ({"mode": "ar", "max_tokens": 7}, {"mode": "verified", "max_tokens": 5, "draft_steps": 1}):
            assert served.complete(seed=1, **fields).status_code == 200
            results.append(expected_output("the quick", seed=1, **fields))
        served.complete(seed=1, stream=True, n=2, max_tokens=3)
        results += [expected_output("the quick", seed=seed, max_tokens=3) for seed in (1, 2)]
        served.complete(5)
        served.get("/nothing")
        served.finish_requests()
        counts = served.counts()
    assert counts["twotower_requests_total", PATH, "200"] == 3
    assert counts["twotower_requests_total", PATH, "400"] == 1
    assert counts["twotower_requests_total", "other", "404"] == 1
    assert counts["twotower_tokens_total", "prompt"] == sum(result.prompt_tokens for result in results)
    assert counts["twotower_tokens_total", "completion"] == sum(len(result.tokens) for result in results)
    assert counts["twotower_passes_total", "denoiser"] == sum(result.denoiser_passes for result in results)
    assert counts["twotower_passes_total", "context"] == sum(result.context_passes for result in results)
    assert counts["twotower_choices_total", "ar", results[0].finish_reason] == 1
    assert sum(value for name, value in counts.items() if name[0] == "twotower_choices_total") == 4
    assert counts["twotower_drafted_tokens_total",] == sum(result.drafted for result in results)
    assert counts["twotower_accepted_tokens_total",] == sum(result.accepted for result in results)
    assert counts["twotower_time_to_first_block_seconds_count",] == 3
    assert counts["twotower_queue_requests",] == counts["twotower_running_requests",] == 0
    assert counts["twotower_state_bytes",] > 0


def test_unknown_paths_are_counted_together(served: RunningServer) -> None:
    """Clients cannot fill the server's memory with metric labels."""
    for number in range(3):
        served.get(f"/some/path/{number}")
    assert not any("/some" in part for name in served.counts() for part in name)


def test_prompts_are_logged_only_on_request() -> None:
    secret = "brown fox"
    for wanted in (False, True):
        with serving(rows=1, log_prompts=wanted) as served, captured_log() as lines:
            number = served.complete(secret, seed=1, max_tokens=4, user="u-1").headers["x-request-id"]
            served.post("/v1/chat/completions", {"messages": [{"role": "user", "content": secret}], "max_tokens": 1})
            served.complete([secret, 5])
            served.complete(secret, temperature=secret)
            served.post(PATH, json.dumps({"prompt": secret, secret: secret}).encode()[:-3])
            wait_until(lambda lines=lines: sum(line["event"] == "request" for line in lines) == 5)
        assert (secret in json.dumps(lines)) == wanted
        (line,) = [line for line in lines if line.get("id") == number]
        assert line["status"] == 200
        assert line["path"] == PATH
        assert line["prompt_tokens"] == expected_output(secret, seed=1, max_tokens=4).prompt_tokens
        assert line["max_tokens"] == 4
        assert line["user"] == "u-1"
        assert line.get("prompts") == ([secret] if wanted else None)


# --- the program ------------------------------------------------------------------------------------------------------


class Program:
    """`twotower serve` with the bundled model, in a process."""

    def __init__(self, *args: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from twotower.cli.main import main; main()", "serve", *args],
            stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.lines: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"http://\S+:\d+", line):
                self.address = found[0]
                break
        else:
            raise AssertionError("".join(self.lines))

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.address, timeout=TIMEOUT)

    def end(self) -> int:
        """Waits for the end of the process and returns its exit code."""
        _, rest = self.process.communicate(timeout=TIMEOUT)
        self.lines += rest.splitlines()
        return self.process.returncode


@pytest.fixture(scope="module")
def programs() -> Iterator[list[Program]]:
    """Two programs, started in parallel because imports take most of the time."""
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: Program("--port", "0", "--rows", "2", "--dtype", "float32"), range(2)))
    yield found
    for one in found:
        one.process.kill()
        one.process.communicate()


def streaming(client: httpx.Client, **fields: Any) -> Any:
    return client.stream("POST", PATH, json={"prompt": "The", "stream": True, "mode": "ar", "seed": 1, **fields})


def test_sigterm_lets_requests_finish(programs: list[Program]) -> None:
    server = programs[0]
    with server.client() as client:
        assert server.address.startswith("http://127.0.0.1:")
        assert client.get("/v1/models").json()["data"][0]["id"]
        with streaming(client, max_tokens=300, temperature=2) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: refuses(server.address))
            rest = [first, *lines]
        events = events_of("\n".join(rest))
        assert events[-1]["choices"][0]["finish_reason"] in ("stop", "length")
        assert server.end() == 0
        assert not any("Traceback" in line for line in server.lines)
        assert any('"event": "stopping"' in line for line in server.lines)


def refuses(address: str) -> bool:
    """Whether the server accepts no new requests."""
    try:
        return httpx.get(f"{address}/ready", timeout=TIMEOUT).status_code == 503
    except httpx.TransportError:
        return True


def test_second_sigterm_stops_at_once(programs: list[Program]) -> None:
    server = programs[1]
    with server.client() as client:
        with suppress(httpx.TransportError), streaming(client, max_tokens=4000, n=60, temperature=2) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: refuses(server.address))
            server.process.send_signal(signal.SIGTERM)
            for _ in lines:
                pass
        assert server.end() in (0, 1)
        assert not any("Fatal" in line or "terminate called" in line for line in server.lines)


def test_drain_time_limit() -> None:
    with serving(rows=1, drain=1) as served, served.client() as client:
        with pytest.raises(httpx.TransportError), streaming(client, n=8, max_tokens=400) as answer:  # noqa: PT012
            lines = answer.iter_lines()
            next(lines)
            served.server.handle_exit(signal.SIGTERM, None)
            for _ in lines:
                pass
        wait_until(lambda: served.service.active_choices == 0)


def test_startup_errors_are_one_line(cli: Callable[..., Any], tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.write_text("\n")
    binary.write_bytes(b"\xff\xfe")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for args, said in (
            (["--port", port], f"port {port}"),
            (["-s", "fast"], "fast"),
            (["-s", "diffusion:7"], "7"),
            (["--api-keys", str(empty)], "empty"),
            (["--api-keys", str(binary)], "binary"),
            (["--api-keys", str(tmp_path / "none")], "none"),
            (["--per-key", "2"], "--per-key"),
            (["--port", "99999"], "99999"),
            (["--host", "not a host"], "not a host"),
            (["--host", "203.0.113.1"], "203.0.113.1"),
            (["--timeout", "0"], "timeout"),
            (["--timeout", "nan"], "timeout"),
            (["--memory", "inf"], "memory"),
            (["-m", str(tmp_path)], str(tmp_path)),
        ):
            result = cli("serve", *(args if "--port" in args else ["--port", "0", *args]))
            assert result.code == 2, args
            assert "Traceback" not in result.err
            assert said in result.err
            assert result.err.count("\n") == 1, result.err


@pytest.mark.parametrize(
    ("host", "keys", "warns"),
    [("0.0.0.0", "", True), ("::", "", True), ("0.0.0.0", "secret", False), ("127.0.0.1", "", False),
     ("localhost", "", False)],
)  # fmt: skip
def test_warning_without_api_keys(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, host: str, keys: str, warns: bool
) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(
        "twotower.server.uvicorn_server.serve_until_signal", lambda service, *_: (ran.append(service), service.close())
    )
    with options.override(api_keys=(keys,) if keys else ()):
        result = cli("serve", "--port", "0", "--host", host, "--rows", "1", "--length", "64", "--dtype", "float32")
    assert result.code == 0, result.err
    assert ("Warning" in result.err) == warns
    assert ran[0].settings.api_keys == ((keys,) if keys else ())
