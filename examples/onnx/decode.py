"""Write text with the files of `twotower export --to onnx`: onnxruntime and numpy, without torch and this package.

Run: python examples/onnx/decode.py DIR ["A prompt"] [ar|diffusion] [NEW_TOKENS]
Needs: pip install onnxruntime tokenizers
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
State = dict[str, Array]


class Passes:
    """The passes of a model. A state is a dictionary of arrays; no pass changes the state that it reads."""

    def __init__(self, info: Mapping[str, Any], sessions: Mapping[str, Any]) -> None:
        """info: the contents of passes.json. sessions: an onnxruntime.InferenceSession for each file."""
        self.info, self.sessions = info, sessions
        self.longest = info["longest_pass"] or 256
        self.empty = {name: np.zeros(shape, np.float32) for name, shape in info["state"].items()}
        self.has_prefix = "prefix" in info["context"]["inputs"]
        self.count = 0  # passes so far

    @classmethod
    def load(cls, directory: Path) -> Passes:
        """The passes in a directory."""
        import onnxruntime

        info = json.loads((directory / "passes.json").read_text(encoding="utf-8"))
        files = [info[name]["file"] for name in ("context", "denoiser") if info[name]]
        files += [info["draft_head"]] if info["draft_head"] else []
        return cls(info, {file: onnxruntime.InferenceSession(directory / file) for file in {*files}})

    def read(self, tokens: list[int], state: State, prefix: int | None = None) -> tuple[Array, State]:
        """A pass of the context tower over tokens → logits (L, V), and the state after the first `prefix` tokens.

        A prompt that is longer than the longest pass is read in several. prefix: None: all tokens.
        """
        part, rest = tokens[: self.longest], tokens[self.longest :]
        inputs = {"tokens": np.array([part])} | state
        if self.has_prefix:
            inputs["prefix"] = np.array([len(part) if prefix is None else prefix])
        logits, *after = self.sessions[self.info["context"]["file"]].run(None, inputs)
        self.count += 1
        new = dict(zip(state, after, strict=True))
        return self.read(rest, new) if rest else (logits[0], new)

    def denoise(self, block: list[int], known: Array, t: float, state: State) -> Array:
        """A pass of the denoiser over a block → logits (L, V). known: which tokens are final. t: the masked share."""
        own = self.info["denoiser"]
        possible = {"tokens": np.array([block]), "t": np.array([t], np.float32)}
        # Adapters that act everywhere have no tokens before the first mask.
        possible["prefix"] = np.array([0 if self.info["adapters"] else int(np.append(known, False).argmin())])
        inputs = {name: possible[name] for name in own["inputs"]} | {name: state[name] for name in own["state"]}
        self.count += 1
        logits: Array = self.sessions[own["file"]].run(None, inputs)[0][0]
        return logits

    def term(self, token: int) -> Array:
        """What the draft head adds to the logits (V,) of the mask after a token; 0 without a draft head."""
        if self.info["draft_head"] is None:
            return np.zeros(1, np.float32)
        terms: Array = self.sessions[self.info["draft_head"]].run(None, {"tokens": np.array([token])})[0]
        term: Array = terms[0]
        return term


def best(logits: Array, mask: int) -> tuple[Array, Array]:
    """logits (…, V) → the likeliest tokens but the mask token, and their probabilities."""
    logits = logits.copy()
    logits[..., mask] = -np.inf
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return logits.argmax(-1), odds.max(-1) / odds.sum(-1)


def ar(passes: Passes, prompt: list[int], new: int) -> list[int]:
    """`new` greedy tokens of the autoregressive model."""
    text: list[int] = []
    logits, state = passes.read(prompt, passes.empty)
    while True:
        text.append(int(logits[-1].argmax()))
        if len(text) == new or text[-1] in passes.info["eos_token_ids"]:
            return text
        logits, state = passes.read(text[-1:], state)


def diffusion(passes: Passes, prompt: list[int], new: int, threshold: float = 0.9) -> list[int]:
    """`new` tokens in blocks; a pass of the denoiser makes the tokens final whose confidence is above a threshold."""
    info = passes.info
    if info["adapters"] == "masks":
        return one_pass(passes, prompt, new, threshold)
    size, shift, mask = info["block_size"], info["prediction_shift"], info["mask_token_id"]
    pending = prompt[-1:] if shift else []  # a known token that begins a block; it is not in the state yet
    read, text = prompt[: len(prompt) - len(pending)], list[int]()
    state = passes.empty
    if read:
        logits, state = passes.read(read, state)
        if info["first_from_ar"]:
            pending = [int(logits[-1].argmax())]
            text += pending
    while len(text) < new and not {*text} & {*info["eos_token_ids"]}:
        block = np.array(pending + [mask] * (size - len(pending)))
        known = np.arange(size) < len(pending)
        for step in range(size):
            if known.all():
                break
            logits = passes.denoise(block.tolist(), known, float((~known).sum()) / (size - shift), state)
            logits = np.concatenate([logits[:shift], logits[: size - shift]])  # at each input, those that predict it
            if info["draft_head"]:
                tokens, sure = drawn(passes, logits, block, known, (prompt + text)[-1])
                order = (~known).nonzero()[0]  # commits are from the left
                above = np.cumprod(sure[order] > threshold).sum()
            else:
                tokens, sure = best(logits, mask)
                sure[known] = -1
                order = np.argsort(-sure, kind="stable")
                above = (sure > threshold).sum()
            order = order[: max(math.ceil((~known).sum() / (size - step)), int(above))]
            block[order], known[order] = tokens[order], True
        text += block[len(pending) :].tolist()
        logits, state = passes.read(block.tolist(), state)
        if pending:
            pending = [int(logits[-1].argmax())]
            text += pending
    return ended(text[:new], info["eos_token_ids"])


def drawn(passes: Passes, logits: Array, block: Array, known: Array, last: int) -> tuple[Array, Array]:
    """The tokens of a block and their probabilities, drawn from the left with the draft head. last: of the text."""
    tokens, sure = block.copy(), np.zeros(len(block), np.float32)
    for place in (~known).nonzero()[0]:
        row = logits[place] + passes.term(int(tokens[place - 1]) if place else last)
        tokens[place], sure[place] = best(row, passes.info["mask_token_id"])
    return tokens, sure


def one_pass(passes: Passes, prompt: list[int], new: int, threshold: float) -> list[int]:
    """The same with adapters that act at masks: a pass reads the last tokens and chooses the next ones."""
    info = passes.info
    text: list[int] = []
    block, state = prompt[-1:], passes.empty
    if prompt[:-1]:
        state = passes.read(prompt[:-1], state)[1]
    rounds = 0
    while len(text) < new and not {*text} & {*info["eos_token_ids"]}:
        masks = max(min(width(len(block), len(text), rounds, info["block_size"]) - len(block), new - len(text) - 1), 0)
        rounds += 1
        logits, state = passes.read(block + [info["mask_token_id"]] * masks, state, len(block))
        found = [int(logits[len(block) - 1].argmax())]  # of the autoregressive model
        for row in logits[len(block) :]:
            token, sure = best(row + passes.term(found[-1]), info["mask_token_id"])
            if sure <= threshold:
                break
            found.append(int(token))
        text += found
        block = found
    return ended(text[:new], info["eos_token_ids"])


def width(known: int, tokens: int, rounds: int, size: int) -> int:
    """The positions of a pass that reads `known` tokens: mask i pays while r^i > 0.2 (docs/decoding.md).

    r is the share of the text's tokens that masks brought; each of the rounds so far brought one token without a mask.
    """
    rate, masks = (8 + tokens - rounds) / (10 + tokens), 1
    while known + masks < size and rate ** (masks + 1) > 0.2:
        masks += 1
    return min(known + masks, size)


def ended(text: list[int], ends: list[int]) -> list[int]:
    """The text up to its first end token."""
    return next((text[: place + 1] for place, token in enumerate(text) if token in ends), text)


if __name__ == "__main__":
    from tokenizers import Tokenizer

    folder, *rest = sys.argv[1:] or sys.exit(__doc__)
    prompt, mode, new = (*rest, *("User: I need a taxi.\nAssistant:", "diffusion", "64")[len(rest) :])
    tokenizer, model = Tokenizer.from_file(str(Path(folder) / "tokenizer.json")), Passes.load(Path(folder))
    write = {"ar": ar, "diffusion": diffusion}[mode]
    out = write(model, tokenizer.encode(prompt).ids, int(new))
    print(tokenizer.decode(out))
    print(f"{len(out)} tokens in {model.count} passes", file=sys.stderr)
