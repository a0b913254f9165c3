"""The roofline of a pass: the bytes it must read at the best read rate, or its operations at the best matmul rate.

The larger of the two times is the pass's roofline. A program measures both rates in its own run (`measure`). A pass
must read the weights of its layers (of routed experts only the chosen ones), the head if logits are needed, the K/V of
the text, and the Mamba states. A rate is the best of several operations and repeats, so a pass cannot be faster than
its roofline unless its weights stay in a CPU cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.timing import seconds
from twotower.model.conditioning import SINUSOID_SIZE
from twotower.model.moe import Router
from twotower.nemotron_h_fields import NemotronHFields
from twotower.ops.cpu import huge_pages
from twotower.ops.precision import accumulation_dtype
from twotower.ops.reference import int4

DTYPES = ("float32", "bfloat16")
PATIENCE = 1.0  # seconds
Amount = tuple[Callable[[], object], float]  # an operation, and its bytes or arithmetic operations


@dataclass(frozen=True)
class Rates:
    """Best rates. reads, products: the result of each way of measuring, in the same units."""

    bytes_per_second: float
    operations_per_second: float
    reads: dict[str, float]
    products: dict[str, float]


@dataclass(frozen=True)
class Work:
    """The bytes that a pass must read, by part, and its operations."""

    parts: dict[str, float]
    operations: float

    @property
    def bytes(self) -> float:
        return sum(self.parts.values())


def roofline_seconds(bytes: float, operations: float, rates: Rates) -> float:
    """The roofline of this many bytes and operations, in seconds."""
    return max(bytes / rates.bytes_per_second, operations / rates.operations_per_second)


def pass_seconds(work: Work, rates: Rates) -> float:
    """The roofline of a pass, in seconds."""
    return roofline_seconds(work.bytes, work.operations, rates)


# --- rates ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(device: torch.device, dtype: torch.dtype, *, quick: bool = False, repeats: int = 7) -> Rates:
    """Measures the rates of a device in this process, with its number of threads."""
    cuda = device.type == "cuda"
    sides = (1024, 2048) if not cuda else (4096, 8192)
    sides = sides[:1] if quick else sides
    repeats = 3 if quick else repeats
    from_memory = best_rates(reads(device, dtype, quick=quick), device, repeats)
    calls: dict[str, Amount] = {}
    for side in sides:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in "ab")
        calls[f"{side} a·b"] = (lambda a=a, b=b: a @ b), 2.0 * side**3
        calls[f"{side} a·bᵀ"] = (lambda a=a, b=b: a @ b.T), 2.0 * side**3
    products = best_rates(calls, device, repeats)
    return Rates(max(from_memory.values()), max(products.values()), from_memory, products)


def reads(device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> dict[str, Amount]:
    """Operations that read a large array and write almost nothing, with the bytes of the array.

    On a CPU the array lies in huge pages, as packed weights do.
    """
    cuda = device.type == "cuda"
    size = (4 << 30 if cuda else 256 << 20) if not quick else (256 << 20 if cuda else 96 << 20)
    array = torch.ones(size // 4, device=device) if cuda else huge_pages.empty(size // 4, torch.float32).fill_(1.0)
    width = 4096
    matrix, vector = array.view(-1, width), torch.ones(width, device=device)
    other = array.view(dtype) if dtype != torch.float32 else array
    calls: dict[str, Callable[[], object]] = {
        "sum": array.sum,
        "amax": array.amax,
        "dot": lambda: array[: array.numel() // 2].dot(array[array.numel() // 2 :]),
        "matrix·vector": lambda: matrix.mv(vector),
        f"amax in {str(dtype).removeprefix('torch.')}": other.amax,
    }
    return {name: (call, size) for name, call in calls.items()}


def best_rates(calls: dict[str, Amount], device: torch.device, repeats: int) -> dict[str, float]:
    """The highest rate of each operation, amounts per second, after one warm-up call.

    An operation that takes longer than `PATIENCE` runs once (bf16 on a CPU that only emulates it, for example).
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, (call, _) in calls.items():
            if repeat and min(times[name], default=0.0) > PATIENCE:
                continue
            taken = seconds(call, device)
            if repeat or taken > PATIENCE:
                times[name].append(taken)
    return {name: amount / min(times[name]) for name, (_, amount) in calls.items()}


# --- what a pass must do --------------------------------------------------------------------------------------------


class Matrices(NamedTuple):
    """Numbers of weights of large matrices, and of their rows: an int8 row has a scale."""

    weights: int
    rows: int

    @classmethod
    def pair(cls, outer: int, inner: int) -> Matrices:
        """An up and a down projection."""
        return cls(2 * outer * inner, outer + inner)

    @classmethod
    def total(cls, parts: Sequence[Matrices]) -> Matrices:
        return cls(sum(part.weights for part in parts), sum(part.rows for part in parts))

    def times(self, count: int) -> Matrices:
        return Matrices(self.weights * count, self.rows * count)

    def bytes(self, size: int, scheme: str) -> int:
        """Bytes of the matrices. size: of a weight that is not quantized."""
        if scheme == "int4":
            return self.weights * int4.BLOCK // (int4.GROUP * int4.PANEL)
        return self.weights * size if scheme == "none" else self.weights + self.rows * torch.float32.itemsize


