"""The options that `twotower pretrain` and `twotower train` share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import click

from twotower.cli.deprecated import formerly

DTYPES = ("auto", "bfloat16", "float32", "float64")
FOLDER = click.Path(file_okay=False, path_type=Path)


OPTIONS = (
    click.option(
        "--data",
        multiple=True,
        metavar="ITEM",
        help="PATH or hub id, then [:SPLIT][@CONFIG][=WEIGHT]; repeat it for a mixture.",
    ),
    click.option("--validation", multiple=True, metavar="ITEM", help="Validation data. [default: held out]"),
    click.option(
        "--held-out",
        type=float,
        default=0.01,
        show_default=True,
        metavar="SHARE",
        help="Of the data, by a hash of the text, where there is no --validation.",
    ),
    click.option(
        "-o",
        "--output",
        "output",
        type=FOLDER,
        metavar="RUN",
        help="The run's directory; the same command again continues it.",
    ),
    click.option("--text-field", default="text", show_default=True),
    click.option(
        "--prompt-field",
        default="prompt",
        show_default=True,
        help="A record's prompt: context only, blocks begin where it ends.",
    ),
    click.option("--streaming", is_flag=True, help="Read hub data as a stream, in its own order."),
    click.option("--epochs", type=click.IntRange(1), help="Read the data so often. [default: again and again]"),
    click.option("--max-bad-records", type=click.IntRange(0), default=100, show_default=True),
    click.option(
        "--batch-size",
        cls=formerly("--rows"),
        type=click.IntRange(1),
        default=8,
        show_default=True,
        help="Rows of one optimizer step, over all processes.",
    ),
    click.option("--row-length", type=click.IntRange(1), default=1024, show_default=True, help="Tokens of a row."),
    click.option(
        "--micro-batch-size",
        cls=formerly("--micro-rows"),
        type=click.IntRange(0),
        default=0,
        help="Rows of one forward pass on one process. [default: all]",
    ),
    click.option(
        "--lr", cls=formerly("--rate"), type=float, default=1e-4, show_default=True, help="Peak learning rate."
    ),
    click.option("--warmup", type=click.IntRange(0), default=100, show_default=True, help="Steps."),
    click.option("--decay", type=float, default=0.3, show_default=True, help="Share of the steps, at the end."),
    click.option(
        "--final-lr-ratio",
        cls=formerly("--final"),
        type=float,
        default=0.01,
        show_default=True,
        help="Learning rate of the last step, as a share of the peak.",
    ),
    click.option("--weight-decay", type=float, default=0.1, show_default=True),
    click.option("--clip", type=float, default=1.0, show_default=True, help="Gradient norm; 0: do not clip."),
    click.option(
        "--balance-rate",
        type=float,
        default=1e-3,
        show_default=True,
        help="Step of the experts' selection biases; 0: leave them.",
    ),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        default="auto",
        show_default=True,
        help="To compute in; auto: bfloat16 where the machine is fast in it, else float32.",
    ),
    click.option("--device", type=click.Choice(("cpu", "cuda")), help="[default: cuda where there is one]"),
    click.option("--threads", type=click.IntRange(1), help="[default: torch's]"),
    click.option(
        "--activation-checkpointing",
        cls=formerly("--recompute"),
        is_flag=True,
        help="Keep two residual streams a layer; recompute the rest in the backward pass.",
    ),
    click.option("--deterministic", is_flag=True, help="The same bits again on CUDA, slower."),
    click.option("--checkpoint-every", type=click.IntRange(1), default=200, show_default=True, help="Steps."),
    click.option(
        "--validate-every",
        type=click.IntRange(0),
        default=500,
        show_default=True,
        help="Steps; 0: at the end only.",
    ),
    click.option(
        "--validation-documents",
        type=click.IntRange(1),
        default=64,
        show_default=True,
        help="Of each source, at most.",
    ),
    click.option("--tensorboard/--no-tensorboard", default=True, help="Also log for TensorBoard."),
)


def common_options(command: Callable[..., object]) -> Callable[..., object]:
    """The options that both verbs have."""
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(OPTIONS), command)
