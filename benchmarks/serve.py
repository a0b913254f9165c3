"""What does a server cost compared with its engine, and how long do clients wait?

    python benchmarks/serve.py [--at-once 1,4,16,64] [--modes ar,diffusion,verified] [--requests 192] [--dtype float64]

One `twotower serve` of bundled/small answers on the loopback interface; the clients are tasks of this process. For
every number of clients, the same requests are sent in each mode. Every tenth client disconnects after a random number
of chunks. In turn with the server, an engine in this process generates the same texts with as many rows. The ratio is
the cost of HTTP, JSON and two processes, with the clients. Every complete answer is compared with the engine's. Times
of a request are from its connection to its first chunk with text (first block) and to its end.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import click
from common.models import DECODING
from common.program import JSON, QUICK, names, numbers, publish, start
from common.timing import percentile
from rich.table import Table

from twotower import LLM, Generation, GenerationParams, Request, model_loading
from twotower.evaluation.machine import machine_facts
from twotower.evaluation.workloads import few_shot_prompts

CONTEXT = 128  # tokens of a prompt
LEAVING = 0.1  # share of the clients that disconnect, after a random number of chunks
PATIENCE = 120.0  # timeout in seconds for one answer


@dataclass
class Load:
    """Figures of one number of clients in one mode."""

    seconds: float = 0.0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)
    whole: int = 0
    left: int = 0
    differ: int = 0


class Server:
    """A `twotower serve` on a free port of the loopback interface."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "twotower", "serve", "--model", "bundled/small", "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                break
        else:
            raise click.ClickException("the server did not start")
        self.silent = asyncio.get_running_loop().run_in_executor(None, self._drain)

    def _drain(self) -> None:
        assert self.process.stderr is not None
        for _ in self.process.stderr:
            pass

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=PATIENCE) as answer:
            text = answer.read().decode()
        found = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.M)
        return float(found[1]) if found else float("nan")

    async def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(self.process.wait, PATIENCE)
        await self.silent


async def ask(port: int, fields: dict[str, Any], leave_after: int | None) -> tuple[str, float, float, int] | None:
    """Requests one streamed answer: text, seconds to the first and last chunk, tokens; None: disconnected early."""
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        body = json.dumps({**fields, "stream": True, "stream_options": {"include_usage": True}}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        )
        writer.write(f"{head}\r\nconnection: close\r\n\r\n".encode() + body)
        text, first, chunks, tokens = "", 0.0, 0, 0
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise click.ClickException(event["error"]["message"])
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
            for choice in event["choices"]:
                text += choice["text"]
                first = first or time.perf_counter() - started
                chunks += 1
            if leave_after is not None and chunks >= leave_after:
                return None
        return text, first, time.perf_counter() - started, tokens
    finally:
        writer.close()


async def load(server: Server, requests: list[dict[str, Any]], expected: list[str], clients: int, seed: int) -> Load:
    """Sends all requests, with `clients` of them at any time."""
    rng = random.Random(seed)
    leave = [rng.randint(1, 8) if rng.random() < LEAVING else None for _ in requests]
    out, following = Load(), iter(range(len(requests)))

    async def client() -> None:
        for place in following:
            answer = await asyncio.wait_for(ask(server.port, requests[place], leave[place]), PATIENCE)
            if answer is None:
                out.left += 1
                continue
            text, first, last, tokens = answer
            out.whole += 1
            out.tokens += tokens
            out.first.append(first)
            out.last.append(last)
            out.differ += text != expected[place]

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    out.seconds = time.perf_counter() - started
    return out


def offline(model: Any, requests: list[Request], rows: int) -> tuple[list[Generation], float]:
    """The engine's answers with as many rows, and its seconds."""
    llm = LLM.fitting(model, requests, rows)
    started = time.perf_counter()
    return llm.generate(requests), time.perf_counter() - started


