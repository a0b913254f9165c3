"""An engine that answers chats with given texts, and forced calls as the real engine does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from twotower import LLM, AsyncLLM, Request
from twotower.decoding.output import Event
from twotower.decoding.sequence_output import SequenceOutput

TOKENS = 3  # of an event


class ScriptedLLM(AsyncLLM):
    """Answers the prompt of a request with `reply(prompt)`, a few tokens in an event.

    A request with a constraint goes to the real engine, because the constraint decides its text. So does a request that
    ignores EOS, because its length decides.
    """

    def __init__(self, llm: LLM, reply: Callable[[str], str]) -> None:
        super().__init__(llm)
        self.reply = reply
        self.prompts: list[str] = []

    def subscribe(self, request: Request, callback: Callable[[Event | Exception], object]) -> Callable[[], None]:
        tokenizer = self.llm.model.tokenizer
        assert tokenizer is not None
        self.prompts.append(tokenizer.decode(request.prompt, skip_special_tokens=False))
        if request.constraint is not None or request.params.ignore_eos:
            return super().subscribe(request, callback)
        text = self.reply(self.prompts[-1])
        left = [*tokenizer(text, add_special_tokens=False)["input_ids"], *request.params.eos_token_id[:1]]
        output = SequenceOutput.of(0, request.params, len(request.prompt), tokenizer)
        loop, canceled = asyncio.get_running_loop(), asyncio.Event()

        def step() -> None:
            if canceled.is_set():
                return
            now = left[:TOKENS]
            del left[:TOKENS]
            callback(output.take(now, [0] * len(now), [1.0] * len(now)))
            if output.running:
                loop.call_soon(step)

        loop.call_soon(step)
        return canceled.set
