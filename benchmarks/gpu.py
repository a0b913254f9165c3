"""Runs all GPU measurements in one call: kernels, equality of texts, rooflines, passes, the 30B shape.

    python benchmarks/gpu.py [--minutes 8.5] [--out build/gpu] [--parts rooflines,full-passes]
    python benchmarks/gpu.py --device cpu --tiny --minutes 1

Parts run one after the other. After each part, `results.json` and `results.md` in --out hold all results so far. A part
that raises an error is reported with its traceback, and the next part runs. A part that exceeds its limit (or the whole
budget) is interrupted; its results so far are kept. The JSON is also printed at the end.

The full shape (benchmarks/published.json) has random bf16 weights that are made on the device: two towers if they fit;
if only one fits, one set of weights for both towers, which reads as much per pass; else the first layers that fit. The
results name the choice ("towers").
"""

from __future__ import annotations

import gc
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click

from twotower.process import configure_process

configure_process()

import context as lengths_of  # noqa: E402
import passes  # noqa: E402
import throughput  # noqa: E402
import torch  # noqa: E402
from common import engine_comparison, memory, quantized_products, roofline  # noqa: E402
from common.models import BLOCK, MIDSIZE, PUBLISHED, Texts, config_of, cut_to, random_model, random_tokens, tower_bytes  # noqa: E402
from common.timing import synchronize  # noqa: E402

from twotower import GenerationParams, TwoTowerForCausalLM, bundled_model, generate, model_loading  # noqa: E402
from twotower.checkpoint.quantize import quantize_  # noqa: E402
from twotower.evaluation.machine import device_facts  # noqa: E402
from twotower.evaluation.workloads import few_shot_prompts  # noqa: E402
from twotower.ops import self_check, self_check_cases  # noqa: E402
from twotower.ops.registry import REGISTRY, report  # noqa: E402

PUBLISHED_RATES = (1.2, 1.5, 1.9, 3.0, 3.3, 5.0)  # tokens per pass: the published values and others
SPARE = 6 << 30  # bytes of the device that stay free for states, logits and libraries


class OutOfTimeError(Exception):
    """The time limit of a part is exceeded."""


@dataclass
class Setting:
    """State that the parts share. Models are made when first needed and freed when another model is needed."""

    device: torch.device
    dtype: torch.dtype
    tiny: bool
    rates: roofline.Rates | None = None
    full: TwoTowerForCausalLM | None = None
    towers: str = ""

    def measured_rates(self) -> roofline.Rates:
        if self.rates is None:
            self.rates = roofline.measure(self.device, self.dtype, quick=self.tiny)
        return self.rates

    def full_model(self) -> TwoTowerForCausalLM:
        """The 30B shape, or the part of it that fits."""
        if self.full is None:
            self.release()  # memory that the allocator kept from earlier parts
            torch.manual_seed(0)
            config = config_of(None if self.tiny else PUBLISHED)
            tower = tower_bytes(config, self.dtype)
            room = free_bytes(self.device) - (0 if self.tiny else SPARE)
            shared = 2 * tower > room
            self.towers = "both towers, weights of their own"
            if shared:
                self.towers = "one set of weights serves both towers"
            if shared and tower > room:
                config = cut_to(config, room, self.dtype)
                self.towers += f", the first {config.num_hidden_layers} layers"
            self.full = random_model(config, self.dtype, self.device, shared=shared)
        return self.full

    def release(self) -> None:
        self.full = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Free bytes of the device's memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


# --- parts ----------------------------------------------------------------------------------------------------------
# Each part takes the setting and fills `out` step by step, so that an interrupted part keeps its results.


def kernels(setting: Setting, out: dict[str, Any]) -> None:
    """Compares every backend that fits the device with its reference in float64, on the device."""
    out["registry"] = [dict(zip(("op", "backend", "why"), row, strict=True)) for row in report(
        setting.device, setting.dtype
    )]  # fmt: skip
    rows = out["checked"] = []
    for op, backends in REGISTRY.items():
        for backend in backends:
            refused = backend.unsupported_reason(setting.device, setting.dtype)
            row: dict[str, Any] = {"op": op, "backend": backend.name, "refused": refused or ""}
            rows.append(row)
            if not refused:
                tried = self_check_cases.CASES[op](setting.device, setting.dtype)
                wrong = self_check.find_mismatch(backend.function, backends[-1].function, tried)
                row["verdict"] = "agrees" if wrong is None else f"DIFFERS: it {wrong}"


