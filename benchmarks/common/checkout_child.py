"""One side of `overhead.py`: a process with the `twotower` of one checkout, which runs cases on request.

Reads one JSON object a line from stdin and answers each with one line on stdout. Uses public names only, so that it
works with older commits too.

    {"mode": "ar", "rows": 1, "prompt": 0, "tokens": 128, "times": 1}
    → {"seconds": 0.06, "texts": [[…]], "prompt": 16, "verbs": {"extend": {"calls": 128, "seconds": 0.05}}}

prompt: tokens of each prompt (0: a sentence). times: number of runs in one measurement. verbs: only with --profile;
with --profile kernels, the calls of C++ kernels.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import inspect
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import twotower

SENTENCES = (
    "User: I want to book a table for two in San Jose.\nAssistant:",
    "User: I need a taxi to the airport.\nAssistant:",
    "User: Can you find me a doctor in Oakland?\nAssistant:",
    "User: Hi, I would like to see a movie tonight.\nAssistant:",
    "User: I am looking for a place to stay in London next week.\nAssistant:",
    "User: What is the weather like in San Francisco today?\nAssistant:",
    "User: Please play a song by Lady Gaga.\nAssistant:",
    "User: I want to rent a car from Monday to Friday.\nAssistant:",
)
OPTIONS: dict[str, dict[str, Any]] = {
    "ar": {},
    "verified": {"block_size": 16, "draft_steps": 1},
    "diffusion": {"block_size": 16, "confidence_threshold": 0.8},
}
VERBS = ("prefill", "extend", "denoise")
COMPILED = ("ar_steps", "read", "fill_blocks")  # one call of these runs one pass or several
SHORT = 256  # texts up to this length share an engine, whose prefix cache stores only longer prompts

Texts = list[list[int]]


class VerbClock:
    """Time spent in the verbs of the towers. A verb that another verb calls counts as part of the outer verb."""

    def __init__(self) -> None:
        self.depth = 0
        self.found: dict[str, dict[str, float]] = {}

    def wrap_all(self) -> None:
        """Wraps the verbs of every class of `twotower` that has them, in any module of the checkout."""
        modules = [module for name, module in sys.modules.items() if name.startswith("twotower")]
        classes = {value for module in modules for value in vars(module).values() if inspect.isclass(value)}
        for owner in classes:
            if {"extend", "denoise"} <= vars(owner).keys() or set(COMPILED) <= vars(owner).keys():
                for verb in VERBS + COMPILED:
                    if verb in vars(owner):
                        setattr(owner, verb, self._timed(verb, vars(owner)[verb]))

    def wrap_kernels(self) -> None:
        """Wraps the function that calls a C++ kernel, in every module of the checkout that has imported it."""
        kernels = importlib.import_module("twotower.ops.cpu.kernels")
        real, timed = kernels.call, self._timed("kernels", kernels.call)
        for module in [module for name, module in sys.modules.items() if name.startswith("twotower")]:
            if getattr(module, "call", None) is real:
                setattr(module, "call", timed)  # noqa: B010

    def _timed(self, verb: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.depth:
                return call(*args, **kwargs)
            self.depth += 1
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                own = self.found.setdefault(verb, {"calls": 0, "seconds": 0.0})
                own["seconds"] += time.perf_counter() - started
                own["calls"] += 1
                self.depth -= 1

        return timed


class Side:
    """The model of this checkout with one entry point."""

    def __init__(self, source: str, entry: str) -> None:
        self.model = twotower.TwoTowerForCausalLM.from_pretrained(source, dtype="float32")
        self.model.pack()
        self.entry = entry
        self.engines: dict[int, Any] = {}
        self.sentences: Texts = [self.model.tokenizer(text)["input_ids"] for text in SENTENCES]

    def prompts(self, rows: int, length: int, tokens: int) -> Texts:
        """Sentences, or prompts of that many tokens, made of sentences; at most the context window."""
        if not length:
            return (self.sentences * (rows // len(self.sentences) + 1))[:rows]
        length = min(length, self.model.config.max_position_embeddings - tokens)
        joined = [token for sentence in self.sentences for token in sentence]
        joined *= length // len(joined) + 2
        return [joined[row : row + length] for row in range(rows)]

    def run_of(self, mode: str, prompts: Texts, tokens: int) -> Callable[[], Texts]:
        """A callable that generates once. Objects that a caller would keep between calls are made here, untimed."""
        entry = self._through_engine if self.entry == "engine" else self._generate
        return entry(mode, prompts, tokens)

    def _generate(self, mode: str, prompts: Texts, tokens: int) -> Callable[[], Texts]:
        name = {"diffusion": "generate_mask_diffusion"}.get(mode, f"generate_{mode}")
        method = getattr(self.model, name)
        return lambda: method(prompts, max_new_tokens=tokens, seed=0, **OPTIONS[mode])[:, -tokens:].tolist()

    def _through_engine(self, mode: str, prompts: Texts, tokens: int) -> Callable[[], Texts]:
        params = twotower.GenerationParams(mode=mode, max_new_tokens=tokens, seed=0, **OPTIONS[mode])
        requests = [twotower.Request(prompt, params) for prompt in prompts]
        length = max(map(len, prompts)) + tokens
        rows = len(prompts)
        if length > SHORT:  # a new engine, because the prefix cache would skip a prompt of the last call
            engine = twotower.LLM(self.model, rows=rows, length=length)
        else:
            engine = self.engines[rows] = self.engines.get(rows) or twotower.LLM(self.model, rows=rows, length=SHORT)
        return lambda: [list(result.tokens) for result in engine.generate(requests)]


def answer(side: Side, clock: VerbClock | None, asked: dict[str, Any]) -> dict[str, Any]:
    """Runs one case."""
    prompts = side.prompts(asked["rows"], asked["prompt"], asked["tokens"])
    run = side.run_of(asked["mode"], prompts, asked["tokens"])
    if clock is not None:
        clock.found.clear()
    started = time.perf_counter()
    for _ in range(asked["times"]):
        texts = run()
    seconds = (time.perf_counter() - started) / asked["times"]
    found: dict[str, Any] = {"seconds": seconds, "texts": texts, "prompt": max(map(len, prompts))}
    if clock is not None:
        parts = clock.found.items()
        found["verbs"] = {verb: {k: v / asked["times"] for k, v in own.items()} for verb, own in parts}
    return found


def main() -> None:
    """Answers requests until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None)
    parser.add_argument("--entry", choices=("generate", "engine"), required=True)
    parser.add_argument("--profile", choices=("verbs", "kernels"), default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    side = Side(arguments.model or str(twotower.bundled_model()), arguments.entry)
    clock = None
    if arguments.profile is not None:
        clock = VerbClock()
        side.run_of("diffusion", side.prompts(1, 0, 1), 1)()  # imports all modules before the first measurement
        clock.wrap_kernels() if arguments.profile == "kernels" else clock.wrap_all()
    gc.collect()
    gc.freeze()
    print(json.dumps({"package": str(Path(twotower.__file__).parent)}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(side, clock, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
