"""Adapters in PEFT's format: written, read back bit for bit, loaded by peft on transformers' model, refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Result, assert_one_line_error
from safetensors.torch import load_file, save_file
from tiny_backbones import FAMILY_NAMES, hf_config, in_float64, save, slow_but
from torch import nn
from transformers import AutoModelForCausalLM

from twotower import TwoTowerForCausalLM
from twotower.checkpoint.convert import convert
from twotower.checkpoint.denoiser_choices import DenoiserChoices
from twotower.checkpoint.export import export_peft
from twotower.checkpoint.peft_adapters import adapted_modules
from twotower.config import GenericTwoTowerConfig
from twotower.denoiser_fields import DenoiserConfig
from twotower.model.layer_io import AttentionMetadata
from twotower.model.towers import TwoTowerModel

RANK, HEAD_RANK = 4, 5
NAMES = ("nemotron_h", "llama", "qwen3", "qwen2_moe", "phi3")  # packed projections: phi3


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a one-tower checkpoint `source`, `two` with random adapters on it, and `adapters`, its export."""

    @cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("peft")
        save(name, folder / "source")
        convert(
            folder / "source",
            folder / "new",
            mask_token=3,
            denoiser_lora=RANK,
            choices=DenoiserChoices(draft_head=HEAD_RANK),
        )
        model = TwoTowerForCausalLM.from_pretrained(folder / "new")
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if ".adapter." in path or "mask_embedding" in path or "draft_head" in path:
                    parameter.normal_(std=0.3, generator=generator)
        model.config.block_size = 8
        model.save_pretrained(folder / "two")
        export_peft(folder / "two", folder / "adapters", base="owner/base")
        return folder

    return make


@pytest.mark.parametrize("name", slow_but((*NAMES, "glm4", "granitemoehybrid", "mamba2", "qwen3_next"), FAMILY_NAMES))
def test_modules_are_those_of_transformers(name: str) -> None:
    config = hf_config(name)
    with torch.device("meta"):
        theirs = dict(AutoModelForCausalLM.from_config(config).named_modules())
        choices = DenoiserConfig.with_adapters(RANK).to_json()
        own = GenericTwoTowerConfig(backbone=config.to_dict(), mask_token_id=3, **choices)
        model = TwoTowerModel(own)
    modules = adapted_modules(model)
    for module in modules:
        linear = theirs[module.path]
        assert isinstance(linear, nn.Linear)
        shapes = list(module.shapes(RANK).values())
        assert shapes[0][1] == linear.in_features
        assert shapes[1][0] == linear.out_features
    targets = tuple(f".{module.in_layer}" for module in modules)
    linears = {path for path, each in theirs.items() if isinstance(each, nn.Linear) and path.endswith(targets)}
    assert linears == {module.path for module in modules}  # PEFT finds no others by target_modules


