"""Loading time, peak memory, time to the first block, and what the state of a text takes.

    python benchmarks/memory.py [--model DIR | --config FILE] [--dtype float32] [--device cuda] [--lengths 1024,8192]

Every load happens in a fresh process: AR on the context tower alone, AR and diffusion with both towers. Peak is the
process's highest resident memory (VmHWM) less what the imported libraries took before the load. Pages of the
checkpoint's file count in it while they are mapped; the system can take those back, so the highest anonymous memory
during the load, sampled, stands beside it. On CUDA also `max_memory_allocated`. Of --config (default:
benchmarks/midsize.json) random weights are written to a temporary directory first; the page cache holds them then.

State: what is really held, storages counted once, after a text of that length got its last token by an AR step, and
after it got its last block by diffusion (a denoiser pass, then the commit). The texts are not read but made up, so the
lengths cost nothing (`models.Texts`). Of the published 30B shape the same by its formulas alone.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from twotower.process import configure_process

configure_process()

import torch  # noqa: E402
from floor import DTYPES  # noqa: E402
from models import BLOCK, MIDSIZE, PUBLISHED, Texts, config_of, random_model, random_tokens  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from throughput import numbers  # noqa: E402

from twotower import TwoTowerConfig, TwoTowerForCausalLM, model_loading  # noqa: E402
from twotower.cache.hybrid_cache import TowerState  # noqa: E402
from twotower.decoding.output import BlockEvent  # noqa: E402
from twotower.evaluation.machine import surroundings  # noqa: E402

LENGTHS = tuple(1024 << i for i in range(8))  # 1K … 128K
CASES = {
    "AR, context tower alone": {"towers": "context", "mode": "ar"},
    "AR, both towers": {"towers": "both", "mode": "ar"},
    "diffusion": {"towers": "both", "mode": "diffusion"},
}


# --- a process of its own ---------------------------------------------------------------------------------------------


def resident(what: str = "VmHWM") -> int:
    """Bytes, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


