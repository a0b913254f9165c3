"""`twotower export --to one-tower` undoes `twotower init`: the same tensors, config and files for transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Result, assert_one_line_error
from conftest import build_random_model
from test_against_transformers import theirs
from test_conversion import CURRENT, MODELS, ORIGINAL, backbone, read_config, tensors, write_config
from test_loading_memory import CHILD
from tiny_backbones import FAMILY_NAMES, VOCAB, hf_config, hf_model, in_float64, save, save_tokenizer, slow_but
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    NemotronHConfig,
)

from twotower import TwoTowerForCausalLM
from twotower.checkpoint.convert import convert
from twotower.checkpoint.export import export_one_tower
from twotower.checkpoint.reader import SINGLE_FILE

EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def assert_same_tensors(one: Path, other: Path) -> None:
    expected, found = tensors(one), tensors(other)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def assert_same_logits(one: Path, other: Path, architecture: str) -> None:
    ids = torch.randint(4, 64, (2, 40), generator=torch.Generator().manual_seed(0))
    models = [AutoModelForCausalLM.from_pretrained(path, **EAGER) for path in (one, other)]
    assert [type(model).__name__ for model in models] == [architecture] * 2
    with torch.inference_mode():
        before, after = (model(ids).logits for model in models)
    assert torch.equal(before, after)


def assert_auto_classes(two: Path, source: Path) -> None:
    """The Auto classes, without `trust_remote_code`, load the converted model, whose AR logits are the source's."""
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **EAGER)
    ids = torch.randint(4, 64, (1, 20), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(two, dtype=torch.float64)
    assert type(model) is type(AutoModel.from_pretrained(two)) is TwoTowerForCausalLM
    with torch.inference_mode(), in_float64(original) as exact:
        expected = exact(ids, use_cache=False).logits
    with torch.inference_mode():
        assert (model(ids).logits - expected).abs().max() <= 1e-9 * expected.abs().max()


def assert_nemotron_config(one: Path, other: Path) -> None:
    """transformers reads the same configuration, apart from keys of draft heads and of code."""
    unread = {"auto_map", "transformers_version", "num_nextn_predict_layers", "mtp_layers_block_type", "norm_eps"}
    before, after = (NemotronHConfig.from_pretrained(path).to_dict() for path in (one, other))
    assert {key: after.get(key) for key in before.keys() - unread} == {
        key: before[key] for key in before.keys() - unread
    }


@pytest.mark.parametrize("name", slow_but((*FAMILY_NAMES, "gemma:options", "granitemoehybrid:rope")))
def test_the_source_comes_back(name: str, tmp_path: Path) -> None:
    """From shards and through shards, the source in fp32 or bf16; a whole file of weights is equal byte for byte."""
    dtype = torch.bfloat16 if len(name) % 2 else torch.float32
    shards = {"max_shard_size": "30KB"} if ":" in name else {}
    hf = hf_model(name).to(dtype)
    hf.save_pretrained(tmp_path / "source", **shards)
    hf.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    save_tokenizer(tmp_path / "source", "<mask>", mask_token="<mask>")
    (tmp_path / "source/chat_template.jinja").write_text("{{ messages }}")
    for file in FILES:
        if (tmp_path / "source" / file).exists():
            shutil.copy(tmp_path / "source" / file, tmp_path / "shards" / file)
    convert(tmp_path / "shards", tmp_path / "two", max_shard_size="50KB")
    assert_auto_classes(tmp_path / "two", tmp_path / "source")
    made = export_one_tower(tmp_path / "two", tmp_path / "one", **shards)
    assert_same_tensors(tmp_path / "source", tmp_path / "one")
    assert (made.architecture, made.notes) == (type(hf).__name__, ())
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()
    if hf.config.model_type == "nemotron_h":
        assert_nemotron_config(tmp_path / "source", tmp_path / "one")
    else:
        assert read_config(tmp_path / "one") == read_config(tmp_path / "source")
    others = {file.name for file in (tmp_path / "one").iterdir() if "safetensors" not in file.name}
    assert others == {"config.json", *FILES}
    if not shards:
        assert (tmp_path / "one" / SINGLE_FILE).read_bytes() == (tmp_path / "source" / SINGLE_FILE).read_bytes()
    assert_same_logits(tmp_path / "source", tmp_path / "one", type(hf).__name__)


@pytest.mark.parametrize("name", MODELS)
def test_nemotron_h_comes_back(name: str, tmp_path: Path) -> None:
    backbone(tmp_path / "source", name, dtype=torch.bfloat16)
    convert(tmp_path / "source", tmp_path / "two")
    export_one_tower(tmp_path / "two", tmp_path / "one")
    assert_same_tensors(tmp_path / "source", tmp_path / "one")
    assert_nemotron_config(tmp_path / "source", tmp_path / "one")
    assert_same_logits(tmp_path / "source", tmp_path / "one", "NemotronHForCausalLM")


def test_the_layout_of_transformers_5_comes_back_as_the_original(tmp_path: Path) -> None:
    """Stacked experts become one tensor an expert."""
    for name in ("mixtral", "qwen3_moe"):
        save(name, tmp_path / name / "stacked", save_original_format=False)
        save(name, tmp_path / name / "original")
        assert tensors(tmp_path / name / "stacked").keys() != tensors(tmp_path / name / "original").keys()
        convert(tmp_path / name / "stacked", tmp_path / name / "two", mask_token=3)
        export_one_tower(tmp_path / name / "two", tmp_path / name / "one")
        assert_same_tensors(tmp_path / name / "original", tmp_path / name / "one")
    backbone(tmp_path / "current", "MoE", CURRENT)
    backbone(tmp_path / "old", "MoE", ORIGINAL)
    convert(tmp_path / "current", tmp_path / "two")
    export_one_tower(tmp_path / "two", tmp_path / "one")
    assert_same_tensors(tmp_path / "old", tmp_path / "one")


def test_the_text_model_of_a_multimodal_source(tmp_path: Path) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = Gemma3Config(text_config=hf_config("gemma3_text").to_dict(), vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    whole = Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path / "source")
    made = convert(tmp_path / "source", tmp_path / "two", mask_token=3)
    assert any("tensors of other parts of the model are left out" in note for note in made.notes)
    result = export_one_tower(tmp_path / "two", tmp_path / "one")
    assert result.architecture == "Gemma3ForCausalLM"
    assert "its text model alone is written" in result.notes[0]
    ids = torch.randint(4, VOCAB, (2, 40))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one", attn_implementation="eager")
    with torch.inference_mode():
        expected = whole(input_ids=ids).logits
        assert (model(ids).logits - expected).abs().max() < 1e-4
        assert (TwoTowerForCausalLM.from_pretrained(tmp_path / "two")(ids).logits - expected).abs().max() < 1e-4


def test_after_load_and_save_the_values_are_the_same(tmp_path: Path) -> None:
    """Loading widens a few small tensors of a bf16 model to fp32; their values stay."""
    hf_model("granitemoehybrid").bfloat16().save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "two", mask_token=3)
    TwoTowerForCausalLM.from_pretrained(tmp_path / "two").save_pretrained(tmp_path / "again")
    export_one_tower(tmp_path / "again", tmp_path / "one")
    expected = tensors(tmp_path / "source")
    for name, tensor in tensors(tmp_path / "one").items():
        assert torch.equal(tensor, expected.pop(name).to(tensor.dtype))
    assert not expected
    assert_same_logits(tmp_path / "source", tmp_path / "one", "GraniteMoeHybridForCausalLM")


