"""The decoder: runs many requests together, each in its own mode, scheduled pass by pass."""

from twotower.engine.async_llm import AsyncLLM
from twotower.engine.llm import LLM
from twotower.engine.sequence import Request
from twotower.engine.stats import EngineStats

__all__ = ["LLM", "AsyncLLM", "EngineStats", "Request"]
