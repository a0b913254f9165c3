"""Loading time, peak memory, time to the first block, and the memory of a text's state.

Every load has its own process: AR with the context tower alone; AR and diffusion with both towers. Peak is the
process's highest resident memory (VmHWM) minus the memory after the imports. Mapped pages of the checkpoint's file
count in the peak, although the system can reclaim them; so the highest anonymous memory during the load, sampled, is
reported too. On CUDA also `max_memory_allocated`.

State: bytes of the storages, each counted once, after a text of that length got its last token by an AR step, and after
it got its last block by diffusion (a denoising pass, then the commit). The texts are not prefilled (`models.Texts`).
For the published 30B shape, the bytes are computed by the formulas of its state.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from common.models import BLOCK, PUBLISHED, Texts, config_of, random_tokens
from twotower import BlockEvent, TwoTowerConfig, TwoTowerForCausalLM, model_loading
from twotower.cache.hybrid_cache import TowerState
from twotower.families import tower_spec
from twotower.process import configure_process

LENGTHS = tuple(1024 << i for i in range(8))  # 1K … 128K
CASES = {
    "AR, context tower alone": {"towers": "context", "mode": "ar"},
    "AR, both towers": {"towers": "both", "mode": "ar"},
    "diffusion": {"towers": "both", "mode": "diffusion"},
}


# --- a process of its own ---------------------------------------------------------------------------------------------


def resident(what: str = "VmHWM") -> int:
    """Resident bytes of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


@contextmanager
def watching_anonymous() -> Iterator[dict[str, int]]:
    """Samples the anonymous memory every two milliseconds in a `with` block; reports the highest."""
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
    """Loads a model, generates one block (AR: as many tokens), and reports the figures."""
    device = torch.device(task["device"])
    before, anonymous = resident("VmRSS"), resident("RssAnon")
    configure_process(task["threads"])
    with watching_anonymous() as seen:
        started = time.perf_counter()
        model = model_loading.load_model(
            task["path"], context_device=task["device"], towers=task["towers"], dtype=task["dtype"]
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
    """The report of `child`, run in a new process."""
    command = [sys.executable, "-m", "common.memory", json.dumps(task)]
    path = os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=environment)
    if done.returncode:
        raise RuntimeError(f"a load failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def loads(path: Path, cases: Sequence[str] = tuple(CASES), **shared: Any) -> dict[str, Any]:
    """Runs every case. shared: device, dtype, threads, prompt (tokens), rounds."""
    return {name: in_own_process({"path": str(path), **shared, **CASES[name]}) for name in cases}


# --- the state of a text ----------------------------------------------------------------------------------------------


def tensors_in(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor that an object holds, in any container; modules and configs are skipped."""
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
    """Bytes of the tensors' storages, each counted once."""
    storages = {}
    seen: set[int] = set()
    for value in objects:
        for tensor in tensors_in(value, seen):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@torch.no_grad()
def state_of_a_text(model: TwoTowerForCausalLM, length: int) -> dict[str, float]:
    """Bytes a row of AR's state and of two-tower generation's, after the last step of `length` tokens."""
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


def by_formula(config: TwoTowerConfig, dtype: torch.dtype, lengths: Sequence[int]) -> list[dict[str, int]]:
    """Bytes that `TowerState` would allocate for a row."""
    meta = torch.device("meta")
    return [
        {"length": length, "bytes": TowerState(tower_spec(config), 1, length, meta, dtype).nbytes} for length in lengths
    ]


def measure_states(model: TwoTowerForCausalLM, lengths: Sequence[int]) -> dict[str, Any]:
    """Measures the states of the given model and computes those of the published shape."""
    rows = [state_of_a_text(model, length) for length in lengths]
    first, last = rows[0], rows[-1]
    published = by_formula(config_of(PUBLISHED), torch.bfloat16, lengths)
    return {
        "states": rows,
        "state bytes a token": {
            name: (last[name] - first[name]) / (last["length"] - first["length"]) for name in ("AR", "two-tower")
        },
        "published shape, bf16": published,
    }


if __name__ == "__main__":
    print(json.dumps(child(json.loads(sys.argv[1]))))
