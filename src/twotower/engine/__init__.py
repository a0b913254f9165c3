"""Many requests at once, each in its own mode: scheduled at the grain of one denoising step."""

from twotower.engine.asynchronous import AsyncLLM
from twotower.engine.engine import LLM
from twotower.engine.request import Request

__all__ = ["LLM", "AsyncLLM", "Request"]
