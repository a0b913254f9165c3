"""The page at `/`: static files of this folder. They need no build step and load nothing from other hosts."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse

FOLDER = Path(__file__).parent
MEDIA_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
)


def add_page(app: FastAPI) -> None:
    """Adds a route for each file; the path of `index.html` is `/`."""
    for file in sorted(FOLDER.iterdir()):
        if file.suffix in MEDIA_TYPES:
            _add(app, "/" if file.name == "index.html" else f"/{file.name}", file)


def _add(app: FastAPI, path: str, file: Path) -> None:
    headers = {
        "content-security-policy": CONTENT_SECURITY_POLICY,
        "x-content-type-options": "nosniff",
        "cache-control": "no-cache",
    }

    @app.get(path, include_in_schema=False)
    async def serve() -> FileResponse:
        return FileResponse(file, media_type=MEDIA_TYPES[file.suffix], headers=headers)
