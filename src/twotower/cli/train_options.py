"""The options that `twotower pretrain` and `twotower train` share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import click

from twotower.cli.deprecated import formerly
from twotower.cli.model_options import OUTPUT_FOLDER
from twotower.errors import ArgumentError

DTYPES = ("auto", "bfloat16", "float32", "float64")

RECIPES = ("draft", "diffusion", "both")
BLOCK_STARTS = ("prompt", "anywhere")
ON_POLICY_NAMES = tuple(f"on_policy_{name}" for name in ("every", "prompts", "tokens", "rows", "setting", "replay"))
RECIPE_NAMES = ("recipe", "patterns", "clip_levels", "targets", "position_decay", "alignment", "block_starts")


def _two_numbers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in value.split(","))
    except ValueError:
        raise ArgumentError(f"clip_levels is {value!r}; give LOW,HIGH, like 0.3,0.8") from None
    return low, high


RECIPE_OPTIONS = (
    click.option(
        "--recipe",
        type=click.Choice(RECIPES),
        help="Sets the following six options for drafts (verified decoding), for diffusion or for both. "
        "docs/training.md has the table. [default: as released; adapters: both]",
    ),
    click.option(
        "--patterns",
        metavar="NAME:WEIGHT+…",
        help="Mixture of the masks of a block: levels (random, as released), clipped, draft (all masked), prefix, "
        "complementary (the block twice, with opposite masks).",
    ),
    click.option(
        "--clip-levels",
        metavar="LOW,HIGH",
        default="0.3,0.8",
        show_default=True,
        callback=_two_numbers,
        help="Limits of the levels of the pattern clipped.",
    ),
    click.option(
        "--targets",
        metavar="NAME:WEIGHT+…",
        help="Mixture of losses: tokens; and against the AR model's distribution kl, tv (total variation), acceptance "
        "(−ln of the likelihood of acceptance). kl:0.7+tokens:0.3 is an example.",
    ),
    click.option(
        "--position-decay",
        type=click.FloatRange(0),
        metavar="D",
        help="The k-th prediction of a block counts exp(−(k − 1) / D); 0: all count the same.",
    ),
    click.option(
        "--alignment",
        type=click.FloatRange(0),
        metavar="WEIGHT",
        help="Adds WEIGHT · (1 − cosine) of the hidden states of both towers, layer by layer. [default: 0]",
    ),
    click.option(
        "--block-starts",
        type=click.Choice(BLOCK_STARTS),
        help="Where the blocks of an answer begin: where its prompt ends; or in half of the texts up to a block later "
        " [default: prompt; with a recipe or adapters: anywhere]",
    ),
)

OPTIONS = (
    click.option(
        "--data",
        multiple=True,
        metavar="ITEM",
        help="Training data: PATH or hub id, then [:SPLIT][@CONFIG][=WEIGHT]. Repeat the option for a mixture.",
    ),
    click.option(
        "--validation",
        multiple=True,
        metavar="ITEM",
        help="Validation data, like --data. [default: a held-out share of --data]",
    ),
    click.option(
        "--held-out",
        type=float,
        default=0.01,
        show_default=True,
        metavar="SHARE",
        help="Share of --data that is held out for validation, by a hash of the text; without --validation.",
    ),
    click.option(
        "-o",
        "--output",
        "output",
        type=OUTPUT_FOLDER,
        metavar="RUN",
        help="Run directory. The same command again resumes the run.",
    ),
    click.option("--text-field", default="text", show_default=True, help="Field of a record's text."),
    click.option(
        "--prompt-field",
        default="prompt",
        show_default=True,
        help="Field of a record's prompt. A prompt is context only; blocks begin where it ends.",
    ),
    click.option(
        "--messages-field",
        default="messages",
        show_default=True,
        help="Field of the messages of a conversation, in records without a text. Assistant turns are trained.",
    ),
    click.option(
        "--chat-template",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Template of conversations, in Jinja; the result keeps it. [default: that of the tokenizer]",
    ),
    click.option("--streaming", is_flag=True, help="Read the data in its order, without loading or indexing it first."),
    click.option("--epochs", type=click.IntRange(1), help="Number of times to read the data. [default: no limit]"),
    click.option(
        "--max-bad-records",
        type=click.IntRange(0),
        default=100,
        show_default=True,
        help="Skip so many broken or empty records; one more is an error.",
    ),
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
    click.option(
        "--warmup",
        type=click.IntRange(0),
        default=100,
        show_default=True,
        help="Steps in which the learning rate rises to its peak.",
    ),
    click.option(
        "--decay",
        type=float,
        default=0.3,
        show_default=True,
        help="Share of the steps, at the end, in which the learning rate falls.",
    ),
    click.option(
        "--final-lr-ratio",
        cls=formerly("--final"),
        type=float,
        default=0.01,
        show_default=True,
        help="Learning rate of the last step, as a share of the peak.",
    ),
    click.option(
        "--weight-decay", type=float, default=0.1, show_default=True, help="AdamW's weight decay, on matrices only."
    ),
    click.option("--clip", type=float, default=1.0, show_default=True, help="Largest gradient norm; 0: no clipping."),
    click.option(
        "--balance-rate",
        type=float,
        default=1e-3,
        show_default=True,
        help="Step size of the experts' selection biases for load balance; 0: no balancing. Routers without such "
        "biases are not balanced.",
    ),
    click.option(
        "--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the data order and the noise."
    ),
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        default="auto",
        show_default=True,
        help="Dtype to compute in. auto: bfloat16 if the device has fast bfloat16 matmuls, else float32.",
    ),
    click.option("--device", type=click.Choice(("cpu", "cuda")), help="Device. [default: cuda if there is a GPU]"),
    click.option("--threads", type=click.IntRange(1), help="CPU threads. [default: torch's]"),
    click.option(
        "--activation-checkpointing",
        cls=formerly("--recompute"),
        is_flag=True,
        help="Keep only the residual streams of each layer; recompute the rest in the backward pass.",
    ),
    click.option("--deterministic", is_flag=True, help="Deterministic CUDA kernels, which are slower."),
    click.option(
        "--checkpoint-every", type=click.IntRange(1), default=200, show_default=True, help="Steps between checkpoints."
    ),
    click.option(
        "--validate-every",
        type=click.IntRange(0),
        default=500,
        show_default=True,
        help="Steps between validations; 0: only at the end.",
    ),
    click.option(
        "--validation-documents",
        type=click.IntRange(1),
        default=64,
        show_default=True,
        help="Documents of each validation source, at most.",
    ),
    click.option("--tensorboard/--no-tensorboard", default=True, help="Also write a TensorBoard log."),
)


ON_POLICY_OPTIONS = (
    click.option(
        "--on-policy-every",
        metavar="N",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Every N steps, decode prompts with the model of that step, and train its own states towards AR (GKD, "
        "arXiv 2306.13649); 0: never.",
    ),
    click.option(
        "--on-policy-prompts",
        metavar="N",
        type=click.IntRange(1),
        default=32,
        show_default=True,
        help="Prompts of a stage, from the documents of the step's batch.",
    ),
    click.option(
        "--on-policy-tokens",
        metavar="N",
        type=click.IntRange(1),
        default=128,
        show_default=True,
        help="Most new tokens of a prompt.",
    ),
    click.option(
        "--on-policy-rows",
        metavar="N",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="Rows of such texts that each step adds to its batch, over all processes.",
    ),
    click.option(
        "--on-policy-setting",
        metavar="MODE[:VALUE,NAME=X…]",
        help="Decoding setting of a stage, in mode verified or diffusion. [default: verified with adapters at masks, "
        "diffusion:0.9 with other denoisers]",
    ),
    click.option(
        "--on-policy-replay",
        metavar="N",
        type=click.IntRange(0),
        default=1,
        show_default=True,
        help="Train the states whose draft was refused again in N further stages (Online Speculative Decoding, arXiv "
        "2310.07177).",
    ),
)


def common_options(command: Callable[..., object]) -> Callable[..., object]:
    """Adds the shared options to a command."""
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(OPTIONS), command)


def recipe_options(command: Callable[..., object]) -> Callable[..., object]:
    """Adds the options that say what a denoiser is trained on (`training.recipe`)."""
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(RECIPE_OPTIONS), command)


def on_policy_options(command: Callable[..., object]) -> Callable[..., object]:
    """Adds the options of stages in which the model trains on its own texts (`training.on_policy`)."""
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(ON_POLICY_OPTIONS), command)
