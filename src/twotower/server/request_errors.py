"""The errors that clients get, and how the engine's errors become them."""

from __future__ import annotations

from twotower.errors import ArgumentError, TwoTowerError


class ClientDisconnected(Exception):
    """The client closed its connection before its answer was complete."""


class RequestError(Exception):
    """Something a client can mend, or has to wait for: an HTTP status and a line that says what, which and how."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, object]:
        """As the published API says it."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def request_error(error: Exception, field: str | None = None) -> RequestError:
    """The client's form of an error that the engine raised. field: the request's field that sets the parameter which
    an `ArgumentError` is about."""
    if isinstance(error, ArgumentError):
        # A format's error is about a part of the field, and names that part alone.
        message = f"{field}: {error}" if field == "response_format" else str(error)
        return RequestError(message, param=field)
    if isinstance(error, TwoTowerError):
        return RequestError(str(error), status=503, code="engine", retry_after=5)
    return RequestError(f"the request failed: {type(error).__name__}", status=500, code="failed")
