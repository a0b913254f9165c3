"""`twotower demo`: shows blocks being denoised, then compares the modes."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from twotower import model_loading
from twotower.assets import bundled_model
from twotower.cli import model_options as models
from twotower.cli.terminal import console_on
from twotower.decoding.modes import BLOCK_MODES, MODES

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from twotower.decoding.output import Generation
    from twotower.decoding.params import Parameters
    from twotower.modeling_twotower import TwoTowerForCausalLM

PROMPT = "User: I am looking for a place to eat.\nAssistant:"
# Of the bundled model with adapters: structured text, where drafts are long.
JSON_PROMPT = (
    "Json: Tom | day, member, job, phone, seats, age | Tom has joined the club. A table for 6, says Tom. Tom has the "
    "number 555-0176. On Sunday, Tom is free. Tom is a doctor. =>"
)
NEW_TOKENS = 64
THRESHOLD = 0.8  # the threshold of the published results
ADAPTER_THRESHOLD = 0.95  # with adapters, whose confidences are higher
ROUNDS, SECONDS = 3, 5.0  # runs of each mode for the median, fewer if they would take more than SECONDS
SHOWN_CHARACTERS = 140
MOCK_AR = "mock_ar: the denoiser as a next-token predictor, for which it was not trained."


@click.command()
@models.model_option
@models.threads_option
@click.option("--json", "as_json", is_flag=True, help="Only measure, and print one JSON object.")
def demo(model: str | None, threads: int | None, as_json: bool) -> None:
    """Show denoising, then compare the modes.

    Decoding is greedy, with one prompt; diffusion has threshold 0.8, with adapters 0.95. All figures are measured in
    this run. Passes are those of both towers, without the prefill.
    """
    loaded, source = models.load_text_model(model, "there is no text to show; choose another model", threads=threads)
    prompt = JSON_PROMPT if source == bundled_model("adapters") else PROMPT
    console = console_on("stdout")
    if not as_json:
        console.print(model_summary(source, loaded), end="\n\n", soft_wrap=not console.is_terminal)
        show_run(loaded, prompt)
    results = measure_modes(loaded, prompt)
    if as_json:
        facts = {"prompt": prompt, "model": str(source), **model_loading.placement(loaded)}
        modes = [figures_of(result) | {"times_ar": times_ar(results, mode)} for mode, result in results.items()]
        from twotower.json_text import to_json

        click.echo(to_json(facts | {"confidence_threshold": threshold_of(loaded), "modes": modes}, ensure_ascii=False))
        return
    print_tables(
        console, results, threshold_of(loaded), shown_mode(loaded), None if adapters_in(loaded, "mock_ar") else MOCK_AR
    )
    console.print(speed_summary(results, shown_mode(loaded)), soft_wrap=not console.is_terminal)


def adapters_in(model: TwoTowerForCausalLM, mode: str) -> bool:
    """Whether the denoiser of a mode is adapters."""
    from twotower.engine.towers import model_of_mode

    return model_of_mode(model, mode).has_adapters


def threshold_of(model: TwoTowerForCausalLM) -> float:
    """The threshold of mode diffusion."""
    return ADAPTER_THRESHOLD if adapters_in(model, "diffusion") else THRESHOLD


def shown_mode(model: TwoTowerForCausalLM) -> str:
    """The mode that the demo shows: with adapters, verified decoding has its best figures."""
    return "verified" if adapters_in(model, "verified") else "diffusion"


def model_summary(source: str | Path, model: TwoTowerForCausalLM) -> Text:
    """One line about the model: name, size, layers, dtype and device."""
    import torch
    from rich.text import Text

    from twotower.cli.info_page import format_pattern

    where = model_loading.placement(model)
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    parts = "one tower with adapters" if model.has_adapters else "two towers"
    if model.denoisers:
        parts = f"one context tower with {len(model.denoisers)} denoisers"
    count = torch.get_num_threads()
    threads = f", {count} thread{'s' if count > 1 else ''}" if model.device.type == "cpu" else ""
    return Text.assemble(
        (model_loading.name_of(source), "bold"),
        f": {size:.1f} M parameters in {parts} of "
        f"{model.spec.num_layers} layers ({format_pattern(model.spec.pattern)}), {where['dtype']} on "
        f"{where['context_device']}{threads}",
    )


def stream_arguments(model: TwoTowerForCausalLM, mode: str) -> Parameters:
    """Arguments of `model.stream` without the mode: greedy, with the same length in every mode."""
    shared: Parameters = {"max_new_tokens": NEW_TOKENS, "eos_token_id": model_loading.eos_of(model)}
    if mode not in BLOCK_MODES:
        return shared
    shared["confidence_threshold"], shared["mask_token_id"] = threshold_of(model), model.config.mask_token
    return shared


def show_run(model: TwoTowerForCausalLM, prompt: str) -> None:
    """Shows one run, which is not measured."""
    from twotower.cli.watch import Watcher, make_view
    from twotower.engine.towers import block_rule, model_of_mode
    from twotower.tokenizer import require_tokenizer

    if not sys.stdout.isatty():
        click.echo(prompt + "\n")
    mode, tokenizer = shown_mode(model), require_tokenizer(model.tokenizer)
    view = make_view("stdout", prompt, keep=True)
    with Watcher(tokenizer, model.config.mask_token, view, mode, block_rule(model_of_mode(model, mode))) as watcher:
        events = model.stream(prompt, mode, step_callback=watcher.callback, **stream_arguments(model, mode))
        for _ in watcher.watch(events):
            pass
    click.echo()


def measure_modes(model: TwoTowerForCausalLM, prompt: str) -> dict[str, Generation]:
    """The run of median speed of each mode. The modes run in turn, so that other load affects all of them."""
    for mode in MODES:  # warms up
        generate_once(model, prompt, mode, 8)
    runs: dict[str, list[Generation]] = {mode: [] for mode in MODES}
    started = time.perf_counter()
    for done in range(ROUNDS):
        if done and (time.perf_counter() - started) * (done + 1) / done > SECONDS:
            break
        for mode in MODES:
            runs[mode].append(generate_once(model, prompt, mode))
    return {mode: sorted(some, key=lambda one: one.tokens_per_second)[len(some) // 2] for mode, some in runs.items()}


def generate_once(model: TwoTowerForCausalLM, prompt: str, mode: str, new_tokens: int = NEW_TOKENS) -> Generation:
    """Generates once and returns the result."""
    result, arguments = None, stream_arguments(model, mode)
    arguments["max_new_tokens"] = new_tokens
    for event in model.stream(prompt, mode, **arguments):
        result = event.result or result
    assert result is not None
    return result


def tokens_per_pass(result: Generation) -> float:
    """New tokens per pass, passes of both towers counted, as in evaluation."""
    return len(result.tokens) / max(result.passes_of_both, 1)


def figures_of(result: Generation) -> dict[str, object]:
    """The result as plain data; passes and tokens per pass count both towers."""
    return result.to_dict() | {"passes": result.passes_of_both, "tokens_per_pass": tokens_per_pass(result)}


def times_ar(results: dict[str, Generation], mode: str) -> float:
    """Tokens per second as a multiple of AR's."""
    return results[mode].tokens_per_second / results["ar"].tokens_per_second


