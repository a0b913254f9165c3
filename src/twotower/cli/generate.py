"""`twotower generate`: a prompt in, its continuation out, as blocks become final."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from twotower import model_loading
from twotower.cli import model_options as models
from twotower.cli.deprecated import formerly
from twotower.cli.prompt import read_prompt
from twotower.decoding.modes import ASKABLE, BLOCK_MODES, MEANT_FOR
from twotower.errors import ArgumentError
from twotower.process import configure_process

if TYPE_CHECKING:
    from twotower.cli.watch import Watcher
    from twotower.decoding.output import BlockEvent, Generation
    from twotower.decoding.params import Parameters
    from twotower.modeling_twotower import TwoTowerForCausalLM

WATCHABLE_MODES = ("diffusion", "verified")  # modes in which there are passes over a block to show
# The modes that use an option; all modes use the other options.
OPTION_MODES = {**MEANT_FOR, **dict.fromkeys(("watch", "trace"), WATCHABLE_MODES)}
SAMPLING_ONLY = ("seed", "top_k", "top_p")


@click.command()
@click.argument("prompt", required=False)
@click.option(
    "-f", "--file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Read the prompt from a file."
)
@models.model_option
@click.option(
    "--mode",
    type=click.Choice(ASKABLE),
    default="diffusion",
    show_default=True,
    help="Blocks of tokens; the context tower alone; the denoiser token by token; blocks that the context tower "
    "checks, so that the text is its own; or what of AR, blocks and verified blocks pays here.",
)
@click.option("-n", "--max-new-tokens", metavar="N", type=click.IntRange(min=1), default=128, show_default=True)
@click.option(
    "--threshold",
    metavar="P",
    type=click.FloatRange(0, 1),
    default=0.9,
    show_default=True,
    help="Diffusion: commit what is more certain than this. Lower is faster.",
)
@click.option(
    "--policy",
    metavar="NAME",
    default="threshold",
    show_default=True,
    help="Diffusion: which positions a pass commits.",
)
@click.option(
    "--policy-value",
    cls=formerly("--knob"),
    metavar="X",
    type=float,
    help="The number that the policy compares with, instead of --threshold.",
)
@click.option(
    "--block-size", metavar="N", type=click.IntRange(min=1), default=16, show_default=True, help="Diffusion: positions."
)
@click.option(
    "--steps",
    metavar="N",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Diffusion: passes a block, at most.",
)
@click.option(
    "--draft-steps", metavar="N", type=click.IntRange(min=0), help="Verified: passes a draft.  [default: what pays]"
)
@click.option(
    "--acceptance",
    metavar="A",
    type=click.FloatRange(0, 1),
    default=1.0,
    show_default=True,
    help="Verified: also keep tokens with A times the probability of AR's best. 1 is lossless.",
)
@click.option("--temperature", metavar="X", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", metavar="N", type=click.IntRange(min=1), help="Sample among the k likeliest tokens.")
@click.option(
    "--top-p", metavar="P", type=click.FloatRange(0, 1), help="Sample among the likeliest tokens of total mass p."
)
@click.option(
    "--seed", metavar="N", type=click.IntRange(0, 2**63 - 1), help="Same seed, same text.  [default: drawn, and shown]"
)
@models.deterministic_option
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text. May be given several times.")
@click.option("--watch", is_flag=True, help="Show each block being denoised (on stderr).")
@click.option(
    "--trace",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Draw the passes as a picture: .svg, .png or .html.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of text.")
@models.dtype_option
@models.quantization_option
@click.option(
    "--context-device", metavar="DEVICE", help="E.g. cpu, cuda:0.  [default: the first CUDA device, else cpu]"
)
@click.option("--denoiser-device", metavar="DEVICE", help="[default: the context's]")
@click.option("--threads", metavar="N", type=click.IntRange(min=1), help="CPU threads.")
@click.pass_context
def generate(ctx: click.Context, /, **options: Any) -> None:
    """Continue PROMPT. Without one (or with -) it is read from stdin.

    Text goes to stdout, everything else to stderr.
    """
    given = {name for name in options if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT}
    generate_text(GenerateOptions(given=frozenset(given), **options))


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """One command line, as click checked it. given: the names of the options that were on it."""

    given: frozenset[str]
    prompt: str | None
    file: Path | None
    model: str | None
    mode: str
    max_new_tokens: int
    threshold: float
    policy: str
    policy_value: float | None
    block_size: int
    steps: int
    draft_steps: int | None
    acceptance: float
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int | None
    deterministic: bool
    stop: tuple[str, ...]
    watch: bool
    trace: Path | None
    as_json: bool
    dtype: str
    quantization: str
    context_device: str | None
    denoiser_device: str | None
    threads: int | None

    def parameters(self) -> Parameters:
        """The keyword arguments of `model.stream`, beside the mode, that do not depend on the model."""
        shared: Parameters = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            # Drawn here where none is given, so that it can be told and used again.
            "seed": secrets.randbits(31) if self.seed is None else self.seed,
            "stop": self.stop,
            "deterministic": self.deterministic,
        }
        if self.mode not in BLOCK_MODES:
            return shared
        shared["block_size"], shared["confidence_threshold"] = self.block_size, self.threshold
        shared["policy"], shared["policy_value"] = self.policy, self.policy_value
        if self.mode in MEANT_FOR["steps"]:
            shared["steps_per_block"] = self.steps
        if self.mode in MEANT_FOR["acceptance"]:
            shared["draft_steps"], shared["acceptance"] = self.draft_steps, self.acceptance
        return shared

    def ignored_options(self) -> Iterator[tuple[str, str]]:
        """(option, why) for each given option that has no effect on this run."""
        yield from (
            (name, f"with --mode {self.mode}") for name, modes in OPTION_MODES.items() if self.mode not in modes
        )
        if self.mode in BLOCK_MODES and (self.policy != "threshold" or self.policy_value is not None):
            yield "threshold", f"with --policy {self.policy}" if self.policy_value is None else "beside --policy-value"
        if self.mode == "diffusion" and self.steps > self.block_size:
            yield "steps", "beyond the block size: every pass commits at least one token"
        if self.mode == "ar":
            yield "denoiser_device", "with --mode ar, which runs the context tower alone"
        if self.temperature <= 0:
            yield from ((name, "at temperature 0") for name in SAMPLING_ONLY)


def generate_text(options: GenerateOptions) -> None:
    """Everything `twotower generate` does.

    Raises:
        TwoTowerError: found as early as possible, before any weights are read where that can be.
    """
    text = read_prompt(options.prompt, options.file)
    for name, reason in options.ignored_options():
        if name in options.given:
            click.echo(f"Warning: --{name.replace('_', '-')} has no effect {reason}.", err=True)
    if options.trace is not None and not options.trace.absolute().parent.is_dir():
        raise ArgumentError(f"--trace {options.trace}: {options.trace.parent} is no directory; make it first")
    if options.trace is not None:
        from twotower.cli.pass_picture import check_format

        check_format(options.trace)

    source = model_loading.source_of(options.model)
    with models.status(f"loading {model_loading.name_of(source)} …"):
        from twotower.decoding.params import GenerationParams

        GenerationParams.of(
            mode=options.mode, **options.parameters()
        )  # a bad argument is told before any weights are read
        configure_process(options.threads)
        model = model_loading.load_model(
            source,
            towers="context" if options.mode == "ar" else "both",
            dtype=options.dtype,
            quantization=options.quantization,
            context_device=options.context_device,
            denoiser_device=options.denoiser_device,
        )
    models.tell_dtype(model, options.dtype)
    model_loading.need_tokenizer(model, source, "it can neither read nor write text; put one there")
    parameters = options.parameters()
    parameters["eos_token_id"] = model_loading.eos_of(model)
    parameters["mask_token_id"] = model.config.mask_token

    shown = options.mode in WATCHABLE_MODES and (options.watch or options.trace)
    watcher = _watcher(model, text, options) if shown else None
    result = _stream(model, text, options.mode, parameters, watcher, silent=options.as_json)
    seed = parameters["seed"] if options.temperature > 0 else None
    assert seed is None or isinstance(seed, int)
    if options.as_json:
        facts = {"prompt": text, "model": str(source), **model_loading.placement(model), "seed": seed}
        click.echo(json.dumps(facts | result.to_dict(), ensure_ascii=False))
    else:
        click.secho(statistics(result, seed), err=True, dim=True)
        if result.mode_reason:
            click.secho(f"chose {result.mode}: {result.mode_reason}", err=True, dim=True)
    if watcher is not None and options.trace is not None:
        from twotower.cli.pass_picture import PassPicture, save_picture

        line = statistics(result, seed)
        save_picture(options.trace, PassPicture(watcher.blocks, watcher.names, text, result.text, line))


def _watcher(model: TwoTowerForCausalLM, prompt: str, options: GenerateOptions) -> Watcher:
    from twotower.cli.watch import NullView, Watcher, make_view
    from twotower.tokenizer import require_tokenizer

    # Where the text goes to a file, what was watched is all that is left on the terminal.
    view = make_view("stderr", prompt, keep=not sys.stdout.isatty()) if options.watch else NullView()
    return Watcher(
        require_tokenizer(model.tokenizer),
        model.config.mask_token,
        view,
        known_positions=int(options.mode == "verified"),
    )


def _stream(
    model: TwoTowerForCausalLM,
    prompt: str,
    mode: str,
    parameters: Parameters,
    watcher: Watcher | None,
    *,
    silent: bool,
) -> Generation:
    """Runs to the end, writing text as it becomes final."""
    events = model.stream(prompt, mode, step_callback=watcher.on_pass if watcher else None, **parameters)
    if watcher is None:
        return _write(events, silent)
    with watcher:
        # Text and picture on one terminal would disturb each other: there the text comes when the picture is done.
        last = _write(watcher.watch(events), silent or watcher.view.owns_stdout)
    if watcher.view.owns_stdout and not silent:
        click.echo(last.text)
    return last


def _write(events: Iterator[BlockEvent], silent: bool) -> Generation:
    result = None
    for event in events:
        if not silent and event.text:
            click.echo(event.text, nl=False)
        result = event.result or result
    if not silent:
        click.echo()
    assert result is not None
    return result


def statistics(result: Generation, seed: int | None = None) -> str:
    """One line about a run."""
    passes = f"{result.passes} passes"
    if result.mode == "verified":
        passes = f"{result.denoiser_passes} + {result.context_passes} passes, {result.accepted} tokens of drafts kept"
    parts = [
        result.mode,
        f"{len(result.tokens)} tokens",
        passes,
        f"{result.tokens_per_pass:.2f} tokens/pass",
        f"{result.tokens_per_second:.1f} tokens/s",
        f"prefill {result.prefill_seconds:.2f} s",
        f"ended by {result.finish_reason}",
    ]
    return " · ".join(parts + ([f"seed {seed}"] if seed is not None else []))
