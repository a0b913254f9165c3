"""Whether new requests can be expected to succeed, for load balancers."""

from __future__ import annotations

from collections.abc import Mapping

from twotower.decoding.output import Event
from twotower.decoding.params import GenerationParams
from twotower.engine import AsyncLLM, Request
from twotower.errors import TwoTowerError
from twotower.model_loading import eos_of

FAILURES = 3  # requests in a row that ended with an error


class Readiness:
    """Checks an engine. After several failures in a row, a test request of one token shows whether requests succeed.

    prompt: token ids of the test request. decoding: its parameters. Only the thread of the event loop may use this.
    """

    def __init__(self, engine: AsyncLLM, prompt: list[int], decoding: Mapping[str, object]) -> None:
        model = engine.llm.model
        mode = dict(decoding) if model.has_denoiser else {"mode": "ar"}
        ids = {"eos_token_id": eos_of(model), "mask_token_id": model.config.mask_token}
        params = GenerationParams.from_mapping(ids | mode | {"max_new_tokens": 1, "seed": 0})
        self.engine = engine
        self._request = Request(prompt, params)
        self._testing = False

    def problem(self) -> str:
        """Why requests fail ("": they do not, as far as is known). Starts a test request if the last requests failed.

        A test request that succeeds ends the series of failures, so a later call returns "".
        """
        if not self.engine.alive:
            return f"{self.engine.failure}; restart the server"
        stats = self.engine.stats
        if stats.failures < FAILURES:
            return ""
        self._test()
        words = f"the last {stats.failures} requests failed, the last one with {stats.last_failure}"
        return f"{words}; the server tests itself and is ready when a request of one token succeeds"

    def _test(self) -> None:
        if self._testing:
            return

        def note(event: Event | Exception) -> None:
            if isinstance(event, Exception) or event.result is not None:
                self._testing = False
                cancel()

        try:
            cancel = self.engine.subscribe(self._request, note)
        except TwoTowerError:  # the engine has ended; the next check says so
            return
        self._testing = True