def print_tables(
    console: Console, results: dict[str, Generation], threshold: float, shown: str, note: str | None
) -> None:
    """Prints the text of each mode, then the figures; AR comes first.

    shown: the mode to emphasise. note: a line below the texts.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from twotower.cli.watch import visible

    shape = box.SIMPLE_HEAD if console.is_terminal else None
    texts = Table(box=shape, header_style="dim", caption=note, caption_justify="left", caption_style="dim")
    figures = Table(box=shape, header_style="dim")
    texts.add_column("mode", no_wrap=True)
    texts.add_column("text")
    figures.add_column("mode", no_wrap=True)
    for name in ("tokens", "passes", "tokens/pass", "tokens/s", "× AR"):
        figures.add_column(name, justify="right", no_wrap=True)
    for mode in ("ar", "mock_ar", "verified", "diffusion"):
        result = results[mode]
        name = f"{mode}, threshold {threshold}" if mode == "diffusion" else mode
        text = visible(result.text.strip().replace("\n", " ↵ "))
        short = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS].rstrip() + " …"
        texts.add_row(name, Text(short))  # plain text, because rich takes [brackets] for markup
        figures.add_row(
            name,
            str(len(result.tokens)),
            str(result.passes_of_both),
            f"{tokens_per_pass(result):.2f}",
            f"{result.tokens_per_second:.1f}",
            f"{times_ar(results, mode):.2f}",
            style="bold" if mode == shown else "",
        )
    for table in (texts, figures):
        console.print(table, end="" if console.is_terminal else "\n\n")


def speed_summary(results: dict[str, Generation], mode: str) -> str:
    """Explains the speed of a mode: tokens per pass, and the cost of a pass in AR steps."""
    ar, shown = results["ar"], results[mode]
    passes = shown.passes_of_both
    cost = (shown.decode_seconds / passes) / (ar.decode_seconds / ar.context_passes)
    ratio = times_ar(results, mode)
    speed = "slower" if ratio < 1 else "faster"
    towers = f" ({shown.denoiser_passes} of the denoiser, {shown.context_passes} of the context tower)"
    return (
        f"{mode.capitalize()} is {speed} than AR here ({ratio:.2f}×). It wrote {len(shown.tokens)} tokens in {passes} "
        f"passes{towers if shown.denoiser_passes else ''}: "
        f"{tokens_per_pass(shown):.2f} tokens per pass. A pass costs as much as {cost:.2f} AR steps. "
        "All figures are from this run."
    )
