"""The ASGI middleware: limits of bodies, API keys, the path prefix of a proxy, HEAD, request ids, metrics and the log.

Plain ASGI instead of Starlette's `BaseHTTPMiddleware`, so that a route is told at once when its client disconnects.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import time
import traceback
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twotower.server.anthropic_messages.errors import error_body as messages_error_body
from twotower.server.logs import log_event
from twotower.server.neutral_fields import strict_fields
from twotower.server.request_body import BodyReader, replay
from twotower.server.request_errors import ClientDisconnected, RequestError

if TYPE_CHECKING:
    from twotower.server.service import Service

MESSAGES_PATH = "/v1/messages"  # of the Anthropic API
# Paths that need a key, if the server has API keys, and those below them.
AUTHENTICATED_PATHS = ("/v1", "/api", "/tokenize", "/detokenize", "/tokenizer_info")
REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")  # an id of the client that the server keeps


class ServerMiddleware:
    """Wraps an app. Routes find key, request_id and log_fields of a request in `scope["state"]`."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service
        self.bodies = BodyReader()
        self.keys = [_digest(key.encode()) for key in service.settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        scope, method, path = self._route_scope(scope), scope["method"], scope["path"]
        started, response_started = time.perf_counter(), False
        status = 499  # the client disconnected before the response started
        body_bytes = 0
        log_fields: dict[str, object] = {}
        given_id = headers.get(b"x-request-id", b"")
        request_id = given_id.decode() if REQUEST_ID.fullmatch(given_id) else uuid.uuid4().hex
        scope.setdefault("state", {}).update(request_id=request_id, key=None, log_fields=log_fields)

        async def send_response(message: Message) -> None:
            nonlocal status, response_started
            if message["type"] == "http.response.start":
                status, response_started = message["status"], True
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            elif method == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        strict_fields.set(self.service.settings.strict_fields)
        try:
            if _needs_key(scope["path"].removeprefix(self.root_path)):
                scope["state"]["key"] = self._authenticate(headers)
            if method in ("POST", "PUT", "PATCH"):
                body = await self.bodies.read(headers, receive, self.service.settings.limits)
                body_bytes = len(body)
                receive = replay(body, receive)
                del body
            await self.app(scope, receive, send_response)
        except RequestError as error:
            await error_response(error, scope)(scope, receive, send_response)
        except ClientDisconnected:
            pass
        except Exception as error:  # here, so that metrics and log count it like other responses
            log_event("error", logging.ERROR, id=request_id, trace="".join(traceback.format_exception(error)))
            if not response_started:
                words = "the server failed; its log has the cause under the id of the header x-request-id"
                failure = RequestError(words, status=500, code="internal")
                await error_response(failure, scope)(scope, receive, send_response)
        finally:
            self.bodies.release(body_bytes)
            route = getattr(scope.get("route"), "path", "other")
            self.service.metrics.observe_request(route, status, started)
            seconds = round(time.perf_counter() - started, 4)
            log_event(
                "request",
                id=request_id,
                method=method,
                path=path,
                status=status,
                seconds=seconds,
                **log_fields,
            )

    @property
    def root_path(self) -> str:
        """The path of the server behind a proxy; empty, or with a slash at the start only."""
        return self.service.settings.root_path

    def _route_scope(self, scope: Scope) -> Scope:
        """The scope for the routes: HEAD as GET, and a path below `root_path`, with or without which it was sent."""
        path, root = scope["path"], self.root_path
        if root and path != root and not path.startswith(f"{root}/"):
            path = root + path  # the proxy has removed the prefix
        if stripped := path.removeprefix(root).rstrip("/"):
            path = root + stripped  # instead of a redirect, which would lose the prefix and the body
        return {
            **scope,
            "path": path,
            "root_path": root,
            "method": "GET" if scope["method"] == "HEAD" else scope["method"],
        }

    def _authenticate(self, headers: Mapping[bytes, bytes]) -> str | None:
        """Returns the digest of the request's API key, or None if the server has no API keys.

        Raises:
            RequestError: The key is missing or wrong (401).
        """
        if not self.keys:
            return None
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if not given and b"x-api-key" in headers:
            kind, given = b"bearer", headers[b"x-api-key"]
        digest = _digest(given.strip())
        # All keys are compared in constant time, so that the response time does not reveal a part of a key.
        if not sum([hmac.compare_digest(digest, key) for key in self.keys]) or kind.lower() != b"bearer":
            raise RequestError(
                "the API key is missing or wrong; send the header Authorization: Bearer KEY or x-api-key: KEY",
                status=401,
                code="invalid_api_key",
            )
        return digest


def error_response(error: RequestError, scope: Scope, headers: dict[str, str] | None = None) -> Response:
    """The HTTP response for an error, in the form of the API that the path belongs to."""
    of_messages = scope["path"].removeprefix(scope["root_path"]).startswith(MESSAGES_PATH)
    body = messages_error_body(error, scope["state"]["request_id"]) if of_messages else error.body()
    out = Response(json.dumps(body), error.status, headers, "application/json")
    if error.retry_after is not None:
        out.headers["retry-after"] = str(error.retry_after)
    if error.status == 401:
        out.headers["www-authenticate"] = "Bearer"
    if error.status in (408, 413, 415):  # the rest of the body is not read
        out.headers["connection"] = "close"
    return out


def _needs_key(path: str) -> bool:
    return any(path == start or path.startswith(f"{start}/") for start in AUTHENTICATED_PATHS)


def _digest(key: bytes) -> str:
    """A digest of the same length for every key."""
    return hashlib.sha256(key).hexdigest()
