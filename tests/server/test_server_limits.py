"""What one client can do to the others: nothing. Bounds, keys, clients that leave, hang or talk nonsense; the end."""

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
from serving import PATIENCE, Served, events_of, logged, serving, texts_of, until, written

from twotower import options
from twotower.errors import ArgumentError
from twotower.server.settings import Limits, read_keys

PATH = "/v1/completions"
LONG = {"prompt": "the quick", "mode": "ar", "max_tokens": 200, "seed": 1}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """Two rows, and two more may wait."""
    with serving(rows=2, limits=Limits(queue=2)) as found:
        yield found


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "served" in request.fixturenames:
        until(request.getfixturevalue("served").is_idle, "a place is still held")


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as found:
        yield found


def param_of(answer: httpx.Response, status: int) -> str | None:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]["param"]


def is_served(served: Served) -> bool:
    return served.complete(seed=1, max_tokens=2).json()["choices"][0]["text"] == written(
        "the quick", seed=1, max_tokens=2
    ).text  # fmt: skip


def request(body: bytes, *headers: str) -> bytes:
    lines = [f"POST {PATH} HTTP/1.1", "Host: here", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def whole(**fields: Any) -> bytes:
    body = json.dumps(LONG | fields).encode()
    return request(body, f"Content-Length: {len(body)}")


def read_all(connection: socket.socket) -> bytes:
    """Until the server closes it."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


# --- bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_may_be_too_long(served: Served, chunked: bool) -> None:
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


def test_a_body_that_says_it_is_endless_is_not_read(served: Served) -> None:
    """Neither one that announces more than anybody may send, nor one that goes on and on."""
    with served.limited(body_bytes=1000, body_seconds=PATIENCE):
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
def test_a_body_has_to_arrive(served: Served, headers: str) -> None:
    with served.limited(body_seconds=0.2), served.connect() as connection:
        connection.sendall(request(b'{"prompt"' if "Length" in headers else b'5\r\n{"pro\r\n', headers))
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in answer.lower()


# --- how much ---------------------------------------------------------------------------------------------------------


def test_caps(served: Served) -> None:
    with served.limited(prompt_tokens=4, output_tokens=6):
        assert param_of(served.complete([5] * 5), 400) == "prompt"
        assert param_of(served.complete([5] * 4, max_tokens=7), 400) == "max_tokens"
        assert served.complete([5] * 4, max_tokens=6).status_code == 200
        assert "at most 6" in served.complete([5], max_tokens=7).text


def test_caps_name_the_fields_of_a_chat(served: Served) -> None:
    with served.limited(prompt_tokens=4, output_tokens=6):
        assert param_of(served.chat("the quick brown fox"), 400) == "messages"
    with served.limited(output_tokens=6):
        assert param_of(served.chat("x", max_completion_tokens=7), 400) == "max_completion_tokens"


def test_a_usual_length_is_within_the_cap(served: Served) -> None:
    """max_tokens is 16 where nobody says; a server that writes less at most writes that."""
    with served.limited(output_tokens=6):
        assert served.complete(seed=1, mode="ar").json()["usage"]["completion_tokens"] <= 6


def test_a_full_queue_says_when_to_come_again(served: Served, pool: ThreadPoolExecutor) -> None:
    with served.valve.closed():
        asked = [pool.submit(served.post, PATH, LONG | {"max_tokens": 2}) for _ in range(4)]  # all the places
        until(lambda: served.service.active_choices == 4)
        for stream in (False, True):
            answer = served.complete(stream=stream)
            param_of(answer, 429)
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["type"] == "rate_limit_error"
        served.valve.wait_blocked()
        counts = served.counts()
        assert counts["twotower_running_requests",] + counts["twotower_queue_requests",] <= 4
    assert [found.result(PATIENCE).status_code for found in asked] == [200] * 4
    assert is_served(served)
    answer = served.complete(n=5)
    assert param_of(answer, 400) == "n"  # it will never fit: coming again would not help
    assert "retry-after" not in answer.headers


def test_choices_take_a_place_each(served: Served, pool: ThreadPoolExecutor) -> None:
    with served.valve.closed():
        asked = pool.submit(served.post, PATH, LONG | {"max_tokens": 2, "n": 3})
        until(lambda: served.service.active_choices == 3)
        assert served.complete(n=2).status_code == 429
        last = pool.submit(served.complete, max_tokens=1)
        until(lambda: served.service.active_choices == 4)
    assert asked.result(PATIENCE).status_code == last.result(PATIENCE).status_code == 200


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keyed() -> Iterator[Served]:
    with serving(rows=4, api_keys=("first", "zweiter-ß"), limits=Limits(queue=4, per_key=2)) as found:
        yield found


def key(text: str, kind: str = "Bearer") -> dict[str, Any]:
    return {"headers": {"authorization": f"{kind} {text}".encode()}}


def test_keys(keyed: Served) -> None:
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


def test_who_has_no_key_is_told_before_the_body_is_read(keyed: Served) -> None:
    with keyed.connect() as connection:
        connection.sendall(request(b"", "Content-Length: 1000"))
        assert connection.recv(1000).startswith(b"HTTP/1.1 401 ")


def test_a_key_has_a_bound_of_its_own(keyed: Served, pool: ThreadPoolExecutor) -> None:
    with keyed.valve.closed():
        asked = [pool.submit(keyed.post, PATH, LONG | {"max_tokens": 2}, **key("first")) for _ in range(2)]
        until(lambda: keyed.service.active_choices == 2)
        answer = keyed.post(PATH, LONG, **key("first"))
        param_of(answer, 429)
        assert int(answer.headers["retry-after"]) >= 1
        asked.append(pool.submit(keyed.post, PATH, LONG | {"max_tokens": 2, "n": 2}, **key("zweiter-ß")))
        until(lambda: keyed.service.active_choices == 4)
    assert [found.result(PATIENCE).status_code for found in asked] == [200] * 3
    assert param_of(keyed.post(PATH, LONG | {"n": 3}, **key("first")), 400) == "n"
    assert not keyed.service.active_choices


def test_keys_are_read_from_a_file_and_the_environment(tmp_path: Path) -> None:
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


# --- time, and clients that leave -------------------------------------------------------------------------------------


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_may_take_too_long(served: Served, pool: ThreadPoolExecutor, stream: bool, running: bool) -> None:
    """At work or still waiting: its client is told, and its place is free again."""
    with served.limited(request_seconds=0.3), served.valve.closed():
        n = 1 if running else 2
        other = pool.submit(served.post, PATH, LONG | {"n": 2}) if not running else None
        if other is not None:
            until(lambda: served.service.active_choices == 2)
        answer = served.post(PATH, LONG | {"stream": stream, "n": n})
        if stream:
            assert answer.status_code == 200
            error = events_of(answer.text)[-1]["error"]
        else:
            param_of(answer, 504)
            error = answer.json()["error"]
        assert error["code"] == "timeout"
        if other is not None:
            assert other.result(PATIENCE).status_code == 504
        until(lambda: not served.service.active_choices)
    until(served.is_idle)
    assert is_served(served)


@contextmanager
def asking(served: Served, stream: bool, **fields: Any) -> Iterator[socket.socket]:
    with served.connect() as connection:
        connection.sendall(whole(stream=stream, **fields))
        yield connection


def leave(connection: socket.socket) -> None:
    connection.close()


def reset(connection: socket.socket) -> None:
    """Without a goodbye."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    connection.close()


def half_close(connection: socket.socket) -> None:
    """It says no more; this server takes that for leaving, as it cannot tell the two apart."""
    connection.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("go", [leave, reset, half_close])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot_within_a_step(
    served: Served, stream: bool, go: Callable[[socket.socket], None]
) -> None:
    with asking(served, stream) as connection, served.valve.closed():
        until(lambda: served.service.active_choices == 1)
        served.valve.wait_blocked()
        served.valve.allow(3)
        served.valve.wait_blocked()
        assert len(served.llm.core.scheduler.running) == 1
        go(connection)
        until(lambda: served.service.active_choices == 0, "the server does not see it")
        before = served.valve.passed
        served.valve.allow(1)  # the step that was about to begin
        until(lambda: len(served.llm.core.scheduler.free) == 2, "its slot is held")
        assert served.valve.passed == before + 1
        assert not served.llm.has_work


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue_never_runs(served: Served, stream: bool) -> None:
    with ExitStack() as stack:
        first = [stack.enter_context(asking(served, True)) for _ in range(2)]
        stack.enter_context(served.valve.closed())
        until(lambda: served.service.active_choices == 2)
        waiting = stack.enter_context(asking(served, stream))
        until(lambda: served.service.active_choices == 3)
        served.valve.wait_blocked()
        served.valve.allow(2)
        served.valve.wait_blocked()
        assert len(served.llm.core.scheduler.waiting) == 1
        waiting.close()
        until(lambda: served.service.active_choices == 2)
        served.valve.allow(1)
        served.valve.wait_blocked()
        assert not served.llm.core.scheduler.waiting
        assert len(served.llm.core.scheduler.running) == 2
        for connection in first:
            connection.close()


def test_the_log_says_who_left(served: Served) -> None:
    with logged() as lines, served.valve.closed():
        with asking(served, False):
            until(lambda: served.service.active_choices == 1)
        until(lambda: any(line.get("status") == 499 for line in lines))


# --- clients that do harm ---------------------------------------------------------------------------------------------


def test_hanging_connections_are_in_nobody_s_way(served: Served) -> None:
    """Fifty that say nothing, half a line, half the headers or half a body."""
    with ExitStack() as stack:
        for number in range(50):
            connection = stack.enter_context(served.connect())
            connection.sendall([b"", b"POST /v1/compl", request(b"")[:-2], whole()[:-9]][number % 4])
        assert is_served(served)
        events = events_of(served.complete(stream=True, seed=2, max_tokens=4).text)
        assert texts_of(events)[0] == written("the quick", seed=2, max_tokens=4).text


def test_headers_have_to_arrive(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A letter now and then does not keep a connection."""
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
                read_all(connection)  # ends, or the socket's own patience does
            except ConnectionResetError:
                pass
            finally:
                stop.set()
                thread.join()


def test_a_client_that_does_not_read_frees_its_place(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stream fills the buffers between it and the server, and then waits for it: not for ever."""
    monkeypatch.setattr("twotower.server.http_timeouts.WRITE_SECONDS", 0.3)
    monkeypatch.setattr("twotower.server.streaming._sse_event", lambda body: b"data: " + body.ljust(2**20) + b"\n\n")
    with asking(served, True):
        until(lambda: served.service.active_choices == 1)
        until(lambda: served.service.active_choices == 0, "it holds its place")


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
def test_garbage(served: Served, garbage: bytes) -> None:
    with served.connect() as connection:
        try:
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
            answer = read_all(connection)
        except (ConnectionResetError, BrokenPipeError):
            answer = b""
    assert not answer or re.match(rb"HTTP/1\.1 4\d\d ", answer), answer
    assert is_served(served)


def test_requests_may_follow_each_other_on_a_connection(served: Served) -> None:
    """Sent before the first is answered, they are answered in their order."""
    bodies = [json.dumps(LONG | {"max_tokens": 3, "seed": seed}).encode() for seed in range(4)]
    lines = [request(body, f"Content-Length: {len(body)}") for body in bodies[:3]]
    lines.append(request(bodies[3], f"Content-Length: {len(bodies[3])}", "Connection: close"))
    with served.connect() as connection:
        connection.sendall(b"".join(lines))
        answer = read_all(connection)
    assert answer.count(b"HTTP/1.1 200 OK") == 4
    found = re.findall(rb'"text": ("(?:[^"\\]|\\.)*")', answer)
    assert [json.loads(text) for text in found] == [
        written("the quick", mode="ar", max_tokens=3, seed=seed).text for seed in range(4)
    ]


# --- what it tells ----------------------------------------------------------------------------------------------------


def test_metrics_count_what_was_asked() -> None:
    with serving(rows=2) as served:
        results = []
        for fields in ({"mode": "ar", "max_tokens": 7}, {"mode": "verified", "max_tokens": 5, "draft_steps": 1}):
            assert served.complete(seed=1, **fields).status_code == 200
            results.append(written("the quick", seed=1, **fields))
        served.complete(seed=1, stream=True, n=2, max_tokens=3)
        results += [written("the quick", seed=seed, max_tokens=3) for seed in (1, 2)]
        served.complete(5)
        served.get("/nothing")
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


def test_unknown_paths_are_counted_together(served: Served) -> None:
    """Nobody can fill the server's memory with names of counts."""
    for number in range(3):
        served.get(f"/some/path/{number}")
    assert not any("/some" in part for name in served.counts() for part in name)


def test_logs_hold_no_texts_unless_asked() -> None:
    secret = "brown fox"
    for wanted in (False, True):
        with serving(rows=1, log_prompts=wanted) as served, logged() as lines:
            number = served.complete(secret, seed=1, max_tokens=4, user="u-1").headers["x-request-id"]
            served.post("/v1/chat/completions", {"messages": [{"role": "user", "content": secret}], "max_tokens": 1})
            served.complete([secret, 5])
            served.complete(secret, temperature=secret)
            served.post(PATH, json.dumps({"prompt": secret, secret: secret}).encode()[:-3])
            until(lambda lines=lines: sum(line["event"] == "request" for line in lines) == 5)
        assert (secret in json.dumps(lines)) == wanted
        (line,) = [line for line in lines if line.get("id") == number]
        assert line["status"] == 200
        assert line["path"] == PATH
        assert line["prompt_tokens"] == written(secret, seed=1, max_tokens=4).prompt_tokens
        assert line["max_tokens"] == 4
        assert line["user"] == "u-1"
        assert line.get("prompts") == ([secret] if wanted else None)


# --- the program ------------------------------------------------------------------------------------------------------


class Program:
    """`twotower serve` in a process of its own, on the bundled model."""

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
        return httpx.Client(base_url=self.address, timeout=PATIENCE)

    def end(self) -> int:
        """Waits for its end → its exit code."""
        _, rest = self.process.communicate(timeout=PATIENCE)
        self.lines += rest.splitlines()
        return self.process.returncode


@pytest.fixture(scope="module")
def programs() -> Iterator[list[Program]]:
    """Two, started at once: most of a start is waiting for imports."""
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: Program("--port", "0", "--rows", "2", "--dtype", "float32"), range(2)))
    yield found
    for one in found:
        one.process.kill()
        one.process.communicate()


