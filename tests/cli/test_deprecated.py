"""`formerly`: the old spelling of an option sets the new parameter and says so."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from twotower.cli.deprecated import formerly
from twotower.cli.main import cli as verbs


@click.command()
@click.option("--lr", cls=formerly("--rate"), type=float, default=0.5, show_default=True, help="Peak learning rate.")
@click.option("--data", cls=formerly("--item"), multiple=True)
@click.option("--again/--no-again", cls=formerly("--twice/--no-twice"), default=True)
@click.option("--activation-checkpointing", "recompute", cls=formerly("--recompute"), is_flag=True)
def command(lr: float, data: tuple[str, ...], again: bool, recompute: bool) -> None:
    click.echo(repr((lr, data, again, recompute)))


def invoke(*args: str) -> Result:
    return CliRunner().invoke(command, list(args))


def test_the_new_spellings_say_nothing() -> None:
    result = invoke("--lr", "0.1", "--data", "a", "--no-again", "--activation-checkpointing")
    assert (result.stdout, result.stderr) == ("(0.1, ('a',), False, True)\n", "")
    assert invoke().stdout == "(0.5, (), True, False)\n"


@pytest.mark.parametrize(
    ("given", "parameters", "names"),
    [
        (("--rate", "0.1"), "(0.1, (), True, False)", ("--rate", "--lr")),
        (("--rate=0.1",), "(0.1, (), True, False)", ("--rate", "--lr")),
        (("--item", "a", "--item", "b"), "(0.5, ('a', 'b'), True, False)", ("--item", "--data")),
        (("--no-twice",), "(0.5, (), False, False)", ("--twice", "--again")),
        (("--recompute",), "(0.5, (), True, True)", ("--recompute", "--activation-checkpointing")),
    ],
)
def test_an_old_spelling_sets_the_parameter_and_prints_one_line(
    given: tuple[str, ...], parameters: str, names: tuple[str, str]
) -> None:
    result = invoke(*given)
    assert result.exit_code == 0
    assert result.stdout == parameters + "\n"
    assert result.stderr == f"{names[0]} is deprecated; use {names[1]}\n"


def test_an_old_spelling_is_checked_like_the_new() -> None:
    result = invoke("--rate", "fast")
    assert result.exit_code == 2
    assert "'fast' is not a valid float" in result.stderr


def test_both_spellings_are_one_error() -> None:
    for given in (("--rate", "0.1", "--lr", "0.2"), ("--lr", "0.2", "--rate", "0.1")):
        result = invoke(*given)
        assert result.exit_code == 2
        assert "Error: --rate is the old name of --lr; give only --lr\n" in result.stderr


@pytest.mark.parametrize("verb", ["train", "pretrain"])
@pytest.mark.parametrize(
    ("old", "new", "values"),
    [
        ("--rate", "--lr", ("0.5",)),
        ("--rows", "--batch-size", ("3",)),
        ("--micro-rows", "--micro-batch-size", ("2",)),
        ("--final", "--final-lr-ratio", ("0.5",)),
        ("--recompute", "--activation-checkpointing", ()),
    ],
)
def test_training_accepts_its_former_options(
    verb: str, old: str, new: str, values: tuple[str, ...], capsys: pytest.CaptureFixture
) -> None:
    required = ["--config", "config.json"] if verb == "pretrain" else ["bundled"]
    by_old, by_new = (verbs.commands[verb].make_context(verb, [*required, name, *values]).params for name in (old, new))
    assert by_old == by_new
    assert capsys.readouterr().err == f"{old} is deprecated; use {new}\n"


def test_the_plan_accepts_its_former_option(capsys: pytest.CaptureFixture) -> None:
    arguments = [["bundled", name, "0.5"] for name in ("--utilisation", "--utilization")]
    by_old, by_new = (verbs.commands["train"].make_context("train", given).params for given in arguments)
    assert by_old == by_new
    assert by_new["utilisation"] == 0.5
    assert capsys.readouterr().err == "--utilisation is deprecated; use --utilization\n"


def test_stages_replace_other_options(tmp_path: Path) -> None:
    arguments = ["bundled", "--stages", "no", "--steps", "5", "--no-tensorboard", "-o", str(tmp_path)]
    result = CliRunner().invoke(verbs.commands["train"], arguments)
    assert "Warning: --steps has no effect with --stages.\n" in result.stderr
    assert "--block-size" not in result.stderr


def test_the_help_hides_old_spellings() -> None:
    help_text = invoke("--help").stdout
    assert "--lr" in help_text
    assert "--data" in help_text
    for old in ("--rate", "--item", "--twice", "--recompute"):
        assert old not in help_text
