"""How fast is AR at batch 1 beside transformers and llama.cpp, with the same weights?

    python benchmarks/peers.py --model DIR [--gguf FILE --peer PYTHON] [--weights float32 --weights bfloat16 …]
        [--threads 2] [--prompt 32] [--tokens 64] [--rounds 7] [--quick] [--json]

--model: a two-tower checkpoint of any family that transformers has. transformers reads the export of its context tower.
--gguf: the GGUF file that the checkpoint was made of (`twotower init --from FILE`). llama.cpp reads a copy of the file
in the weights that are measured: Q8_0 for int8, and Q4_0 for int4 with embeddings and head in Q8_0, so that both sides
read equal bytes of 8-bit and 4-bit weights. Its products round activations to 8 bits too; ours do with -activations.
--peer: a Python with the package llama-cpp-python; llama.cpp runs in a process of it.

Four times: a greedy text after a random prompt, prefill included; one AR step of it; a pass over 16 tokens behind the
prompt with the logits of all of them, as verified decoding checks a draft; and the first token after a prompt of 256.
All sides take turns; figures are medians over rounds, the first round is not counted. Ratios are of the times of one
round.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import click
import torch
from common import gguf_copy
from common.models import random_tokens
from common.program import DIRECTORY, JSON, QUICK, THREADS, publish, start
from common.timing import medians, ratio, seconds
from rich.console import RenderableType
from rich.table import Table
from transformers import AutoModelForCausalLM, DynamicCache

from twotower import TwoTowerForCausalLM, model_loading
from twotower.checkpoint.export import export_one_tower
from twotower.evaluation.machine import machine_facts, machine_summary
from twotower.model.tower import steady_weights

CHILD = Path(__file__).parent / "common" / "llamacpp_child.py"
CHECK = 16  # tokens of a check


class Weights(NamedTuple):
    """Arguments of `load_model`, and llama.cpp's names of the same number of bits: of matrices of layers, of others."""

    dtype: str
    quantization: str
    gguf: str
    gguf_heads: str


WEIGHTS = {
    "float32": Weights("float32", "none", "F32", "F32"),
    "bfloat16": Weights("bfloat16", "none", "BF16", "BF16"),
    "int8": Weights("float32", "int8", "Q8_0", "Q8_0"),
    "int8-activations": Weights("float32", "int8,activations=int8", "Q8_0", "Q8_0"),
    "int4": Weights("float32", "int4", "Q4_0", "Q8_0"),
    "int4-activations": Weights("float32", "int4,activations=int8", "Q4_0", "Q8_0"),
}


class Sizes(NamedTuple):
    """Tokens of the prompt, of the text, and of the long prompt; rounds that count."""

    prompt: int
    tokens: int
    long: int
    rounds: int


class Side(Protocol):
    """One of the programs that are compared."""

    def text(self, prompt: Sequence[int], tokens: int) -> tuple[float, list[int]]:
        """A greedy text → the seconds it took, and the text."""

    def check(self, prompt: Sequence[int], tokens: Sequence[int]) -> float:
        """The seconds of one pass over `tokens` behind a prompt that was read before."""


def timed(call: Callable[[], object]) -> float:
    return seconds(call, torch.device("cpu"))


class Ours:
    def __init__(self, model: TwoTowerForCausalLM) -> None:
        self.model = model

    def text(self, prompt: Sequence[int], tokens: int) -> tuple[float, list[int]]:
        found: list[torch.Tensor] = []
        given = torch.tensor([prompt])
        taken = timed(lambda: found.append(self.model.generate_ar(given, max_new_tokens=tokens, eos_token_id=[])))
        return taken, found[0][0, len(prompt) :].tolist()

    @torch.no_grad()
    def check(self, prompt: Sequence[int], tokens: Sequence[int]) -> float:
        state = self.model.new_state(1, len(prompt) + len(tokens))
        self.model.prefill(torch.tensor([prompt]), torch.tensor([len(prompt)]), state)
        given = torch.tensor([tokens])
        with steady_weights():
            self.model.extend(given, state, upcast_logits=False)
            state.rollback(torch.tensor([len(prompt)]))
            return timed(lambda: self.model.extend(given, state, upcast_logits=False))