async def measure(
    at_once: Sequence[int], modes: Sequence[str], count: int, new: int, dtype: str, rounds: int
) -> dict[str, Any]:
    model = model_loading.load_model(model_loading.source_of("bundled/small"), dtype=dtype)
    tokens = few_shot_prompts(model, count, CONTEXT)
    shared = {"eos_token_id": model_loading.eos_of(model), "mask_token_id": model.config.mask_token, "temperature": 0.0}
    server = Server("--dtype", dtype, "--rows", str(max(at_once)), "--length", "2048", "--queue", str(2 * count))
    measured: list[dict[str, Any]] = []
    try:
        for mode in modes:
            fields = {name.removeprefix("confidence_"): value for name, value in DECODING[mode].items()}
            asked = [{"prompt": prompt, "max_tokens": new, "temperature": 0, **fields} for prompt in tokens]
            params = GenerationParams.of(max_new_tokens=new, **(shared | DECODING[mode]))
            requests = [Request(prompt, params) for prompt in tokens]
            expected = [result.text for result in offline(model, requests, 1)[0]]
            for clients in at_once:
                few = slice(0, max(count // 8, 4 * clients) if clients < 8 else count)
                loads, rates = [], []
                for round_ in range(rounds):
                    results, seconds = offline(model, requests[few], clients)
                    rates.append(sum(len(result.tokens) for result in results) / seconds)
                    loads.append(await load(server, asked[few], expected[few], clients, round_))
                served = [run.tokens / run.seconds for run in loads]
                firsts, lasts = ([t for run in loads for t in getattr(run, name)] for name in ("first", "last"))
                measured.append({
                    "mode": mode, "clients": clients, "answers": sum(run.whole for run in loads),
                    "left": sum(run.left for run in loads), "differ": sum(run.differ for run in loads),
                    "tokens_per_second": statistics.median(served),
                    "engine_tokens_per_second": statistics.median(rates),
                    "of_engine": statistics.median(a / b for a, b in zip(served, rates, strict=True)),
                    "first_p50": percentile(firsts, 0.5), "first_p95": percentile(firsts, 0.95),
                    "last_p50": percentile(lasts, 0.5), "last_p95": percentile(lasts, 0.95),
                    "memory": server.metric("process_resident_memory_bytes"),
                })  # fmt: skip
        busy = server.metric("twotower_running_requests") + server.metric("twotower_queue_requests")
    finally:
        await server.stop()
    return {
        "machine": machine_facts(model), "dtype": dtype, "measured": measured, "busy_at_the_end": busy,
        "exit_code": server.process.returncode,
    }  # fmt: skip


def table(facts: dict[str, Any]) -> Table:
    out = Table(title=f"twotower serve, bundled/small, {facts['dtype']}: streaming clients, one in ten leaves early")
    columns = "clients", "answers", "differ", "tokens/s", "÷ engine", "first block p50 / p95 ms", "end p50 / p95 ms"
    for name in ("mode", *columns, "server, MiB"):
        out.add_column(name, justify="left" if name == "mode" else "right")
    for row in facts["measured"]:
        out.add_row(
            row["mode"], str(row["clients"]), f"{row['answers']} (+{row['left']} left)", str(row["differ"]),
            f"{row['tokens_per_second']:,.0f}", f"{row['of_engine']:.2f}",
            f"{1e3 * row['first_p50']:,.0f} / {1e3 * row['first_p95']:,.0f}",
            f"{1e3 * row['last_p50']:,.0f} / {1e3 * row['last_p95']:,.0f}", f"{row['memory'] / 2**20:,.0f}",
        )  # fmt: skip
    return out


@click.command()
@click.option("--at-once", callback=numbers, default="1,4,16,64", show_default=True, help="Numbers of clients.")
@click.option("--modes", default=",".join(DECODING), show_default=True)
@click.option("--requests", "count", default=192, show_default=True, help="Texts of each mode and number, at most.")
@click.option("--new", default=64, show_default=True, help="New tokens of a text, at most.")
@click.option("--rounds", default=2, show_default=True)
@click.option("--dtype", type=click.Choice(model_loading.DTYPES), default="float32", show_default=True)
@QUICK
@JSON
def main(
    at_once: tuple[int, ...], modes: str, count: int, new: int, rounds: int, dtype: str, quick: bool, as_json: bool
) -> None:
    """Measures a server of bundled/small."""
    start()
    chosen = names(modes, DECODING, "--modes")
    if quick:
        at_once, count, new, rounds = (1, 8), 16, 24, 1
    facts = asyncio.run(measure(at_once, chosen, count, new, dtype, rounds))
    publish("serve", facts, [table(facts), str(facts["machine"])], as_json)


if __name__ == "__main__":
    main()
