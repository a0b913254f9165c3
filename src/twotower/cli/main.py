"""The `twotower` command: finds the verb, and prints every error of the user in one line."""

from __future__ import annotations

import difflib
import os
import sys

import click

from twotower.cli.batch import batch, generate_data
from twotower.cli.bench import bench
from twotower.cli.curves import curves
from twotower.cli.demo import demo
from twotower.cli.evaluate import evaluate
from twotower.cli.export import export, join
from twotower.cli.generate import generate
from twotower.cli.info import info
from twotower.cli.init import init
from twotower.cli.lm_eval import lm_eval
from twotower.cli.quantize import quantize
from twotower.cli.report import report
from twotower.cli.serve import serve
from twotower.cli.train import pretrain, train
from twotower.errors import TwoTowerError
from twotower.version import VERSION

DEFAULT_VERB = "generate"


class Verbs(click.Group):
    """A group of verbs. If the first argument is no verb, the verb is `generate` and the argument its prompt."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args:  # piped input is a prompt; at a terminal the help is printed
            args = ["--help"] if sys.stdin.isatty() else [DEFAULT_VERB]
        elif args[0] not in self.commands and args[0] not in {"--help", "-h", "--version"}:
            self._mention_near_miss(args[0])
            args = [DEFAULT_VERB, *args]
        return super().parse_args(ctx, args)

    def _mention_near_miss(self, word: str) -> None:
        near = difflib.get_close_matches(word, self.commands, n=1, cutoff=0.75)
        if near:
            click.echo(f"Note: {word!r} is taken as a prompt; the verb is {near[0]!r}.", err=True)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(VERSION, message="%(prog)s %(version)s")
def cli() -> None:
    """Run, train, measure and serve two-tower diffusion language models.

    \b
    twotower "Once upon a time"           continue a prompt (same as `twotower generate "…"`)
    twotower generate --watch "Once …"    show each denoising pass
    twotower demo                         compare the modes on one prompt
    twotower serve                        OpenAI-compatible API, and a page that shows denoising
    """


for verb in (
    generate,
    batch,
    serve,
    demo,
    info,
    init,
    join,
    export,
    quantize,
    generate_data,
    pretrain,
    train,
    curves,
    report,
    evaluate,
    bench,
    lm_eval,
):
    cli.add_command(verb)


def run_cli(args: list[str] | None = None) -> int:
    """Runs one command line → the exit code.

    0; 1 if no line of a batch job has an answer or a generation ends with an error; 2 for an error of the user; 130
    after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # without Unicode, "?" replaces a character
    try:
        code: object = cli.main(args=args, prog_name="twotower", standalone_mode=False, color=_color())
    except click.Abort:
        return 130
    except click.NoSuchOption as error:
        if error.option_name in ("-s", "--setting") and error.ctx is not None and error.ctx.command is generate:
            return _print_error(f"{error.message.rstrip('.')}; generate takes --mode and one option for each parameter")
        return _print_error(error.format_message())
    except click.ClickException as error:
        return _print_error(error.format_message())
    except TwoTowerError as error:
        return _print_error(str(error))
    except OSError as error:
        return _print_error(str(error))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; torch is not imported here
            raise
        return _print_error(f"{error} Use a smaller --dtype, fewer tokens, or a second device.")
    return code if isinstance(code, int) else 0


def _color() -> bool | None:
    """False if escape codes of colors are not wanted (TERM=dumb); None: click decides."""
    return False if os.environ.get("TERM") == "dumb" else None


def _print_error(message: str) -> int:
    click.echo("Error: " + " ".join(line.strip() for line in message.splitlines()), err=True)
    return 2


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run_cli())