def test_a_changed_dtype_is_told(tmp_path: Path) -> None:
    save("llama", tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "two", mask_token=3, dtype="bfloat16")
    made = export_one_tower(tmp_path / "two", tmp_path / "one")
    assert made.notes == ("dtype was float32 in the source; the weights are bfloat16",)
    assert read_config(tmp_path / "one") == read_config(tmp_path / "source") | {"dtype": "bfloat16"}


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> Path:
    save("llama", tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "two", mask_token=3)
    shutil.rmtree(tmp_path / "source")
    return tmp_path / "two"


def command(model: Path, output: Path, *more: str) -> list[str | Path]:
    return ["export", model, "--to", "one-tower", "-o", output, *more]


def test_command(two: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    result = cli(*command(two, tmp_path / "one"))
    assert result.code == 0
    head, size = result.out.splitlines()
    assert head == str(tmp_path / "one")
    assert size.startswith("LlamaForCausalLM: ")
    facts = json.loads(cli(*command(two, tmp_path / "two-shards", "--json", "--max-shard-size", "30KB")).out)
    assert facts["architecture"] == "LlamaForCausalLM"
    assert len(facts["files"]) > 2
    assert_same_tensors(tmp_path / "one", tmp_path / "two-shards")


def test_what_is_refused(
    two: Path, tmp_path: Path, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    result = cli("export", two, "--to", "foo", "-o", tmp_path / "one")
    assert_one_line_error(result, "--to", "'foo'", "'one-tower'", "'gguf'")
    assert_one_line_error(cli("export", two, "-o", tmp_path / "one"), "--to", "one-tower")
    assert_one_line_error(cli(*command(two, two)), "not empty")
    assert_one_line_error(cli(*command(two, two, "--overwrite")), "contains the source")
    assert_one_line_error(cli(*command(tmp_path / "nowhere", tmp_path / "one")), "no such directory")
    assert_one_line_error(cli(*command(two, tmp_path / "one", "--max-shard-size", "x")), "5GB")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        assert_one_line_error(cli(*command(two, tmp_path / "one")), "1000 bytes are free", "needs 64", "MiB")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_existing_output_is_refused(two: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    assert cli(*command(two, tmp_path / "one")).code == 0
    assert_one_line_error(cli(*command(two, tmp_path / "one")), "not empty", "--overwrite")
    assert cli(*command(two, tmp_path / "one", "--overwrite")).code == 0
    (tmp_path / "one/mynotes.txt").touch()
    assert_one_line_error(cli(*command(two, tmp_path / "one", "--overwrite")), "mynotes.txt", "would delete", "move")
    (tmp_path / "file").touch()
    assert_one_line_error(cli(*command(two, tmp_path / "file/one")), "file/one: ", "file is a file; choose another")
    assert_one_line_error(cli(*command(two, tmp_path / "file")), "is a file")


def test_a_full_disk_is_one_line(two: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: a write fails in the middle."""
    code = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
    code += "from twotower.cli.main import main; main()"
    arguments = [str(argument) for argument in command(two, tmp_path / "one")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ")
    assert "File too large" in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two"]


def test_sources_that_are_not_two_towers(two: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    assert cli(*command(two, tmp_path / "one")).code == 0
    theirs(build_random_model("M-*M")).save_pretrained(tmp_path / "nemotron")
    targets = {
        "one-tower": ([], "no context tower beside a denoiser to export"),
        "peft": ([], "no adapters to export"),
        "denoiser": (["--denoiser", "a"], "no denoiser to export"),
    }
    for name, (target, (options, words)) in product(("one", "nemotron"), targets.items()):
        result = cli("export", tmp_path / name, "--to", target, "-o", tmp_path / "x", *options)
        assert_one_line_error(result, "is an autoregressive model", words, "twotower init")
    stored = tensors(two)
    stored["context_tower.layers.0.mlp.up_proj.weight"] = torch.zeros(80, 48, dtype=torch.int8)
    from safetensors.torch import save_file

    save_file(stored, two / "model.safetensors")
    assert_one_line_error(cli(*command(two, tmp_path / "x")), "up_proj.weight is stored as I8", "float")
    write_config(two, read_config(two) | {"mask_token_id": None})
    assert_one_line_error(cli(*command(two, tmp_path / "x")), "mask_token_id is missing")


# --- memory ---------------------------------------------------------------------------------------------------------

MEASURED = CHILD.replace(
    "from twotower import TwoTowerForCausalLM",
    "import torch._dynamo; from twotower.checkpoint.export import export_one_tower",
)
MEASURED = MEASURED.replace(
    "model = TwoTowerForCausalLM.from_pretrained(path, **arguments)",
    "made = export_one_tower(path, sys.argv[3], **arguments)",
).replace("weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])", "weights = made.bytes")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_memory_is_far_below_the_size(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 3000, "vocab_size": 30000, "num_hidden_layers": 3}
    config = hf_config("llama")
    config.update(sizes | {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64})
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "two", mask_token=3)
    child = [sys.executable, "-c", MEASURED, str(tmp_path / "two"), "[{}]", str(tmp_path / "one")]
    done = subprocess.run(child, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["weights"] > 120e6
    assert figures["peak"] < 0.15 * figures["weights"]
    assert_same_tensors(tmp_path / "source", tmp_path / "one")
