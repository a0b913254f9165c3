"""`twotower init`: converts a one-tower checkpoint to a checkpoint with a denoiser, from which training starts."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from twotower import model_loading
from twotower.cli import model_options as models
from twotower.cli.info import DTYPES
from twotower.cli.terminal import byte_bar

if TYPE_CHECKING:
    from twotower.checkpoint.convert import ConversionResult
    from twotower.evaluation.feed_forward import TextFeedForward

KINDS = ("adapters", "tower")
RANK = 16  # of adapters, unless one is given
GATES = ("masks", "everywhere")
BLOCK_ATTENTIONS = ("full", "prefix_causal")


@click.command()
@click.option(
    "--from", "source", required=True, metavar="MODEL", help="One-tower checkpoint: a directory, hub id or GGUF file."
)
@models.new_checkpoint_option
@click.option(
    "--mask-token",
    "--mask-token-id",
    metavar="TOKEN",
    help="Mask token: its id, or its text in the tokenizer. [default: the tokenizer's mask token, else a reserved "
    "token, a row of the embedding beyond the tokenizer, or an unused special token; for Nemotron-H id 3]",
)
@click.option(
    "--denoiser",
    "kind",
    type=click.Choice(KINDS),
    help="adapters: low-rank adapters on the context tower. tower: a second tower, as in the released model. "
    "[default: adapters; tower with options of a second tower]",
)
@click.option(
    "--denoiser-lora",
    metavar="R",
    type=click.IntRange(1),
    help=f"Rank of the adapters. [default: {RANK}]",
)
@click.option(
    "--draft-head",
    metavar="R",
    type=click.IntRange(1),
    help="Rank of a draft head: each token that a pass chooses then depends on the token before it. [default: none]",
)
@click.option(
    "--denoiser-layers",
    metavar="SPEC",
    help="Layers of the source that the second tower has: every:N, first:N, last:N, numbers and ranges such as "
    "0,4,8-11, or several of these with +. twotower info lists the numbers. [default: all]",
)
@click.option(
    "--denoiser-feed-forward",
    metavar="KIND",
    help="In the place of the second tower's MoE layers: experts:K, the K experts that --calibrate uses most, or "
    "dense:WIDTH, an MLP fitted to them. [default: the same MoE layers]",
)
@click.option(
    "--calibrate",
    "calibration",
    multiple=True,
    metavar="DATA",
    help="Text for --denoiser-feed-forward: a file or data set as in twotower train. Can be repeated.",
)
@models.calibration_tokens_option
@click.option(
    "--adapter-gate",
    type=click.Choice(GATES),
    help="Where adapters act. masks: from the first mask of a block on, so one pass checks a draft and makes the next. "
    "everywhere: at every position of a block; the passes are then those of a second tower. [default: masks]",
)
@click.option(
    "--prediction-shift",
    type=click.Choice(("0", "1")),
    help="1: each output of the denoiser predicts the next token, and a block begins with the text's last token. "
    "[default: 0; 1 for adapters at masks]",
)
@click.option(
    "--block-attention",
    type=click.Choice(BLOCK_ATTENTIONS),
    help="prefix_causal: the tokens of a block before its first mask attend only to earlier ones. "
    "[default: full; prefix_causal for adapters at masks]",
)
@click.option(
    "--first-from-ar", is_flag=True, help="In diffusion the context tower chooses the first token of each block."
)
@click.option(
    "--adapters",
    metavar="PATH",
    help="Adapters of this model that twotower export --to peft wrote, a directory or hub id: they are the denoiser.",
)
@click.option("--dtype", type=click.Choice(DTYPES), help="Dtype of the new checkpoint. [default: as stored]")
@click.option(
    "--max-shard-size", metavar="SIZE", default="5GB", show_default=True, help="Largest size of one weights file."
)
@click.option(
    "--seed",
    metavar="N",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Seed of the random weights: of the time embedder, or of new adapters.",
)
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint in DIR.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def init(
    source: str,
    output: Path,
    mask_token: str | None,
    kind: str | None,
    denoiser_lora: int | None,
    denoiser_layers: str | None,
    denoiser_feed_forward: str | None,
    calibration: tuple[str, ...],
    calibration_tokens: int,
    adapters: str | None,
    dtype: str | None,
    max_shard_size: str,
    seed: int,
    overwrite: bool,
    as_json: bool,
    **choices: object,
) -> None:
    """Add a denoiser to an autoregressive model.

    The source is a checkpoint of a supported family: Nemotron-H, Llama, Qwen and others. It becomes the context tower.
    The denoiser is the source itself with low-rank adapters, which start without an effect: one network in memory, and
    only adapters are trained. With --denoiser tower it is a second tower, as in the released model, which starts as a
    copy of the source; the time conditioning starts as the identity, so the untrained denoiser computes what the source
    computes. With --denoiser-layers the second tower has some of the source's layers. With --denoiser-feed-forward it
    has fewer experts, or an MLP instead. Tensors are copied one at a time, so a model of any size needs little memory.

    A mask stands for a token that is not known yet. The mask token must be one that no text contains. The command
    prints its choice and the reason, and config.json keeps it.
    """
    models.check_calibration_tokens(calibration)
    of_a_tower = bool(denoiser_layers or denoiser_feed_forward or calibration)
    denoiser_lora = _rank(kind, denoiser_lora, adapters, of_a_tower)
    with models.status("reading …"):
        from twotower.checkpoint.convert import convert
        from twotower.checkpoint.denoiser_choices import DenoiserChoices
    with byte_bar() as progress:
        made = convert(
            model_loading.source_of(source),
            output,
            mask_token=mask_token,
            denoiser_lora=denoiser_lora,
            choices=DenoiserChoices.of_options(choices),
            adapters=adapters,
            denoiser_layers=denoiser_layers,
            denoiser_feed_forward=denoiser_feed_forward,
            calibration=_calibration(calibration, calibration_tokens),
            dtype=dtype,
            max_shard_size=max_shard_size,
            seed=seed,
            overwrite=overwrite,
            progress=progress,
        )
    for note in made.notes:
        click.echo(f"Note: {note}.", err=True)
    if as_json:
        click.echo(json.dumps(made.to_dict(), ensure_ascii=False))
        return
    for line in summary(made):
        click.echo(line)
    directory = shlex.quote(str(made.directory))
    use = f"train {directory} --data PATH -o RUN" if adapters is None else f"serve --model {directory}"
    click.secho(f"next: twotower {use}", err=True, dim=True)


def _rank(kind: str | None, given: int | None, adapters: str | None, of_a_tower: bool) -> int | None:
    """The rank of new adapters; None for a second tower, and for adapters of a file.

    of_a_tower: whether there are options that only a second tower has.
    """
    if given is None and adapters is None:
        return RANK if kind == "adapters" or (kind is None and not of_a_tower) else None
    if kind == "tower":
        option = "--denoiser-lora" if adapters is None else "--adapters"
        raise click.UsageError(f"--denoiser is tower, and {option} makes adapters; leave one of them out")
    return given


def _calibration(data: tuple[str, ...], tokens: int) -> TextFeedForward | None:
    """The calibration with this text, with a line for each layer on stderr; None without text."""
    if not data:
        return None
    import torch

    from twotower.evaluation.feed_forward import TextFeedForward

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    return TextFeedForward(data=data, tokens=tokens, device=device, progress=lambda line: click.echo(line, err=True))


def summary(made: ConversionResult) -> Iterator[str]:
    """Lines that describe the new checkpoint."""
    from twotower.byte_units import format_bytes
    from twotower.cli import info_page

    count, size = info_page.format_count, format_bytes
    files = f"{len(made.files)} files" if len(made.files) > 1 else made.files[0]
    yield click.style(str(made.directory), bold=True)
    layers = f"({len(made.pattern)} layers: {info_page.format_pattern(made.pattern)})"
    head = "" if made.draft_head_rank is None else f" and a draft head of rank {made.draft_head_rank}"
    if made.adapter_rank is None:
        own = made.denoiser_layers is not None or made.denoiser_feed_forward is not None
        towers = "a context tower" if own else "two towers"
        towers = f"{towers} of {count(made.parameters_per_tower)} parameters {layers}"
        yield f"{towers}, time conditioning {count(made.time_parameters)}{head}"
        if own:
            yield from _own_denoiser(made)
    else:
        tower = f"one tower of {count(made.parameters_per_tower)} parameters {layers}"
        yield f"{tower}, adapters of rank {made.adapter_rank}{head} with {count(made.adapter_parameters)}"
    yield f"{size(made.bytes)} in {files}, {made.dtype}"
    text = "" if made.mask_token is None else f" {made.mask_token!r}"
    yield f"mask token id {made.mask_token_id}{text}: {made.mask_reason}"


def _own_denoiser(made: ConversionResult) -> Iterator[str]:
    """Lines about a second tower that has fewer layers or another feed-forward than the first."""
    from twotower.cli import info_page

    parts = [f"a denoiser of {info_page.format_count(made.denoiser_parameters)} parameters"]
    if made.denoiser_layers is not None:
        parts.append(f"layers {info_page.format_numbers(made.denoiser_layers)} of the source")
    if made.denoiser_feed_forward is not None:
        parts.append(f"feed-forward {made.denoiser_feed_forward}")
    yield ", ".join(parts)
    if made.feed_forward_errors:
        errors = ", ".join(f"{layer}: {error:.3f}" for layer, error in made.feed_forward_errors.items())
        yield f"relative error of the feed-forward by layer of the source: {errors}"
