"""`twotower info` of other backbones: layers, sizes and options, and how their passes run. No weights are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command import Result
from tiny_backbones import hf_config

from twotower.ops.cpu import library

PAGES = {
    "llama": ("3 attention, 3 MLP", "llama: 3 layers, the head is the embedding", "attention: 4 heads of 16"),
    "falcon_h1": ("3 MLP, 3 parallel attention and Mamba-2", "Mamba-2: 8 heads of 12, state 10, 2 groups"),
    "qwen3_next": (
        "1 attention, 2 MoE, 1 MLP, 2 gated DeltaNet",
        "attention: norms of queries and keys over each head, a gate of the output",
        "gated DeltaNet: 4 heads of 10, 2 key heads of 12, convolution 4",
        "MoE: 2 of 5 experts, width 24; shared expert 32",
    ),
}  # fmt: skip


def config_file(directory: Path, name: str) -> Path:
    values = {"model_type": "two_tower", "backbone": hf_config(name).to_dict(), "mask_token_id": 3}
    (directory / "config.json").write_text(json.dumps(values))
    return directory / "config.json"


@pytest.mark.parametrize("name", PAGES)
def test_the_page_has_layers_sizes_and_options(name: str, tmp_path: Path, cli: Callable[..., Result]) -> None:
    result = cli("info", config_file(tmp_path, name))
    assert (result.code, result.err) == (0, "")
    for words in PAGES[name]:
        assert words in result.out
    assert max(map(len, result.out.splitlines())) <= 100


@pytest.mark.skipif(isinstance(library.library(), str), reason="the compiled kernels are not here")
@pytest.mark.parametrize(
    ("name", "way", "reason"),
    [
        ("llama", "one call", "for few tokens; a CUDA graph"),
        ("qwen3_5_text", "layer by layer", "the C++ pass has no gated DeltaNet layers; a CUDA graph"),
    ],
)
def test_how_a_pass_runs(name: str, way: str, reason: str, tmp_path: Path, cli: Callable[..., Result]) -> None:
    facts = json.loads(cli("info", config_file(tmp_path, name), "--json").out)
    row = next(row for row in facts["backends"]["cpu"] if row["op"] == "pass")
    assert row["backend"] == way
    assert row["reason"].startswith(reason)
    assert f"{way} " in cli("info", config_file(tmp_path, name)).out


def test_the_state_counts_the_recurrence(tmp_path: Path, cli: Callable[..., Result]) -> None:
    """In fp32: two layers with a window of 3 inputs of 4·10 + 2·2·12 channels, and 4 heads of 10 × 12."""
    facts = json.loads(cli("info", config_file(tmp_path, "qwen3_5_text"), "--json").out)
    wide = 4 if facts["computes_in"]["cpu"] == "float32" else 2
    assert facts["state"]["per_row"] == 2 * (3 * (40 + 48) * wide + 4 * 10 * 12 * 4)
    assert facts["shape"]["linear_key_head_dim"] == 12
