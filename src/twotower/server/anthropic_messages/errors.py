"""Errors in the form of the Anthropic API."""

from __future__ import annotations

from twotower.server.request_errors import RequestError

KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_body(error: RequestError, request_id: str) -> dict[str, object]:
    """The JSON body of an error."""
    kind = KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": request_id}
