"""Errors in HTTP responses, and their conversion from errors of the engine."""

from __future__ import annotations

from twotower.decoding.output import Generation
from twotower.errors import ArgumentError, LengthError, TwoTowerError

CONSTRAINT_FIELDS = (
    "response_format",
    "tool_choice",
    "tools",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "grammar",
    "json_schema",
)
MAX_MESSAGE_LENGTH = 1000  # a message may repeat a part of the request


class ClientDisconnected(Exception):
    """The client disconnected before the response was complete."""


class RequestError(Exception):
    """An error for the client. message: one line with the value, what is allowed and the remedy."""

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
        message = message if len(message) <= MAX_MESSAGE_LENGTH else message[: MAX_MESSAGE_LENGTH - 1] + "…"
        self.message, self.status, self.param, self.code = message, status, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, object]:
        """The JSON body, in the form of the OpenAI API."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def request_error(error: Exception, field: str | None = None) -> RequestError:
    """Converts an error of the engine. field: the request's field for the parameter of an `ArgumentError`."""
    if isinstance(error, ArgumentError):
        # The message about a format names only a part of the field.
        message = f"{field}: {error}" if field in CONSTRAINT_FIELDS else str(error)
        return RequestError(message, param=field)
    if isinstance(error, TwoTowerError):
        return RequestError(str(error), status=503, code="engine", retry_after=5)
    return RequestError(f"the request failed: {type(error).__name__}", status=500, code="failed")


def result_error(result: Generation, constraint_field: str) -> RequestError:
    """The error of a result with finish_reason "error": of the client if a parameter of the request caused it.

    constraint_field: the field of the request that constrains the text.
    """
    if result.error_param:
        field = constraint_field if result.error_param == "constraint" else None
        return RequestError(result.error if field is None else f"{field}: {result.error}", param=field)
    return RequestError(f"the request failed: {result.error}", status=500, code="failed")


def length_error(error: LengthError, prompt_field: str, length_field: str | None) -> RequestError:
    """Converts an error about the length of a text to the names of the request's fields."""
    words = f"{prompt_field} has {error.prompt_tokens} tokens"
    if length_field is None:
        return context_error(error.most, f"{words}, longer than that; shorten it", prompt_field)
    words += f" and {length_field} is {error.new_tokens}, together longer than that; shorten one of them"
    return context_error(error.most, words, length_field)


def context_error(most: int, words: str, field: str | None) -> RequestError:
    """The error of a text that is longer than `most` tokens. Clients match its code or its first words."""
    message = f"This model's maximum context length is {most} tokens. {words}"
    return RequestError(message, param=field, code="context_length_exceeded")