@pytest.mark.parametrize("name", NAMES)
def test_the_way_back_is_exact(name: str, trained: Callable[[str], Path], cli: Callable[..., Result]) -> None:
    folder = trained(name)
    output = folder / "again"
    done = cli("init", "--from", folder / "source", "--adapters", folder / "adapters", "-o", output, "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert (facts["mask_token_id"], facts["adapter_rank"]) == (3, RANK)
    assert "other weights" not in done.err
    before, after = (load_file(path / "model.safetensors") for path in (folder / "two", output))
    assert before.keys() == after.keys()
    for tensor in before:
        assert torch.equal(before[tensor], after[tensor]), tensor
        assert before[tensor].dtype == after[tensor].dtype
    configs = [json.loads((path / "config.json").read_text()) for path in (folder / "two", output)]
    assert [(c["adapters"], c["format"], c["block_size"]) for c in configs] == [
        ({"rank": RANK, "gate": "masks"}, 1, 8)
    ] * 2
    prompt = torch.tensor([[5, 6, 7, 8]])
    models = [TwoTowerForCausalLM.from_pretrained(path, dtype=torch.float64) for path in (folder / "two", output)]
    assert models[1].context.mask_embedding is not None
    assert torch.equal(*(model.generate(prompt, max_new_tokens=8) for model in models))


@pytest.mark.parametrize("name", NAMES)
def test_peft_computes_the_adapted_tower(
    name: str, trained: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits of one token, where adapters act everywhere, are those of peft's model, in float64."""
    peft = pytest.importorskip("peft")
    folder = trained(name)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    base = AutoModelForCausalLM.from_pretrained(folder / "source", dtype=torch.float64, **eager)
    if name == "nemotron_h":
        with pytest.raises(ValueError, match="out_proj"):
            peft.PeftModel.from_pretrained(base, folder / "adapters")
        base = AutoModelForCausalLM.from_pretrained(folder / "source", dtype=torch.float64, **eager)
        monkeypatch.setattr(peft.tuners.tuners_utils, "_check_lora_target_modules_mamba", lambda *arguments: None)
    adapted = peft.PeftModel.from_pretrained(base, folder / "adapters").eval()
    model = TwoTowerForCausalLM.from_pretrained(folder / "two", dtype=torch.float64)
    for token in (5, 90):
        block = torch.tensor([[token]])
        with torch.inference_mode():
            with in_float64(adapted) as exact:
                expected = exact(block).logits
            view = model.new_state(1, 8).view()
            meta = AttentionMetadata(prefix=torch.zeros(1, dtype=torch.long), start=view.lengths)
            found = model.context.logits(model.context(block, meta, view.past, None, False)[0], False)
            plain = model(block).logits
        assert (found - expected).abs().max() < 1e-9 * expected.abs().max()
        assert (plain - expected).abs().max() > 1e-2 * expected.abs().max()


# --- bad input ------------------------------------------------------------------------------------------------------


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def edited(target: Path, name: str, **values: Any) -> None:
    (target / name).write_text(json.dumps(json.loads((target / name).read_text()) | values))


def test_adapters_that_do_not_fit(trained: Callable[[str], Path], tmp_path: Path, cli: Callable[..., Result]) -> None:
    folder = trained("llama")

    def init(adapters: Path, *others: object, source: Path = folder / "source") -> Result:
        return cli("init", "--from", source, "--adapters", adapters, "-o", tmp_path / "out", *others)

    other = trained("nemotron_h") / "source"
    first = "model.layers.0.mixer.in_proj.lora_A.weight is missing; the adapters are of another backbone than"
    assert_one_line_error(init(folder / "adapters", source=other), first, str(other))
    wide = save("llama", tmp_path / "wide")
    wide.config.intermediate_size = 96
    AutoModelForCausalLM.from_config(wide.config).save_pretrained(tmp_path / "wide")
    words = ("layers.0.mlp.gate_proj.lora_B.weight has shape [80, 4], and [96, 4] fits", "another backbone")
    assert_one_line_error(init(folder / "adapters", source=tmp_path / "wide"), *words)
    for name in ("mask_embedding.safetensors", "two_tower.json", "adapter_config.json"):
        bad = copy_of(folder / "adapters", tmp_path / f"no-{name}")
        (bad / name).unlink()
        assert_one_line_error(init(bad), f"has no {name}", "twotower export")
    for name, values, expected in (
        ("two_tower.json", {"temperature": 1}, "temperature is not a known field"),
        ("two_tower.json", {"format": 9}, "format is 9; this version reads up to 1, so update twotower"),
        ("two_tower.json", {"adapters": {"rank": 0}}, "adapters.rank is 0"),
        ("two_tower.json", {"adapters": {"rank": 8}}, "has shape [4, 48], and [8, 48] fits"),
        ("two_tower.json", {"mask_token_id": "x"}, "mask_token_id is 'x'"),
        ("two_tower.json", {"block_size": 0}, "block_size is 0"),
        ("adapter_config.json", {"lora_alpha": 16}, "lora_alpha is 16; for adapters of rank 4"),
        ("adapter_config.json", {"use_dora": True}, "use_dora is True"),
    ):
        bad = copy_of(folder / "adapters", tmp_path / f"bad-{len(list(tmp_path.iterdir()))}")
        edited(bad, name, **values)
        assert_one_line_error(init(bad), f"{bad / name}" if "shape" not in expected else "adapter_model", expected)
    bad = copy_of(folder / "adapters", tmp_path / "damaged")
    tensors = load_file(bad / "adapter_model.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] * torch.nan}, bad / "adapter_model.safetensors")
    assert_one_line_error(init(bad), name, "NaN or infinite")
    save_file(tensors | {"more": tensors[name].clone()}, bad / "adapter_model.safetensors")
    assert_one_line_error(init(bad), "more has no place in the model")
    (bad / "adapter_model.safetensors").write_bytes(b"x" * 20)
    assert_one_line_error(init(bad), "not a complete safetensors file")
    assert_one_line_error(init(folder / "adapters", "--denoiser-lora", 4), "exclude each other")
    assert_one_line_error(init(folder / "adapters", "--mask-token", 7), "--mask-token is '7'", "has id 3")
    assert not (tmp_path / "out").exists()


def test_packed_projections_need_their_blocks(
    trained: Callable[[str], Path], tmp_path: Path, cli: Callable[..., Result]
) -> None:
    folder = trained("phi3")
    bad = copy_of(folder / "adapters", tmp_path / "bad")
    tensors = load_file(bad / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.qkv_proj.lora_B.weight"
    assert tensors[name].shape[1] == 3 * RANK
    tensors[name][0, -1] = 1.0  # the last columns are of v, the first rows of q
    save_file(tensors, bad / "adapter_model.safetensors")
    done = cli("init", "--from", folder / "source", "--adapters", bad, "-o", tmp_path / "out")
    assert_one_line_error(done, name, "outside the blocks of its 3 projections")


def test_another_version_of_the_backbone_is_noted(
    trained: Callable[[str], Path], tmp_path: Path, cli: Callable[..., Result]
) -> None:
    folder = trained("llama")
    model = AutoModelForCausalLM.from_pretrained(folder / "source")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight += 0.1
    model.save_pretrained(tmp_path / "tuned")
    done = cli("init", "--from", tmp_path / "tuned", "--adapters", folder / "adapters", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert "a backbone with other weights than these" in done.err


def test_what_export_writes_and_refuses(
    trained: Callable[[str], Path], tmp_path: Path, cli: Callable[..., Result]
) -> None:
    folder = trained("llama")
    command = ("export", folder / "two", "--to", "peft", "-o", tmp_path / "out")
    done = cli(*command, "--json")
    assert done.code == 0, done.err
    assert "--base NAME" in done.err
    facts = json.loads(done.out)
    assert (facts["architecture"], facts["rank"]) == ("LlamaForCausalLM", RANK)
    assert {file.name for file in (tmp_path / "out").iterdir()} == set(facts["files"])
    assert json.loads((folder / "adapters/adapter_config.json").read_text())["base_model_name_or_path"] == "owner/base"
    assert_one_line_error(cli(*command), "not empty", "--overwrite")
    assert cli(*command, "--overwrite").code == 0
    (tmp_path / "out/notes.txt").touch()
    assert_one_line_error(cli(*command, "--overwrite"), "notes.txt, which is not a file of a folder of adapters")
    refused = cli("export", folder / "two", "--to", "peft", "-o", folder / "source", "--overwrite")
    assert_one_line_error(refused, "is not just a folder of adapters", "no adapter_config.json")
    convert(folder / "source", tmp_path / "full", mask_token=3)
    refused = cli("export", tmp_path / "full", "--to", "peft", "-o", tmp_path / "x")
    assert_one_line_error(refused, "its denoiser is a tower of its own, not adapters")
    refused = cli("export", folder / "two", "--to", "one-tower", "--base", "x", "-o", tmp_path / "x")
    assert_one_line_error(refused, "--base is for --to peft")
    words = ("has adapters alone", f"twotower init --from owner/base --adapters {folder / 'adapters'}")
    assert_one_line_error(cli("init", "--from", folder / "adapters", "-o", tmp_path / "x"), *words)
    assert_one_line_error(cli("info", folder / "adapters"), *words)
    nemotron = cli("export", trained("nemotron_h") / "two", "--to", "peft", "-o", tmp_path / "nemotron")
    assert "peft itself refuses adapters on out_proj of nemotron_h models" in nemotron.err


def test_adapters_of_a_quantised_model(
    trained: Callable[[str], Path], tmp_path: Path, cli: Callable[..., Result]
) -> None:
    folder = trained("llama")
    TwoTowerForCausalLM.from_pretrained(folder / "two", quantization="int8").save_pretrained(tmp_path / "int8")
    done = cli("export", tmp_path / "int8", "--to", "peft", "-o", tmp_path / "out", "--base", "owner/base")
    assert done.code == 0, done.err
    for name in ("adapter_model.safetensors", "mask_embedding.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / "adapters" / name).read_bytes()
