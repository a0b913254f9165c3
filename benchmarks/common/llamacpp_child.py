"""llama.cpp in a process of its own, for `peers.py`: needs the packages `llama-cpp-python` and `numpy` only.

    PYTHON llamacpp_child.py MODEL.gguf THREADS CONTEXT

Reads one JSON object a line from stdin and answers each with one line on stdout. It calls llama.cpp's C functions and
chooses the best token with numpy, so that nothing of the Python package's own sampling is timed.

    {"prompt": [1, 2, 3], "tokens": 64} → {"seconds": 0.4, "tokens": [17, …]}
    {"prompt": [1, 2, 3], "check": [4, 5]} → {"seconds": 0.1}, one pass over "check" with the logits of all its tokens
"""

from __future__ import annotations

import json
import sys
import time

import llama_cpp
import numpy as np


class Model:
    """A model and a context of llama.cpp."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        assert self.model, f"llama.cpp cannot read {path}"
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = context, context, context
        options.n_threads = options.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def best(self, tokens: list[int]) -> int:
        """Appends tokens to the text → the best next token."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        assert llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(tokens))) == 0
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, -1), shape=(self.vocab,))
        return int(logits.argmax())

    def check(self, prompt: list[int], tokens: list[int]) -> float:
        """The seconds of a pass over tokens behind a prompt; a first such pass is not counted."""
        memory = llama_cpp.llama_get_memory(self.context)
        llama_cpp.llama_memory_clear(memory, True)
        self.best(prompt)
        batch, taken = llama_cpp.llama_batch_init(len(tokens), 0, 1), 0.0
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, len(prompt) + i, True
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        batch.n_tokens = len(tokens)
        for _ in range(2):
            assert llama_cpp.llama_memory_seq_rm(memory, 0, len(prompt), -1)
            started = time.perf_counter()
            assert llama_cpp.llama_decode(self.context, batch) == 0
            llama_cpp.llama_get_logits_ith(self.context, -1)  # waits for the pass
            taken = time.perf_counter() - started
        llama_cpp.llama_batch_free(batch)
        return taken

    def generate(self, prompt: list[int], count: int) -> list[int]:
        """The greedy continuation of a prompt."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        out = [self.best(prompt)]
        while len(out) < count:
            out.append(self.best(out[-1:]))
        return out


def main() -> None:
    path, threads, context = sys.argv[1:]
    llama_cpp.llama_log_set(SILENT, llama_cpp.c_void_p(0) if hasattr(llama_cpp, "c_void_p") else None)
    llama_cpp.llama_backend_init()
    model = Model(path, int(threads), int(context))
    for line in sys.stdin:
        request = json.loads(line)
        if "check" in request:
            answer = {"seconds": model.check(request["prompt"], request["check"])}
        else:
            started = time.perf_counter()
            tokens = model.generate(request["prompt"], request["tokens"])
            answer = {"seconds": time.perf_counter() - started, "tokens": tokens}
        print(json.dumps(answer), flush=True)


@llama_cpp.llama_log_callback
def SILENT(level: int, text: bytes, data: object) -> None:
    """Drops llama.cpp's messages."""


if __name__ == "__main__":
    main()
