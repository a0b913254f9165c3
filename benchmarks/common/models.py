"""Models and states to measure on: a checkpoint or random weights, and texts of any length without a prefill.

The cost of a pass does not depend on the weights, with one exception: the experts that tokens choose. With random
weights, all masks of a block choose the same few experts. In a trained model, a block visits nearly as many experts as
with a random choice. Timed blocks therefore hold random tokens instead of masks (`random_for_masks`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twotower import TwoTowerConfig, TwoTowerForCausalLM, model_loading
from twotower.cache.hybrid_cache import TowerState
from twotower.cache.pools import AttentionPool, MambaPool
from twotower.checkpoint.quantize import quantize_
from twotower.config import read_object
from twotower.model.conditioning import TimeConditioning
from twotower.runners import packed_weights

HERE = Path(__file__).parent.parent
BLOCK = 16  # tokens of a block, in all benchmarks
# The default decoding settings of the benchmarks.
DECODING: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar"},
    "diffusion": {"mode": "diffusion", "block_size": BLOCK, "confidence_threshold": 0.8},
    "verified": {"mode": "verified", "block_size": BLOCK, "draft_steps": 1},
}
MIDSIZE, PUBLISHED = HERE / "midsize.json", HERE / "published.json"
# All kinds of layers in a few kilobytes, to try a benchmark out.
TINY: dict[str, Any] = {
    "hybrid_override_pattern": "ME*-M", "hidden_size": 64, "vocab_size": 512, "max_position_embeddings": 262144,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "mamba_num_heads": 4, "mamba_head_dim": 32,
    "ssm_state_size": 16, "n_groups": 2, "chunk_size": 32, "intermediate_size": 96, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 48, "moe_shared_expert_intermediate_size": 96,
    "routed_scaling_factor": 2.5,
}  # fmt: skip


def model_for(
    path: Path | None, config: Path | None, quick: bool, *, dtype: str, device: str,
    quantization: str = "none",
) -> TwoTowerForCausalLM:  # fmt: skip
    """The checkpoint at `path`, else random weights of the shape in `config` (None: midsize, or tiny if quick)."""
    torch.manual_seed(0)
    if path is not None:
        return model_loading.load_model(path, dtype=dtype, quantization=quantization, context_device=device)
    model = random_model(config_of(shape_of(config, quick)), getattr(torch, dtype), torch.device(device))
    if quantization != "none":
        quantize_(model, quantization)
    return model


def shape_of(config: Path | None, quick: bool) -> Path | None:
    """The config.json of the random weights; None: the tiny shape."""
    return None if quick and config is None else config or MIDSIZE


def name_of(path: Path | None, config: Path | None, quick: bool) -> str:
    """The name of the model that `model_for` returns, for the JSON."""
    shape = shape_of(config, quick)
    return str(path or (shape.name if shape else "tiny"))


def config_of(path: Path | None) -> TwoTowerConfig:
    """The config of a config.json; None: the tiny shape."""
    values = dict(TINY) if path is None else read_object(path, "name a config.json")
    values.pop("model_type", None)
    return TwoTowerConfig(**values)


def random_model(
    config: TwoTowerConfig, dtype: torch.dtype, device: torch.device, *, shared: bool = False
) -> TwoTowerForCausalLM:
    """A model with random weights, made on the device with the project's initialization.

    shared: one set of weights serves both towers, for a device that cannot hold two; a pass reads as much. The weights
    are packed where `twotower` would pack them.
    """
    with torch.device("meta"):
        model = TwoTowerForCausalLM(config, towers="context" if shared else "both")
        if shared:
            model.denoiser = model.context
            model.time = TimeConditioning(config.hidden_size, config.num_hidden_layers)
    model.to(dtype)
    model.to_empty(device=device)
    fill(model)
    model.config.dtype = dtype
    if packed_weights.packing_unsupported_reason(model) is None:
        model.pack()
    return model.eval()


@torch.no_grad()
def fill(model: TwoTowerForCausalLM) -> None:
    """Gives random weights to a model whose memory is not initialized yet."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        own = name.rsplit(".", 2)[-2:]
        if own[-1] == "D" or ("norm" in own[0] and own[-1] == "weight"):
            tensor.fill_(1.0)
        elif tensor.dim() == 1:
            tensor.zero_()  # biases; other tensors of one dimension are drawn below
    model.reset_parameters()
    if model.time is not None:
        fill_time(model.time)


