"""Runs the real server in a thread, on a tiny model, for tests over sockets."""

from __future__ import annotations

import functools
import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import torch
from conftest import build_random_model
from test_stopping import TOKENIZER, VOCABULARY

from twotower import LLM, AsyncLLM, Generation, GenerationParams, TwoTowerForCausalLM, generate
from twotower.server.logs import LOGGER
from twotower.server.service import Service
from twotower.server.settings import Limits, ServerSettings
from twotower.server.uvicorn_server import DrainingServer, create_server

NAME = "tiny"
EOS = 2
LENGTH = 512
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # a client that loads the system's certificates takes long to create
LOW_THRESHOLD = 0.02  # with this threshold, a block of the tiny model takes a few passes
TIMEOUT = 20.0  # seconds
# Modes with arguments for which the text does not depend on time measurements.
MODES: dict[str, dict[str, Any]] = {
    "diffusion": {"mode": "diffusion", "block_size": 8, "threshold": LOW_THRESHOLD},
    "ar": {"mode": "ar"},
    "verified": {"mode": "verified", "block_size": 8, "draft_steps": 2, "threshold": LOW_THRESHOLD},
    "mock_ar": {"mode": "mock_ar"},
}
DECODING = {"mode": "diffusion", "confidence_threshold": LOW_THRESHOLD}  # the server's defaults
# Field of a request → parameter of the Python API with another name.
PARAMETER_NAMES = {"max_tokens": "max_new_tokens", "threshold": "confidence_threshold", "steps": "steps_per_block"}


@functools.cache
def tiny_model() -> TwoTowerForCausalLM:
    """A random model in float64, so that a batch gives the same texts. They have incomplete characters."""
    model = build_random_model("M*-", seed=11, dtype=torch.float64, vocab_size=VOCABULARY, eos_token_id=EOS)
    model.tokenizer = TOKENIZER
    return model


def expected_output(prompt: str | list[int], **fields: Any) -> Generation:
    """The output of the Python API for a request with these fields."""
    values = {"temperature": 1.0, "max_new_tokens": 16} | (DECODING if "mode" not in fields else {})
    values |= {PARAMETER_NAMES.get(name, name): value for name, value in fields.items()}
    return _expected_output(
        prompt if isinstance(prompt, str) else tuple(prompt), GenerationParams.of(**values, eos_token_id=EOS)
    )


@functools.cache
def _expected_output(prompt: str | tuple[int, ...], params: GenerationParams) -> Generation:
    (output,) = generate(tiny_model(), [prompt], params)
    return output