class Transformers:
    """`generate` and `forward` of transformers' own class."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()

    @torch.inference_mode()
    def text(self, prompt: Sequence[int], tokens: int) -> tuple[float, list[int]]:
        given, found = torch.tensor([prompt]), list[torch.Tensor]()
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "min_new_tokens": tokens}
        mask = torch.ones_like(given)
        taken = timed(
            lambda: found.append(self.model.generate(given, attention_mask=mask, max_new_tokens=tokens, **options))
        )
        return taken, found[0][0, len(prompt) :].tolist()

    @torch.inference_mode()
    def check(self, prompt: Sequence[int], tokens: Sequence[int]) -> float:
        cache = DynamicCache(config=self.model.config)
        self.model(torch.tensor([prompt]), past_key_values=cache)
        return timed(lambda: self.model(torch.tensor([tokens]), past_key_values=cache))


class LlamaCpp:
    """llama.cpp in a process that `stack` ends."""

    def __init__(self, python: Path, file: Path, threads: int, context: int, stack: ExitStack) -> None:
        command = [str(python), str(CHILD), str(file), str(threads), str(context)]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.child.stdin is not None
        stack.callback(self.child.wait)
        stack.callback(self.child.stdin.close)

    def text(self, prompt: Sequence[int], tokens: int) -> tuple[float, list[int]]:
        answer = self._ask(prompt=list(prompt), tokens=tokens)
        return answer["seconds"], answer["tokens"]

    def check(self, prompt: Sequence[int], tokens: Sequence[int]) -> float:
        return float(self._ask(prompt=list(prompt), check=list(tokens))["seconds"])

    def _ask(self, **request: object) -> dict[str, Any]:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        print(json.dumps(request), file=self.child.stdin, flush=True)
        line = self.child.stdout.readline()
        if not line:
            raise click.ClickException(f"llama.cpp ended with exit code {self.child.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def measure(path: Path, gguf: Path | None, peer: Path | None, weights: str, sizes: Sizes) -> dict[str, Any]:
    """All sides with one kind of weights."""
    kind = WEIGHTS[weights]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = model_loading.load_model(path, towers="context", dtype=kind.dtype, quantization=kind.quantization)
        sides: dict[str, Side] = {"twotower": Ours(model)}
        if kind.quantization == "none":
            export_one_tower(path, folder / "one")
            sides["transformers"] = Transformers(folder / "one", getattr(torch, kind.dtype))
        if peer is not None and gguf is not None:
            gguf_copy.write_as(gguf, folder / "copy.gguf", kind.gguf, kind.gguf_heads)
            context = max(sizes.prompt + sizes.tokens + CHECK, sizes.long + 1)
            sides["llama.cpp"] = LlamaCpp(peer, folder / "copy.gguf", torch.get_num_threads(), context, stack)
        prompt, long, check = (
            random_tokens(model, 1, count, seed=count)[0].tolist() for count in (sizes.prompt, sizes.long, CHECK)
        )
        times: dict[str, dict[str, list[float]]] = {name: {} for name in sides}
        texts: dict[str, list[int]] = {}
        for at in range(sizes.rounds + 1):
            for name, side in sides.items():
                whole, texts[name] = side.text(prompt, sizes.tokens)
                first, _ = side.text(prompt, 1)
                step = (whole - first) / (sizes.tokens - 1)
                last, _ = side.text(long, 1)
                taken = {"text": whole, "AR step": step, f"pass over {CHECK}": side.check(prompt, check)}
                for what, value in (taken | {f"prompt of {sizes.long}": last}).items():
                    if at:
                        times[name].setdefault(what, []).append(value)
        return {
            "machine": machine_facts(model), "weights": weights, **sizes._asdict(),
            "sides": {name: _figures(times, texts, name) for name in sides},
        }  # fmt: skip


def _figures(times: dict[str, dict[str, list[float]]], texts: dict[str, list[int]], name: str) -> dict[str, Any]:
    """The medians of a side, and the ratios of our times to its times."""
    ours, own = times["twotower"], times[name]
    return {
        "seconds": medians(own),
        "ours takes": {what: ratio(ours[what], values) for what, values in own.items()},
        "same until": same_until(texts["twotower"], texts[name]),
    }


def same_until(one: list[int], other: list[int]) -> int:
    """The number of equal tokens at the start."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def tables(found: dict[str, Any]) -> Iterator[RenderableType]:
    sizes = f"{found['prompt']} + {found['tokens']} tokens"
    title = f"{machine_summary(found['machine'])}, weights {found['weights']}: milliseconds (time of twotower / time)"
    whats = list(found["sides"]["twotower"]["seconds"])
    table = Table("side", *(what.replace("text", sizes) for what in whats), "same tokens until", title=title)
    for name, one in found["sides"].items():
        cells = (f"{one['seconds'][what] * 1e3:.2f} ({one['ours takes'][what]:.2f})" for what in whats)
        table.add_row(name, *cells, str(one["same until"]))
    yield table


FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.option("--model", "path", type=DIRECTORY, required=True, help="A two-tower checkpoint directory.")
@click.option("--gguf", type=FILE, default=None, help="The GGUF file that the checkpoint was made of.")
@click.option("--peer", type=FILE, default=None, help="A Python with llama-cpp-python; needs --gguf.")
@click.option("--weights", type=click.Choice(list(WEIGHTS)), multiple=True, default=["float32"], show_default=True)
@click.option("--prompt", default=32, show_default=True, help="Tokens of the prompt.")
@click.option("--tokens", default=64, show_default=True, help="New tokens.")
@click.option("--rounds", default=7, show_default=True, help="Rounds that count.")
@THREADS
@QUICK
@JSON
def main(
    path: Path, gguf: Path | None, peer: Path | None, weights: tuple[str, ...], prompt: int, tokens: int, rounds: int,
    threads: int | None, quick: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measures one checkpoint, with one kind of weights after the other."""
    if peer is not None and gguf is None:
        raise click.UsageError("--peer needs --gguf: the file that llama.cpp reads")
    start(threads)
    sizes = Sizes(8, 8, 24, 2) if quick else Sizes(prompt, tokens, 256, rounds)
    results = [measure(path, gguf, peer, kind, sizes) for kind in weights]
    shown = [table for found in results for table in tables(found)]
    publish("peers", {"model": str(path), "measured": results}, shown, as_json)


if __name__ == "__main__":
    sys.exit(main())
