"""Details of responses: log-probabilities of a chat, echo, values that mean "off", names of the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from serving import NAME, RunningServer, events_of, expected_output, serving, wait_until
from test_stopping import TOKENIZER

from twotower.server.conversation import ChatPrompt

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "the quick"}]
PLAIN = "User: the quick\nAssistant:"


@pytest.fixture(scope="module")
def served() -> Iterator[RunningServer]:
    with serving(rows=2, aliases=("acme/tiny-model",)) as found:
        yield found
        wait_until(found.is_idle)


def logprobs_of(served: RunningServer, stream: bool, **fields: Any) -> tuple[str, list[dict[str, Any]]]:
    """Content and log-probabilities of a chat."""
    answer = served.post(CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 1, "stream": stream} | fields)
    assert answer.status_code == 200, answer.text
    if not stream:
        (choice,) = answer.json()["choices"]
        return choice["message"]["content"], choice["logprobs"]["content"]
    content, scores = "", []
    for event in events_of(answer.text):
        for choice in event["choices"]:
            content += choice["delta"].get("content") or ""
            scores += (choice["logprobs"] or {"content": []})["content"]
            assert len(joined(scores[:-1]).strip("\ufffd ")) <= len(content)  # no token before its text
    return content, scores


def joined(scores: list[dict[str, Any]]) -> str:
    return b"".join(bytes(score["bytes"]) for score in scores).decode(errors="replace")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("mode", ["ar", "verified", "diffusion"])
def test_logprobs_of_a_chat_are_those_of_its_content(served: RunningServer, mode: str, stream: bool) -> None:
    """No stop string, no trimmed space, no end of text. Tokens that are only a part of the content are whole."""
    with_stop = 0
    for seed in range(6):
        fields: dict[str, Any] = {"mode": mode, "max_tokens": 24, "seed": seed}
        free = expected_output(PLAIN, **fields).text
        stop = free[7:9] or "never"
        content, scores = logprobs_of(served, stream, **fields, stop=stop)
        assert stop not in content
        with_stop += len(free.lstrip()) > len(content)
        whole = joined(scores).lstrip()
        assert whole.startswith(content.rstrip("\ufffd"))
        last = joined(scores[-1:])
        assert len(whole) < len(content) + max(len(last), 1) or whole == content
    assert with_stop >= 1


def test_the_implicit_stop_is_not_in_the_logprobs(served: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The role names of the plain chat format are stop strings, and the space before a reply is trimmed."""
    import twotower.server.tokenizer_adapter as adapter

    free, seed = next(
        (text, seed)
        for seed in range(100)
        if len(text := expected_output(PLAIN, mode="ar", max_tokens=24, seed=seed).text) > 12 and text.isprintable()
    )
    monkeypatch.setattr(adapter.TokenizerAdapter, "encode_chat", lambda self, _: ChatPrompt(
        self.encode_prompt(PLAIN), (free[6:9],)))  # fmt: skip
    content, scores = logprobs_of(served, False, mode="ar", max_tokens=24, seed=seed)
    assert content == free[: free.index(free[6:9])].lstrip()
    assert joined(scores[:-1]).lstrip() in content
    assert free[6:9] not in joined(scores[:-1])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("logprobs", [None, 1])
def test_echo_repeats_the_prompt_exactly(served: RunningServer, stream: bool, logprobs: int | None) -> None:
    special = TOKENIZER.convert_ids_to_tokens(TOKENIZER.all_special_ids[0])
    for prompt in (f"{special}the quick{special} brown", "世界", "  two  spaces "):
        fields = {"echo": True, "seed": 3, "max_tokens": 6, "stream": stream, "logprobs": logprobs}
        answer = served.complete(prompt, **fields)
        assert answer.status_code == 200, answer.text
        choices = [choice for event in events_of(answer.text) for choice in event["choices"]] if stream else (
            answer.json()["choices"]
        )  # fmt: skip
        text = "".join(choice["text"] for choice in choices)
        assert text[: len(prompt)] == prompt
        assert text[len(prompt) :] == expected_output(prompt, seed=3, max_tokens=6).text
        if logprobs is not None:
            tokens = [token for choice in choices for token in choice["logprobs"]["tokens"]]
            offsets = [offset for choice in choices for offset in choice["logprobs"]["text_offset"]]
            assert offsets == sorted(offsets)
            count = len(TOKENIZER(prompt)["input_ids"])
            for token, offset in zip(tokens[:count], offsets, strict=False):
                assert text.startswith(token, offset) or token.startswith("bytes:")
            assert offsets[count] == len(prompt)


def test_echo_of_token_ids_has_special_tokens(served: RunningServer) -> None:
    special = TOKENIZER.all_special_ids[0]
    prompt = [special, *TOKENIZER("the quick")["input_ids"], special]
    (choice,) = served.complete(prompt, echo=True, max_tokens=0).json()["choices"]
    assert choice["text"] == TOKENIZER.decode(prompt)


@pytest.mark.parametrize("path", ["/v1/completions", CHAT])
def test_values_that_mean_off(served: RunningServer, path: str) -> None:
    start = {"prompt": "the quick"} if path != CHAT else {"messages": MESSAGES}
    fields = start | {"max_tokens": 6, "seed": 2, "temperature": 1}

    def text(**more: Any) -> str:
        answer = served.post(path, fields | more)
        assert answer.status_code == 200, answer.text
        (choice,) = answer.json()["choices"]
        return str(choice.get("text") or choice["message"]["content"])

    assert text(top_k=0) == text()
    with served.set(decoding={"mode": "ar", "top_k": 1, "seed": 5}):
        assert text(top_k=0) == text(top_k=320) != text()
        seeds = [served.post(path, fields | {"seed": -1}).json()["choices"][0]["decoding"]["seed"] for _ in range(2)]
        assert seeds[0] != seeds[1]
        assert 5 not in seeds
    if path == CHAT:
        assert text(top_logprobs=0) == text()
        assert text(top_logprobs=0, logprobs=False) == text()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"stop": ""}, 'stop is ""; it should have at least 1 character'),
        ({"stop": ["a"] * 17}, "stop is a list of 17 values; it should have at most 16 items, not 17"),
        ({"stop": 5}, "stop is 5; it should be a valid string or a list"),
        ({"stream": None, "n": True}, "n is true; it should be a valid integer"),
        ({"prompt": {}}, "prompt is {}; it should be a valid string or a list"),
        ({"temperature": "hot"}, 'temperature is "hot"; it should be a valid number'),
        ({"response_format": 5}, "response_format is 5; it should be an object"),
        (
            {"prompt": "a", "max_tokens": 600},
            "maximum context length is 512 tokens. prompt has 1 tokens and max_tokens is 600",
        ),
        ({"response_format": {"type": "json_object"}, "mode": "diffusion"}, "response_format needs mode ar or"),
    ],
)
def test_messages_speak_of_the_fields_of_the_request(served: RunningServer, fields: dict[str, Any], words: str) -> None:
    answer = served.post("/v1/completions", {"prompt": "the quick"} | fields)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_the_model_may_be_named_by_its_hub_id(served: RunningServer) -> None:
    for name in (NAME, "acme/tiny-model"):
        answer = served.complete(model=name, max_tokens=1)
        assert answer.status_code == 200
        assert answer.json()["model"] == NAME
        assert served.get(f"/v1/models/{name}").json()["id"] == NAME
    assert served.complete(model="acme/other").status_code == 404
    assert served.complete(model="tiny-model").status_code == 404
