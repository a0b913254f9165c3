"""Options and loading that the verbs with a model share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click
from click.core import ParameterSource

from twotower import model_loading
from twotower.cli.terminal import status_line
from twotower.decoding.modes import COMPARED_SETTINGS
from twotower.process import configure_process

if TYPE_CHECKING:
    from twotower.decoding.params import Parameters
    from twotower.model.towers import TowerSet
    from twotower.modeling_twotower import TwoTowerForCausalLM

Command = TypeVar("Command", bound=Callable[..., object])


class OutputPath(click.Path):
    """A file or folder that a command writes. An empty text is refused: as a path it is the current directory."""

    def __init__(self, *, file_okay: bool = True, dir_okay: bool = True) -> None:
        super().__init__(file_okay=file_okay, dir_okay=dir_okay, path_type=Path)

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if value == "":
            self.fail("it is empty; give a path (the current directory is .)", param, ctx)
        return Path(str(super().convert(str(value), param, ctx)))


OUTPUT = OutputPath()
OUTPUT_FILE = OutputPath(dir_okay=False)
OUTPUT_FOLDER = OutputPath(file_okay=False)


def check_plan(_: click.Context, __: click.Parameter, plan: str | None) -> str | None:
    """Callback of an option with a quantization plan: raises ArgumentError if it is not valid."""
    from twotower.quantization import QuantizationPlan

    if plan is not None:
        QuantizationPlan.parse(plan)
    return plan


model_option = click.option(
    "-m",
    "--model",
    metavar="MODEL",
    help="Checkpoint directory, id on the hub, or bundled/NAME.  [default: the bundled model]",
)

new_checkpoint_option = click.option(
    "-o",
    "--output",
    required=True,
    type=OUTPUT,
    metavar="DIR",
    help="Directory of the new checkpoint.",
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
family_option = click.option(
    "--family",
    "families",
    multiple=True,
    metavar="NAME",
    help="Family of problems. Can be repeated.  [default: all but json]",
)
difficulty_option = click.option(
    "--difficulty",
    "difficulties",
    metavar="N",
    type=int,
    multiple=True,
    default=(1, 2),
    show_default=True,
    help="Difficulty of the problems, 1 to 5. Can be repeated.",
)
calibration_tokens_option = click.option(
    "--calibration-tokens",
    metavar="N",
    type=click.IntRange(1),
    default=65_536,
    show_default=True,
    help="Tokens of --calibrate to read.",
)


def is_given(name: str) -> bool:
    """Whether the command line or the environment has a value for an option."""
    return click.get_current_context().get_parameter_source(name) is not ParameterSource.DEFAULT


def check_calibration_tokens(calibration: Sequence[str]) -> None:
    """Raises UsageError if there is a number of tokens, and no text to calibrate with."""
    if is_given("calibration_tokens") and not calibration:
        raise click.UsageError("--calibration-tokens has no effect without --calibrate; add it, or leave it out")


problem_seed_option = click.option(
    "--seed", metavar="N", type=click.IntRange(0), default=0, show_default=True, help="Seed of the problems."
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
denoiser_option = click.option(
    "--denoiser",
    metavar="NAME",
    help="Diffusion, verified, mock_ar, auto: the denoiser to use, of a model with several.  [default: that of the "
    "mode]",
)
deterministic_option = click.option(
    "--deterministic",
    is_flag=True,
    help="Give the same text in every run with the same seed, also in bf16: passes do not depend on measured times or "
    "on other requests. Slower.",
)
quantization_option = click.option(
    "--quantization",
    metavar="PLAN",
    callback=check_plan,
    help="Quantize the large matrices while loading: int8, int4, or pairs such as "
    "experts=int4,rest=int8 or denoiser=int4,context=int8. Heads have at least 8 bits; the rest stays in --dtype. "
    "activations=int8 beside them rounds activations too, for integer products on CPUs.  "
    "[default: as stored]",
)
threads_option = click.option(
    "--threads",
    metavar="N",
    type=click.IntRange(min=1),
    help="Number of CPU threads.  [default: 1 for a small model, else all cores]",
)


def setting_values(setting: str, deterministic: bool) -> dict[str, object]:
    """The decoding parameters of `--setting` and `--deterministic`.

    Raises:
        ArgumentError: the setting is not valid.
    """
    from twotower.decoding.presets import parse_setting

    return parse_setting(setting).values | ({"deterministic": True} if deterministic else {})


def load_text_model(
    model: Path | str | None,
    consequence: str,
    *,
    towers: TowerSet = "both",
    dtype: str = "auto",
    quantization: str | None = None,
    context_device: str | None = None,
    denoiser_device: str | None = None,
    threads: int | None = None,
    one_tower: bool = False,
) -> tuple[TwoTowerForCausalLM, Path | str]:
    """Configures the process and loads the model of `--model`; returns the model and its source.

    consequence: ends the error message for a model without a tokenizer ("…, so CONSEQUENCE"). one_tower: the
    checkpoint of an autoregressive model is allowed too.

    Raises:
        TwoTowerError: the model is missing, does not fit its config, or has no tokenizer.
    """
    source = model_loading.source_of(model)
    with status(f"loading {model_loading.name_of(source)} …"):
        configure_process(threads)
        loaded = model_loading.load_text_model(
            source,
            consequence,
            towers=towers,
            dtype=dtype,
            quantization=quantization,
            context_device=context_device,
            denoiser_device=denoiser_device,
            one_tower=one_tower,
        )
    note = model_loading.dtype_note(loaded, dtype)
    if note is not None:
        click.secho(note, err=True, dim=True)
    return loaded, source


@contextmanager
def status(text: str) -> Iterator[None]:
    """Shows a line on stderr while the block runs, if stderr is a terminal."""
    with status_line() as update:
        update(text)
        yield


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """The values of the options of `sampling_options`."""

    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    bad_word: tuple[str, ...]
    stop_token_id: tuple[int, ...]
    min_tokens: int
    ignore_eos: bool
    special_tokens: bool
    stop: tuple[str, ...]

    def sampling(self) -> Parameters:
        """The options as keyword arguments of `model.stream`."""
        return {
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "logit_bias": self.logit_bias,
            "bad_words": self.bad_word,
            "stop_token_ids": self.stop_token_id,
            "min_tokens": self.min_tokens,
            "ignore_eos": self.ignore_eos,
            "skip_special_tokens": not self.special_tokens,
            "stop": self.stop,
        }


def _bias(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[int, float], ...]:
    found = []
    for text in values:
        token, _, bias = text.partition("=")
        try:
            found.append((int(token), float(bias)))
        except ValueError:
            raise click.BadParameter(f"{text!r} is not TOKEN=BIAS; give two numbers, such as 42=-5") from None
    return tuple(found)


SAMPLING_OPTIONS = (
    click.option(
        "--min-p",
        metavar="P",
        type=click.FloatRange(0, 1),
        default=0.0,
        help="Sample among the tokens with at least P times the probability of the most likely token.",
    ),
    click.option(
        "--repetition-penalty",
        metavar="X",
        type=click.FloatRange(0.01, 100),
        default=1.0,
        help="Divide positive logits of tokens of the prompt and the text by X, and multiply negative ones.",
    ),
    click.option(
        "--frequency-penalty",
        metavar="X",
        type=click.FloatRange(-2, 2),
        default=0.0,
        help="Subtract X from the logit of a token for each time that the text has it.",
    ),
    click.option(
        "--presence-penalty",
        metavar="X",
        type=click.FloatRange(-2, 2),
        default=0.0,
        help="Subtract X from the logits of tokens that the text has.",
    ),
    click.option(
        "--logit-bias",
        metavar="TOKEN=BIAS",
        multiple=True,
        callback=_bias,
        help="Add BIAS, from -100 to 100, to the logit of the token with this id. Can be repeated.",
    ),
    click.option(
        "--bad-word",
        metavar="TEXT",
        multiple=True,
        help="AR, verified, mock-AR: a word that the text does not have. Can be repeated.",
    ),
    click.option(
        "--stop-token-id",
        metavar="ID",
        multiple=True,
        type=click.IntRange(min=0),
        help="End at the token with this id too. Can be repeated.",
    ),
    click.option(
        "--min-tokens",
        metavar="N",
        type=click.IntRange(min=0),
        default=0,
        help="Do not end before N new tokens.",
    ),
    click.option("--ignore-eos", is_flag=True, help="Do not end at EOS."),
    click.option("--stop", multiple=True, metavar="TEXT", help="Stop string: end before this text. Can be repeated."),
    click.option("--special-tokens", is_flag=True, help="Print special tokens as text too."),
)


def sampling_options(command: Command) -> Command:
    """Adds options for penalties, biases and ends of the text, which vLLM has too, to a command."""
    for option in reversed(SAMPLING_OPTIONS):
        command = option(command)
    return command
