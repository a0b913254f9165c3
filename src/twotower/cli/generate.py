"""`twotower generate`: continues a prompt and prints the text block by block."""

from __future__ import annotations

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
from twotower.decoding.modes import BLOCK_MODES, MODES_OF_FIELD, REQUEST_MODES
from twotower.errors import ArgumentError

if TYPE_CHECKING:
    from twotower.cli.watch import Watcher
    from twotower.decoding.output import BlockEvent, Generation
    from twotower.decoding.params import Parameters
    from twotower.modeling_twotower import TwoTowerForCausalLM

WATCHABLE_MODES = ("diffusion", "verified")  # modes with denoising passes to show
# The modes that use an option; all modes use the other options.
OPTION_MODES = {**MODES_OF_FIELD, **dict.fromkeys(("watch", "trace"), WATCHABLE_MODES)}
SAMPLING_ONLY = ("seed", "top_k", "top_p", "min_p")


@click.command()
@click.argument("prompt", required=False)
@click.option(
    "-f", "--file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Read the prompt from a file."
)
@models.model_option
@click.option(
    "--mode",
    type=click.Choice(REQUEST_MODES),
    default="diffusion",
    show_default=True,
    help="diffusion: the denoiser fills blocks of tokens. ar: the context tower writes token by token. mock_ar: the "
    "denoiser writes token by token. verified: the denoiser drafts blocks and the context tower verifies them; the "
    "text is AR's (in bf16 up to near ties). auto: the mode that is fastest here, of ar, diffusion and verified.",
)
@click.option(
    "-n",
    "--max-new-tokens",
    metavar="N",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Maximum number of new tokens.",
)
@click.option(
    "--threshold",
    metavar="P",
    type=click.FloatRange(0, 1),
    default=0.9,
    show_default=True,
    help="Diffusion, verified, auto: commit every token with a confidence above P. Lower values are faster and less "
    "accurate.",
)
@click.option(
    "--policy",
    metavar="NAME",
    default="threshold",
    show_default=True,
    help="Diffusion, verified, auto: commit policy, which chooses the positions that a pass commits.",
)
@click.option(
    "--policy-value",
    cls=formerly("--knob"),
    metavar="X",
    type=float,
    help="Diffusion, verified, auto: value of the commit policy, instead of --threshold.",
)
@click.option(
    "--block-size",
    metavar="N",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Diffusion, verified, auto: tokens of a block.",
)
@click.option(
    "--steps",
    metavar="N",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Diffusion, auto: maximum number of denoising passes for a block.",
)
@click.option(
    "--draft-steps",
    metavar="N",
    type=click.IntRange(min=0),
    help="Verified, auto: draft depth, the denoising passes for a draft.  [default: 0, 1, 2 or 4, by measured speed]",
)
@click.option(
    "--acceptance",
    metavar="A",
    type=click.FloatRange(0, 1),
    default=1.0,
    show_default=True,
    help="Verified, auto: accept drafted tokens with at least A times the probability of AR's best token. 1: the text "
    "is AR's.",
)
@click.option(
    "--temperature", metavar="X", type=float, default=0.0, show_default=True, help="Sampling temperature; 0 is greedy."
)
@click.option("--top-k", metavar="N", type=click.IntRange(min=1), help="Sample among the N most likely tokens.")
@click.option(
    "--top-p",
    metavar="P",
    type=click.FloatRange(0, 1),
    help="Sample among the most likely tokens with a total probability of P.",
)
@click.option(
    "--seed", metavar="N", type=click.IntRange(0, 2**63 - 1), help="Seed of sampling.  [default: random, and printed]"
)
@models.denoiser_option
@models.sampling_options
@models.deterministic_option
@click.option("--watch", is_flag=True, help="Show each denoising pass on stderr.")
@click.option(
    "--trace",
    type=models.OUTPUT_FILE,
    metavar="FILE",
    help="Write a picture of the denoising passes: .svg, .png or .html.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@models.dtype_option
@models.quantization_option
@models.context_device_option
@models.denoiser_device_option
@models.threads_option
def generate(**options: Any) -> None:
    """Continue a prompt.

    Without PROMPT, or if it is "-", the prompt is read from stdin. The text goes to stdout, everything else to stderr.
    """
    given = {name for name in options if models.is_given(name)}
    generate_text(GenerateOptions(given=frozenset(given), **options))


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(models.SamplingOptions):
    """The options of one command line. given: the names of the options that it names."""

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
    denoiser: str | None
    deterministic: bool
    watch: bool
    trace: Path | None
    as_json: bool
    dtype: str
    quantization: str | None
    context_device: str | None
    denoiser_device: str | None
    threads: int | None

    def parameters(self) -> Parameters:
        """Keyword arguments of `model.stream` that do not depend on the model, without the mode."""
        shared: Parameters = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            # A missing seed is drawn here, so that it can be printed and used again.
            "seed": secrets.randbits(31) if self.seed is None else self.seed,
            "deterministic": self.deterministic,
            "denoiser": self.denoiser,
            **self.sampling(),
        }
        if self.mode not in BLOCK_MODES:
            return shared
        shared["block_size"], shared["confidence_threshold"] = self.block_size, self.threshold
        shared["policy"], shared["policy_value"] = self.policy, self.policy_value
        if self.mode in MODES_OF_FIELD["steps"]:
            shared["steps_per_block"] = self.steps
        if self.mode in MODES_OF_FIELD["acceptance"]:
            shared["draft_steps"], shared["acceptance"] = self.draft_steps, self.acceptance
        return shared

    def ignored_options(self) -> Iterator[tuple[str, str]]:
        """Options without effect on this run, each with the reason."""
        yield from (
            (name, f"with --mode {self.mode}") for name, modes in OPTION_MODES.items() if self.mode not in modes
        )
        if self.mode in BLOCK_MODES and (self.policy != "threshold" or self.policy_value is not None):
            yield "threshold", f"with --policy {self.policy}" if self.policy_value is None else "beside --policy-value"
        if self.mode == "diffusion" and self.steps > self.block_size:
            yield "steps", "above --block-size: every pass commits at least one token"
        if self.mode == "ar":
            yield "denoiser_device", "with --mode ar, which runs only the context tower"
        if self.temperature <= 0:
            yield from ((name, "at temperature 0") for name in SAMPLING_ONLY)


