"""Part 0: versions, and what the device can do at best: copies, products, grouped products, attention of torch."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_parts.clock import captured, timed
from gpu_parts.record import Figures, Record
from gpu_parts.setting import CEILINGS, Setting, measured_rates
from twotower.evaluation.machine import device_facts

PACKAGES = (
    "torch", "triton", "transformers", "numpy", "safetensors", "tokenizers", "huggingface_hub", "click", "rich",
    "pytest", "pytest-xdist", "pytest-timeout",
)  # fmt: skip
BACKENDS = (
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
)  # fmt: skip


def run(setting: Setting, record: Record) -> None:
    record.measure("versions", lambda: versions(setting))
    record.measure(CEILINGS, lambda: ceilings(setting))
    seconds = setting.budget(record, 30)
    record.measure("copy", lambda: copy(setting, seconds))
    for dtype in (torch.bfloat16, torch.float32):
        record.measure(f"product, {name(dtype)}", lambda dtype=dtype: product(setting, dtype, seconds))
    for tokens in (1, 16, 128) if not setting.small else (4,):
        for form in ("eager", "captured"):
            what = f"grouped product, {tokens} tokens, {form}"
            record.measure(what, lambda tokens=tokens, form=form: grouped(setting, tokens, form == "captured", seconds))
    for backend in BACKENDS:
        for repeated in (False, True):
            what = f"attention of torch, {backend.name.lower()}, K/V heads {'repeated' if repeated else 'grouped'}"
            record.measure(
                what, lambda backend=backend, repeated=repeated: attention(setting, backend, repeated, seconds)
            )


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def versions(setting: Setting) -> Figures:
    facts: dict[str, Any] = device_facts(setting.device, setting.dtype)
    found = {package: _version(package) for package in PACKAGES}
    facts = {key: facts[key] for key in ("device", "twotower", "commit")} | {"python": platform.python_version()}
    facts |= {key: value for key, value in found.items() if value}
    facts["missing"] = [key for key, value in found.items() if not value] or "none"
    if setting.cuda:
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "memory GiB": properties.total_memory / 2**30, "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}", "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
        }  # fmt: skip
    return facts


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def ceilings(setting: Setting) -> Figures:
    """The rates of `roofline.measure`, to which all later parts compare."""
    rates = asdict(measured_rates(setting))
    return {key: rates[key] for key in ("bytes_per_second", "operations_per_second")} | {
        "GB/s": rates["bytes_per_second"] / 1e9,
        "TFLOP/s": rates["operations_per_second"] / 1e12,
    }


def copy(setting: Setting, seconds: float) -> Figures:
    """A copy on the device, bytes read and written."""
    source = torch.ones(1 << (18 if setting.small else 30), device=setting.device)
    target = torch.empty_like(source)
    found = timed(lambda: target.copy_(source), setting.device, seconds)
    return found | {"GB/s": 2 * source.nbytes / found["ms"] / 1e6}


def product(setting: Setting, dtype: torch.dtype, seconds: float) -> Figures:
    side = 128 if setting.small else 8192
    a, b = (torch.randn(side, side, device=setting.device).to(dtype) for _ in "ab")
    found = timed(lambda: a @ b, setting.device, seconds)
    return found | {"TFLOP/s": 2 * side**3 / found["ms"] / 1e9}


def grouped(setting: Setting, tokens: int, graph: bool, seconds: float) -> Figures:
    """One up projection of the experts by torch's grouped product, in bf16."""
    config = setting.config().layer_fields
    experts, width, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    weight = torch.randn(experts, inner, width, device=setting.device).bfloat16()
    count = tokens * config.num_experts_per_tok
    x = torch.randn(count, width, device=setting.device).bfloat16()
    chosen = torch.rand(tokens, experts, device=setting.device).topk(config.num_experts_per_tok, -1).indices.flatten()
    ends = F.one_hot(chosen, experts).sum(0).cumsum(0).to(torch.int32)

    def call() -> Tensor:
        return torch._grouped_mm(x, weight.transpose(1, 2), ends)

    found = timed(captured(call, setting.device) if graph else call, setting.device, seconds)
    read = chosen.unique().numel() * inner * width * 2
    return found | {"GB/s": read / found["ms"] / 1e6, "experts": chosen.unique().numel()}


def attention(setting: Setting, backend: SDPBackend, repeated: bool, seconds: float) -> Figures:
    """Forward and backward of a training step's attention with a mask, as in a denoiser: 8 rows of 1,024 tokens."""
    config = setting.config().layer_fields
    rows, length = (1, 32) if setting.small else (8, 1024)
    heads, kv, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q = torch.randn(rows, heads, length, width, device=setting.device, dtype=setting.dtype, requires_grad=True)
    k, v = (
        torch.randn(rows, kv, length, width, device=setting.device, dtype=setting.dtype, requires_grad=True)
        for _ in "kv"
    )
    mask = torch.ones(length, length, dtype=torch.bool, device=setting.device).tril()

    def call() -> None:
        keys, values = (part.repeat_interleave(heads // kv, 1) if repeated else part for part in (k, v))
        out = F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=not repeated)
        out.sum().backward()

    with sdpa_kernel([backend]):
        return timed(call, setting.device, seconds)
