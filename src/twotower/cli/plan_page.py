"""The plan of a training run as text: whether it fits, how long it takes, and which numbers are assumed."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

import click

from twotower.specs import KIND_NAMES, KIND_OF_LETTER
from twotower.training.planning.flops import adapter_columns
from twotower.training.planning.plan import UTILISATIONS, Plan
from twotower.training.planning.plan_setup import GIB, Setup
from twotower.training.planning.step_memory import Memory

_INDENT = 14
_WIDTH = 100
_NAME = 52  # width of the first column of a table


def render(plan: Plan) -> str:
    """The plan as text with terminal styles, which `click.echo` removes if stdout is not a terminal."""
    return "\n".join(page(plan))


def page(plan: Plan) -> Iterator[str]:
    """The lines of the plan, section by section."""
    for name, lines in _sections(plan):
        for i, line in enumerate(lines):
            heading = click.style(name.ljust(_INDENT), dim=True) if i == 0 else " " * _INDENT
            first, *more = textwrap.wrap(line, _WIDTH - _INDENT, subsequent_indent="  ", break_on_hyphens=False)
            yield heading + first
            yield from (" " * _INDENT + rest for rest in more)


def _sections(plan: Plan) -> Iterator[tuple[str, list[str]]]:
    yield "verdict", list(_verdict(plan))
    yield "run", list(_run(plan.setup))
    count = plan.parameters
    towers = f"{_big(count.per_tower)} {'per tower' if plan.setup.adapters is None else 'of the context tower'}"
    if count.denoiser != count.per_tower:
        towers = f"{_big(count.per_tower)} of the context tower, {_big(count.denoiser)} of the denoiser"
    yield "parameters", [f"{towers}; {_big(count.trained)} trained, {_big(count.frozen)} held frozen"]
    yield "memory", [*_memory(plan.memory), *_activations(plan)]
    yield "FLOPs", list(_work(plan))
    yield "traffic", list(_messages(plan))
    yield "hours" if plan.fits else "if it fitted", list(_hours(plan))
    yield "assumed", list(_assumed(plan.setup))


def _verdict(plan: Plan) -> Iterator[str]:
    setup, used = plan.setup, plan.memory.total
    where = f"{_gib(used)} of {setup.gpu_memory_gib:g} GiB on {_gpus(setup.gpus)}"
    if plan.fits:
        yield f"fits: {where}"
    else:
        yield f"does not fit: {where}; each of these changes alone reduces memory:"
        for remedy in plan.remedies:
            yield f"  {remedy.change}: {_gib(remedy.total)} GiB, {'fits' if remedy.fits else 'not enough'}"
    rows = f"with {setup.micro_batch_size} row{'s'[: setup.micro_batch_size > 1]} of {setup.row_length} at a time"
    if plan.smallest_gpus is None:
        yield f"no number of GPUs of this size is enough {rows}"
    else:
        kind = "a multiple of 8" if setup.adapters is None else "1, 2, 4 or a multiple of 8"
        yield f"smallest number of such GPUs ({kind}): {plan.smallest_gpus}, {rows}"


def _run(setup: Setup) -> Iterator[str]:
    rows = f"{setup.step_rows} row{'s'[: setup.step_rows > 1]} of {setup.row_length} tokens a step"
    yield (
        f"{rows} ({_big(setup.step_rows * setup.row_length)}), "
        f"{setup.micro_batches} × {setup.micro_batch_size} on each GPU; blocks of {setup.block_size}"
    )
    towers = {"frozen": "context tower frozen", "trained": "context tower trained too", "tied": "one tied network"}
    what = f"adapters of rank {setup.adapters}, " if setup.adapters is not None else ""
    what += f"draft head of rank {setup.draft_head}, " if setup.draft_head is not None else ""
    target = "; targets of the AR model" if setup.teacher else ""
    how = "with" if setup.activation_checkpointing else "without"
    yield f"{setup.dtype}; {how} recomputation; {what}{towers[setup.context]}{target}"


def _memory(memory: Memory) -> Iterator[str]:
    yield f"{'on one GPU, at the peak':<{_NAME}}{'GiB':>12}    {memory.moment}"
    rows = {
        "shard of the trained weights, fp32": memory.weights,
        "  their gradients": memory.gradients,
        "  AdamW's two moments": memory.moments,
        "shard of the frozen weights": memory.frozen,
        "embeddings, heads, time: gathered during a pass": memory.root,
        "the running layer pair, gathered, and messages": memory.gathered,
        "kept for the backward pass": memory.kept,
        "temporary memory of the running layer pair": memory.working,
        "reserve (assumed)": memory.reserve,
        "total": memory.total,
    }
    yield from (f"{name:<{_NAME}}{_gib(size):>12}" for name, size in rows.items() if size)


def _activations(plan: Plan) -> Iterator[str]:
    kinds = ", ".join(f"{_gib(size)} {KIND_NAMES[KIND_OF_LETTER[kind]]}" for kind, size in plan.kept_by.items())
    yield f"kept by one layer pair for a micro-batch, GiB: {kinds}"


def _work(plan: Plan) -> Iterator[str]:
    columns = plan.setup.row_length
    adapters = plan.setup.adapters is not None
    yield f"{'GFLOP per position':<{_NAME}}{'adapters' if adapters else 'two towers':>12}{'next-token':>12}"
    teacher = " and teacher" if plan.setup.teacher else ""
    where = f"trained columns, {adapter_columns(plan.setup.block_size):.0%}" if adapters else "masked positions, half"
    for label, name in (
        ("context tower", "context"),
        ("denoiser", "denoiser"),
        (f"head{teacher} (at {where} of all)", "head"),
        ("time conditioning", "time"),
        ("recomputation", "recomputed"),
        ("total", "total"),
    ):
        two, one = (getattr(step, name) / columns / 1e9 for step in (plan.flops, plan.autoregressive))
        if two == one == 0:
            continue
        yield f"{label:<{_NAME}}{two:>12.2f}{one:>12.2f}"
    yield f"{plan.ratio:.2f} times next-token training of one such tower"


def _messages(plan: Plan) -> Iterator[str]:
    traffic = plan.traffic
    weights, gradients = (f"{size / 1e9:.3g} GB" for size in (traffic.gathered, traffic.reduced))
    yield (
        f"each GPU receives {weights} of weights and {gradients} of gradients a step: "
        f"{traffic.seconds:.2f} s at {plan.setup.bandwidth_gb:g} GB/s; computation: {traffic.compute_seconds:.2f} s"
    )
    if traffic.seconds > traffic.compute_seconds:
        factor = traffic.seconds / traffic.compute_seconds
        yield (
            f"WARNING: communication takes longer than computation; multiply the hours below, which count computation "
            f"alone, by {factor:.1f}, or give a larger --micro-batch-size"
        )


def _hours(plan: Plan) -> Iterator[str]:
    low, high = UTILISATIONS
    used = f"{plan.setup.utilisation:.0%} of peak"
    head = f"for tokens, padding included, on {plan.setup.gpus} GPU{'s'[: plan.setup.gpus > 1]}, at"
    yield f"{head:<{_NAME - 12}}{f'{high:.0%}':>12}{used:>14}{f'{low:.0%}':>12}"
    for row in plan.hours:
        cells = (row.fastest, row.hours, row.slowest)
        yield f"{_big(row.tokens):<{_NAME - 12}}" + "".join(
            f"{_duration(hours):>{width}}" for hours, width in zip(cells, (12, 14, 12), strict=True)
        )


def _assumed(setup: Setup) -> Iterator[str]:
    yield (
        f"{setup.utilisation:.0%} of {setup.peak_tflops:g} TFLOP/s, recomputation counted as work; "
        f"{setup.bandwidth_gb:g} GB/s into each GPU, overlapping with computation; {setup.reserve_gib:g} GiB reserve; "
        "fused attention. All else is computed from the shapes."
    )


def _gpus(count: int) -> str:
    return "one GPU" if count == 1 else f"each of {count} GPUs"


def _duration(hours: float) -> str:
    return f"{hours / 24:,.0f} days" if hours >= 240 else f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.0f} min"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size < GIB else f"{size / GIB:.1f}"


def _big(count: float) -> str:
    """A count in thousands, millions, billions or trillions."""
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {name}"
    return f"{count:.0f}"
