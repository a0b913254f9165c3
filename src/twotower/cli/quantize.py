"""`twotower quantize`: writes a copy of a checkpoint with weights in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from twotower import model_loading
from twotower.cli import model_options as models
from twotower.cli.terminal import console_on, status_line

if TYPE_CHECKING:
    from twotower.checkpoint.quantized_copy import QuantizedCopy
    from twotower.evaluation.calibration import TextCalibration


@click.command()
@click.argument("model", required=False)
@models.new_checkpoint_option
@click.option(
    "--scheme",
    metavar="PLAN",
    required=True,
    callback=models.check_plan,
    help="int8, int4, or pairs such as experts=int4,rest=int8 or denoiser=int4,context=int8. Heads have at least 8 "
    "bits.",
)
@click.option(
    "--dtype",
    type=click.Choice(model_loading.DTYPES),
    default="auto",
    show_default=True,
    help="Dtype of the tensors that are not quantized. auto: that of the checkpoint.",
)
@click.option(
    "--calibrate",
    "calibration",
    multiple=True,
    metavar="DATA",
    help="Round int4 weights for the inputs that this text gives them: a file or data set as in twotower train. Can be "
    "repeated.",
)
@models.calibration_tokens_option
@click.option(
    "--report",
    is_flag=False,
    flag_value="-",
    metavar="[FILE]",
    help="Measure what it costs, and print a table; FILE.md or FILE.json: also write it there.",
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="DATA",
    help="Text of the report's likelihoods, as --calibrate. Can be repeated.  [default: problems of the suite]",
)
@click.option(
    "--tokens",
    metavar="N",
    type=click.IntRange(1),
    default=8192,
    show_default=True,
    help="Tokens of text that the report reads.",
)
@click.option(
    "-n",
    "--problems",
    metavar="N",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    help="Problems of each family that the report solves.",
)
@click.option(
    "--seed",
    metavar="N",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Seed of the masks of --calibrate and --report, and of the problems.",
)
@click.option(
    "--max-shard-size", metavar="SIZE", default="5GB", show_default=True, help="Largest size of one weights file."
)
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint in DIR.")
@models.threads_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def quantize(
    model: str | None,
    output: Path,
    scheme: str,
    dtype: str,
    calibration: tuple[str, ...],
    calibration_tokens: int,
    report: str | None,
    texts: tuple[str, ...],
    tokens: int,
    problems: int,
    seed: int,
    max_shard_size: str,
    overwrite: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Write a copy of a checkpoint with weights in 8 or 4 bits.

    MODEL is a two-tower checkpoint, a directory or a hub id; by default the bundled model. All verbs load the copy as
    it is. They need no --quantization, and nothing is quantized at their start. Tensors are read, quantized and written
    one at a time, so a model of any size needs little memory.

    --calibrate rounds int4 weights so that outputs of layers change little for a text like the one that the model will
    read (GPTQ). It runs both towers, layer by layer. --report loads both models into memory and compares them: size,
    likelihood, distributions of both towers, passes, accuracy and speed.
    """
    from twotower.cli.quantization_table import check_report_file

    models.check_calibration_tokens(calibration)
    file = None if report in (None, "-") else Path(str(report))
    check_report_file(file)
    source = model_loading.source_of(model)
    if texts and report is None:
        raise click.UsageError("--text is the text of a report; add --report, or leave it out")
    with models.status("reading …"):
        from twotower.checkpoint.quantized_copy import quantize_checkpoint
        from twotower.json_text import to_json
        from twotower.process import configure_process

        configure_process(threads)
    if report is not None:
        _check_report(source)
    with status_line() as update:
        made = quantize_checkpoint(
            source,
            output,
            scheme,
            dtype=dtype,
            calibration=_calibration(scheme, calibration, calibration_tokens, seed, update),
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            progress=lambda done, total: update(f"writing: {done / total:.0%}"),
        )
    facts = made.to_dict()
    if not as_json:
        click.echo("\n".join(summary(made)))
    if report is not None:
        facts |= _report(source, output, file, as_json, data=texts, tokens=tokens, per_family=problems, seed=seed)
    if as_json:
        click.echo(to_json(facts))


def _calibration(
    scheme: str, data: tuple[str, ...], tokens: int, seed: int, progress: Callable[[str], None]
) -> TextCalibration | None:
    """The calibration with this text; None without text.

    Raises:
        ArgumentError: the plan has no int4 weights to calibrate.
    """
    if not data:
        return None
    import torch

    from twotower.errors import ArgumentError
    from twotower.evaluation.calibration import TextCalibration
    from twotower.quantization import QuantizationPlan

    if "int4" not in QuantizationPlan.parse(scheme).schemes.values():
        raise ArgumentError(f"--calibrate rounds int4 weights, and --scheme {scheme} has none; leave --calibrate out")
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    return TextCalibration(data=data, tokens=tokens, seed=seed, device=device, progress=progress)


def _check_report(source: Path | str) -> None:
    """Raises TwoTowerError, before anything is written, for a model that a report cannot measure."""
    from twotower.checkpoint.source import resolve_source
    from twotower.config import TwoTowerConfig
    from twotower.evaluation.text_batches import check_towers

    check_towers(TwoTowerConfig.read(resolve_source(source, {})), "--report")


def _report(
    source: Path | str,
    output: Path,
    file: Path | None,
    as_json: bool,
    *,
    data: tuple[str, ...],
    tokens: int,
    per_family: int,
    seed: int,
) -> dict[str, object]:
    """Measures both models, prints or writes the table → the facts for `--json`."""
    from twotower.cli import quantization_table as tables
    from twotower.evaluation.machine import machine_facts, machine_summary
    from twotower.evaluation.quantization_report import compare_quantized

    loaded = []
    for which in (source, output):
        with models.status(f"loading {model_loading.name_of(which)} …"):
            loaded.append(model_loading.load_model(which))
    model_loading.need_tokenizer(loaded[0], source, "--report cannot encode texts; leave it out")
    with status_line() as update:
        found = compare_quantized(*loaded, data=data, tokens=tokens, per_family=per_family, seed=seed, progress=update)
    machine = machine_facts(loaded[0])
    place = machine_summary(machine)
    if not as_json:
        console_on("stdout").print(tables.table(found, place))
    facts: dict[str, object] = {"report": found.to_dict(), "machine": machine}
    if file is not None:
        tables.write_report(file, found, {"model": str(source), "machine": machine}, place)
    return facts


def summary(made: QuantizedCopy) -> Iterator[str]:
    """Lines that describe the new checkpoint."""
    from twotower.byte_units import format_bytes

    files = f"{len(made.files)} files" if len(made.files) > 1 else made.files[0]
    share = made.bytes / made.source_bytes
    yield click.style(str(made.directory), bold=True)
    size, before = format_bytes(made.bytes), format_bytes(made.source_bytes)
    yield f"{made.quantization}: {size} in {files}, {share:.0%} of {before}"
