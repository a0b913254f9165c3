"""What stands between the network and the routes: a bound on bodies, API keys, request numbers, counts and logs.

Plain ASGI: a route sees its client's disconnect the moment it happens.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import time
import traceback
import uuid
from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twotower.server.logs import log_event
from twotower.server.request_errors import ClientDisconnected, RequestError

if TYPE_CHECKING:
    from twotower.server.service import Service

AUTHENTICATED_PREFIX = "/v1/"  # paths that need a key where there are keys
MAX_DISCARDED_BYTES = 1 << 20  # bytes of a refused body that are read, so that its sender sees why


class ServerMiddleware:
    """Wraps an app. What routes may want to know of a request is in scope["state"]: key, request_id, log_fields."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service
        self.keys = [_digest(key.encode()) for key in service.settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        started, response_started = time.perf_counter(), False
        status = 499  # the client went away before there was an answer
        log_fields: dict[str, object] = {}
        request_id = uuid.uuid4().hex
        scope.setdefault("state", {}).update(request_id=request_id, key=None, log_fields=log_fields)

        async def send_response(message: Message) -> None:
            nonlocal status, response_started
            if message["type"] == "http.response.start":
                status, response_started = message["status"], True
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            if scope["path"].startswith(AUTHENTICATED_PREFIX):
                scope["state"]["key"] = self._authenticate(headers.get(b"authorization", b""))
            if scope["method"] in ("POST", "PUT", "PATCH"):
                receive = await self._read_body(headers, receive)
            await self.app(scope, receive, send_response)
        except RequestError as error:
            await error_response(error)(scope, receive, send_response)
        except ClientDisconnected:
            pass
        except Exception as error:  # here rather than outside, so that it is counted and logged like every answer
            log_event("error", logging.ERROR, id=request_id, trace="".join(traceback.format_exception(error)))
            if not response_started:
                words = "the server failed; its log says how"
                await error_response(RequestError(words, status=500, code="internal"))(scope, receive, send_response)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.service.metrics.observe_request(route, status, started)
            seconds = round(time.perf_counter() - started, 4)
            log_event(
                "request",
                id=request_id,
                method=scope["method"],
                path=scope["path"],
                status=status,
                seconds=seconds,
                **log_fields,
            )

    def _authenticate(self, header: bytes) -> str | None:
        """The digest of a request's key, by which its choices are counted.

        Raises:
            RequestError: there are keys, and this is none of them (401).
        """
        if not self.keys:
            return None
        kind, _, given = header.partition(b" ")
        digest = _digest(given.strip())
        # Every key is compared, each in the same time, so the answer's delay tells nothing about any of them.
        if not sum([hmac.compare_digest(digest, key) for key in self.keys]) or kind.lower() != b"bearer":
            raise RequestError("no valid API key; send the header Authorization: Bearer KEY", status=401, code="key")
        return digest

    async def _read_body(self, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """Takes the whole body in → a `receive` that gives it out again.

        Raises:
            RequestError: it is too long (413), or does not arrive in time (408).
        """
        limits = self.service.settings.limits
        said = headers.get(b"content-length", b"")
        too_long = said.isdigit() and int(said) > limits.body_bytes
        parts: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(limits.body_seconds):
                while more and size <= limits.body_bytes + (MAX_DISCARDED_BYTES if too_long else 0):
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnected
                    size += len(message.get("body", b""))
                    too_long |= size > limits.body_bytes
                    if not too_long:
                        parts.append(message.get("body", b""))
                    more = message.get("more_body", False)
        except TimeoutError:
            raise RequestError(
                f"the request's body did not arrive in {limits.body_seconds:g} s", status=408, code="timeout"
            ) from None
        if too_long:
            raise RequestError(
                f"the request's body is longer than {limits.body_bytes} bytes", status=413, code="too_long"
            )
        body = [b"".join(parts)]

        async def replay() -> Message:
            return {"type": "http.request", "body": body.pop(), "more_body": False} if body else await receive()

        return replay


def error_response(error: RequestError, headers: dict[str, str] | None = None) -> Response:
    """The answer to what cannot be done."""
    out = Response(json.dumps(error.body()), error.status, headers, "application/json")
    if error.retry_after is not None:
        out.headers["retry-after"] = str(error.retry_after)
    if error.status == 401:
        out.headers["www-authenticate"] = "Bearer"
    if error.status in (408, 413):  # the rest of the body is not read
        out.headers["connection"] = "close"
    return out


def _digest(key: bytes) -> str:
    """Of one length for all keys."""
    return hashlib.sha256(key).hexdigest()
