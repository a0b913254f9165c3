"""The page at /docs: the routes and fields of the OpenAPI schema. It loads nothing from other hosts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from html import escape

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from twotower.server.page import CONTENT_SECURITY_POLICY

HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>twotower: the API</title>
<link rel="icon" href="icon.svg">
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code { font-family: ui-monospace, monospace; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1.5rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #8884; }
td:nth-child(odd) { white-space: nowrap; }
td:nth-child(even) { overflow-wrap: anywhere; }
</style>
"""


def add_docs_page(app: FastAPI) -> None:
    """Adds the page. It shows the schema of the app as it is at the first request."""
    headers = {"content-security-policy": CONTENT_SECURITY_POLICY, "x-content-type-options": "nosniff"}

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(text(), headers=headers)

    @cache
    def text() -> str:
        return docs_page(app.openapi())


def docs_page(schema: Mapping[str, object]) -> str:
    """The page for an OpenAPI schema."""
    paths, schemas = _part(schema, "paths"), _part(_part(schema, "components"), "schemas")
    parts = [HEAD, "<h1>The API of this server</h1>\n"]
    words = 'The schema for programs is at <a href="openapi.json">openapi.json</a>. The page at <a href="./">/</a>'
    parts.append(f"<p>{words} shows the decoding.</p>\n")
    for path in paths:
        for method, operation in _part(paths, path).items():
            if not isinstance(operation, Mapping):
                continue
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>\n")
            parts.append(f"<p>{escape(str(operation.get('description', '')))}</p>\n")
            if body := _part(operation, "requestBody"):
                content = _part(_part(_part(body, "content"), "application/json"), "schema")
                parts.append(_fields(_part(schemas, _name(content))))
    return "".join(parts) + "</html>\n"


def _fields(schema: Mapping[str, object]) -> str:
    """A table of the fields of a body."""
    needed = schema.get("required", ())
    rows = []
    for name, field in _part(schema, "properties").items():
        assert isinstance(field, Mapping)
        needs = "required" if isinstance(needed, list) and name in needed else ""
        described = escape(str(field.get("description", "")))
        rows.append(f"<tr><td><code>{escape(name)}</code><td>{escape(_kind(field))}<td>{needs}<td>{described}\n")
    return "<table><tr><th>field<th>type<th><th>meaning\n" + "".join(rows) + "</table>\n"


def _kind(field: Mapping[str, object]) -> str:
    """The type of a field in words, without null, which every optional field accepts."""
    if isinstance(choices := field.get("anyOf"), list):
        kinds = [_kind(choice) for choice in choices]
        return " or ".join(dict.fromkeys(kind for kind in kinds if kind != "null"))
    if isinstance(values := field.get("enum"), list):
        return ", ".join(map(str, values))
    if field.get("type") == "array":
        return f"list of {_kind(_part(field, 'items'))}"
    return str(field.get("type") or field.get("const") or _name(field) or "any")


def _name(field: Mapping[str, object]) -> str:
    return str(field.get("$ref", "")).rpartition("/")[2]


def _part(schema: Mapping[str, object], name: str) -> Mapping[str, object]:
    found = schema.get(name)
    return found if isinstance(found, Mapping) else {}
