"""`twotower export` and `twotower join`: a part of a two-tower checkpoint, or several checkpoints in one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from twotower import model_loading
from twotower.cli import model_options as models
from twotower.cli.terminal import byte_bar
from twotower.errors import ArgumentError

if TYPE_CHECKING:
    from twotower.checkpoint.export import ExportResult
    from twotower.checkpoint.gguf_export.export import FileDtype
    from twotower.checkpoint.join import JoinResult

TARGETS = ("one-tower", "gguf", "onnx", "peft", "denoiser")
FILE_DTYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
# Options → the targets that they are for.
_TARGETS_OF = {
    "base": ("peft",),
    "file_dtype": ("gguf",),
    "pre_tokenizer": ("gguf",),
    "max_shard_size": ("one-tower", "denoiser"),
}


@click.command()
@click.argument("model")
@click.option(
    "--to",
    "target",
    required=True,
    type=click.Choice(TARGETS),
    help="one-tower: the autoregressive model that is the context tower, for transformers. gguf: the same model for "
    "llama.cpp, Ollama and LM Studio. onnx: the passes of a small model, for onnxruntime. peft: the adapters alone, "
    "for twotower init --adapters and for peft. denoiser: the two-tower checkpoint with one of several denoisers.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=models.OUTPUT,
    metavar="DIR",
    help="Directory of the new files.",
)
@click.option(
    "--base", metavar="NAME", help="With peft: the hub id or path of the autoregressive model, for its config."
)
@click.option("--denoiser", metavar="NAME", help="With denoiser: the name of the denoiser to write.")
@click.option(
    "--max-shard-size", metavar="SIZE", default="5GB", show_default=True, help="Largest size of one weights file."
)
@click.option(
    "--dtype",
    "file_dtype",
    type=click.Choice(FILE_DTYPES),
    default="f16",
    show_default=True,
    help="With gguf: the dtype of the matrices. Embedding and head have at least 8 bits; vectors stay in f32.",
)
@click.option(
    "--pre-tokenizer",
    metavar="NAME",
    help="With gguf: llama.cpp's name of the tokenizer's pre-tokenizer, such as llama-bpe.  [default: recognised]",
)
@click.option("--overwrite", is_flag=True, help="Replace the files in DIR.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.pass_context
def export(
    context: click.Context,
    model: str,
    target: str,
    output: Path,
    base: str | None,
    denoiser: str | None,
    max_shard_size: str,
    file_dtype: FileDtype,
    pre_tokenizer: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write a two-tower checkpoint in the form of other programs.

    MODEL is a two-tower checkpoint: a directory, a hub id, or bundled/NAME. The target one-tower is the context tower
    alone, as the autoregressive checkpoint that it came from: the tensors under their original names and bit for bit,
    the original config.json, tokenizer, chat template and generation config. Tensors are copied one at a time, so a
    model of any size needs little memory.

    The target gguf writes the context tower, or an autoregressive checkpoint, as DIR/NAME-DTYPE.gguf with a Modelfile
    for Ollama beside it. The tokenizer, its special tokens and the chat template are in the file. docs/integrations.md
    has the families that llama.cpp runs.

    The target onnx writes the passes of a small model as ONNX graphs in fp32, with the state as inputs and outputs.
    docs/integrations.md shows how onnxruntime decodes with them.

    The target peft is for models whose denoiser is adapters. It writes them in PEFT's format, with the embedding of the
    mask token beside: a few MB that turn the autoregressive model into the two-tower model.

    The target denoiser is for models that twotower join made: it writes the checkpoint with one denoiser alone.
    """
    if (target == "denoiser") != (denoiser is not None):
        raise ArgumentError(
            "--denoiser NAME and --to denoiser belong together; give both, or leave --denoiser out for another target"
        )
    _check_options(context, target)
    source = model_loading.source_of(model)
    with models.status("reading …"):
        from twotower.checkpoint.export import ExportResult
    made = _write(
        target,
        source,
        output,
        base=base,
        denoiser=denoiser,
        max_shard_size=max_shard_size,
        file_dtype=file_dtype,
        pre_tokenizer=pre_tokenizer,
        overwrite=overwrite,
    )
    _print(made, as_json, summary(made) if isinstance(made, ExportResult) else join_summary(made))


