"""The log: one JSON object per line on stderr. Prompts are logged only with `--log-prompts`."""

from __future__ import annotations

import json
import logging
import sys
import time

LOGGER = logging.getLogger("twotower.server")


def log_event(event: str, level: int = logging.INFO, /, **fields: object) -> None:
    """Writes a log line with the time, the level, the event and its fields."""
    if LOGGER.isEnabledFor(level):
        now = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
        head = {"time": f"{now}Z", "level": logging.getLevelName(level).lower(), "event": event}
        LOGGER.log(level, json.dumps(head | fields, default=str))


def configure_logging() -> None:
    """Sends the log of this package, and warnings of uvicorn, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOGGER.handlers[:] = [handler]
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    uvicorn_handler = logging.StreamHandler(sys.stderr)
    uvicorn_handler.setFormatter(_JsonFormatter())
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers[:] = [uvicorn_handler]
        logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger(name).propagate = False


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        fields = {"time": now, "level": record.levelname.lower(), "event": record.name, "message": record.getMessage()}
        if record.exc_info:
            fields["trace"] = self.formatException(record.exc_info)
        return json.dumps(fields)
