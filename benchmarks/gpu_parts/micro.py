"""Part 4: each kernel at the published sizes, beside every other backend, as a share of the device's ceiling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from common import roofline
from torch import Tensor, nn

from gpu_parts.clock import captured, timed
from gpu_parts.record import Figures, Record
from gpu_parts.setting import Setting, release
from twotower.model.linear import Int4Linear, Int8Linear, Linear
from twotower.model.moe import Experts, Int4Experts, Int8Experts
from twotower.nemotron_h_fields import NemotronHFields
from twotower.ops.reference.attention import CachedKV
from twotower.ops.registry import REGISTRY
from twotower.ops.self_check_cases import Sizes, mamba_block_arguments, state_update_arguments
from twotower.ops.self_check_moe_cases import released_route_arguments
from twotower.specs import MLPSpec, MoESpec


class Case(NamedTuple):
    """Arguments of an operation. bytes: that it must read and write. operations: that it must compute."""

    op: str
    text: str
    arguments: tuple[Any, ...]
    bytes: float
    operations: float = 0.0


@torch.no_grad()
def run(setting: Setting, record: Record) -> None:
    rates = setting.rates(record)
    groups = (attentions, mixtures, mamba_blocks, products, others)
    for number, make in enumerate(groups):
        share = record.left() * 0.85 / (len(groups) - number)
        try:
            cases = list(make(setting))
        except torch.OutOfMemoryError:
            record.add(make.__name__, skipped="its arguments do not fit")
            continue
        timings = sum(len(backends(setting, case.op)) for case in cases)
        seconds = 0.01 if setting.small else max(0.03, share / max(timings, 1) - 0.05)
        for case in cases:
            for backend in backends(setting, case.op):
                what = f"{case.op}, {case.text}: {backend.name}"
                record.measure(what, lambda c=case, b=backend, s=seconds: measured(setting, c, b.function, rates, s))
        del cases
        release()


def backends(setting: Setting, op: str) -> list[Any]:
    """The backends that the device allows. The last, the reference, counts only if there is no other."""
    found = [one for one in REGISTRY[op] if one.unsupported_reason(setting.device, setting.dtype) is None]
    return found if len(found) == 1 else [one for one in found if one is not REGISTRY[op][-1]]


def measured(
    setting: Setting, case: Case, function: Callable[..., Any], rates: roofline.Rates, seconds: float
) -> Figures:
    """The time of the kernels in a CUDA graph, the host's time without one, and the share of the ceiling."""

    def call() -> object:
        return function(*case.arguments)

    found = timed(call, setting.device, seconds)
    busy = found.get("device ms", found["ms"])
    if setting.cuda:
        found["graph ms"] = busy = timed(captured(call, setting.device), setting.device, seconds)["device ms"]
    least = roofline.roofline_seconds(case.bytes, case.operations, rates) * 1e3
    return found | {"% of ceiling": 100 * least / busy, "GB/s": case.bytes / busy / 1e6}


def attentions(setting: Setting) -> Iterator[Case]:
    """A token or a block after its context, in place in a pool."""
    config = setting.config().layer_fields
    heads, kv, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    shapes = ((1, 1024, 1), (1, 1024, 16), (64, 1024, 1), (64, 1024, 16), (8, 32768, 16), (1, 131072, 1))
    for rows, length, block in ((2, 64, 4),) if setting.small else shapes:
        q, k, v = (_randn(setting, rows, block, count, width) for count in (heads, kv, kv))
        pool = _randn(setting, 2, rows * kv * length, width)
        start = torch.arange(rows, device=setting.device) * kv * length
        stride = lengths = torch.full_like(start, length)
        cached = CachedKV(pool[0], pool[1], start, stride, lengths, length, length)
        text = f"{rows} × {length}, {block} token{'s' * (block > 1)}"
        operations = 4.0 * rows * block * heads * width * (length + block)
        yield Case("attention", text, (q, k, v, None, block > 1, cached), pool.nbytes, operations)


def mamba_blocks(setting: Setting) -> Iterator[Case]:
    config = setting.config().layer_fields
    sizes = Sizes(config.mamba_num_heads, config.n_groups, config.mamba_head_dim, config.ssm_state_size, 4)
    for rows, block in ((2, 4),) if setting.small else ((1, 1), (1, 16), (8, 16), (64, 1), (64, 16)):
        arguments = mamba_block_arguments(sizes, block, setting.device, setting.dtype, rows)
        projected, _, window, state, _ = arguments
        count = projected.nbytes + window.nbytes + state.nbytes
        yield Case("mamba_block", f"{rows} × {block} tokens", (*arguments, True), count)
    for block in (1, 16):
        window, state, inputs, accepted, slots = state_update_arguments(sizes, block, setting.device, setting.dtype)
        count = 2 * (window.nbytes + state.nbytes) * len(slots) / len(state) + sum(part.nbytes for part in inputs)
        given = ((window, state),), (inputs,), accepted, slots
        yield Case("state_update", f"{len(slots)} × {block} tokens", given, count)


