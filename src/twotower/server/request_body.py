"""Reads the bodies of requests within limits of size and time, and decompresses them."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Mapping

from starlette.types import Message, Receive

from twotower.server.request_errors import ClientDisconnected, RequestError
from twotower.server.settings import Limits

MAX_DISCARDED_BYTES = 1 << 20  # read from a body that is too long, so that the client receives the error
MAX_MEMBERS = 64  # of a compressed body
WINDOW_BITS = {b"gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}  # content-encoding → argument of zlib


class BodyReader:
    """Reads bodies, and counts the bytes of all bodies that the server holds."""

    def __init__(self) -> None:
        self.held_bytes = 0

    async def read(self, headers: Mapping[bytes, bytes], receive: Receive, limits: Limits) -> bytes:
        """Reads the whole body. Call `release` with its length when the response is complete.

        Raises:
            RequestError: The body is too long (413), is compressed in a way that the server does not know (415), does
                not arrive in time (408), or the server holds too many bytes (429).
            ClientDisconnected: The client disconnected before the end of the body.
        """
        encoding = headers.get(b"content-encoding", b"identity").strip().lower()
        if encoding not in (b"identity", b"", *WINDOW_BITS):
            raise RequestError(
                "the body has an unknown content-encoding; send it without one, or use gzip or deflate",
                status=415,
                code="encoding",
            )
        size, body = 0, b""
        try:
            async with asyncio.timeout(limits.body_seconds):
                body = await self._receive(headers, receive, limits)
        except TimeoutError:
            raise RequestError(
                f"the body did not arrive within {limits.body_seconds:g} s; send the request again",
                status=408,
                code="timeout",
            ) from None
        if encoding in WINDOW_BITS:
            size = len(body)
            try:
                body = _decompress(body, encoding, limits.body_bytes)
                self._hold(len(body), limits)
            finally:
                self.release(size)
        return body

    def release(self, size: int) -> None:
        """The server no longer holds `size` bytes."""
        self.held_bytes -= size

    async def _receive(self, headers: Mapping[bytes, bytes], receive: Receive, limits: Limits) -> bytes:
        """The body as it was sent; its bytes are held."""
        declared = headers.get(b"content-length", b"")
        too_long = declared.isdigit() and int(declared) > limits.body_bytes
        parts: list[bytes] = []
        size, held, more = 0, 0, True
        try:
            while more and size <= limits.body_bytes + (MAX_DISCARDED_BYTES if too_long else 0):
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnected
                part = message.get("body", b"")
                size += len(part)
                too_long |= size > limits.body_bytes
                if not too_long:
                    self._hold(len(part), limits)
                    held += len(part)
                    parts.append(part)
                more = message.get("more_body", False)
            if too_long:
                raise _too_long(limits.body_bytes)
        except BaseException:
            self.release(held)
            raise
        return b"".join(parts)

    def _hold(self, size: int, limits: Limits) -> None:
        if self.held_bytes + size > limits.all_bodies_bytes:
            raise RequestError(
                "the server holds too many requests; try again in 5 s", status=429, code="overloaded", retry_after=5
            )
        self.held_bytes += size


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that yields a body that has been read."""
    left = [body]

    async def receive_again() -> Message:
        return {"type": "http.request", "body": left.pop(), "more_body": False} if left else await receive()

    return receive_again


def _decompress(body: bytes, encoding: bytes, most: int) -> bytes:
    """The decompressed body, of one or more members; stops after `most` bytes."""
    out = b""
    for _ in range(MAX_MEMBERS):
        decoder = zlib.decompressobj(WINDOW_BITS[encoding])
        try:
            out += decoder.decompress(body, most + 1 - len(out))
        except zlib.error:
            raise RequestError(
                f"the body is not {encoding.decode()} data, which its content-encoding names; correct one of them",
                code="encoding",
            ) from None
        if len(out) > most:
            raise _too_long(most)
        if not decoder.eof:
            raise RequestError("the compressed body ends too early; send all of it", code="encoding")
        body = decoder.unused_data
        if not body:
            return out
    raise RequestError(f"the compressed body has more than {MAX_MEMBERS} members; send one", code="encoding")


def _too_long(most: int) -> RequestError:
    return RequestError(f"the body is longer than the allowed {most} bytes; shorten it", status=413, code="too_long")