def generate_text(options: GenerateOptions) -> None:
    """Runs `twotower generate`.

    Raises:
        TwoTowerError: an error of the user, found before weights are read where possible.
    """
    from twotower.cli.prompt import read_prompt

    text = read_prompt(options.prompt, options.file)
    for name, reason in options.ignored_options():
        if name in options.given:
            click.echo(f"Warning: --{name.replace('_', '-')} has no effect {reason}.", err=True)
    if options.trace is not None and not options.trace.absolute().parent.is_dir():
        raise ArgumentError(
            f"--trace {options.trace}: the folder {options.trace.parent} does not exist; create it first"
        )
    if options.trace is not None:
        from twotower.cli.pass_picture import check_format

        check_format(options.trace)

    source = model_loading.source_of(options.model)
    with models.status(f"loading {model_loading.name_of(source)} …"):
        from twotower.decoding.params import GenerationParams

        GenerationParams.of(mode=options.mode, **options.parameters())  # reports a bad argument before weights are read
    model, _ = models.load_text_model(
        source,
        "it cannot read or write text; add a tokenizer",
        towers="context" if options.mode == "ar" else "both",
        dtype=options.dtype,
        quantization=options.quantization,
        context_device=options.context_device,
        denoiser_device=options.denoiser_device,
        threads=options.threads,
    )
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
        from twotower.json_text import to_json

        click.echo(to_json(facts | result.to_dict(), ensure_ascii=False))
    else:
        click.secho(statistics(result, seed), err=True, dim=True)
        if result.mode_reason:
            click.secho(f"mode {result.mode}: {result.mode_reason}", err=True, dim=True)
    if watcher is not None and options.trace is not None:
        from twotower.cli.pass_picture import PassPicture, save_picture

        line = statistics(result, seed)
        save_picture(options.trace, PassPicture(watcher.blocks, watcher.names, text, result.text, line))
    if result.error:
        click.echo(f"Error: {result.error}", err=True)
        raise click.exceptions.Exit(1)


def _watcher(model: TwoTowerForCausalLM, prompt: str, options: GenerateOptions) -> Watcher:
    from twotower.cli.watch import NullView, Watcher, make_view
    from twotower.engine.towers import block_rule, model_of_mode
    from twotower.tokenizer import require_tokenizer

    # If the text goes to a file, the last frame stays on the terminal.
    view = make_view("stderr", prompt, keep=not sys.stdout.isatty()) if options.watch else NullView()
    names = require_tokenizer(model.tokenizer)
    rule = block_rule(model_of_mode(model, options.mode, options.denoiser))
    return Watcher(names, model.config.mask_token, view, options.mode, rule)


def _stream(
    model: TwoTowerForCausalLM,
    prompt: str,
    mode: str,
    parameters: Parameters,
    watcher: Watcher | None,
    *,
    silent: bool,
) -> Generation:
    """Runs to the end, and writes text when its block is final."""
    events = model.stream(prompt, mode, step_callback=watcher.callback if watcher else None, **parameters)
    if watcher is None:
        return _write(events, silent)
    with watcher:
        # On one terminal, text would disturb the view; it is printed after the view closes.
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
    """One line with the figures of a run."""
    passes = f"{result.passes} passes"
    if result.mode == "verified":
        if result.denoiser_passes:  # with adapters, a pass is of both kinds
            passes = f"{result.denoiser_passes} denoiser and {result.context_passes} context passes"
        passes += f", {result.accepted} drafted tokens accepted"
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
