"""Fields of clients without effect here: their neutral values, and what to do instead of the fields that are refused.

`neutral_fields.json` has the fields of the `openai` package, which `tools/generate_fields.py` writes, and the fields
and defaults of vLLM's request models at one commit.
"""

from __future__ import annotations

import json
from contextvars import ContextVar
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("neutral_fields.json")
strict_fields: ContextVar[bool] = ContextVar("strict_fields", default=False)  # of `serve --strict-fields`

# Field of the OpenAI API that is not supported → the values that turn it off, beside null. Also with strict fields.
UNSUPPORTED_FIELDS: dict[str, tuple[object, ...]] = {
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (False, True),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "web_search_options": (),
    "verbosity": (),
    "prompt_cache_key": (),
    "safety_identifier": (),
}
# Fields without effect on the text, accepted with any value.
WITHOUT_EFFECT = frozenset(
    {
        *("store", "metadata", "service_tier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
        "safety_identifier",  # of the OpenAI API
        *("priority", "request_id", "session_id", "stream_interval", "return_token_offsets", "return_mm_kwargs"),
        *("media_io_kwargs", "mm_processor_kwargs", "routed_experts_prompt_start"),  # of vLLM
        "cache_prompt",  # of llama.cpp
    }
)
# Neutral values beside null and the defaults of vLLM.
OTHER_NEUTRAL: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "documents": ([],),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "return_prompt_text": (False,),
    "thinking_token_budget": (-1,),
    "truncate_prompt_tokens": (-1,),
    "truncation_side": ("left", "right"),  # without truncate_prompt_tokens, no effect
    "vllm_xargs": ({},),
    "watermarking": (False,),
}
# What to do instead of a field that is refused; else: omit it.
REMEDIES = {
    "cache_salt": "all clients share one prefix cache, so omit it",
    "chat_template": "start the server with --chat-template, or omit it",
    "documents": "put the documents into messages",
    "function_call": "it is an old field; use tool_choice",
    "functions": "it is an old field; use tools",
    "prediction": "use mode verified, which drafts by itself",
    "prompt_embeds": "send prompt as text or token ids",
    "suffix": "the model does not fill in the middle, so put all text into prompt",
    "truncate_prompt_tokens": "shorten the prompt",
    "web_search_options": "give the model a function in tools",
}


@cache
def _facts() -> tuple[dict[str, dict[str, list[str]]], dict[str, dict[str, object]]]:
    found = json.loads(FILE.read_text("utf-8"))
    return {name: part for name, part in found["openai"].items() if name != "version"}, found["vllm"]


@cache
def body_fields() -> frozenset[str]:
    """The fields of a body of either route, in the OpenAI API and in vLLM, without the prompt."""
    openai, vllm = _facts()
    routes = ("completions", "chat/completions")
    names = {name for route in routes for name in (*openai[route]["body"], *vllm[route])}
    return frozenset(names - {"messages", "prompt"})


@cache
def nested_fields() -> frozenset[str]:
    """The fields of objects in a body, in the OpenAI API and in vLLM."""
    openai, vllm = _facts()
    names = {name for part in openai.values() for name in part["nested"]}
    inner = (part for part in vllm["nested"].values() if isinstance(part, dict))
    return frozenset(names.union(*inner))


@cache
def neutral_values(route: str) -> dict[str, tuple[object, ...]]:
    """Field of a body that is not served → its neutral values, beside null. route: its path below /v1."""
    _, vllm = _facts()
    defaults = vllm.get(route, {})
    return {
        name: (*OTHER_NEUTRAL.get(name, ()), *(() if defaults.get(name) is None else (defaults[name],)))
        for name in body_fields()
    }
