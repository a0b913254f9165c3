"""The ASGI middleware: size limit of bodies, API keys, request ids, metrics and the log.

Plain ASGI instead of Starlette's `BaseHTTPMiddleware`, so that a route is told at once when its client disconnects.
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

AUTHENTICATED_PREFIX = "/v1/"  # of the paths that need a key, if the server has API keys
MAX_DISCARDED_BYTES = 1 << 20  # read from a body that is too long, so that the client receives the error


class ServerMiddleware:
    """Wraps an app. Routes find key, request_id and log_fields of a request in `scope["state"]`."""

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
        status = 499  # the client disconnected before the response started
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
        except Exception as error:  # here, so that metrics and log count it like other responses
            log_event("error", logging.ERROR, id=request_id, trace="".join(traceback.format_exception(error)))
            if not response_started:
                words = "the server failed; its log has the cause under the id of the header x-request-id"
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
        """Returns the digest of the request's API key, or None if the server has no API keys.

        Raises:
            RequestError: The key is missing or wrong (401).
        """
        if not self.keys:
            return None
        kind, _, given = header.partition(b" ")
        digest = _digest(given.strip())
        # All keys are compared in constant time, so that the response time does not reveal a part of a key.
        if not sum([hmac.compare_digest(digest, key) for key in self.keys]) or kind.lower() != b"bearer":
            raise RequestError(
                "the API key is missing or wrong; send the header Authorization: Bearer KEY", status=401, code="key"
            )
        return digest

    async def _read_body(self, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """Reads the whole body and returns a `receive` that yields the body again.

        Raises:
            RequestError: The body is too long (413) or does not arrive in time (408).
            ClientDisconnected: The client disconnected before the end of the body.
        """
        limits = self.service.settings.limits
        declared = headers.get(b"content-length", b"")
        too_long = declared.isdigit() and int(declared) > limits.body_bytes
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
                f"the body did not arrive within {limits.body_seconds:g} s; send the request again",
                status=408,
                code="timeout",
            ) from None
        if too_long:
            raise RequestError(
                f"the body is longer than the allowed {limits.body_bytes} bytes; shorten it",
                status=413,
                code="too_long",
            )
        body = [b"".join(parts)]

        async def replay() -> Message:
            return {"type": "http.request", "body": body.pop(), "more_body": False} if body else await receive()

        return replay


def error_response(error: RequestError, headers: dict[str, str] | None = None) -> Response:
    """The HTTP response for an error."""
    out = Response(json.dumps(error.body()), error.status, headers, "application/json")
    if error.retry_after is not None:
        out.headers["retry-after"] = str(error.retry_after)
    if error.status == 401:
        out.headers["www-authenticate"] = "Bearer"
    if error.status in (408, 413):  # the rest of the body is not read
        out.headers["connection"] = "close"
    return out


def _digest(key: bytes) -> str:
    """A digest of the same length for every key."""
    return hashlib.sha256(key).hexdigest()
