"""Options and loading that the verbs with a model share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from twotower import model_loading
from twotower.cli.terminal import status_line
from twotower.decoding.modes import COMPARED_SETTINGS
from twotower.process import configure_process

if TYPE_CHECKING:
    from twotower.modeling_twotower import TwoTowerForCausalLM

model_option = click.option(
    "-m", "--model", metavar="MODEL", help="Checkpoint directory, or id on the hub.  [default: the bundled model]"
)

setting_option = click.option(
    "-s",
    "--setting",
    "settings",
    multiple=True,
    default=COMPARED_SETTINGS,
    show_default=True,
    metavar="MODE[:VALUE,NAME=X…]",
    help="Decoding setting to compare with AR, e.g. diffusion:0.8, diffusion:factor=1.2,block_size=8, "
    "verified:acceptance=0.3. Can be repeated; AR always runs.",
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(model_loading.DTYPES),
    default="auto",
    show_default=True,
    help="Dtype of weights and activations. auto: the checkpoint's dtype, but float32 on a CPU for a bfloat16 model of "
    "less than 500 million parameters.",
)
context_device_option = click.option(
    "--context-device",
    metavar="DEVICE",
    help="Device of the context tower, e.g. cpu, cuda:0.  [default: the first CUDA device, else cpu]",
)
denoiser_device_option = click.option(
    "--denoiser-device", metavar="DEVICE", help="Device of the denoiser tower.  [default: that of the context tower]"
)
deterministic_option = click.option(
    "--deterministic",
    is_flag=True,
    help="Give the same text in every run with the same seed, also in bf16: passes do not depend on measured times or "
    "on other requests. Slower.",
)
quantization_option = click.option(
    "--quantization",
    type=click.Choice(model_loading.QUANTIZATIONS),
    default="none",
    show_default=True,
    help="int8: quantize the large matrices to 8 bits while loading (weight-only); the rest stays in --dtype.",
)
threads_option = click.option(
    "--threads",
    metavar="N",
    type=click.IntRange(min=1),
    help="Number of CPU threads.  [default: 1 for a small model, else all cores]",
)


def load_text_model(
    model: str | None,
    consequence: str,
    *,
    dtype: str = "auto",
    quantization: str = "none",
    threads: int | None = None,
) -> tuple[TwoTowerForCausalLM, Path | str]:
    """Configures the process and loads the model of `--model`; returns the model and its source.

    consequence: ends the error message for a model without a tokenizer ("…, so CONSEQUENCE").

    Raises:
        TwoTowerError: the model is missing, does not fit its config, or has no tokenizer.
    """
    source = model_loading.source_of(model)
    with status(f"loading {model_loading.name_of(source)} …"):
        configure_process(threads)
        loaded = model_loading.load_model(source, dtype=dtype, quantization=quantization)
    print_dtype_note(loaded, dtype)
    model_loading.need_tokenizer(loaded, source, consequence)
    return loaded, source


def print_dtype_note(model: TwoTowerForCausalLM, dtype: str) -> None:
    """Prints a note on stderr if --dtype auto chose bfloat16."""
    text = model_loading.dtype_note(model, dtype)
    if text is not None:
        click.secho(text, err=True, dim=True)


@contextmanager
def status(text: str) -> Iterator[None]:
    """Shows a line on stderr while the block runs, if stderr is a terminal."""
    with status_line() as update:
        update(text)
        yield
