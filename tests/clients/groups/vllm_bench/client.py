"""The request functions of vLLM's serving benchmark: streamed texts have the asked number of tokens."""

import asyncio
import sys

import aiohttp
from vllm.benchmarks.lib.endpoint_request_func import ASYNC_REQUEST_FUNCS, RequestFuncInput

TOKENS = 12


async def measure(name: str, path: str) -> None:
    asked = RequestFuncInput(
        prompt="Is it warm in Ulm?",
        api_url=f"{sys.argv[1]}{path}",
        prompt_len=8,
        output_len=TOKENS,
        model="small",
        ignore_eos=True,
        extra_body={"repetition_penalty": 1.1, "min_p": 0.01, "mode": "ar"},
    )
    async with aiohttp.ClientSession() as session:
        found = await ASYNC_REQUEST_FUNCS[name](asked, session)
    assert found.success, found.error
    assert found.output_tokens == TOKENS, found
    assert 0 < found.ttft <= found.latency, found


asyncio.run(measure("openai", "/completions"))
asyncio.run(measure("openai-chat", "/chat/completions"))
