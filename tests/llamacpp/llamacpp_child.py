"""llama.cpp in a process of its own, which needs the packages `llama-cpp-python` and `numpy` only.

    PYTHON llamacpp_child.py MODEL.gguf CONTEXT PRECISION

PRECISION: "default", keys and values in f16, or "exact", everything in f32 and no flash attention, which rounds scores.
Reads one JSON object a line from stdin and answers each with one line on stdout:

    {"prompt": [1, 2, 3], "new": 64} → {"tokens": [17, …], "margins": [0.5, …]}, greedy; margins: best − second logit
    {"prompt": [1, 2, 3]} → {"logits": [0.1, …]}, those of the next token
    {"texts": ["…"]} → {"ids": [[1, 17, …], …], "texts": ["…", …]}: tokens of each text, and their text
"""

from __future__ import annotations

import ctypes
import json
import sys

import llama_cpp
import numpy as np


class Model:
    """A model and a context of llama.cpp, with one thread."""

    def __init__(self, path: str, context: int, exact: bool) -> None:
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        assert self.model, f"llama.cpp cannot read {path}"
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = context, context, context
        options.n_threads = options.n_threads_batch = 1
        if exact:
            options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32
            options.flash_attn_type = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        assert self.context, f"llama.cpp cannot run {path}"
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.size = llama_cpp.llama_vocab_n_tokens(self.vocab)

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Appends tokens to the text → the logits of the next one, which the next call overwrites."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        assert llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(tokens))) == 0
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, -1), shape=(self.size,))

    def clear(self) -> None:
        """Begins a new text."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def generate(self, prompt: list[int], new: int) -> dict[str, list[float]]:
        """The greedy continuation of a prompt."""
        self.clear()
        tokens, margins, given = [], [], prompt
        while len(tokens) < new:
            logits = self.logits(given)
            second, best = np.argpartition(logits, -2)[-2:]
            best, second = (best, second) if logits[best] >= logits[second] else (second, best)
            tokens.append(int(logits.argmax()))
            margins.append(float(logits[best] - logits[second]))
            given = tokens[-1:]
        return {"tokens": tokens, "margins": margins}

    def tokenize(self, text: str) -> list[int]:
        data = text.encode()
        array = (llama_cpp.llama_token * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(self.vocab, data, len(data), array, len(array), True, False)
        assert count >= 0
        return list(array[:count])

    def detokenize(self, ids: list[int]) -> str:
        array = (llama_cpp.llama_token * len(ids))(*ids)
        buffer = ctypes.create_string_buffer(64 * len(ids) + 64)
        count = llama_cpp.llama_detokenize(self.vocab, array, len(ids), buffer, len(buffer), True, False)
        assert count >= 0
        return buffer.raw[:count].decode(errors="replace")


@llama_cpp.llama_log_callback
def SILENT(level: int, text: bytes, data: object) -> None:
    """Drops llama.cpp's messages."""


def main() -> None:
    path, context, precision = sys.argv[1:]
    llama_cpp.llama_log_set(SILENT, None)
    llama_cpp.llama_backend_init()
    model = Model(path, int(context), precision == "exact")
    for line in sys.stdin:
        request = json.loads(line)
        if "texts" in request:
            ids = [model.tokenize(text) for text in request["texts"]]
            answer: object = {"ids": ids, "texts": [model.detokenize(each) for each in ids]}
        elif "new" in request:
            answer = model.generate(request["prompt"], request["new"])
        else:
            model.clear()
            answer = {"logits": model.logits(request["prompt"]).tolist()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