class StepGate:
    """Counts the steps of an engine. While closed, it blocks all steps that are not allowed."""

    def __init__(self, llm: LLM) -> None:
        self._step, self._allowed, self._change = llm.step, None, threading.Condition()
        self.steps = 0
        self.blocked = False  # a step is waiting
        llm.step = self.step  # type: ignore[method-assign]

    def step(self, seconds: float = 0.0) -> Any:
        """One pass of each tower, whatever time is allowed, so that steps can be counted."""
        with self._change:
            self.blocked = True
            self._change.notify_all()
            self._change.wait_for(lambda: self._allowed is None or self._allowed > 0)
            self.blocked = False
            self.steps += 1
            if self._allowed is not None:
                self._allowed -= 1
        return self._step()

    def wait_blocked(self) -> None:
        """Waits until a step is blocked."""
        with self._change:
            assert self._change.wait_for(lambda: self.blocked and not self._allowed, TIMEOUT)

    def allow(self, steps: int | None) -> None:
        """Allows this number of further steps; None: all."""
        with self._change:
            self._allowed = steps
            self._change.notify_all()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Blocks all steps except those of `allow`."""
        self.allow(0)
        try:
            yield
        finally:
            self.allow(None)


class RunningServer:
    """A running server and its client functions."""

    def __init__(self, server: DrainingServer, service: Service, address: str) -> None:
        self.server, self.service, self.address = server, service, address
        self.llm = service.engine.llm
        self.step_gate = StepGate(self.llm)
        self.port = int(address.rsplit(":", 1)[1])

    def client(self, **arguments: Any) -> httpx.Client:
        return httpx.Client(base_url=self.address, timeout=TIMEOUT, verify=NO_TLS, **arguments)

    def post(self, path: str, body: Any = None, **arguments: Any) -> httpx.Response:
        """Posts `body` as JSON; bytes are sent unchanged."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json"} | arguments.pop("headers", {})
        with self.client() as client:
            return client.post(path, content=content, headers=headers, **arguments)

    def complete(self, prompt: Any = "the quick", **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": prompt, **fields})

    def chat(self, text: str = "the quick", **fields: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **fields})

    def get(self, path: str, **arguments: Any) -> httpx.Response:
        with self.client() as client:
            return client.get(path, **arguments)

    def counts(self) -> dict[tuple[str, ...], float]:
        """`/metrics` → (name, label values…) → number."""
        from prometheus_client.parser import text_string_to_metric_families as parse

        text = self.get("/metrics").text
        return {
            (one.name, *(one.labels[label] for label in sorted(one.labels) if label != "model_name")): one.value
            for family in parse(text)
            for one in family.samples
        }

    def finish_requests(self) -> None:
        """Waits until the server has counted and logged all requests: a client has its answer before that."""
        wait_until(lambda: not self.server.server_state.tasks, "a request does not end")

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), TIMEOUT)

    @contextmanager
    def limited(self, **limits: Any) -> Iterator[None]:
        """Changes limits while the context is open."""
        with self.set(limits=replace(self.service.settings.limits, **limits)):
            yield

    @contextmanager
    def set(self, **settings: Any) -> Iterator[None]:
        """Changes settings while the context is open."""
        before = self.service.settings
        self.service.settings = replace(before, **settings)
        try:
            yield
        finally:
            self.service.settings = before

    def is_idle(self) -> bool:
        """Whether the server and the engine have no request."""
        llm = self.llm
        return (
            not (self.service.active_choices or llm.core.scheduler.running or llm.core.scheduler.waiting)
            and len(llm.core.scheduler.free) == llm.core.state.rows
        )


RUNNING: list[RunningServer] = []


@contextmanager
def serving(
    rows: int = 4,
    drain: int = 5,
    model: TwoTowerForCausalLM | None = None,
    service: Service | None = None,
    **settings: Any,
) -> Iterator[RunningServer]:
    """Runs a server on a free port. model: default the tiny model; service: default a new one with `settings`."""
    settings = {"name": NAME, "decoding": DECODING, "limits": Limits(queue=64)} | settings
    if service is None:
        service = Service(AsyncLLM(LLM(model or tiny_model(), rows=rows, length=LENGTH)), ServerSettings(**settings))
    found: list[str] = []
    listens = threading.Event()

    def listening(address: str) -> None:
        found.append(address)
        listens.set()

    server = create_server(service, "127.0.0.1", 0, drain, listening)
    thread = threading.Thread(target=server.run, name="server", daemon=True)
    thread.start()
    assert listens.wait(TIMEOUT)
    served = RunningServer(server, service, found[0])
    RUNNING.append(served)
    try:
        yield served
    finally:
        RUNNING.remove(served)
        served.step_gate.allow(None)
        server.should_exit = True
        thread.join(TIMEOUT)
        assert not thread.is_alive()


def wait_until(condition: Callable[[], object], what: str = "") -> None:
    """Waits until a condition that another thread changes is true."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, what or "timeout"
        time.sleep(0.002)


def events_of(text: str) -> list[dict[str, Any]]:
    """The chunks of a complete stream, which must end with [DONE]."""
    lines = [line.strip() for line in text.split("\n\n") if line.strip()]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1] if not line.startswith(":")]


def texts_of(events: list[dict[str, Any]]) -> dict[int, str]:
    """The text of each choice of a stream."""
    out: dict[int, str] = {}
    for event in events:
        for choice in event["choices"]:
            piece = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            out[choice["index"]] = out.get(choice["index"], "") + piece
    return out


@contextmanager
def captured_log() -> Iterator[list[dict[str, Any]]]:
    """The log lines of the servers while the context is open, without those of requests before it."""
    for served in RUNNING:
        served.finish_requests()
    lines: list[dict[str, Any]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(record.getMessage()))

    handler, level = Keep(), LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
