"""Runs all GPU measurements in one command: eleven parts, each in a process of its own under a time limit.

    python benchmarks/gpu.py [--minutes 6] [--parts full,engine] [--out build/gpu]
    python benchmarks/gpu.py --small          the same parts with tiny shapes, also on a CPU
    python benchmarks/gpu.py --prepare        copies data to train on; says what is missing, and how much would travel
    python benchmarks/gpu.py --record-losses  writes gpu_losses.json, the losses of a CPU

Each measurement is appended to measurements.jsonl when it is made. After each part, results.json and results.md hold
all measurements so far; log.txt has the messages of all parts. The table is printed last. A part that fails, crashes or
hangs does not stop the others. --minutes shares the time among the parts in proportion; in a part, the most important
measurements come first, and what does not fit into its time is skipped by name.

The published shape has random bf16 weights that are made on the device: both towers on a card of 139 GiB (H200); one
set of weights for both towers on 78 GiB (H100), and int8 with both towers' own. States are made at the wanted length,
without a prefill. No part needs a compiler, a network or an installed package of this project.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import tempfile
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
if "twotower" not in sys.modules:  # without an installed package
    sys.path.insert(0, str(ROOT / "src"))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)

from twotower import options  # noqa: E402
from twotower.process import configure_process  # noqa: E402

configure_process()

import torch  # noqa: E402
from gpu_parts import adapters, bundled, cuda_tests, engine, full, int8, kernels, machine, micro, midsize, training  # noqa: E402
from gpu_parts.driver import Driver, Part  # noqa: E402
from gpu_parts.parallel import start  # noqa: E402
from gpu_parts.prepare import prepared  # noqa: E402
from gpu_parts.setting import Setting  # noqa: E402
from gpu_parts.table import printed  # noqa: E402

PARTS = (  # in order of importance; seconds of a run of nine minutes
    Part(
        "machine", 15, "Versions; ceilings of copies, products and grouped products; attention of torch.", machine.run
    ),
    Part("kernels", 40, "Every kernel beside its reference in float64; registers and spills.", kernels.run),
    Part("tests", 40, "The tests that use CUDA.", cuda_tests.run),
    Part("bundled", 30, "The bundled models: graphs, scheduling, verified as AR in fp32.", bundled.run),
    Part("micro", 30, "Each kernel at the published sizes, beside every other backend.", micro.run),
    Part("full", 80, "Passes of the published shape.", full.run),
    Part("engine", 40, "The engine on the published shape, AR against diffusion.", engine.run),
    Part("adapters", 30, "Rounds of adapters on the published shape, beside plain passes.", adapters.run),
    Part("int8", 35, "The published shape in int8, made layer by layer.", int8.run),
    Part("training", 110, "Losses as on a CPU, tokens a second, a run that is killed and resumed.", training.run),
    Part("midsize", 40, "The midsize shape beside its roofline, the naive reference and transformers.", midsize.run),
)


def chosen_parts(text: str | None) -> list[Part]:
    """The parts with these names, separated by commas, in their order; None: all."""
    known = {part.name: part for part in PARTS}
    names = list(known) if text is None else [name.strip() for name in text.split(",")]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: choose from {', '.join(known)}", param_hint="--parts")
    return [part for part in PARTS if part.name in names]


def has_cuda() -> bool:
    """Whether torch finds a GPU; asked in another process, because a process that has used CUDA cannot be forked."""
    _, status = os.waitpid(start(lambda: os._exit(0 if torch.cuda.is_available() else 3)), 0)
    return status == 0


@click.command()
@click.option("--minutes", type=click.FloatRange(min=0.1), default=6.0, show_default=True, help="Time of all parts.")
@click.option("--parts", default=None, help="Names of parts, separated by commas.  [default: all]")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("build/gpu"), show_default=True)
@click.option("--device", type=click.Choice(("cpu", "cuda")), default=None, help="[default: cuda if there is a GPU]")
@click.option("--small", is_flag=True, help="Tiny shapes: whether all parts work, also on a CPU.")
@click.option("--memory", type=click.FloatRange(min=0), default=None, help="GiB of the device to use.  [default: all]")
@click.option("--prepare", is_flag=True, help="Measure nothing; copy data, say what is needed.")
@click.option("--record-losses", is_flag=True, help=f"Measure nothing; write {training.RECORDED.name} on this CPU.")
def main(
    minutes: float, parts: str | None, out: Path, device: str | None, small: bool, memory: float | None, prepare: bool,
    record_losses: bool,
) -> None:  # fmt: skip
    """Measures one GPU."""
    chosen = chosen_parts(parts)
    if prepare:
        print("\n".join(prepared(ROOT)))
        return
    if record_losses:
        torch.set_num_threads(1)
        print(training.record_losses())
        return
    if not all(math.isfinite(value) for value in (minutes, memory or 0.0)):
        raise click.UsageError(f"--minutes is {minutes} and --memory is {memory}; give finite numbers")
    out = out.resolve()  # a part may change its folder
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.BadParameter(f"{out}: {error.strerror}; give another folder", param_hint="--out") from None
    found = has_cuda()
    if device == "cuda" and not found:
        raise click.BadParameter("torch finds no GPU; to try it out: --device cpu --small", param_hint="--device")
    device = device or ("cuda" if found else "cpu")
    if device == "cpu" and not small:
        raise click.UsageError("there is no GPU; the published shape needs one. To try the script out, give --small")
    compiled = Path(tempfile.mkdtemp(prefix="triton-"))  # all processes share compiled kernels
    os.environ["TRITON_CACHE_DIR"] = str(compiled)
    room = None if memory is None else int(memory * 2**30)
    driver = Driver(chosen, Setting(device=torch.device(device), small=small, out=out, memory=room), minutes, out)
    try:
        with options.override(native=device == "cpu"):  # a compiler would take the time of a part
            driver.run()
    finally:
        shutil.rmtree(compiled, ignore_errors=True)
    print(printed(driver.results()))


if __name__ == "__main__":
    main()