@contextmanager
def watching_anonymous() -> Iterator[dict[str, int]]:
    """The highest anonymous memory inside the block, looked at every two milliseconds."""
    seen = {"peak": resident("RssAnon")}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            seen["peak"] = max(seen["peak"], resident("RssAnon"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()
        seen["peak"] = max(seen["peak"], resident("RssAnon"))


def child(task: dict[str, Any]) -> dict[str, Any]:
    """Loads, writes one block (AR: as many tokens), and says what that took."""
    device = torch.device(task["device"])
    before, anonymous = resident("VmRSS"), resident("RssAnon")
    names = ("towers", "dtype")
    configure_process(task["threads"])
    with watching_anonymous() as seen:
        started = time.perf_counter()
        model = model_loading.load_model(
            task["path"], context_device=task["device"], **{name: task[name] for name in names}
        )
        model.synchronize()
        loaded = time.perf_counter() - started
    after_load = resident()
    weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    prompt = random_tokens(model, 1, task["prompt"])[0].tolist()
    firsts, wholes = [], []
    for _ in range(task["rounds"]):
        first, whole = first_block(model, prompt, task["mode"])
        firsts.append(first)
        wholes.append(whole)
    found = {
        "load seconds": loaded,
        "weights bytes": weights,
        "libraries": before,
        "peak of the load": after_load - before,
        "anonymous peak of the load": seen["peak"] - anonymous,
        "peak": resident() - before,
        "cold first event": firsts[0],
        "first event": statistics.median(firsts[1:] or firsts),
        "first block": statistics.median(wholes[1:] or wholes),
    }
    if device.type == "cuda":
        found["peak on device"] = torch.cuda.max_memory_allocated()
    return found


def first_block(model: TwoTowerForCausalLM, prompt: list[int], mode: str) -> tuple[float, float]:
    """Seconds from the call to the first event (AR: a token) and to a whole block of tokens."""
    started = time.perf_counter()
    events: Iterator[BlockEvent] = model.stream(
        torch.tensor([prompt]), mode=mode, max_new_tokens=BLOCK, mask_token_id=model.config.mask_token, seed=0,
        **({} if mode == "ar" else {"block_size": BLOCK}),
    )  # fmt: skip
    next(events)
    first = time.perf_counter() - started
    for _ in events:
        pass
    return first, time.perf_counter() - started


def in_own_process(task: dict[str, Any]) -> dict[str, Any]:
    """What `child` says of it."""
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise RuntimeError(f"a load failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def loads(path: Path, cases: Sequence[str] = tuple(CASES), **shared: Any) -> dict[str, Any]:
    """Every case; shared: device, dtype, threads, prompt (tokens), rounds."""
    return {name: in_own_process({"path": str(path), **shared, **CASES[name]}) for name in cases}


# --- the state of a text ----------------------------------------------------------------------------------------------


def tensors_in(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor that an object holds, whatever it keeps it in; modules and configs are nobody's state."""
    if id(value) in seen or isinstance(value, torch.nn.Module):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part, seen)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part, seen)
    elif hasattr(value, "__dict__"):
        yield from tensors_in(vars(value), seen)


def held(*objects: Any) -> int:
    """Bytes of their storages, each once."""
    storages = {}
    seen: set[int] = set()
    for value in objects:
        for tensor in tensors_in(value, seen):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@torch.no_grad()
def state_of_a_text(model: TwoTowerForCausalLM, length: int) -> dict[str, float]:
    """Bytes a row: AR's state and two-tower generation's, of a text of `length` tokens that has just grown."""
    tokens = random_tokens(model, 1, BLOCK)
    texts = Texts.empty(model, 1, length)
    texts.set_length(length - 1)
    model.extend(tokens[:, :1], texts.state)
    ar = held(texts.state)
    del texts
    texts = Texts.empty(model, 1, length)
    texts.set_length(length - BLOCK)
    reader = model.reader(texts.state)
    view = reader.view()
    model.denoise(tokens, torch.ones(1, device=tokens.device), view)
    model.extend(tokens, texts.state, logits=False)
    both = held(texts.state, reader, tokens)
    return {"length": length, "AR": ar, "two-tower": both, "scratch": both - ar, "ratio": both / ar}


def states(model: TwoTowerForCausalLM, lengths: Sequence[int]) -> list[dict[str, float]]:
    return [state_of_a_text(model, length) for length in lengths]


def per_token(rows: Sequence[dict[str, float]], name: str) -> float:
    """Bytes a token, from the shortest and the longest text."""
    return (rows[-1][name] - rows[0][name]) / (rows[-1]["length"] - rows[0]["length"])


def by_formula(config: TwoTowerConfig, dtype: torch.dtype, lengths: Sequence[int]) -> list[dict[str, int]]:
    """What `TowerState` would allocate for a row."""
    meta = torch.device("meta")
    return [
        {"length": length, "bytes": TowerState(config.backbone, 1, length, meta, dtype).nbytes} for length in lengths
    ]


def measure_states(model: TwoTowerForCausalLM, lengths: Sequence[int]) -> dict[str, Any]:
    """Of the model at hand, and of the published shape."""
    rows = states(model, lengths)
    published = by_formula(config_of(PUBLISHED), torch.bfloat16, lengths)
    return {
        "states": rows,
        "state bytes a token": {name: per_token(rows, name) for name in ("AR", "two-tower")},
        "published shape, bf16": published,
    }


# --- one command ------------------------------------------------------------------------------------------------------


def show(found: dict[str, Any], console: Console) -> None:
    def size(value: float) -> str:
        return f"{value / 2**20:.1f} MiB"

    table = Table("", "weights", "load, s", "load's peak", "anonymous", "peak", "first tokens, ms", "block, ms")
    for name, one in found["loads"].items():
        table.add_row(
            name, size(one["weights bytes"]), f"{one['load seconds']:.2f}", size(one["peak of the load"]),
            size(one["anonymous peak of the load"]), size(one.get("peak on device", one["peak"])),
            f"{one['first event'] * 1e3:.1f}", f"{one['first block'] * 1e3:.1f}",
        )  # fmt: skip
    console.print(table)
    table = Table("text", "AR", "two-tower", "more", "ratio", "published shape, bf16")
    for row, big in zip(found["states"], found["published shape, bf16"], strict=True):
        table.add_row(
            f"{row['length']:,}", size(row["AR"]), size(row["two-tower"]), size(row["scratch"]),
            f"{row['ratio']:.4f}", size(big["bytes"]),
        )  # fmt: skip
    console.print(table)
    tokens = found["state bytes a token"]
    console.print(f"bytes a token: AR {tokens['AR']:.0f}, two-tower {tokens['two-tower']:.0f}")


@click.command()
@click.option("--model", "path", type=click.Path(exists=True, file_okay=False, path_type=Path), default=None)
@click.option("--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=None)
@click.option("--device", type=click.Choice(("cpu", "cuda")), default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
@click.option("--lengths", callback=numbers, default=",".join(map(str, LENGTHS)), show_default=True)
@click.option("--prompt", default=128, show_default=True, help="Tokens before the first block.")
@click.option("--rounds", default=5, show_default=True, help="First blocks in each process; the first warms up.")
@click.option("--threads", type=int, default=None, help="[default: the product's choice]")
@click.option("--quick", is_flag=True, help="A tiny model, seconds.")
@click.option("--json", "as_json", is_flag=True, help="No tables.")
@click.option("--child", "task", default=None, hidden=True)
def main(
    path: Path | None, config: Path | None, device: str, dtype: str, lengths: tuple[int, ...], prompt: int,
    rounds: int, threads: int | None, quick: bool, as_json: bool, task: str | None,
) -> None:  # fmt: skip
    """Measures one model."""
    if task is not None:
        print(json.dumps(child(json.loads(task))))
        return
    configure_process(threads)
    if quick:
        lengths, prompt, rounds = (1024, 4096), 16, 2
    torch.manual_seed(0)
    where, what = torch.device(device), getattr(torch, dtype)
    shape = None if quick and config is None else config or MIDSIZE
    shared: dict[str, Any] = {"device": device, "dtype": dtype, "threads": threads, "prompt": prompt, "rounds": rounds}
    shared["cases"] = ("diffusion",) if quick else tuple(CASES)
    if path is not None:
        model = model_loading.load_model(path, dtype=dtype, context_device=device)
        found = measure_states(model, lengths)
        found["loads"] = loads(path, **shared)
    else:
        model = random_model(config_of(shape), what, where)
        found = measure_states(model, lengths)
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            del model
            found["loads"] = loads(Path(directory), **shared)
    if not as_json:
        show(found, Console(stderr=True, width=120))
    source = str(path or (shape.name if shape else "tiny"))
    facts = {"benchmark": "memory", "model": source, "machine": surroundings(where, what)}
    print(json.dumps(facts | {"prompt": prompt, "block_size": BLOCK} | found))


if __name__ == "__main__":
    main()