FREE: dict[str, Any] = {"mode": "diffusion", "confidence_threshold": 0.8}


def equality(setting: Setting, out: dict[str, Any]) -> None:
    """The bundled model on the device: verified mode against AR, and AR against AR on the CPU."""
    texts, tokens = (2, 6) if setting.tiny else (16, 64)
    cpu = TwoTowerForCausalLM.from_pretrained(bundled_model("small"), dtype="float32")
    prompts = few_shot_prompts(cpu, texts, 48)
    shared: dict[str, Any] = {"max_new_tokens": tokens, "mask_token_id": cpu.config.mask_token, "seed": 0}

    def written(model: TwoTowerForCausalLM, **more: Any) -> list[list[int]]:
        return [one.tokens for one in generate(model, prompts, GenerationParams.of(**more, **shared))]

    on_cpu = written(cpu, mode="ar")
    for dtype in ("float32", "bfloat16"):
        model = model_loading.load_model(bundled_model("small"), dtype=dtype, context_device=str(setting.device))
        ar = written(model, mode="ar")
        for steps in (1,) if setting.tiny else (1, 2):
            verified = written(model, mode="verified", draft_steps=steps)
            out[f"{dtype}: verified, {steps} passes a draft, as AR"] = same(verified, ar)
        out[f"{dtype}: AR as in fp32 on the CPU"] = same(ar, on_cpu)
        once, again = (written(model, **FREE) for _ in range(2))
        out[f"{dtype}: diffusion twice the same"] = same(once, again)
        if dtype == "float32":
            out[f"{dtype}: diffusion as on the CPU"] = same(once, written(cpu, **FREE))


def same(one: list[list[int]], other: list[list[int]]) -> str:
    """The number of equal texts."""
    return f"{sum(a == b for a, b in zip(one, other, strict=True))} of {len(one)} texts"


def rooflines(setting: Setting, out: dict[str, Any]) -> None:
    """The read and matmul rates of the device."""
    rates = setting.measured_rates()
    out["summary"] = roofline.rates_summary(rates)
    out["rates"] = asdict(rates)
    config = config_of(None if setting.tiny else PUBLISHED).layer_fields
    works = roofline.passes_of(config, setting.dtype, 1024)
    out["full shape, by chance"] = [
        {
            "pass": name,
            "GB": work.bytes / 1e9,
            "GFLOP": work.operations / 1e9,
            "roofline, ms": roofline.pass_seconds(work, rates) * 1e3,
        }
        for name, work in works.items()
    ]


def midsize(setting: Setting, out: dict[str, Any]) -> None:
    """`passes.py` on the midsize shape, with transformers and the naive reference."""
    torch.manual_seed(0)
    model = random_model(config_of(None if setting.tiny else MIDSIZE), setting.dtype, setting.device)
    rates = setting.measured_rates()
    repeats, tokens, rounds = (3, 16, 1) if setting.tiny else (20, 96, 2)
    out |= passes.costs(model, rates, context=256, repeats=repeats, naive=True)
    out["diffusion"] = passes.diffusion_against_ar(model, context=256, tokens=tokens, rounds=rounds)
    if not setting.tiny:
        out["transformers"] = passes.against_transformers(model, context=32, tokens=tokens, rounds=rounds)


def full_passes(setting: Setting, out: dict[str, Any]) -> None:
    """The full shape: each pass with its roofline."""
    started = time.perf_counter()
    model = setting.full_model()
    synchronize(setting.device)
    out["towers"] = setting.towers
    out["seconds to make it"] = time.perf_counter() - started
    out["weights, GB"] = sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values()) / 1e9
    repeats = 3 if setting.tiny else 20
    out |= passes.costs(model, setting.measured_rates(), context=1024, repeats=repeats, naive=False)
    out["times AR by the passes alone"] = [
        {"tokens per pass": rate, "times AR": passes.from_passes(out["passes"], rate)} for rate in PUBLISHED_RATES
    ]


def full_profile(setting: Setting, out: dict[str, Any]) -> None:
    """The operations of one AR step, one denoising pass and one commit, by time."""
    model, context = setting.full_model(), 1024
    texts = Texts.random(model, 1, context + 4 * BLOCK)
    texts.set_length(context)
    block, t = random_tokens(model, 1, BLOCK), torch.full((1,), 0.5, device=setting.device)
    view = model.reader(texts.state).view()
    calls: dict[str, Callable[[], object]] = {
        "denoiser pass": lambda: model.denoise(block, t, view),
        "AR step": lambda: model.extend(block[:, :1], texts.state),
        "commit": lambda: (model.extend(block, texts.state, logits=False), texts.state.commit_state()),
    }
    for name, call in calls.items():
        texts.set_length(context)
        call()
        texts.set_length(context)
        out[name] = profiled(call, setting.device)