def expected_experts(config: NemotronHFields, tokens: int) -> float:
    """Expected number of a layer's experts that a number of tokens visits with a random choice."""
    return config.n_routed_experts * (1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** tokens)


@contextmanager
def counting_experts(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the routers' choices in a `with` block: one tensor of expert ids for each layer and pass."""
    choices: list[Tensor] = []
    hooks = [
        part.register_forward_hook(lambda _, __, out: choices.append(out[0]))
        for part in module.modules()
        if isinstance(part, Router)
    ]
    try:
        yield choices
    finally:
        for hook in hooks:
            hook.remove()


def visited(choices: Sequence[Tensor], config: NemotronHFields, tokens: int) -> tuple[list[float], str]:
    """The number of experts that each MoE layer must read, and its source."""
    layers = config.hybrid_override_pattern.count("E")
    if layers and len(choices) == layers:
        return [float(choice.unique().numel()) for choice in choices], "counted"
    return [expected_experts(config, tokens)] * layers, "expected by chance"


def work(
    config: NemotronHFields,
    dtype: torch.dtype,
    *,
    rows: int,
    width: int,
    context: int,
    experts: Sequence[float] | None = None,
    head: bool = True,
    denoiser: bool = False,
    quantization: str = "none",
) -> Work:
    """One pass over rows × width tokens after texts of `context` tokens.

    experts: number of experts that each MoE layer visits (None: expected for a random choice). denoiser: True: the pass
    has time conditioning; False: the pass adds its tokens to the Mamba states.
    """
    tokens, size, hidden, inner = rows * width, dtype.itemsize, config.hidden_size, config.mamba_inner
    pattern = config.hybrid_override_pattern
    experts = [expected_experts(config, tokens)] * pattern.count("E") if experts is None else experts
    counts = {kind: pattern.count(kind) for kind in "M*E-"}
    keys = config.num_key_value_heads * config.head_dim
    queries = config.num_attention_heads * config.head_dim
    into_mamba = inner + config.conv_dim + config.mamba_num_heads
    convolution = config.conv_dim * (config.conv_kernel + config.use_conv_bias)
    expert = Matrices.pair(hidden, config.moe_intermediate_size)
    large = Matrices.total([  # matrices that can be int8 or int4
        Matrices(hidden * (into_mamba + inner), into_mamba + hidden).times(counts["M"]),
        Matrices(hidden * 2 * (queries + keys), queries + 2 * keys + hidden).times(counts["*"]),
        Matrices.pair(hidden, config.moe_shared_expert_intermediate_size).times(counts["E"]),
        Matrices.pair(hidden, config.intermediate_size).times(counts["-"]),
    ])  # fmt: skip
    small = counts["M"] * (inner + convolution + 3 * config.mamba_num_heads)
    small += counts["E"] * config.n_routed_experts * hidden
    norms = hidden * (config.num_layers + 1)
    vocabulary = Matrices(config.vocab_size * hidden, config.vocab_size).times(int(head))
    once = hidden * (SINUSOID_SIZE + 4 * hidden) if denoiser else 0  # the time embedder: one token a row
    tables = 3 * hidden * config.num_layers if denoiser else 0
    ssm = inner * config.ssm_state_size
    parts = {
        "layers": large.bytes(size, quantization) + (small + norms + tables + once) * size,
        "experts": sum(experts) * expert.bytes(size, quantization),
        "head": vocabulary.bytes(size, "int8" if quantization == "int4" else quantization),
        "embeddings": tokens * hidden * size,
        "K/V": rows * context * counts["*"] * 2 * keys * size,
        "Mamba states": rows * counts["M"] * (
            ssm * accumulation_dtype(dtype).itemsize + (config.conv_kernel - 1) * config.conv_dim * size
        ),
    }  # fmt: skip
    chosen = counts["E"] * config.num_experts_per_tok * expert.weights
    operations = 2.0 * tokens * (large.weights + small + vocabulary.weights + chosen)
    operations += 2.0 * rows * once + 4.0 * tokens * counts["*"] * queries * (context + width)
    operations += 2.0 * tokens * counts["M"] * ssm * (1 if denoiser else 2)
    return Work({name: float(value) for name, value in parts.items()}, operations)


def passes_of(
    config: NemotronHFields,
    dtype: torch.dtype,
    context: int,
    block_size: int = 16,
    rows: int = 1,
    quantization: str = "none",
) -> dict[str, Work]:
    """An AR step, a denoising pass and a commit of `rows` texts, with experts chosen at random."""
    shared: dict[str, Any] = {"rows": rows, "context": context, "quantization": quantization}
    return {
        "AR step": work(config, dtype, width=1, **shared),
        "denoiser pass": work(config, dtype, width=block_size, denoiser=True, **shared),
        "commit": work(config, dtype, width=block_size, head=False, **shared),
    }


def rates_summary(rates: Rates) -> str:
    """The rates in one line."""
    return f"reads {rates.bytes_per_second / 1e9:.1f} GB/s, multiplies {rates.operations_per_second / 1e9:.0f} GFLOP/s"
