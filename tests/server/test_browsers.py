"""Browsers and reverse proxies: CORS, HEAD, and a path prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from command import Result, assert_one_line_error
from serving import RunningServer, serving, wait_until

from twotower.errors import ArgumentError
from twotower.server import uvicorn_server
from twotower.server.service import Service
from twotower.server.settings import Limits, check_origin, check_root_path

ORIGIN = "https://example.org"
PREFLIGHT = {
    "origin": ORIGIN,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-lang",
}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def served() -> Iterator[RunningServer]:
    """A server that allows an origin and has an API key."""
    with serving(rows=1, api_keys=("right",), allowed_origins=(ORIGIN,), limits=Limits(body_bytes=1000)) as found:
        yield found
        wait_until(found.is_idle)


@pytest.fixture(scope="module")
def plain() -> Iterator[RunningServer]:
    with serving(rows=1) as found:
        yield found
        wait_until(found.is_idle)


@pytest.fixture(scope="module")
def behind() -> Iterator[RunningServer]:
    """A server behind a proxy, with an API key."""
    with serving(rows=1, api_keys=("right",), root_path="/llm") as found:
        yield found
        wait_until(found.is_idle)


def test_preflight_of_an_allowed_origin(served: RunningServer) -> None:
    with served.client() as client:
        answer = client.options(CHAT, headers=PREFLIGHT)
        assert answer.status_code == 200, answer.text
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "POST" in answer.headers["access-control-allow-methods"]
        allowed = answer.headers["access-control-allow-headers"].lower()
        assert all(name in allowed for name in ("authorization", "content-type", "x-stainless-lang"))
        assert "access-control-allow-credentials" not in answer.headers
        other = client.options(CHAT, headers=PREFLIGHT | {"origin": "https://other.org"})
        assert other.status_code == 400
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    ("key", "body", "status"), [("right", b"x" * 2000, 413), ("right", b"{}", 400), ("wrong", b"{}", 401)]
)
def test_errors_have_the_headers_too(served: RunningServer, key: str, body: bytes, status: int) -> None:
    answer = served.post(CHAT, body, headers={"origin": ORIGIN, "authorization": f"Bearer {key}"})
    assert answer.status_code == status
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "x-request-id" in answer.headers["access-control-expose-headers"].lower()


def test_without_the_option_no_origin_is_allowed(plain: RunningServer) -> None:
    with plain.client() as client:
        assert client.options(CHAT, headers=PREFLIGHT).status_code == 405
        answer = client.get("/health", headers={"origin": ORIGIN})
    assert not any(name.startswith("access-control") for name in answer.headers)


def test_any_origin() -> None:
    with serving(rows=1, allowed_origins=("*",)) as served:
        answer = served.get("/v1/models", headers={"origin": "http://localhost:3000"})
        assert answer.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize(
    "path", ["/health", "/ready", "/metrics", "/v1/models", "/v1/models/tiny", "/", "/openapi.json"]
)
def test_head_is_get_without_the_body(plain: RunningServer, path: str) -> None:
    with plain.client() as client:
        head, get = client.head(path), client.get(path)
        assert (head.status_code, get.status_code) == (200, 200)
        assert head.content == b""
        assert head.headers["content-type"] == get.headers["content-type"]
        if path != "/metrics":
            assert head.headers["content-length"] == get.headers["content-length"]
        assert client.head(CHAT).status_code == 405
        assert client.head("/nothing").status_code == 404
        assert "HEAD" in client.delete("/health").headers["allow"]
        assert "HEAD" not in client.get(CHAT).headers["allow"]


@pytest.mark.parametrize("prefix", ["", "/llm"])
def test_root_path(behind: RunningServer, prefix: str) -> None:
    """The proxy removes the prefix, or keeps it."""
    key = {"authorization": "Bearer right"}
    assert behind.get(f"{prefix}/health").json() == {"status": "ok"}
    assert behind.get(f"{prefix}/v1/models").status_code == 401  # the prefix does not avoid the key
    assert behind.get(f"{prefix}/v1/models", headers=key).status_code == 200
    answer = behind.post(f"{prefix}/v1/completions", {"prompt": "the quick", "max_tokens": 2}, headers=key)
    assert answer.status_code == 200
    assert behind.get(f"{prefix}/openapi.json").json()["servers"] == [{"url": "/llm"}]
    page = behind.get(f"{prefix}/")
    assert page.status_code == 200
    assert 'src="/' not in page.text
    assert 'href="/' not in page.text
    assert behind.get(f"{prefix}/app.js").status_code == 200
    assert behind.get(f"{prefix}/nothing").status_code == 404


def test_a_root_path_without_a_slash_is_redirected(behind: RunningServer) -> None:
    answer = behind.get("/llm")
    assert answer.is_redirect
    assert answer.headers["location"].endswith("/llm/")
    assert behind.get("/llmx/v1/models").status_code == 404
    assert behind.get("/llm/llm/v1/models").status_code == 404


def test_origins_and_root_paths_are_checked() -> None:
    for origin in (ORIGIN, "http://localhost:3000", "http://[::1]:80", "*", "chrome-extension://abc"):
        assert check_origin(origin) == origin
    for origin in ("example.org", f"{ORIGIN}/", f"{ORIGIN}/a", "", "https://", "https://*.org"):
        with pytest.raises(ArgumentError, match="origin"):
            check_origin(origin)
    assert [check_root_path(path) for path in ("", "/", "/llm", "/llm/", "/a/b")] == ["", "", "/llm", "/llm", "/a/b"]
    for path in ("llm", "/v1", "/v1/x", "//llm", "/a?b", "/a b", "https://example.org/llm"):
        with pytest.raises(ArgumentError, match="root path"):
            check_root_path(path)


def test_the_options_reach_the_server(cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Service] = []
    monkeypatch.setattr(uvicorn_server, "serve_until_signal", lambda service, *_: found.append(service))
    options = ("--allow-origin", ORIGIN, "--allow-origin", "http://localhost:3000", "--root-path", "/llm/")
    assert cli("serve", "--port", "0", "--rows", "1", "--length", "64", *options).code == 0
    (service,) = found
    service.close()
    assert service.settings.allowed_origins == (ORIGIN, "http://localhost:3000")
    assert service.settings.root_path == "/llm"


@pytest.mark.parametrize(("option", "value"), [("--allow-origin", "example.org"), ("--root-path", "llm")])
def test_a_bad_option_is_one_line(cli: Callable[..., Result], option: str, value: str) -> None:
    assert_one_line_error(cli("serve", "--port", "0", option, value), value, "e.g.")