def streaming(client: httpx.Client, **fields: Any) -> Any:
    return client.stream("POST", PATH, json={"prompt": "The", "stream": True, "mode": "ar", "seed": 1, **fields})


def test_sigterm_lets_requests_end(programs: list[Program]) -> None:
    server = programs[0]
    with server.client() as client:
        assert server.address.startswith("http://127.0.0.1:")
        assert client.get("/v1/models").json()["data"][0]["id"]
        with streaming(client, max_tokens=300, temperature=2) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: refuses(server.address))
            rest = [first, *lines]
        events = events_of("\n".join(rest))
        assert events[-1]["choices"][0]["finish_reason"] in ("stop", "length")
        assert server.end() == 0
        assert not any("Traceback" in line for line in server.lines)
        assert any('"event": "stopping"' in line for line in server.lines)


def refuses(address: str) -> bool:
    """No new connection is taken."""
    try:
        return httpx.get(f"{address}/ready", timeout=PATIENCE).status_code == 503
    except httpx.TransportError:
        return True


def test_sigterm_twice_stops_now(programs: list[Program]) -> None:
    server = programs[1]
    with server.client() as client:
        with suppress(httpx.TransportError), streaming(client, max_tokens=4000, n=60, temperature=2) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: refuses(server.address))
            server.process.send_signal(signal.SIGTERM)
            for _ in lines:
                pass
        assert server.end() in (0, 1)
        assert not any("Fatal" in line or "terminate called" in line for line in server.lines)


def test_draining_has_an_end() -> None:
    with serving(rows=1, drain=1) as served, served.client() as client:
        with pytest.raises(httpx.TransportError), streaming(client, n=8, max_tokens=400) as answer:  # noqa: PT012
            lines = answer.iter_lines()
            next(lines)
            served.server.handle_exit(signal.SIGTERM, None)
            for _ in lines:
                pass
        until(lambda: served.service.active_choices == 0)


def test_wrong_starts_are_told_in_a_line(cli: Callable[..., Any], tmp_path: Path) -> None:
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
def test_open_doors_are_warned_of(
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
