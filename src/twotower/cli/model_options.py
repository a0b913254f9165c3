"""What verbs that work with a model have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from twotower import model_loading
from twotower.cli.terminal import status_line
from twotower.decoding.modes import SETTINGS
from twotower.process import configure_process

if TYPE_CHECKING:
    from twotower.modeling_twotower import TwoTowerForCausalLM

model_option = click.option(
    "-m", "--model", metavar="MODEL", help="Checkpoint directory or hub id.  [default: the bundled model]"
)

setting_option = click.option(
    "-s",
    "--setting",
    "settings",
    multiple=True,
    default=SETTINGS,
    show_default=True,
    metavar="MODE[:VALUE,NAME=X…]",
    help="A way to decode, e.g. diffusion:0.8, diffusion:factor=1.2,block_size=8, verified:acceptance=0.3. "
    "May be given several times; AR is always run.",
)
deterministic_option = click.option(
    "--deterministic",
    is_flag=True,
    help="Repeat the same text in bf16 too: passes depend on neither measured times nor other requests. Slower.",
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(model_loading.DTYPES),
    default="auto",
    show_default=True,
    help="auto: as stored, but float32 on a CPU for a bfloat16 model of less than 500 million parameters.",
)
quantization_option = click.option(
    "--quantization",
    type=click.Choice(model_loading.QUANTIZATIONS),
    default="none",
    show_default=True,
    help="int8: the large matrices in 8 bits, quantised as they are read; the rest in --dtype.",
)
threads_option = click.option("--threads", type=click.IntRange(min=1), help="CPU threads.")


def load_text_model(
    model: str | None,
    consequence: str,
    *,
    dtype: str = "auto",
    quantization: str = "none",
    threads: int | None = None,
) -> tuple[TwoTowerForCausalLM, Path | str]:
    """Configures the process → the model that `--model` means, ready to read and write text, and where it is from.
    consequence: of its having no tokenizer.

    Raises:
        TwoTowerError: no such model, one that does not fit its config, or one without a tokenizer.
    """
    source = model_loading.source_of(model)
    with status(f"loading {model_loading.name_of(source)} …"):
        configure_process(threads)
        loaded = model_loading.load_model(source, dtype=dtype, quantization=quantization)
    tell_dtype(loaded, dtype)
    model_loading.need_tokenizer(loaded, source, consequence)
    return loaded, source


def tell_dtype(model: TwoTowerForCausalLM, dtype: str) -> None:
    """Writes to stderr what follows from bfloat16 where --dtype auto chose it."""
    text = model_loading.dtype_note(model, dtype)
    if text is not None:
        click.secho(text, err=True, dim=True)


@contextmanager
def status(text: str) -> Iterator[None]:
    """A line on a terminal's stderr while something takes its time; gone afterwards."""
    with status_line() as update:
        update(text)
        yield