def profiled(call: Callable[[], object], device: torch.device, rows: int = 25) -> dict[str, Any]:
    """The operations that take longest, on the device if there is one; milliseconds."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    synchronize(device)
    with profile(activities=activities) as watched:
        started = time.perf_counter()
        call()
        synchronize(device)
        wall = time.perf_counter() - started
    events = watched.key_averages()

    def own(event: Any) -> float:
        if not cuda:
            return float(event.self_cpu_time_total)
        name = "self_device_time_total" if hasattr(event, "self_device_time_total") else "self_cuda_time_total"
        return float(getattr(event, name))

    # On CUDA an operation and its kernels are separate entries, so only the kernels' times are summed.
    on_device = [e for e in events if not cuda or "CUDA" in str(getattr(e, "device_type", ""))]
    busiest = sorted(on_device, key=own, reverse=True)[:rows]
    return {
        "wall ms under the profiler": wall * 1e3,
        "busy ms": sum(map(own, on_device)) / 1e3,
        "launched": sum(e.count for e in on_device),
        "longest": [
            {"operation": e.key[:90], "calls": e.count, "ms": own(e) / 1e3} for e in busiest if own(e)
        ],
    }  # fmt: skip


def full_diffusion(setting: Setting, out: dict[str, Any]) -> None:
    """The full shape end to end: AR against diffusion at the published tokens per pass."""
    model = setting.full_model()
    tokens, rounds = (16, 1) if setting.tiny else (96, 1)
    rates = PUBLISHED_RATES[:2] if setting.tiny else PUBLISHED_RATES
    out["towers"] = setting.towers
    out["diffusion"] = passes.diffusion_against_ar(model, context=512, tokens=tokens, rounds=rounds, per_pass=rates)


def full_context(setting: Setting, out: dict[str, Any]) -> None:
    """The full shape after 1K … 128K tokens."""
    lengths = (1024, 4096) if setting.tiny else memory.LENGTHS
    repeats = 2 if setting.tiny else 7
    out["towers"] = setting.towers
    out |= lengths_of.measure(setting.full_model(), setting.measured_rates(), lengths=lengths, repeats=repeats)


def full_memory(setting: Setting, out: dict[str, Any]) -> None:
    """Memory of texts at the full shape: held, and at the peak of one block."""
    model = setting.full_model()
    lengths = (1024, 2048) if setting.tiny else memory.LENGTHS
    out |= memory.measure_states(model, lengths)
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        passes.costs(model, setting.measured_rates(), context=max(lengths), repeats=1, naive=False)
        out["peak of passes after the longest text, GB"] = (torch.cuda.max_memory_allocated() - before) / 1e9
        out["of which the text's state, GB"] = out["states"][-1]["AR"] / 1e9


def engine(setting: Setting, out: dict[str, Any]) -> None:
    """`throughput.py`: the bundled model, 1 … 64 requests at once."""
    setting.release()
    model = model_loading.load_model(bundled_model("small"), context_device=str(setting.device))
    if setting.tiny:
        few: dict[str, Any] = {"at_once": (1, 2), "modes": ("ar",), "texts": 2}
        out |= throughput.measure(model, rounds=1, tokens=12, context=24, **few)
    else:
        out |= throughput.measure(model, rounds=1, texts=8, tokens=64)


def full_async_scheduling(setting: Setting, out: dict[str, Any]) -> None:
    """`engine_comparison.py` on the full shape: with and without async scheduling."""
    few: dict[str, Any] = {"at_once": (2,), "tokens": 6} if setting.tiny else {"at_once": (1, 8), "tokens": 48}
    model = setting.full_model()
    out["towers"] = setting.towers
    prompts = random_tokens(model, 8, 16 if setting.tiny else 256).tolist()
    out["engine"] = engine_comparison.compare_async_scheduling(
        model, prompts=prompts, kinds=("diffusion, 4 passes a block",), rounds=1, **few
    )


def products(setting: Setting, out: dict[str, Any]) -> None:
    """`quantized_products.py`: experts and `out_proj` of the full shape with plain, int8 and int4 weights."""
    config = config_of(None if setting.tiny else PUBLISHED).layer_fields
    out["rows"] = quantized_products.measure(config, setting.dtype, setting.device, 2 if setting.tiny else 20)


def full_int8(setting: Setting, out: dict[str, Any]) -> None:
    """The full shape with int8 weights: each pass with its own roofline."""
    full_quantized(setting, out, "int8")


def full_int4(setting: Setting, out: dict[str, Any]) -> None:
    """The full shape with int4 weights: each pass with its own roofline."""
    full_quantized(setting, out, "int4")


def full_quantized(setting: Setting, out: dict[str, Any], scheme: str) -> None:
    """Quantises the full shape, measures its passes and releases it: the model stays quantised."""
    model = setting.full_model()
    started = time.perf_counter()
    quantize_(model, scheme)
    synchronize(setting.device)
    out["towers"] = setting.towers
    out["seconds to quantise it"] = time.perf_counter() - started
    repeats = 3 if setting.tiny else 20
    out |= passes.costs(model, setting.measured_rates(), context=1024, repeats=repeats, naive=False)
    del model
    setting.release()


def two_devices(setting: Setting, out: dict[str, Any]) -> None:
    """`engine_comparison.py`: the engine with the towers on one GPU and on two, if there are two."""
    if setting.device.type == "cuda" and torch.cuda.device_count() < 2:
        out["left out"] = "there is one GPU"
        return
    other = torch.device("cuda:1") if setting.device.type == "cuda" else setting.device
    few: dict[str, Any] = {"at_once": (2,), "tokens": 6, "rounds": 1} if setting.tiny else {"tokens": 64, "rounds": 3}
    model = setting.full_model()
    out["towers on one"] = setting.towers
    prompts = random_tokens(model, 32, 16 if setting.tiny else 256).tolist()
    kinds = ("verified", "diffusion, 4 passes a block")
    out["full shape"] = engine_comparison.compare_devices(
        model, other, prompts=prompts, **{"at_once": (1, 2, 8, 32), "kinds": kinds} | few
    )
    del model
    setting.release()
    model = model_loading.load_model(bundled_model("small"), context_device=str(setting.device))
    prompts = few_shot_prompts(model, 2 if setting.tiny else 64, 48)
    kinds = ("verified", "diffusion")
    out["bundled model"] = engine_comparison.compare_devices(
        model, other, prompts=prompts, **{"at_once": (1, 8, 64), "kinds": kinds} | few
    )


def loading(setting: Setting, out: dict[str, Any]) -> None:
    """`memory.py` on the bundled model, each case in its own process (tiny: one case, in this process)."""
    shared: dict[str, Any] = {
        "device": str(setting.device), "dtype": "bfloat16", "threads": None, "prompt": 128, "rounds": 3,
    }  # fmt: skip
    if setting.tiny:
        name, case = next(iter(memory.CASES.items()))
        out["loads"] = {name: memory.child({"path": str(bundled_model("small")), **shared, **case})}
    else:
        out["loads"] = memory.loads(bundled_model("small"), **shared)


PARTS: dict[str, tuple[Callable[[Setting, dict[str, Any]], None], float]] = {  # the parts and their limits in minutes
    "kernels": (kernels, 0.5),
    "equality": (equality, 1.0),
    "rooflines": (rooflines, 0.5),
    "products": (products, 0.3),
    "full-passes": (full_passes, 2.0),
    "full-profile": (full_profile, 0.7),
    "full-diffusion": (full_diffusion, 1.5),
    "full-context": (full_context, 1.0),
    "full-memory": (full_memory, 0.5),
    "full-async-scheduling": (full_async_scheduling, 0.7),
    "full-int8": (full_int8, 0.8),
    "full-int4": (full_int4, 0.9),
    "midsize": (midsize, 1.2),
    "engine": (engine, 2.0),
    "two-devices": (two_devices, 1.5),
    "loading": (loading, 1.0),
}


# --- running them ---------------------------------------------------------------------------------------------------


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises OutOfTimeError if the block runs longer. A hanging kernel cannot be interrupted."""

    def over(*_: object) -> None:
        raise OutOfTimeError(f"cut off after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Report:
    """All results so far, written to disk after every part."""

    folder: Path
    facts: dict[str, Any]
    parts: dict[str, Any] = field(default_factory=dict)

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("results.json", json.dumps(self.all(), indent=1)), ("results.md", self.markdown())):
            draft = self.folder / f"{name}.part"
            draft.write_text(text + "\n", encoding="utf-8")
            draft.replace(self.folder / name)

    def all(self) -> dict[str, Any]:
        return self.facts | {"parts": self.parts}

    def markdown(self) -> str:
        lines = ["# One GPU, one call", ""]
        lines += [f"- {name}: {value}" for name, value in self.facts["machine"].items()]
        for name, part in self.parts.items():
            lines += ["", f"## {name}", "", f"{PARTS[name][0].__doc__} {part['state']}, {part['seconds']:.1f} s.", ""]
            lines += written(part["found"])
            if part.get("error"):
                lines += ["", "```", part["error"].rstrip(), "```"]
        return "\n".join(lines)