def mixtures(setting: Setting) -> Iterator[Case]:
    """The experts of one layer, plain, int8 and int4, by tokens: where one backend overtakes another."""
    config = setting.config().layer_fields
    expert = MLPSpec(width=config.moe_intermediate_size, activation="relu2", gated=False)
    spec = MoESpec(experts=config.n_routed_experts, top_k=config.num_experts_per_tok, expert=expert)
    with setting.device:
        plain = Experts(spec, config.hidden_size).to(setting.dtype)
    for weight in plain.parameters():
        weight.normal_(0, 0.02)
    kinds: dict[str, nn.Module] = {
        "experts": plain, "experts_int8": Int8Experts(plain), "experts_int4": Int4Experts(plain),
    }  # fmt: skip
    for op, module in kinds.items():
        size = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
        for tokens in (4,) if setting.small else (1, 4, 16, 64, 128, 512, 1024):
            hidden = _randn(setting, tokens, config.hidden_size)
            weight, choice = torch.rand(tokens, spec.experts, device=setting.device).topk(spec.top_k, -1)
            visited = choice.unique().numel() / spec.experts
            operations = 4.0 * tokens * spec.top_k * config.hidden_size * config.moe_intermediate_size
            given = (hidden, choice, weight, *weights_of(module))
            yield Case(op, f"{tokens} token{'s' * (tokens > 1)}", given, size * visited, operations)


def weights_of(module: nn.Module) -> tuple[Any, ...]:
    """The weights of experts without a gate, as the operations take them."""
    if isinstance(module, Experts):
        return None, module.up_proj, module.down_proj, module.activation
    if isinstance(module, Int8Experts):
        up, down = (module.up_proj, module.up_proj_scale), (module.down_proj, module.down_proj_scale)
        return None, up, down, module.activation
    assert isinstance(module, Int4Experts)
    return None, module.up_proj, module.down_proj, module.shapes["up_proj"][1], module.activation


def products(setting: Setting) -> Iterator[Case]:
    """The input projection of a Mamba layer, and the head, plain, int8 and int4."""
    config = setting.config().layer_fields
    shapes = {"in_proj": _mamba_inputs(config), "head": config.vocab_size}
    for name, out in shapes.items():
        with setting.device:
            plain = Linear(config.hidden_size, out, bias=False).to(setting.dtype)
        plain.weight.normal_(0, 0.02)
        kinds = {"linear": plain, "linear_int8": Int8Linear(plain)}
        if name != "head":
            kinds["linear_int4"] = Int4Linear(plain)
        for op, module in kinds.items():
            read = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
            for tokens in (4,) if setting.small else (1, 16, 128):
                x = _randn(setting, tokens, config.hidden_size)
                text = f"{name}, {tokens} token{'s' * (tokens > 1)}"
                operations = 2.0 * tokens * out * config.hidden_size
                yield Case(op, text, (x, *matrices_of(module, out)), read, operations)


def matrices_of(module: nn.Module, out: int) -> tuple[Any, ...]:
    """The weights of a projection without bias, as the operations take them."""
    if isinstance(module, Int8Linear):
        return module.weight, module.weight_scale, None
    return (module.weight, out, None) if isinstance(module, Int4Linear) else (module.weight, None, None)


def _mamba_inputs(config: NemotronHFields) -> int:
    return config.mamba_inner + config.conv_dim + config.mamba_num_heads


def others(setting: Setting) -> Iterator[Case]:
    """Argmax, norms and routers."""
    config = setting.config().layer_fields
    for rows, block in ((2, 4),) if setting.small else ((1, 1), (1, 16), (64, 16)):
        logits = _randn(setting, rows, block, config.vocab_size)
        yield Case("argmax", f"{rows} × {block} tokens", (logits, None), logits.nbytes)
        x, weight = _randn(setting, rows, block, config.hidden_size), _randn(setting, config.hidden_size)
        both = _randn(setting, 2, rows, 1, config.hidden_size)
        given = x, weight, 1e-5, (both[0], both[1]), "after"
        yield Case("rms_norm", f"{rows} × {block} tokens", given, 2 * x.nbytes)
    if not setting.small:
        hidden, weight, bias, rule = released_route_arguments(setting.device, setting.dtype)
        for tokens in (1, 16, 1024):
            x = hidden[:1].expand(tokens, -1).contiguous()
            yield Case("route", f"{tokens} tokens", (x, weight, bias, rule), weight.nbytes + x.nbytes)


def _randn(setting: Setting, *shape: int) -> Tensor:
    return torch.randn(shape, device=setting.device, dtype=setting.dtype)