@torch.no_grad()
def fill_time(time: TimeConditioning) -> None:
    """Gives random weights to a time network."""
    for module in time.t_embedder.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    time.reset_parameters()
    # As after a little training: t has an effect, but shifts stay small beside embeddings of deviation 0.02. With
    # large shifts, all tokens would be alike and choose the same experts.
    nn.init.normal_(time.t_block[1].weight, std=5e-4)
    spread = torch.tensor([[0.002], [0.1], [0.1]])  # of shift, scale and gate
    for table in time.scale_shift_tables:
        table += spread.to(table) * torch.randn_like(table)


@dataclass
class Texts:
    """A state whose rows hold texts of any length up to its capacity, without a prefill.

    It has random K/V and random Mamba states: the cost of a pass depends on the amount of data, not on the values.
    """

    model: TwoTowerForCausalLM
    state: TowerState

    @classmethod
    def empty(cls, model: TwoTowerForCausalLM, rows: int, capacity: int) -> Texts:
        """A state of zeros, for measurements that do not depend on it; pages that are not read use no memory."""
        return cls(model, model.new_state(rows, capacity))

    @classmethod
    def random(cls, model: TwoTowerForCausalLM, rows: int, capacity: int) -> Texts:
        state = model.new_state(rows, capacity)
        for pool in state.pools:
            if isinstance(pool, AttentionPool):
                pool.k.normal_()
                pool.v.normal_()
            elif isinstance(pool, MambaPool):
                pool.conv_window.normal_()
                pool.ssm_state.normal_()
        return cls(model, state)

    def set_length(self, length: int) -> None:
        """Sets the length of every row's text."""
        self.state.commit_state()
        self.state.lengths = torch.full_like(self.state.lengths, length)
        self.state.max_seq_len = length
        for window in filter(None, (group.slots.window for group in self.state.kv_groups)):
            window.first = (self.state.lengths - window.keep).clamp(min=0)


def random_tokens(model: TwoTowerForCausalLM, rows: int, length: int, seed: int = 0) -> Tensor:
    """Random tokens (rows, length), without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, model.config.vocab_size, (rows, length), generator=generator).to(model.device)


@contextmanager
def random_for_masks(model: TwoTowerForCausalLM, block_size: int) -> Iterator[dict[str, int]]:
    """Gives the denoiser random tokens in place of masks, and counts its passes."""
    real, mask = model.denoise, model.config.mask_token
    noise = random_tokens(model, 1, block_size, seed=1)
    counted = {"passes": 0}

    def denoise(block: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        counted["passes"] += 1
        return real(torch.where(block == mask, noise[:, : block.shape[1]], block), *args, **kwargs)

    model.denoise = denoise  # type: ignore[method-assign]
    try:
        yield counted
    finally:
        del model.denoise


def cut_to(config: TwoTowerConfig, bytes_per_tower: float, dtype: torch.dtype) -> TwoTowerConfig:
    """The model with only as many of the first layers as fit for one tower."""
    while config.num_hidden_layers > 1 and tower_bytes(config, dtype) > bytes_per_tower:
        config = cut_to_layers(config, config.num_hidden_layers - 1)
    return config


def cut_to_layers(config: TwoTowerConfig, layers: int | None) -> TwoTowerConfig:
    """The model with the first layers only; None: all."""
    values = {**config.to_dict(), "hybrid_override_pattern": config.hybrid_override_pattern[:layers]}
    return TwoTowerConfig(**{name: value for name, value in values.items() if name not in _DERIVED})


_DERIVED = {"model_type", "num_hidden_layers"}


def tower_bytes(config: TwoTowerConfig, dtype: torch.dtype) -> int:
    """Bytes of the weights of one tower, with its embedding and head."""
    with torch.device("meta"):
        model = TwoTowerForCausalLM(config, towers="context").to(dtype)
    return sum(tensor.nbytes for tensor in model.parameters())
