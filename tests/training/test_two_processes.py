"""Several processes compute the same as one: losses, log, weights; with shards of unequal size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
import torch
from tiny_run import Given, column, launch, log, two_towers, uninterrupted, weights
from torch import Tensor

VALIDATED = ("masked_nll", "ar_nll", "nll", "bits_per_byte")


def deviation(one: Path, two: Path, steps: int = 20) -> float:
    """The largest relative difference of losses and norms; all counts must be equal."""
    for name in ("step", "targets", "tokens", "lr", "block_size"):
        assert column(one, name).equal(column(two, name)), name
    assert len(log(one)) >= steps
    pairs = [(column(one, name), column(two, name)) for name in ("loss", "grad_norm")]
    pairs += [(validated(one, name), validated(two, name)) for name in VALIDATED]
    return max(float(((b - a).abs() / a).max()) for a, b in pairs if len(a))


def validated(directory: Path, name: str) -> Tensor:
    found = [record["validation"] for record in log(directory) if "validation" in record]
    assert len(found) == 2
    return torch.tensor([record[name] for record in found if name in record], dtype=torch.float64)


def difference(one: Path, two: Path) -> float:
    """The largest difference of any weight."""
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def run_two(args: list[str], said: Path, processes: int = 2) -> list[str]:
    """Runs two processes and returns the output of the first; the other prints nothing."""
    launched = launch(args, said, processes)
    codes = launched.codes()
    assert codes == [0] * processes, launched.stderr() + launched.stderr(1)
    assert not any(launched.stderr(rank) for rank in range(1, processes))
    return launched.stderr()


def report(name: str, one: Path, two: Path) -> None:
    print(f"\n{name}: relative deviation {deviation(one, two):.1e}, weights differ by {difference(one, two):.1e}")


# A pass for each row and activation checkpointing together must change nothing.
HARD = ("--micro-batch-size", "1", "--activation-checkpointing", "--checkpoint-every", "100")


@pytest.mark.parametrize("verb", ["train", "pretrain"])
def test_two_processes_give_the_losses_of_one(verb: str, tmp_path: Path) -> None:
    one, two = uninterrupted(verb), tmp_path / "two"
    run_two(getattr(tiny_run.given(), verb)(two, *HARD), tmp_path / "said")
    report(verb, one, two)
    assert deviation(one, two) < 1e-5
    assert difference(one, two) < 2e-5  # a step of Adam is 1e-3
    if verb == "train":
        source = weights(tiny_run.given().model)
        for name, tensor in weights(two).items():
            assert tensor.equal(source[name]) == name.startswith("context_"), name


def test_passes_over_fewer_rows_change_nothing(tmp_path: Path) -> None:
    """Three rows and then one row, in one process."""
    one = uninterrupted("train")
    assert (
        tiny_run.run_cli(
            tiny_run.given().train(tmp_path / "run", "--micro-batch-size", "3", "--checkpoint-every", "100")
        )
        == 0
    )
    report("micro-rows", one, tmp_path / "run")
    assert deviation(one, tmp_path / "run") < 1e-6
    assert difference(one, tmp_path / "run") < 1e-5


# --- in full -------------------------------------------------------------------------------------------------------

EXACT = ("--dtype", "float64")  # so that any difference is a mistake
VARIANTS = {
    "frozen": (),
    "elbo, a noise level a row": ("--elbo", "--noise", "row", "--offset", "fixed"),
    "a noise level a block, no clipping": ("--noise", "block", "--clip", "0"),
    "trained context": ("--train-context",),
    "trained context with its own loss": ("--train-context", "--ar-weight", "0.5"),
    "tied": ("--tie", "--ar-weight", "0.5"),
    "no balancing": ("--balance-rate", "0"),
}


@pytest.mark.slow
@pytest.mark.parametrize("more", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("processes", [2, 4])
def test_every_variant_in_double_precision(more: tuple[str, ...], processes: int, tmp_path: Path) -> None:
    """From a float64 checkpoint, with four processes.

    Hidden size 33 gives shards of 9, 9, 9 and 6; 5 experts leave one process without any.
    """
    given: Given = tiny_run.given()
    source = two_towers(tmp_path / "source", dtype=torch.float64)
    one, many = tmp_path / "one", tmp_path / "many"
    assert tiny_run.run_cli(given.train(one, *EXACT, *more, model=source)) == 0
    run_two(given.train(many, *EXACT, *more, *HARD, model=source), tmp_path / "said", processes)
    report(f"{processes} processes, {' '.join(more) or 'frozen'}", one, many)
    assert deviation(one, many) < 1e-9
    assert difference(one, many) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_a_backbone_in_double_precision(processes: int, tmp_path: Path) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    assert tiny_run.run_cli(tiny_run.given().pretrain(one, *EXACT)) == 0
    run_two(tiny_run.given().pretrain(many, *EXACT, *HARD), tmp_path / "said", processes)
    assert deviation(one, many) < 1e-9
    assert difference(one, many) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["M", "*-", "E", "MEM*EMEM*E"])
def test_other_stacks(pattern: str, tmp_path: Path) -> None:
    """A context tower with layers that are not run; a model without any state; a deep model."""
    source = two_towers(tmp_path / "source", pattern)
    one, two = tmp_path / "one", tmp_path / "two"
    assert tiny_run.run_cli(tiny_run.given().train(one, model=source)) == 0
    run_two(tiny_run.given().train(two, *HARD, model=source), tmp_path / "said")
    report(pattern, one, two)
    assert deviation(one, two) < 1e-5
    assert difference(one, two) < 5e-5


@pytest.mark.slow
def test_generation_in_validation_disturbs_nothing(tmp_path: Path) -> None:
    """The prompts are the first process's documents, so samples differ; losses do not."""
    run_two(tiny_run.given().train(tmp_path / "run", "--generate"), tmp_path / "said")
    assert deviation(uninterrupted("train"), tmp_path / "run") < 1e-5
    for record in log(tmp_path / "run"):
        if "validation" in record:
            assert 0 < record["validation"]["tokens_per_pass"] <= 16
            assert record["validation"]["sample"]


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["train", "pretrain"])
def test_under_torchrun(verb: str, tmp_path: Path) -> None:
    """The command as a user gives it."""
    output = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "twotower", *getattr(tiny_run.given(), verb)(output, *HARD)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(output / "model")]
    assert deviation(uninterrupted(verb), output) < 1e-5
