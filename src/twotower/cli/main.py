"""The `twotower` command: finds the verb, and turns every error a user can cause into one line."""

from __future__ import annotations

import difflib
import sys

import click

from twotower.cli.batch import batch
from twotower.cli.bench import bench
from twotower.cli.curves import curves
from twotower.cli.demo import demo
from twotower.cli.evaluate import evaluate
from twotower.cli.generate import generate
from twotower.cli.info import info
from twotower.cli.init import init
from twotower.cli.lm_eval import lm_eval
from twotower.cli.report import report
from twotower.cli.serve import serve
from twotower.cli.train import pretrain, train
from twotower.errors import TwoTowerError
from twotower.version import VERSION

DEFAULT_VERB = "generate"


class Verbs(click.Group):
    """A group whose verb may be left out: what is not a verb is a prompt for `generate`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args:  # something piped in is a prompt; a person at a terminal wants the help
            args = ["--help"] if sys.stdin.isatty() else [DEFAULT_VERB]
        elif args[0] not in self.commands and args[0] not in {"--help", "-h", "--version"}:
            self._mention_near_miss(args[0])
            args = [DEFAULT_VERB, *args]
        return super().parse_args(ctx, args)

    def _mention_near_miss(self, word: str) -> None:
        near = difflib.get_close_matches(word, self.commands, n=1, cutoff=0.75)
        if near:
            click.echo(f"Note: {word!r} is taken as a prompt; the verb is spelt {near[0]!r}.", err=True)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(VERSION, message="%(prog)s %(version)s")
def cli() -> None:
    """Two-tower diffusion language models: run them, look at them.

    \b
    twotower "Once upon a time"           write on (the same as `twotower generate …`)
    twotower generate --watch "Once …"    see each block being denoised
    twotower demo                         the modes side by side
    twotower serve                        the OpenAI endpoints, and a page to see it think
    """


for verb in (generate, batch, serve, demo, info, init, pretrain, train, curves, report, evaluate, bench, lm_eval):
    cli.add_command(verb)


def run_cli(args: list[str] | None = None) -> int:
    """Runs one command line → its exit code: 0, 2 for an error of the user's, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Unicode shows "?" rather than a traceback
    try:
        code: object = cli.main(args=args, prog_name="twotower", standalone_mode=False)
    except click.Abort:
        return 130
    except click.ClickException as error:
        return _print_error(error.format_message())
    except TwoTowerError as error:
        return _print_error(str(error))
    except OSError as error:
        return _print_error(str(error))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; torch is not imported here
            raise
        return _print_error(f"{error} Use a narrower --dtype, fewer tokens, or a second device.")
    return code if isinstance(code, int) else 0


def _print_error(message: str) -> int:
    click.echo("Error: " + " ".join(line.strip() for line in message.splitlines()), err=True)
    return 2


def main() -> None:
    """The console script."""
    sys.exit(run_cli())
