"""The message of a request body that does not match its schema, in the terms of JSON and of the request's fields."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from fastapi.exceptions import RequestValidationError

from twotower.server.request_errors import RequestError

SHOWN_LENGTH = 80  # characters of an invalid value that a message repeats


def validation_error(error: RequestValidationError) -> RequestError:
    """One of the errors of a body, in one line.

    If a value fits none of several types, pydantic reports an error for each type. An error about the value itself
    says more than an error about its type, and an error at a deeper place of the body more than another.
    """
    found = max(error.errors(), key=lambda detail: (not _is_type_error(detail), len(detail["loc"])))
    absent = found["type"] in ("missing", "extra_forbidden")
    field, place = _place(found["loc"], error.body, absent)
    match found["type"]:
        case "json_invalid":
            reason = found.get("ctx", {}).get("error", "")
            return RequestError(f"the body is not valid JSON ({reason}); send a JSON object", code="json")
        case "missing" if field is None:
            return RequestError("the body is empty; send a JSON object", code="json")
        case "missing":
            return RequestError(f"{place} is missing; the request needs this field", param=field, code="missing")
        case "extra_forbidden":
            words = f"{place} is an unknown field; omit it, /openapi.json lists the fields"
            return RequestError(words, param=field, code="unsupported")
        case "model_attributes_type" | "dict_type" if field is None:
            return RequestError("the body must be a JSON object with content-type application/json", code="json")
    same_place = [detail for detail in error.errors() if len(detail["loc"]) == len(found["loc"])]
    kinds = [_message(detail) for detail in same_place if _is_type_error(detail)]
    message = " or ".join(dict.fromkeys(kinds)) if _is_type_error(found) else _message(found)
    words = f"{place or 'the body'} is {shown(found['input'])}; it {message}"
    return RequestError(words.replace(" or should be", " or"), param=field, code="invalid")


def _is_type_error(detail: Mapping[str, object]) -> bool:
    return str(detail["type"]).endswith("_type")


def _message(detail: Mapping[str, object]) -> str:
    """Pydantic's message in the words of JSON."""
    words = re.sub(r"^(Value error, |Input |String |List )", "", str(detail["msg"])).replace(" after validation", "")
    words = re.sub(r"a valid dictionary( or (instance|object).*)?$", "an object", words)
    return words.replace("a valid list", "a list")


def _place(location: Sequence[str | int], body: object, absent: bool) -> tuple[str | None, str]:
    """The field of the request, and the path of the value in the body. Names of types in `location` are left out.

    absent: the body lacks the last part.
    """
    names = [part for part in location if part != "body"]
    if not names or not isinstance(names[0], str):
        return None, ""
    path, value = [names[0]], body.get(names[0]) if isinstance(body, dict) else None
    for number, part in enumerate(names[1:], start=2):
        if isinstance(value, list) and isinstance(part, int) and part < len(value):
            path, value = [*path, str(part)], value[part]
        elif isinstance(value, dict) and (part in value or (absent and number == len(names))):
            path, value = [*path, str(part)], value.get(part)
    return names[0], ".".join(path)


def shown(value: object) -> str:
    """A short form of a JSON value for a message."""
    if isinstance(value, str):
        text = json.dumps(value[:SHOWN_LENGTH], ensure_ascii=True)
        return text if len(value) <= SHOWN_LENGTH else text[:-1] + '…"'
    if isinstance(value, dict):
        return "an object" if value else "{}"
    if isinstance(value, list):
        return f"a list of {len(value)} values" if value else "[]"
    text = json.dumps(value)
    return text if len(text) <= SHOWN_LENGTH else text[:SHOWN_LENGTH] + "…"
