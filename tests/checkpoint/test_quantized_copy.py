"""`twotower quantize`: the files that loading and saving would write, read by every verb, replaced as a whole."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from backbone_models import MASK
from command import Result, assert_one_line_error
from test_loading_memory import CHILD, write_checkpoint
from tiny_backbones import save

from twotower import TwoTowerForCausalLM, bundled_model
from twotower.checkpoint.convert import convert
from twotower.checkpoint.quantized_copy import quantize_checkpoint
from twotower.errors import ArgumentError

PLANS = ("int8", "int4", "experts=int4,rest=int8", "context=int8,denoiser=int4", "denoiser.projections=int4")


def files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize("plan", PLANS)
def test_the_files_are_those_of_a_model_that_is_loaded_and_saved(golden_dir: Path, tmp_path: Path, plan: str) -> None:
    for name, source, sizes in (
        ("a", golden_dir / "tiny-hybrid", {"max_shard_size": 20_000}),
        ("b", bundled_model("small"), {}),
    ):
        made = quantize_checkpoint(source, tmp_path / name / "made", plan, **sizes)
        TwoTowerForCausalLM.from_pretrained(source, quantization=plan).save_pretrained(
            tmp_path / name / "saved", **sizes
        )
        assert files(tmp_path / name / "made") == files(tmp_path / name / "saved")
        assert made.quantization == plan


@pytest.mark.parametrize("name", ["phi3", "granitemoehybrid", "mixtral", "qwen2", "qwen3_next"])
def test_packed_projections_stacked_experts_and_tied_heads(name: str, tmp_path: Path) -> None:
    save(name, tmp_path / "ar")
    convert(tmp_path / "ar", tmp_path / "two", mask_token=MASK)
    quantize_checkpoint(tmp_path / "two", tmp_path / "made", "int4", dtype="bfloat16")
    loaded = TwoTowerForCausalLM.from_pretrained(tmp_path / "two", quantization="int4", dtype="bfloat16")
    loaded.save_pretrained(tmp_path / "saved")
    assert files(tmp_path / "made") == files(tmp_path / "saved")


def test_adapters(tmp_path: Path, cli: Callable[..., Result]) -> None:
    """A denoiser of adapters is copied as it is; what needs a second tower says so."""
    save("llama", tmp_path / "ar")
    convert(tmp_path / "ar", tmp_path / "two", mask_token=MASK, denoiser_lora=4)
    quantize_checkpoint(tmp_path / "two", tmp_path / "made", "int4")
    TwoTowerForCausalLM.from_pretrained(tmp_path / "two", quantization="int4").save_pretrained(tmp_path / "saved")
    assert files(tmp_path / "made") == files(tmp_path / "saved")
    (tmp_path / "text.txt").write_text("Some words.\n")
    for option in (("--calibrate", tmp_path / "text.txt"), ("--report",)):
        result = cli("quantize", tmp_path / "two", "-o", tmp_path / "new", "--scheme", "int4", *option)
        assert_one_line_error(result, f"{option[0]} needs a denoiser of its own, and this model's are adapters")
        assert not (tmp_path / "new").exists()


@pytest.fixture
def made(tmp_path: Path, cli: Callable[..., Result]) -> Path:
    """The bundled model in int4, as the command writes it."""
    result = cli("quantize", bundled_model("small"), "-o", tmp_path / "made", "--scheme", "int4")
    assert result.code == 0, result.err
    assert "int4: 3.8 MiB in model.safetensors, 39% of 9.8 MiB" in result.out
    return tmp_path / "made"


def test_the_verbs_load_the_copy(made: Path, cli: Callable[..., Result]) -> None:
    now = [cli("generate", "-m", name, "User: Hi", "--mode", "verified", "-n", "12", "--seed", "1", *more).out
           for name, more in ((made, ()), (bundled_model("small"), ("--quantization", "int4")))]  # fmt: skip
    assert now[0] == now[1] != ""
    facts = json.loads(cli("info", made, "--json").out)
    assert (facts["weights"]["quantization"], facts["weights"]["problem"]) == ("int4", None)
    result = cli("eval", "-m", made, "-n", "1", "--max-new-tokens", "4", "--json")
    assert json.loads(result.out)["quantization"] == "int4"
    result = cli("bench", "-m", made, "--rounds", "1", "--batches", "1", "-n", "4", "-s", "verified", "--json")
    assert result.code == 0, result.err


def test_errors_are_one_line(made: Path, golden_dir: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    def refused(*arguments: str | Path, said: str) -> None:
        assert_one_line_error(cli("quantize", *arguments), said)

    new = tmp_path / "new"
    refused(
        "-o", made, "--scheme", "int8", said="made is not empty; choose another directory, or replace it with --over"
    )
    refused(made, "-o", new, "--scheme", "int8", said="stored in int4; twotower quantize needs the original checkpoint")
    refused("-o", new, "--scheme", "int3", said="'int3' in 'int3' is not valid; give a scheme")
    refused("-o", new, "--scheme", "none", said="the plan 'none' quantises no weight of")
    refused("-o", new, said="--scheme")
    refused(tmp_path / "absent", "-o", new, "--scheme", "int8", said="no such directory")
    for size in ("big", "infGB", "-5GB", "0", "1e400GB"):
        refused("-o", new, "--scheme", "int8", f"--max-shard-size={size}", said=f"max_shard_size is '{size}'")
    source = tmp_path / "source"
    shutil.copytree(golden_dir / "tiny-hybrid", source, ignore=shutil.ignore_patterns("golden*"))
    refused(source, "-o", source, "--overwrite", "--scheme", "int8", said="contains the source checkpoint")
    save("llama", tmp_path / "ar")
    refused(tmp_path / "ar", "-o", new, "--scheme", "int8", said="twotower init")
    weights = next(source.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(source, "-o", new, "--scheme", "int8", said="not a complete safetensors file")
    assert not new.exists()
    assert not list(tmp_path.glob("*.partial"))


def test_a_full_disk_is_an_error_before_anything_is_written(
    tmp_path: Path, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    result = cli("quantize", "-o", tmp_path / "new", "--scheme", "int8")
    assert_one_line_error(result, "1.0 MiB are free on its disk, but the checkpoint needs")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_leaves_what_was_there(made: Path, golden_dir: Path) -> None:
    before = files(made)

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(bundled_model("small"), made, "int8", overwrite=True, progress=stop)
    assert files(made) == before
    assert [path.name for path in made.parent.iterdir()] == ["made"]
    quantize_checkpoint(bundled_model("small"), made, "int8", overwrite=True)
    assert TwoTowerForCausalLM.from_pretrained(made).quantization == "int8"


def test_training_needs_the_original_checkpoint(made: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    (tmp_path / "a.txt").write_text("Some words of a text.\n" * 40)
    run = tmp_path / "run"
    result = cli("train", made, "--data", tmp_path / "a.txt", "-o", run, "--steps", "1", "--held-out", "0")
    assert_one_line_error(result, "the weights are stored in int4; training needs the original checkpoint")
    assert not run.exists()
    result = cli("export", made, "--to", "one-tower", "-o", run)
    assert_one_line_error(result, "the weights are stored in int4; twotower export needs the original checkpoint")
    with pytest.raises(ArgumentError, match="int4 weights cannot be trained"):
        TwoTowerForCausalLM.from_pretrained(made).train()


# --- memory ---------------------------------------------------------------------------------------------------------

MEASURED = CHILD.replace(
    "from twotower import TwoTowerForCausalLM",
    "import torch._dynamo; from twotower.checkpoint.quantized_copy import quantize_checkpoint",
)
MEASURED = MEASURED.replace(
    "model = TwoTowerForCausalLM.from_pretrained(path, **arguments)",
    "made = quantize_checkpoint(path, sys.argv[3], **arguments)",
).replace("weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])", "weights = made.bytes")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_memory_is_far_below_the_size_of_the_source(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", 6, 3)
    plans = json.dumps([{"plan": "int4"}])
    child = [sys.executable, "-c", MEASURED, str(tmp_path / "source"), plans, str(tmp_path / "made")]
    done = subprocess.run(child, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["weights"] > 30e6
    source = sum(file.stat().st_size for file in (tmp_path / "source").glob("*.safetensors"))
    assert figures["peak"] < 0.6 * source  # 15 to 35 MB whatever the size, and the largest weight
