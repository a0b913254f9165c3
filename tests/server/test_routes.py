"""Routes beside those that generate text, the errors that clients act on, and headers."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
from command import Result, assert_one_line_error
from serving import LENGTH, NAME, RunningServer, captured_log, expected_output, serving, wait_until
from test_stopping import TOKENIZER

from twotower.server import uvicorn_server
from twotower.server.completion_requests import CompletionRequest
from twotower.server.service import Service
from twotower.version import VERSION

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def served() -> Iterator[RunningServer]:
    with serving(rows=2) as found:
        yield found
        wait_until(found.is_idle)


@pytest.fixture(scope="module")
def keyed() -> Iterator[RunningServer]:
    with serving(rows=1, api_keys=("right",), root_path="/llm") as found:
        yield found
        wait_until(found.is_idle)


def error_of(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (COMPLETIONS, {"prompt": "a", "max_tokens": 600}),
        (COMPLETIONS, {"prompt": [5] * 600}),
        (COMPLETIONS, {"prompt": "a" * 10**6}),
        (CHAT, {"messages": [{"role": "user", "content": "x " * 600}]}),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 600}),
    ],
)
def test_a_text_that_is_too_long_has_the_code_that_clients_match(
    served: RunningServer, path: str, fields: dict[str, Any]
) -> None:
    error = error_of(served.post(path, fields), 400)
    assert error["code"] == "context_length_exceeded"
    assert error["message"].startswith(f"This model's maximum context length is {LENGTH} tokens")
    assert error["type"] == "invalid_request_error"


def test_a_limit_of_prompts_has_the_same_code(served: RunningServer) -> None:
    with served.limited(prompt_tokens=4):
        error = error_of(served.complete([5] * 5), 400)
    assert error["code"] == "context_length_exceeded"
    assert "at most 4 tokens" in error["message"]


def test_a_wrong_key_has_the_code_of_the_openai_api(keyed: RunningServer) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": "wrong"}):
        error = error_of(keyed.get("/v1/models", headers=headers), 401)
        assert error["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/engines", "/v1/chat", "/v1/completions/x"])
def test_a_404_under_v1_names_the_routes(served: RunningServer, path: str) -> None:
    message = error_of(served.get(path), 404)["message"]
    assert f"{COMPLETIONS}, {CHAT}" in message
    assert "/v1/models" in message


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/audio/speech", "/v1/files/f-1/content"])
def test_a_route_of_another_kind_is_not_served(served: RunningServer, path: str) -> None:
    message = error_of(served.post(path, {"input": "x"}), 404)["message"]
    assert " not served" in message
    assert COMPLETIONS in message


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_too_many_stop_strings_say_so(served: RunningServer, path: str) -> None:
    start: dict[str, Any] = {"prompt": "a"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "x"}]}
    error = error_of(served.post(path, start | {"stop": ["a"] * 17}), 400)
    assert error["param"] == "stop"
    assert "at most 16" in error["message"]


# --- headers and paths ------------------------------------------------------------------------------------------------


def test_a_key_may_be_sent_as_x_api_key(keyed: RunningServer) -> None:
    assert keyed.get("/v1/models", headers={"x-api-key": "right"}).status_code == 200
    both = {"x-api-key": "right", "authorization": "Bearer wrong"}
    assert keyed.get("/v1/models", headers=both).status_code == 401  # the usual header counts first


@pytest.mark.parametrize("prefix", ["", "/llm"])
def test_a_slash_at_the_end_changes_nothing(keyed: RunningServer, prefix: str) -> None:
    key = {"x-api-key": "right"}
    assert keyed.get(f"{prefix}/v1/models/", headers=key).json()["data"][0]["id"] == NAME
    answer = keyed.post(f"{prefix}{COMPLETIONS}/", {"prompt": "the", "max_tokens": 1}, headers=key)
    assert answer.status_code == 200
    assert keyed.post(f"{prefix}{COMPLETIONS}//", {"prompt": "the"}).status_code == 401  # nor does it avoid the key


def test_the_request_id_of_a_client_is_kept(served: RunningServer) -> None:
    with captured_log() as lines:
        answer = served.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1}, headers={"x-request-id": "mine-7:a"})
        served.finish_requests()
    assert answer.headers.get_list("x-request-id") == ["mine-7:a"]
    assert [line["id"] for line in lines if line["event"] == "request"] == ["mine-7:a"]
    for bad in ("x" * 129, "a b", b"\xff"):
        found = served.get("/health", headers={"x-request-id": bad}).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", found)


def test_a_gzip_body_may_have_several_members(served: RunningServer) -> None:
    body = json.dumps({"prompt": "the quick", "max_tokens": 2, "seed": 1}).encode()
    headers = {"content-encoding": "gzip"}
    whole = served.post(COMPLETIONS, body).json()["choices"][0]["text"]
    for packed in (gzip.compress(body), gzip.compress(body[:9]) + gzip.compress(body[9:])):
        assert served.post(COMPLETIONS, packed, headers=headers).json()["choices"][0]["text"] == whole
    for bad in (gzip.compress(body) + b"more", gzip.compress(body)[:-3], b"", gzip.compress(b"") * 65):
        assert error_of(served.post(COMPLETIONS, bad, headers=headers), 400)["code"] == "encoding"
    assert error_of(served.post(COMPLETIONS, gzip.compress(b""), headers=headers), 400)["code"] == "json"
    bomb = gzip.compress(b" " * 2**23) * 2
    assert served.post(COMPLETIONS, bomb, headers=headers).status_code == 413


def test_version_and_ping(served: RunningServer) -> None:
    assert served.get("/version").json() == {"version": VERSION}
    assert served.get("/ping").json() == served.post("/ping").json() == {"status": "ok"}


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_tokens_and_texts(served: RunningServer) -> None:
    for prompt in ("the quick brown", "世界", ""):
        answer = served.post("/tokenize", {"prompt": prompt, "return_token_strs": True}).json()
        assert answer["tokens"] == TOKENIZER(prompt)["input_ids"]
        assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
        assert answer["max_model_len"] == LENGTH
        plain = served.post("/tokenize", {"model": NAME, "prompt": prompt, "add_special_tokens": False}).json()
        assert plain["tokens"] == TOKENIZER(prompt, add_special_tokens=False)["input_ids"]
        assert served.post("/detokenize", {"tokens": plain["tokens"]}).json() == {"prompt": prompt}


def test_tokens_of_a_chat_are_those_of_its_prompt(served: RunningServer) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the quick"}]
    for fields, prompt in (
        ({}, "User: hi\nAssistant: the quick\nAssistant:"),
        ({"add_generation_prompt": False}, "User: hi\nAssistant: the quick\n"),
        ({"continue_final_message": True, "add_generation_prompt": False}, "User: hi\nAssistant: the quick"),
        ({"continue_final_message": True}, "User: hi\nAssistant: the quick"),
    ):
        answer = served.post("/tokenize", {"messages": messages} | fields)
        assert answer.json()["tokens"] == TOKENIZER(prompt)["input_ids"], answer.text
        chat = served.post(CHAT, {"messages": messages, "max_tokens": 4, "seed": 1} | fields)
        expected = expected_output(prompt, max_tokens=4, seed=1, stop=["\nSystem:", "\nUser:", "\nAssistant:"]).text
        assert chat.json()["choices"][0]["message"]["content"].strip() == expected.strip()


def test_a_chat_template_continues_a_message(served: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    monkeypatch.setattr(TOKENIZER, "chat_template", template + "{% if add_generation_prompt %}<assistant>{% endif %}")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the quick"}]
    for fields, prompt in (
        ({}, "<user>hi</s><assistant>the quick</s><assistant>"),
        ({"add_generation_prompt": False}, "<user>hi</s><assistant>the quick</s>"),
        ({"continue_final_message": True}, "<user>hi</s><assistant>the quick"),
    ):
        tokens = served.post("/tokenize", {"messages": messages} | fields).json()["tokens"]
        assert served.post("/detokenize", {"tokens": tokens}).json()["prompt"] == prompt


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, None),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, None),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/tokenize", {"prompt": "a" * 10**6}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "a"}], "add_special_tokens": True},
            "add_special_tokens",
        ),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {}, "tokens"),
        (
            CHAT,
            {
                "messages": [{"role": "user", "content": "a"}],
                "continue_final_message": True,
                "add_generation_prompt": True,
            },
            "continue_final_message",
        ),
    ],
)
def test_bad_bodies(served: RunningServer, path: str, body: dict[str, Any], param: str | None) -> None:
    assert error_of(served.post(path, body), 400)["param"] == param


def test_other_models_and_keys(served: RunningServer, keyed: RunningServer) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})):
        assert error_of(served.post(path, body | {"model": "other"}), 404)["code"] == "model_not_found"
        assert keyed.post(path, body).status_code == 401
    assert keyed.get("/tokenizer_info").status_code == 401


def test_the_remote_tokenizer_of_lm_eval(served: RunningServer) -> None:
    utils = pytest.importorskip("lm_eval.utils")
    assert utils.check_remote_tokenizer_support(f"{served.address}{COMPLETIONS}")
    remote = utils.RemoteTokenizer(f"{served.address}{COMPLETIONS}")
    assert remote.encode("the quick") == TOKENIZER("the quick", add_special_tokens=False)["input_ids"]
    assert remote.decode(remote.encode("the quick")) == "the quick"
    assert remote.eos_token_id == TOKENIZER.eos_token_id


def test_the_page_of_the_api(served: RunningServer) -> None:
    answer = served.get("/docs")
    assert answer.headers["content-type"].startswith("text/html")
    for words in ("POST /v1/chat/completions", "POST /tokenize", "max_completion_tokens", "stream_denoising"):
        assert words in answer.text
    assert not re.search(r"(https?:)?//[a-z]+\.[a-z]|<script", answer.text)


# --- names and defaults of `twotower serve` ---------------------------------------------------------------------------


def service_of(cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, *options: str | Path) -> Service:
    """The service that `twotower serve` would start."""
    found: list[Service] = []
    monkeypatch.setattr(uvicorn_server, "serve_until_signal", lambda service, *_: found.append(service))
    result = cli("serve", "--port", "0", "--rows", "1", "--length", "64", *options)
    assert result.code == 0, result.err
    found[0].close()
    return found[0]


def test_several_names(served: RunningServer) -> None:
    with served.set(more_names=("other", "acme/b"), aliases=("hub/id",)):
        assert [card["id"] for card in served.get("/v1/models").json()["data"]] == [NAME, "other", "acme/b"]
        assert served.get("/v1/models/acme/b").json()["id"] == "acme/b"
        assert served.get("/v1/models/hub/id").json()["id"] == NAME
        for name in ("other", "hub/id"):
            assert served.complete(model=name, max_tokens=1).json()["model"] == NAME
    assert served.complete(model="other", max_tokens=1).status_code == 404


def test_options_of_serve(cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    service = service_of(cli, monkeypatch, "--name", "a", "--name", "b", "--chat-template", template)
    assert service.names == ("a", "b")
    assert service.settings.decoding == {"mode": "verified"}
    assert service.tokenizer.tokenizer.chat_template == template.read_text()
    template.write_text("{% if %}")
    assert_one_line_error(cli("serve", "--port", "0", "--rows", "1", "--chat-template", template), "Jinja", "line 1")


def test_an_autoregressive_model_is_served_in_ar(cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    service = service_of(cli, monkeypatch, "--model", tiny_chat.backbone(), "--threads", "1")
    assert service.settings.decoding == {"mode": "ar"}
    request = CompletionRequest.model_validate({"prompt": "a", "max_tokens": 2})
    assert service._builder.build(request, service.settings)[0].engine_request.params.mode == "ar"


def test_steps_without_a_mode_mean_diffusion(served: RunningServer) -> None:
    def mode(**fields: Any) -> str:
        answer = served.complete(max_tokens=2, **fields)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["decoding"]["mode"])

    with served.set(decoding={"mode": "verified"}):
        assert mode() == "verified"
        assert mode(steps=4) == "diffusion"
        assert error_of(served.complete(steps=4, mode="verified"), 400)["param"] == "steps"
        assert error_of(served.complete(steps=4, response_format={"type": "json_object"}), 400)["param"] == "steps"
    with served.set(decoding={"mode": "ar"}):
        assert mode(steps=4) == "diffusion"
