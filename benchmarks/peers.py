"""How fast is AR at batch 1 beside transformers and llama.cpp, with the same weights?

    python benchmarks/peers.py --model DIR [--gguf FILE --peer PYTHON] [--dtype float32 --dtype bfloat16]
        [--threads 2] [--prompt 32] [--tokens 64] [--rounds 7] [--quick] [--json]

--model: a two-tower checkpoint of any family that transformers has. transformers reads the export of its context tower.
--gguf: the GGUF file that the checkpoint was made of (`twotower init --from FILE`). llama.cpp reads a copy of the file
in the dtype that is measured. --peer: a Python with the package llama-cpp-python; llama.cpp runs in a process of it.

All sides continue the same random prompt greedily and take turns; figures are medians over rounds, the first round is
not counted, and a time includes the prefill. Ratios are of the times of one round.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import torch
from common import gguf_copy
from common.models import random_tokens
from common.program import DIRECTORY, JSON, QUICK, THREADS, publish, start
from common.roofline import DTYPES
from common.timing import medians, ratio, seconds
from rich.console import RenderableType
from rich.table import Table
from transformers import AutoModelForCausalLM

from twotower import model_loading
from twotower.checkpoint.export import export_one_tower
from twotower.evaluation.machine import machine_facts, machine_summary

CHILD = Path(__file__).parent / "common" / "llamacpp_child.py"
Side = Callable[[], tuple[float, list[int]]]  # one continuation → its seconds and tokens


def timed(generate: Callable[[], list[int]]) -> tuple[float, list[int]]:
    """The seconds of one call, and its tokens."""
    found: list[int] = []
    return seconds(lambda: found.extend(generate()), torch.device("cpu")), found


def transformers_side(directory: Path, dtype: torch.dtype, prompt: torch.Tensor, tokens: int) -> Side:
    """`generate` of transformers' own class."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()

    @torch.inference_mode()
    def generate() -> list[int]:
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, min_new_tokens=tokens,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return out[0, prompt.shape[1] :].tolist()

    return lambda: timed(generate)


def llamacpp_side(python: Path, file: Path, threads: int, prompt: torch.Tensor, tokens: int, stack: ExitStack) -> Side:
    """llama.cpp in a process that `stack` ends."""
    command = [str(python), str(CHILD), str(file), str(threads), str(prompt.shape[1] + tokens)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    stack.callback(child.wait)
    assert child.stdin is not None
    assert child.stdout is not None
    stack.callback(child.stdin.close)
    request = json.dumps({"prompt": prompt[0].tolist(), "tokens": tokens})

    def side() -> tuple[float, list[int]]:
        print(request, file=child.stdin, flush=True)
        line = child.stdout.readline()
        if not line:
            raise click.ClickException(f"llama.cpp ended with exit code {child.wait()}")
        answer = json.loads(line)
        return answer["seconds"], answer["tokens"]

    return side


def measure(
    path: Path, gguf: Path | None, peer: Path | None, dtype: str, *, prompt_tokens: int, tokens: int, rounds: int
) -> dict[str, Any]:
    """All sides in one dtype."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        export_one_tower(path, folder / "one")
        model = model_loading.load_model(path, dtype=dtype)
        prompt = random_tokens(model, 1, prompt_tokens, seed=2)

        def ours() -> list[int]:
            out = model.generate_ar(prompt, max_new_tokens=tokens, eos_token_id=[])
            return out[0, prompt_tokens:].tolist()

        sides: dict[str, Side] = {
            "twotower": lambda: timed(ours),
            "transformers": transformers_side(folder / "one", getattr(torch, dtype), prompt, tokens),
        }
        if peer is not None and gguf is not None:
            gguf_copy.write_in(gguf, folder / "copy.gguf", dtype)
            threads = torch.get_num_threads()
            sides["llama.cpp"] = llamacpp_side(peer, folder / "copy.gguf", threads, prompt, tokens, stack)
        times: dict[str, list[float]] = {name: [] for name in sides}
        texts: dict[str, list[int]] = {}
        for at in range(rounds + 1):
            for name, side in sides.items():
                taken, texts[name] = side()
                if at:
                    times[name].append(taken)
        return {
            "machine": machine_facts(model), "dtype": dtype, "prompt": prompt_tokens, "tokens": tokens,
            "sides": {
                name: {
                    "tokens/s": tokens / medians(times)[name],
                    "ours takes": ratio(times["twotower"], times[name]),
                    "same until": same_until(texts["twotower"], texts[name]),
                }
                for name in sides
            },
        }  # fmt: skip


def same_until(one: list[int], other: list[int]) -> int:
    """The number of equal tokens at the start."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def tables(found: dict[str, Any]) -> Iterator[RenderableType]:
    title = f"{machine_summary(found['machine'])}: AR, {found['prompt']} + {found['tokens']} tokens"
    table = Table("side", "tokens/s", "time of twotower / time", "same tokens until", title=title)
    for name, one in found["sides"].items():
        table.add_row(name, f"{one['tokens/s']:.1f}", f"{one['ours takes']:.2f}", str(one["same until"]))
    yield table


FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.option("--model", "path", type=DIRECTORY, required=True, help="A two-tower checkpoint directory.")
@click.option("--gguf", type=FILE, default=None, help="The GGUF file that the checkpoint was made of.")
@click.option("--peer", type=FILE, default=None, help="A Python with llama-cpp-python; needs --gguf.")
@click.option("--dtype", "dtypes", type=click.Choice(DTYPES), multiple=True, default=DTYPES[:1], show_default=True)
@click.option("--prompt", default=32, show_default=True, help="Tokens of the prompt.")
@click.option("--tokens", default=64, show_default=True, help="New tokens.")
@click.option("--rounds", default=7, show_default=True, help="Rounds that count.")
@THREADS
@QUICK
@JSON
def main(
    path: Path, gguf: Path | None, peer: Path | None, dtypes: tuple[str, ...], prompt: int, tokens: int, rounds: int,
    threads: int | None, quick: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measures one checkpoint, dtype by dtype."""
    if peer is not None and gguf is None:
        raise click.UsageError("--peer needs --gguf: the file that llama.cpp reads")
    start(threads)
    if quick:
        prompt, tokens, rounds = 8, 8, 2
    sizes = {"prompt_tokens": prompt, "tokens": tokens, "rounds": rounds}
    results = [measure(path, gguf, peer, dtype, **sizes) for dtype in dtypes]
    shown = [table for found in results for table in tables(found)]
    publish("peers", {"model": str(path), "measured": results}, shown, as_json)


if __name__ == "__main__":
    sys.exit(main())
