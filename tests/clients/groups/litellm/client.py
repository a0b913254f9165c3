"""litellm: its own exceptions for a text that is too long, an unknown model and a field that is refused."""

import contextlib
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no request to another host

import litellm

litellm.suppress_debug_info = True
ASK = {"role": "user", "content": "Is Ulm a city?"}
common = {"model": "openai/small", "api_base": sys.argv[1], "api_key": "x", "messages": [ASK], "max_retries": 0}


def raised(kind, **fields):
    """Asserts that a call raises an exception of exactly this kind, and returns its text."""
    found = None
    try:
        litellm.completion(**(common | fields))
    except Exception as error:
        found = error
    assert type(found) is kind, (type(found), found)
    return str(found)


assert litellm.completion(**common, max_tokens=40).choices[0].message.content
raised(litellm.ContextWindowExceededError, messages=[ASK | {"content": "word " * 6000}])
raised(litellm.ContextWindowExceededError, max_tokens=100_000)
raised(litellm.NotFoundError, model="openai/other")
assert "mode" in raised(litellm.BadRequestError, extra_body={"mode": "fast"})
router = litellm.Router([{"model_name": "m", "litellm_params": {**common, "messages": None}}], num_retries=0)
with contextlib.suppress(litellm.BadRequestError):
    router.completion(model="m", messages=[ASK], extra_body={"use_beam_search": True})
assert router.completion(model="m", messages=[ASK], max_tokens=40).choices[0].message.content  # no cooldown
