"""Loading allocates each weight once: the rise of anonymous memory during a load, measured in a new process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peak_memory import WATCH
from safetensors.torch import save_file

from twotower import TwoTowerConfig, TwoTowerForCausalLM
from twotower.checkpoint.names import TensorEntry, tensor_entries
from twotower.checkpoint.reader import INDEX_FILE, SINGLE_FILE
from twotower.model.fp32_tensors import target_dtype

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")

LIMIT = 1.2  # rise of anonymous memory over the level after import, in sizes of the weights

CHILD = (
    WATCH
    + """
import json, os, sys, threading, time
import torch, twotower
from twotower import TwoTowerForCausalLM

torch.set_num_threads(1)
path = sys.argv[1]
for arguments in json.loads(sys.argv[2]):
    if os.fork():  # each load in its own process, forked after the imports
        assert os.wait()[1] == 0
        continue
    before = peak = anonymous()
    done = False
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = TwoTowerForCausalLM.from_pretrained(path, **arguments)
    done = True
    watcher.join()
    peak = max(peak, anonymous())  # the watcher may not have run on a busy machine
    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    print(json.dumps({"weights": weights, "peak": peak - before}), flush=True)
    os._exit(0)
"""
)


def write_checkpoint(directory: Path, scale: int, shards: int) -> None:
    """A random bf16 checkpoint with every layer kind, most of it experts; its size grows with scale²."""
    config = TwoTowerConfig(
        hybrid_override_pattern="ME*E-ME",
        hidden_size=64 * scale,
        vocab_size=4096,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=8 * scale,
        mamba_num_heads=8,
        mamba_head_dim=16 * scale,
        n_groups=2,
        ssm_state_size=32,
        intermediate_size=128 * scale,
        n_routed_experts=32,
        num_experts_per_tok=2,
        moe_intermediate_size=40 * scale,
        moe_shared_expert_intermediate_size=80 * scale,
        torch_dtype="bfloat16",
    )
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    with torch.device("meta"):
        every = tensor_entries(TwoTowerForCausalLM(config))
    if shards == 1:
        save_file({entry.disk: _random(entry) for entry in every}, directory / SINGLE_FILE)
        return
    weight_map = {}
    for i in range(shards):
        part = every[i * len(every) // shards : (i + 1) * len(every) // shards]
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({entry.disk: _random(entry) for entry in part}, directory / name)
        weight_map |= {entry.disk: name for entry in part}
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _random(entry: TensorEntry) -> torch.Tensor:
    return torch.empty(entry.shape, dtype=target_dtype(entry.memory, torch.bfloat16)).uniform_(-0.1, 0.1)


def loads(directory: Path, *cases: dict[str, str]) -> list[dict[str, float]]:
    """The megabytes of weights and the maximum rise of anonymous memory, for the arguments of each case."""
    command = [sys.executable, "-c", CHILD, str(directory), json.dumps(cases)]
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory is returned
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    kind = "sharded" if (directory / INDEX_FILE).exists() else "single file"
    results = []
    for arguments, line in zip(cases, done.stdout.splitlines(), strict=True):
        figures = {name: size / 1e6 for name, size in json.loads(line).items()}
        results.append(figures)
        print(
            f"\n{kind} {arguments or 'both towers'}: weights {figures['weights']:.0f} MB, peak of anonymous memory "
            f"{figures['peak']:.0f} MB = {figures['peak'] / figures['weights']:.3f} × weights",
            end="",
        )
    return results


# Arguments of a load, and the least and the largest size of its weights, in sizes of both towers in bf16.
CASES: dict[str, tuple[dict[str, str], float, float]] = {
    "context": ({"towers": "context"}, 0.4, 0.51),
    "fp32": ({"dtype": "float32"}, 1.99, 2.01),
    "int8": ({"quantization": "int8"}, 0.4, 0.55),
    "int4": ({"quantization": "int4"}, 0.2, 0.36),
    "plan": ({"quantization": "experts=int4,rest=int8"}, 0.2, 0.39),
}


@pytest.mark.parametrize(
    ("shards", "names"),
    [
        (1, ("context", "int8", "plan")),
        (5, ("fp32", "int4")),
        *(pytest.param(shards, tuple(CASES), marks=pytest.mark.slow) for shards in (1, 5)),
    ],
)
def test_weights_are_built_once(tmp_path: Path, shards: int, names: tuple[str, ...]) -> None:
    write_checkpoint(tmp_path / "model", scale=7, shards=shards)
    both, *others = loads(tmp_path / "model", {}, *(CASES[name][0] for name in names))
    assert 120 < both["weights"] < 180
    for name, figures in zip(names, others, strict=True):
        _, least, most = CASES[name]
        assert least * both["weights"] < figures["weights"] < most * both["weights"], name
    for figures in (both, *others):
        assert 0.5 * figures["weights"] < figures["peak"] <= LIMIT * figures["weights"]


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 7])
def test_weights_are_built_once_at_two_gigabytes(tmp_path: Path, shards: int) -> None:
    write_checkpoint(tmp_path / "model", scale=30, shards=shards)
    plans = {"quantization": "int8"}, {"quantization": "int4"}
    both, context, int8, int4 = loads(tmp_path / "model", {}, {"towers": "context"}, *plans)
    assert both["weights"] >= 2000
    assert context["weights"] < 0.51 * both["weights"]
    assert int8["weights"] < 0.52 * both["weights"]
    assert int4["weights"] < 0.32 * both["weights"]  # 4.5 of 16 bits; embeddings keep 16, heads have 8
    for figures in (both, context, int8, int4):
        assert 0.5 * figures["weights"] < figures["peak"] <= LIMIT * figures["weights"]