def written(found: Any, depth: int = 3) -> list[str]:
    """Markdown of JSON-like data: rows as tables, nested data under headings, the rest as a list."""
    lines: list[str] = []
    nested = []
    for name, value in found.items():
        if isinstance(value, dict | list) and value and not is_flat(value):
            nested.append((name, value))
        else:
            lines.append(f"- {name}: {cell(value)}")
    for name, value in nested:
        lines += ["", f"{'#' * depth} {name}", ""]
        if isinstance(value, list):
            lines += tabled(value)
        elif all(isinstance(part, dict) and is_flat(part, 1) for part in value.values()):
            lines += tabled([{"": key} | part for key, part in value.items()])
        else:
            lines += written(value, depth + 1)
    return lines


def is_flat(value: Any, nested: int = 0) -> bool:
    """Whether a value fits into a line (nested: or into a row, whose cells may hold flat values)."""
    parts = list(value.values()) if isinstance(value, dict) else value
    return all(not isinstance(part, dict | list) or (nested and is_flat(part)) for part in parts)


def tabled(rows: list[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    body = ["| " + " | ".join(cell(row.get(name, "")) for name in columns) + " |" for row in rows]
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *body]


def cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {cell(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value))
    return str(value).replace("|", "\\|").replace("\n", " ")


def run_part(name: str, setting: Setting, seconds: float) -> dict[str, Any]:
    """Runs a part and returns its entry in the report, also if it fails."""
    entry: dict[str, Any] = {"state": "done", "seconds": 0.0, "found": {}}
    started = time.perf_counter()
    try:
        with at_most(seconds), torch.no_grad():
            PARTS[name][0](setting, entry["found"])
    except OutOfTimeError as error:
        entry["state"], entry["error"] = str(error), traceback.format_exc(limit=-4)
    except Exception as error:
        entry["state"], entry["error"] = f"failed: {type(error).__name__}", traceback.format_exc()
        if isinstance(error, torch.OutOfMemoryError):
            setting.release()
    entry["seconds"] = time.perf_counter() - started
    return entry


@click.command()
@click.option("--device", type=click.Choice(("cpu", "cuda")), default="cuda", show_default=True)
@click.option("--dtype", type=click.Choice(roofline.DTYPES), default="bfloat16", show_default=True)
@click.option("--minutes", default=8.5, show_default=True, help="Time budget of all parts.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("build/gpu"), show_default=True)
@click.option("--parts", default=",".join(PARTS), show_default=True)
@click.option("--tiny", is_flag=True, help="Tiny shapes, to try the script out, also on a CPU.")
def main(device: str, dtype: str, minutes: float, out: Path, parts: str, tiny: bool) -> None:
    """Measures one device."""
    started = time.perf_counter()
    unknown = sorted(set(parts.split(",")) - set(PARTS))
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: choose from {', '.join(PARTS)}", param_hint="--parts")
    if device == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter(
            "no CUDA device; to try the script out, give --device cpu --tiny", param_hint="--device"
        )
    torch.manual_seed(0)
    setting = Setting(torch.device(device), getattr(torch, dtype), tiny)
    facts = {"benchmark": "gpu", "machine": device_facts(setting.device, setting.dtype), "tiny": tiny}
    found = Report(out, facts)
    for name in parts.split(","):
        left = 60 * minutes - (time.perf_counter() - started)
        if left < 1:
            found.parts[name] = {"state": "not begun: the budget is spent", "seconds": 0.0, "found": {}}
        else:
            print(f"{name} … ({left:.0f} s left)", file=sys.stderr, flush=True)
            found.parts[name] = run_part(name, setting, min(left, 60 * PARTS[name][1]))
            print(f"{name}: {found.parts[name]['state']}", file=sys.stderr, flush=True)
        found.write()
    print(f"{out / 'results.md'} written", file=sys.stderr)
    print(json.dumps(found.all()))


if __name__ == "__main__":
    main()
