"""State that several threads share: snapshots of an engine, and tokenizers."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from serving import LENGTH, NAME, RunningServer, serving, tiny_model, wait_until
from test_stopping import TEXTS, byte_level

from twotower import LLM, AsyncLLM, GenerationParams, Request
from twotower.decoding.stopping import Detokenizer
from twotower.engine.core import EngineCore
from twotower.engine.engine_options import EngineOptions
from twotower.server.conversation import Conversation
from twotower.server.message_schemas import Message
from twotower.server.service import Service
from twotower.server.settings import Limits, ServerSettings
from twotower.server.tokenizer_adapter import TokenizerAdapter

CHANGING = ("prefixes", "scheduler", "rounds")  # attributes that the steps of an engine change
SECONDS = 1.5


class ObservedCore(EngineCore):
    """Records which threads read the attributes in `CHANGING`."""

    readers: set[str]

    def __getattribute__(self, name: str) -> Any:
        if name in CHANGING and "readers" in object.__getattribute__(self, "__dict__"):
            object.__getattribute__(self, "readers").add(threading.current_thread().name)
        return object.__getattribute__(self, name)


@pytest.fixture
def prompt() -> str:
    return " ".join(TEXTS) * 20


# --- snapshots --------------------------------------------------------------------------------------------------------


def test_snapshots_follow_the_engine() -> None:
    async def ask() -> None:
        with AsyncLLM(LLM(tiny_model(), rows=2, length=LENGTH)) as engine:
            idle = engine.stats
            assert (idle.slots, idle.free_slots, idle.running, idle.waiting) == (2, 2, 0, 0)
            assert (idle.max_seq_len, idle.max_block_size) == (LENGTH, 16)
            assert idle.state_bytes == engine.llm.core.state.nbytes
            request = Request([5] * 300, GenerationParams(mode="ar", max_new_tokens=200))
            streams = [engine.stream(request) for _ in range(3)]
            for stream in streams[:2]:
                await anext(stream)
            third = asyncio.ensure_future(anext(streams[2]))
            await asyncio.to_thread(wait_until, lambda: engine.stats.waiting == 1)
            busy = engine.stats
            assert (busy.free_slots, busy.running) == (0, 2)
            assert busy.prompt_tokens == 600
            assert (busy.prefix_tokens, idle.prefix_tokens) == (256, 0)
            assert busy.prefix_bytes > 0
            await streams[0].aclose()
            await third
            assert engine.stats.prompt_tokens == 900
            assert engine.stats.reused_tokens in (
                256,
                512,
            )  # the second can be admitted before the first is in the cache
            for stream in streams:
                await stream.aclose()
            await asyncio.to_thread(wait_until, lambda: engine.stats.free_slots == 2)
            assert (engine.stats.running, engine.stats.waiting) == (0, 0)
            with pytest.raises(FrozenInstanceError):
                idle.running = 1  # type: ignore[misc]

    asyncio.run(ask())


def test_only_the_engine_s_thread_reads_changing_state() -> None:
    """Also while clients use all routes."""
    llm = LLM(tiny_model(), rows=2, length=LENGTH)
    core = ObservedCore(tiny_model(), 2, LENGTH, 16, None, EngineOptions())
    llm.core = core
    engine = AsyncLLM(llm)
    core.readers = set()
    with serving_of(engine) as served:
        with ThreadPoolExecutor(4) as pool:
            requests = [pool.submit(served.complete, "the quick", n=2, max_tokens=30) for _ in range(4)]
            for path in ("/metrics", "/ready", "/health", "/v1/models"):
                assert served.get(path).status_code == 200
            assert served.complete(n=9).status_code == 400
            assert served.complete([5], max_tokens=10**9).status_code == 400
            assert {answer.result().status_code for answer in requests} <= {200, 429}
        wait_until(lambda: engine.stats.free_slots == 2)
        assert served.counts()["twotower_prefix_query_tokens_total",] == engine.stats.prompt_tokens
    assert core.readers == {"twotower-engine"}


@contextmanager
def serving_of(engine: AsyncLLM) -> Iterator[RunningServer]:
    with serving(
        service=Service(engine, ServerSettings(name=NAME, decoding={"mode": "ar"}, limits=Limits(queue=2)))
    ) as found:
        yield found


class FailingLLM(LLM):
    """Raises an unexpected error for each request."""

    def add_request(self, request: Request) -> int:
        raise ZeroDivisionError("a secret of the engine")


def test_an_engine_error_at_submission() -> None:
    """The error is one line without the text of the exception."""
    with serving_of(AsyncLLM(FailingLLM(tiny_model(), rows=1, length=LENGTH))) as served:
        answer = served.complete()
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "failed"
        assert answer.json()["error"]["message"] == "the request failed: ZeroDivisionError"
        assert served.get("/health").status_code == 200


# --- tokenizers -------------------------------------------------------------------------------------------------------


def in_threads(*works: Callable[[], object]) -> int:
    """Repeats each function in its own thread for `SECONDS`; raises the first error, returns the number of calls."""
    end, rounds = time.monotonic() + SECONDS, 0
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def repeat(work: Callable[[], object]) -> int:
        count = 0
        while time.monotonic() < end:
            work()
            count += 1
        return count

    try:
        with ThreadPoolExecutor(len(works)) as pool:
            for done in [pool.submit(repeat, work) for work in works]:
                rounds += done.result()
    finally:
        sys.setswitchinterval(interval)
    return rounds


def test_prompts_stay_complete_beside_other_encoders(prompt: str) -> None:
    """Another thread encodes with the model's tokenizer and truncation, and a third decodes, as the engine does."""
    tokenizer = byte_level()
    adapter = TokenizerAdapter(tokenizer)
    whole = list(tokenizer(prompt)["input_ids"])
    text = tokenizer.decode(whole, skip_special_tokens=True)
    lengths = iter(range(10**9))

    def encode_as_others_do() -> None:
        length = 8 + next(lengths) % 50
        assert len(tokenizer(prompt, truncation=True, max_length=length)["input_ids"]) == length

    def decode_as_the_engine_does() -> None:
        detokenizer = Detokenizer(tokenizer)
        assert detokenizer.decode(whole, skip_special_tokens=True) == text

    def encode() -> None:
        assert adapter.encode_prompt(prompt) == whole

    assert in_threads(encode, encode, encode_as_others_do, decode_as_the_engine_does) > 20


def test_the_adapter_is_thread_safe(prompt: str) -> None:
    """Prompts with and without special tokens, and texts of tokens, in three threads."""
    adapter = TokenizerAdapter(byte_level())
    chat = Conversation([Message(role="user", content=prompt)])
    whole, chat_prompt = adapter.encode_prompt(prompt), adapter.encode_chat(chat)
    shown = [adapter.token_text(token) for token in range(50)]

    def same() -> None:
        assert adapter.encode_prompt(prompt) == whole
        assert adapter.encode_chat(chat) == chat_prompt
        assert [adapter.token_text(token) for token in range(50)] == shown

    assert in_threads(same, same, same) > 5


def test_the_adapter_does_not_change_the_model_s_tokenizer() -> None:
    """If the tokenizer's file enables truncation, the adapter encodes without it and leaves the original unchanged."""
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.enable_truncation(8)
    adapter = TokenizerAdapter(tokenizer)
    assert len(adapter.encode_prompt(TEXTS[0])) > 8
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 8
