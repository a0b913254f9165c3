"""The `openai` client with the server: the texts of the Python API, and the client's errors."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest
from serving import NAME, TIMEOUT, RunningServer, expected_output, serving, wait_until

from twotower.server.settings import Limits

openai = pytest.importorskip("openai")
PROMPT = "the quick"
PLAIN = f"User: {PROMPT}\nAssistant:"
ENDS = ["\nSystem:", "\nUser:", "\nAssistant:"]
MESSAGES = [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def served() -> Iterator[RunningServer]:
    with serving(rows=2, api_keys=("right",), limits=Limits(queue=2)) as found:
        yield found
        wait_until(found.is_idle)


@pytest.fixture(scope="module")
def client(served: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{served.address}/v1", api_key="right", max_retries=0, timeout=TIMEOUT
    ) as found:  # fmt: skip
        yield found


def reply(**fields: object) -> str:
    """The expected reply of a chat."""
    return expected_output(PLAIN, stop=ENDS, **fields).text.lstrip()


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=NAME, prompt=[PROMPT, "brown"], max_tokens=12, seed=3, n=2, echo=False)
    texts = [expected_output(prompt, max_tokens=12, seed=seed).text for prompt in (PROMPT, "brown") for seed in (3, 4)]
    assert [choice.text for choice in sorted(answer.choices, key=lambda choice: choice.index)] == texts
    assert answer.usage is not None
    assert answer.usage.completion_tokens == sum(
        len(expected_output(prompt, max_tokens=12, seed=seed).tokens) for prompt in (PROMPT, "brown") for seed in (3, 4)
    )


def test_completions_in_a_stream(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=20, seed=3, stream=True, stream_options={"include_usage": True},
        extra_body={"mode": "verified", "draft_steps": 1},
    )  # fmt: skip
    chunks = list(stream)
    expected = expected_output(PROMPT, max_tokens=20, seed=3, mode="verified", draft_steps=1)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == expected.text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(expected.tokens)


def test_chats(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=NAME, messages=MESSAGES, max_completion_tokens=12, seed=3, temperature=0.5, top_p=0.9
    )
    assert answer.choices[0].message.content == reply(max_tokens=12, seed=3, temperature=0.5, top_p=0.9)
    stream = client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=20, seed=3, stream=True)
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == reply(max_tokens=20, seed=3)


def test_stream_helper_of_the_client(client: openai.OpenAI) -> None:
    """The client's stream helper joins chunks and validates them."""
    stop = reply(max_tokens=20, seed=3)[8:10]
    with client.chat.completions.stream(model=NAME, messages=MESSAGES, max_tokens=20, seed=3, stop=stop) as stream:
        for _ in stream:
            pass
        answer = stream.get_final_completion()
    assert answer.choices[0].message.content == reply(max_tokens=20, seed=3).partition(stop)[0]
    assert answer.choices[0].finish_reason == "stop"


def test_log_probabilities(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model=NAME, messages=MESSAGES, max_tokens=5, seed=3, logprobs=True, top_logprobs=2
    )
    scores = chat.choices[0].logprobs
    assert scores is not None
    assert scores.content is not None
    content = chat.choices[0].message.content
    assert content
    assert b"".join(bytes(score.bytes or ()) for score in scores.content).decode(errors="replace").strip() == content
    assert all(score.logprob <= 0 and len(score.top_logprobs) == 2 for score in scores.content)
    text = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=5, seed=3, logprobs=2)
    assert text.choices[0].logprobs is not None
    assert len(text.choices[0].logprobs.token_logprobs or ()) == 5


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_many_at_once(served: RunningServer) -> None:
    async def ask() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{served.address}/v1", api_key="right", max_retries=0, timeout=TIMEOUT
        ) as client:

            async def whole(seed: int) -> str:
                answer = await client.completions.create(model=NAME, prompt=PROMPT, max_tokens=6, seed=seed)
                return answer.choices[0].text

            async def streamed(seed: int) -> str:
                stream = await client.completions.create(
                    model=NAME, prompt=PROMPT, max_tokens=6, seed=seed, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            texts = [whole, streamed]
            assert await asyncio.gather(*(texts[seed % 2](seed) for seed in range(4))) == [
                expected_output(PROMPT, max_tokens=6, seed=seed).text for seed in range(4)
            ]

    asyncio.run(ask())


def test_closing_a_stream_frees_the_slot(served: RunningServer, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=300, stream=True, extra_body={"mode": "ar"}
    )
    next(iter(stream))
    stream.close()
    wait_until(served.is_idle)


def test_errors(served: RunningServer, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=NAME, prompt=PROMPT, suffix="x")
    assert bad.value.param == "suffix"
    assert bad.value.code == "unsupported"
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(model=NAME, messages=MESSAGES, tool_choice="required")
    assert tools.value.param == "tool_choice"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt=PROMPT)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").completions.create(model=NAME, prompt=PROMPT)
    with served.step_gate.closed():
        with httpx.Client(verify=False) as other, other.stream(
            "POST", f"{served.address}/v1/completions", headers={"authorization": "Bearer right"},
            json={"prompt": PROMPT, "n": 4, "stream": True, "max_tokens": 1},
        ):  # fmt: skip
            with pytest.raises(openai.RateLimitError) as full:
                client.completions.create(model=NAME, prompt=PROMPT)
            assert int(full.value.response.headers["retry-after"]) >= 1
        wait_until(lambda: not served.service.active_choices)
        with served.limited(request_seconds=0.2), pytest.raises(openai.InternalServerError) as late:
            client.completions.create(model=NAME, prompt=PROMPT)
        assert late.value.status_code == 504


def test_an_error_in_a_stream_is_raised(served: RunningServer, client: openai.OpenAI) -> None:
    with served.limited(request_seconds=0.2), served.step_gate.closed():
        stream = client.completions.create(model=NAME, prompt=PROMPT, stream=True)
        with pytest.raises(openai.APIError, match="longer than"):
            list(stream)
        wait_until(lambda: not served.service.active_choices)
