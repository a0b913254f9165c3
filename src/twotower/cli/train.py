"""`twotower pretrain` and `twotower train`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from twotower import model_loading
from twotower.cli.deprecated import formerly
from twotower.cli.model_options import is_given
from twotower.cli.train_options import (
    ON_POLICY_NAMES,
    RECIPE_NAMES,
    common_options,
    on_policy_options,
    recipe_options,
)
from twotower.errors import ArgumentError, install_command
from twotower.process import configure_process

if TYPE_CHECKING:
    from twotower.training.fsdp import World
    from twotower.training.recipe import RecipeChoices
    from twotower.training.runs import ValidationInputs
    from twotower.training.trainer import Validate

NOISE = ("row", "document", "block")
OFFSETS = ("random", "fixed")


@click.command()
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The config.json of a Nemotron-H that is trained from scratch.",
)
@click.option(
    "--from",
    "source",
    metavar="MODEL",
    help="Train an autoregressive model of any supported family further: a directory or hub id.",
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="A tokenizer.json or a directory with one. [default: train one on the data]",
)
@click.option(
    "--vocab-size", type=click.IntRange(300), help="Vocabulary size of a new tokenizer. [default: the backbone's]"
)
@click.option("--split-digits", is_flag=True, help="A new tokenizer makes each digit a token.")
@click.option("--steps", type=click.IntRange(1), default=1000, show_default=True, help="Optimizer steps.")
@click.option(
    "--align",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Documents begin at multiples of so many positions of a row.",
)
@click.option("--prompt-loss/--no-prompt-loss", default=True, help="Train on prompts too.")
@common_options
def pretrain(
    output: Path | None, device: str | None, threads: int | None, steps: int, align: int, **options: Any
) -> None:
    """Train an autoregressive backbone: a small one from scratch, or an existing one further.

    With --config the result RUN/model is a Nemotron-H checkpoint. With --from it has the layout of the source, which
    transformers loads; on conversations, this makes an assistant of a model. `twotower init --from RUN/model` makes
    two towers of it.
    """
    output = _required_output(output)
    if options["source"] is not None:
        options["source"] = str(model_loading.source_of(options["source"]))
    configure_process(threads)
    _require_tensorboard(options["tensorboard"])
    from twotower.training import backbone_runs
    from twotower.training.run_settings import PretrainSettings
    from twotower.training.trainer import Stage

    settings = PretrainSettings(stages=(Stage(align, steps),), **options)
    _run_distributed(
        device,
        lambda world: backbone_runs.pretrain(settings, output, world, _backbone_validation),
        lambda where: f"twotower init --from {where} -o DIR",
    )


@click.command()
@click.argument("model")
@click.option(
    "--stages",
    metavar="BLOCK:STEPS,…",
    help="Block sizes and their steps, like 32:1000,32:1000,16:2000 (the order of the paper).",
)
@click.option(
    "--block-size", type=click.IntRange(1), default=16, show_default=True, help="Block size, without --stages."
)
@click.option(
    "--steps", type=click.IntRange(1), default=1000, show_default=True, help="Optimizer steps, without --stages."
)
@click.option(
    "--noise",
    type=click.Choice(NOISE),
    default="document",
    show_default=True,
    help="What shares one noise level. row: as in the released recipe.",
)
@click.option(
    "--offset",
    type=click.Choice(OFFSETS),
    default="random",
    show_default=True,
    help="Where blocks begin in a text without prompt: at a random offset, or at its start.",
)
@click.option(
    "--elbo", is_flag=True, help="Weight the loss by 1/t: the bound on −ln p instead of the mean over masked positions."
)
@click.option("--train-context", is_flag=True, help="Train the context tower too.")
@click.option("--tie", is_flag=True, help="Use one network for both towers.")
@click.option(
    "--ar-weight",
    type=float,
    default=0.0,
    show_default=True,
    help="Weight of the next-token loss of a trained context tower.",
)
@recipe_options
@on_policy_options
@click.option("--generate/--no-generate", default=True, help="Generate a sample in each validation.")
@click.option(
    "--plan",
    "plan_only",
    is_flag=True,
    help="Do not train; print the memory and hours that training needs. Needs no GPU.",
)
@click.option("--gpus", type=click.IntRange(1), default=8, show_default=True, help="For --plan: number of GPUs.")
@click.option(
    "--gpu-memory", type=float, default=80.0, show_default=True, metavar="GIB", help="For --plan: memory of one GPU."
)
@click.option("--tokens", type=float, default=2.1e12, show_default="2.1e12", help="For --plan: tokens to train on.")
@click.option("--peak-tflops", type=float, default=989.0, show_default=True, help="For --plan: dense peak of one GPU.")
@click.option(
    "--utilization",
    "utilisation",
    cls=formerly("--utilisation"),
    type=float,
    default=0.35,
    show_default=True,
    help="For --plan: assumed share of the peak.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON object.")
@common_options
def train(
    model: str,
    output: Path | None,
    device: str | None,
    threads: int | None,
    stages: str | None,
    block_size: int,
    steps: int,
    plan_only: bool,
    gpus: int,
    gpu_memory: float,
    tokens: float,
    peak_tflops: float,
    utilisation: float,
    as_json: bool,
    **options: Any,
) -> None:
    """Train the denoiser of a two-tower checkpoint.

    MODEL is a two-tower checkpoint, for example from `twotower init`; `bundled` is the bundled model. The context
    tower is frozen unless you give --train-context or --tie. The result is RUN/model, the log RUN/log.jsonl. Under
    torchrun, the same command trains on many GPUs.
    """
    from twotower.training.recipe import RecipeChoices

    on_policy = {name.removeprefix("on_policy_"): options.pop(name) for name in ON_POLICY_NAMES}
    choices = RecipeChoices(**{name: options.pop(name) for name in RECIPE_NAMES})
    source = str(model_loading.source_of(None if model == "bundled" else model))
    if plan_only:
        figures = {
            "gpus": gpus,
            "gpu_memory_gib": gpu_memory,
            "tokens": tokens,
            "peak_tflops": peak_tflops,
            "utilisation": utilisation,
            "block_size": _only_block_size(stages) if stages else block_size,
        }
        _show_plan(source, figures, options, choices, as_json)
        return
    output = _required_output(output)
    if stages:
        _warn_without_effect("block_size", "steps")
    configure_process(threads)
    _require_tensorboard(options["tensorboard"])
    from twotower.training import runs
    from twotower.training.run_settings import DenoiserSettings, OnPolicySettings, parse_stages
    from twotower.training.trainer import Stage

    course = parse_stages(stages) if stages else (Stage(block_size, steps),)
    if not on_policy["every"]:
        _refuse_without_stages()
    own_texts = OnPolicySettings(**on_policy) if on_policy["every"] else None
    settings = DenoiserSettings(model=source, stages=course, choices=choices, on_policy=own_texts, **options)
    _run_distributed(
        device,
        lambda world: runs.train_denoiser(settings, output, world, _denoiser_validation),
        lambda where: f"twotower generate --model {where} …, or twotower curves {output}",
    )


def _run_distributed(device: str | None, job: Callable[[World], Path], following: Callable[[Path], str]) -> None:
    """Runs a job in the process group of the run. Rank 0 prints the path of the result and a next command."""
    from twotower.training import fsdp

    world = fsdp.start(device)
    try:
        where = job(world)
        if world.is_main:
            click.echo(str(where))
            click.secho(f"next: {following(where)}", err=True, dim=True)
    finally:
        fsdp.stop()


def _backbone_validation(inputs: ValidationInputs) -> Validate:
    from twotower.training.objective import AutoregressiveObjective
    from twotower.training.validation import AutoregressiveValidation

    assert isinstance(inputs.objective, AutoregressiveObjective)
    return AutoregressiveValidation(
        inputs.model,
        inputs.objective,
        inputs.held_out,
        inputs.world,
        block_size=inputs.block_size,
        eos_token_id=inputs.eos_token_id,
    )


def _denoiser_validation(inputs: ValidationInputs) -> Validate:
    from twotower.training.adapter_objective import AdapterObjective
    from twotower.training.objective import DenoisingObjective
    from twotower.training.run_settings import DenoiserSettings
    from twotower.training.validation import AdapterValidation, DenoisingValidation

    settings = inputs.settings
    assert isinstance(settings, DenoiserSettings)
    prompts, eos = 8 if settings.generate else 0, inputs.eos_token_id
    given = inputs.held_out, inputs.world
    if isinstance(inputs.objective, AdapterObjective):
        size = inputs.block_size
        return AdapterValidation(
            inputs.model, inputs.objective, *given, block_size=size, eos_token_id=eos, prompts=prompts
        )
    assert isinstance(inputs.objective, DenoisingObjective)
    return DenoisingValidation(
        inputs.model,
        inputs.objective,
        *given,
        block_size=inputs.block_size,
        eos_token_id=eos,
        prompts=prompts,
        seed=settings.seed,
    )


def _warn_without_effect(*names: str) -> None:
    """Warns of each of these options that the command line names beside --stages."""
    for name in names:
        if is_given(name):
            click.echo(f"Warning: --{name.replace('_', '-')} has no effect with --stages.", err=True)


def _refuse_without_stages() -> None:
    """Raises ArgumentError for an option of on-policy stages, if there are none."""
    for name in ON_POLICY_NAMES[1:]:
        if is_given(name):
            raise ArgumentError(f"--{name.replace('_', '-')} has no effect without --on-policy-every; add it")


def _required_output(output: Path | None) -> Path:
    if output is None:
        raise ArgumentError("no run directory; give one with -o RUN")
    return output


def _show_plan(
    source: str,
    figures: Mapping[str, object],
    options: Mapping[str, object],
    choices: RecipeChoices,
    as_json: bool,
) -> None:
    from twotower.cli.plan_page import render
    from twotower.config import TwoTowerConfig
    from twotower.json_text import to_json
    from twotower.training.planning.plan import plan_from

    if options["ar_weight"]:
        raise ArgumentError("--plan does not count the next-token loss of --ar-weight; leave out --ar-weight")
    shared = {name: options[name] for name in ("row_length", "activation_checkpointing")}
    shared["context"] = "tied" if options["tie"] else "trained" if options["train_context"] else "frozen"
    if options["micro_batch_size"]:
        shared["micro_batch_size"] = options["micro_batch_size"]
    if options["dtype"] != "auto":
        shared["dtype"] = options["dtype"]
    if is_given("batch_size"):  # the default is one micro-batch on each GPU
        shared["batch_size"] = options["batch_size"]
    config = TwoTowerConfig.read(Path(source))
    own = config.denoiser.adapters
    shared["adapters"] = None if own is None else own.rank
    head = config.denoiser.draft_head
    shared["draft_head"] = None if head is None else head.rank
    shared["teacher"] = choices.resolve(gated=own is not None).teacher
    plan = plan_from(config, {**figures, **shared})
    click.echo(to_json(plan.to_dict()) if as_json else render(plan))


def _only_block_size(stages: str) -> int:
    """The block size of a plan with --stages."""
    from twotower.training.run_settings import parse_stages

    sizes = sorted({stage.block_size for stage in parse_stages(stages)})
    if len(sizes) > 1:
        raise ArgumentError(
            f"--plan plans one block size, and --stages has {', '.join(map(str, sizes))}; give --block-size instead"
        )
    return sizes[0]


def _require_tensorboard(tensorboard: bool) -> None:
    import importlib.util

    if tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ArgumentError(f"TensorBoard is not installed; {install_command('train')}, or add --no-tensorboard")