def _write(
    target: str,
    source: str | Path,
    output: Path,
    *,
    base: str | None,
    denoiser: str | None,
    max_shard_size: str,
    file_dtype: FileDtype,
    pre_tokenizer: str | None,
    overwrite: bool,
) -> ExportResult | JoinResult:
    """Writes a target with the options that it takes."""
    from twotower.checkpoint.export import export_one_tower, export_peft
    from twotower.checkpoint.gguf_export.export import export_gguf
    from twotower.checkpoint.join import export_denoiser
    from twotower.checkpoint.onnx_export.export import export_onnx

    with byte_bar() as progress:
        if denoiser is not None:
            return export_denoiser(
                source, output, denoiser, max_shard_size=max_shard_size, overwrite=overwrite, progress=progress
            )
        if target == "peft":
            return export_peft(source, output, base=base, overwrite=overwrite, progress=progress)
        if target == "gguf":
            return export_gguf(
                source, output, dtype=file_dtype, pre_tokenizer=pre_tokenizer, overwrite=overwrite, progress=progress
            )
        if target == "onnx":
            return export_onnx(source, output, overwrite=overwrite, progress=progress)
        return export_one_tower(source, output, max_shard_size=max_shard_size, overwrite=overwrite, progress=progress)


def _check_options(context: click.Context, target: str) -> None:
    """Raises ArgumentError if an option of another target is given."""
    names = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    for name, targets in _TARGETS_OF.items():
        if target not in targets and context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise ArgumentError(f"{names[name]} is for --to {' and '.join(targets)}; leave it out")


def _print(made: ExportResult | JoinResult, as_json: bool, lines: Iterator[str]) -> None:
    """Prints notes to stderr, and the result as one JSON object or as text."""
    for note in made.notes:
        click.echo(f"Note: {note}.", err=True)
    for line in [json.dumps(made.to_dict(), ensure_ascii=False)] if as_json else lines:
        click.echo(line)


def summary(made: ExportResult) -> Iterator[str]:
    """Lines that describe the new checkpoint."""
    from twotower.byte_units import format_bytes
    from twotower.cli import info_page

    files = f"{len(made.files)} files" if len(made.files) > 1 else made.files[0]
    yield click.style(str(made.directory), bold=True)
    adapters = "" if made.rank is None else f"adapters of rank {made.rank} on "
    yield (
        f"{adapters}{made.architecture}: {info_page.format_count(made.parameters)} parameters, "
        f"{format_bytes(made.bytes)} in {files}"
    )


@click.command()
@click.argument("denoisers", nargs=-1, required=True, metavar="NAME=MODEL NAME=MODEL…")
@models.new_checkpoint_option
@click.option(
    "--for",
    "modes",
    multiple=True,
    metavar="MODE=NAME",
    help="Denoiser of a mode: diffusion, verified, mock_ar or auto. Can be repeated.  [default: the first; for auto "
    "that of verified]",
)
@click.option(
    "--max-shard-size", metavar="SIZE", default="5GB", show_default=True, help="Largest size of one weights file."
)
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint in DIR.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def join(
    denoisers: tuple[str, ...],
    output: Path,
    modes: tuple[str, ...],
    max_shard_size: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Join checkpoints with the same context tower to one with several denoisers.

    Each argument is a name for a denoiser, and its two-tower checkpoint: a directory or a hub id. The context towers
    must be equal bit for bit, and are stored once. A request names its denoiser, or gets the one of its mode. Tensors
    are copied one at a time, so a model of any size needs little memory. twotower export --to denoiser writes one
    denoiser alone again, with the tensors of its source bit for bit.
    """
    sources, of_mode = pairs(denoisers, "NAME=MODEL"), pairs(modes, "--for MODE=NAME")
    with models.status("reading …"):
        from twotower.checkpoint.join import join as join_checkpoints
    with byte_bar() as progress:
        made = join_checkpoints(
            sources, output, modes=of_mode, max_shard_size=max_shard_size, overwrite=overwrite, progress=progress
        )
    _print(made, as_json, join_summary(made))


def pairs(given: tuple[str, ...], form: str) -> dict[str, str]:
    """Arguments such as NAME=VALUE, by name.

    Raises:
        ArgumentError: an argument of another form, or a name that is given twice.
    """
    found: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise ArgumentError(f"{text!r} is not of the form {form}")
        if name in found:
            raise ArgumentError(f"{name} is given twice ({form}); give it once")
        found[name] = value
    return found


def join_summary(made: JoinResult) -> Iterator[str]:
    """Lines that describe the new checkpoint."""
    from twotower.byte_units import format_bytes
    from twotower.cli.info_page import format_count

    files = f"{len(made.files)} files" if len(made.files) > 1 else made.files[0]
    yield click.style(str(made.directory), bold=True)
    yield f"context tower: {format_count(made.context_parameters)} parameters"
    for name, parameters in made.denoisers.items():
        modes = [mode for mode, own in made.for_mode.items() if own == name]
        use = f", for mode {', '.join(modes)}" if modes else ""
        yield f"denoiser {name}: {format_count(parameters)} parameters{use}"
    yield f"{format_bytes(made.bytes)} in {files}"
