"""`twotower export --to gguf`: the file read back with `gguf`, the families, and what is refused.

`tests/llamacpp` runs the files in llama.cpp.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from command import Result, assert_one_line_error
from conftest import build_random_model
from gguf_models import EXPORTED, save_exported, save_merging_tokenizer
from peak_memory import WATCH
from preloaded import run_script
from test_conversion import tensors as stored_tensors
from tiny_backbones import SHAPES, hf_model, two_tower

from twotower import TwoTowerForCausalLM, bundled_model
from twotower.checkpoint.convert import convert
from twotower.checkpoint.gguf_export.architectures import ARCHITECTURES
from twotower.checkpoint.gguf_export.export import DTYPES, export_gguf
from twotower.cli.export import FILE_DTYPES
from twotower.errors import ConfigError
from twotower.families import BY_MODEL_TYPE


class Exported:
    """A file that was read back. The values of a tensor have the shape that they have in PyTorch."""

    def __init__(self, folder: Path) -> None:
        (file,) = folder.glob("*.gguf")
        self.reader = gguf.GGUFReader(file)
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        self.architecture = self.value("general.architecture")

    def value(self, key: str) -> Any:
        field = self.reader.fields.get(key)
        return None if field is None else field.contents()

    def own(self, key: str) -> Any:
        return self.value(f"{self.architecture}.{key}")

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def kind(self, name: str) -> str:
        return str(self.tensors[name].tensor_type.name)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.tensors[name]
        return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32))


def test_the_bundled_model(tmp_path: Path) -> None:
    """Names, shapes, metadata and values of the format that llama.cpp reads."""
    made = export_gguf(bundled_model("small"), tmp_path / "out", dtype="f32")
    file = Exported(tmp_path / "out")
    model = TwoTowerForCausalLM.from_pretrained(bundled_model("small"), dtype=torch.float32)
    context, fields = model.context.state_dict(), model.config.layer_fields
    assert made.architecture == file.architecture == "nemotron_h_moe"
    assert made.bytes == sum(int(tensor.n_bytes) for tensor in file.reader.tensors)
    pattern = model.spec.pattern
    assert file.own("attention.head_count_kv") == [fields.num_key_value_heads * (kind == "*") for kind in pattern]
    assert file.own("expert_feed_forward_length") == [
        {"E": fields.moe_intermediate_size, "-": 1}.get(kind, 0) for kind in pattern
    ]
    assert file.own("context_length") == fields.max_position_embeddings
    assert file.own("ssm.inner_size") == fields.mamba_inner
    assert file.own("expert_weights_norm") is fields.norm_topk_prob
    wide = max(fields.moe_shared_expert_intermediate_size, fields.intermediate_size)
    assert file.own("expert_shared_feed_forward_length") == wide
    for name, expected in {"token_embd": "embeddings", "output_norm": "norm_f", "output": "head"}.items():
        assert torch.equal(file[f"{name}.weight"], context[f"{expected}.weight"])
    for i, kind in enumerate(pattern):
        own = {name.removeprefix(f"layers.{i}.mixer."): tensor for name, tensor in context.items()
               if name.startswith(f"layers.{i}.")}  # fmt: skip
        of = Layer(file, i)
        assert torch.equal(of["attn_norm.weight"], context[f"layers.{i}.norm.weight"])
        {"M": check_mamba, "*": check_attention, "E": check_experts, "-": check_mlp}[kind](of, own, model)


class Layer:
    def __init__(self, file: Exported, number: int) -> None:
        self.file, self.number = file, number

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.file[f"blk.{self.number}.{name}"]


Tensors = Mapping[str, torch.Tensor]


def check_mamba(of: Layer, own: Tensors, model: TwoTowerForCausalLM) -> None:
    heads, groups = model.config.layer_fields.mamba_num_heads, model.config.layer_fields.n_groups
    torch.testing.assert_close(of["ssm_a"], -own["A_log"].exp().reshape(heads, 1), rtol=1e-6, atol=0)
    assert torch.equal(of["ssm_d"], own["D"].reshape(heads, 1))
    assert torch.equal(of["ssm_dt.bias"], own["dt_bias"])
    assert torch.equal(of["ssm_conv1d.weight"], own["conv1d.weight"].squeeze(1))
    assert torch.equal(of["ssm_conv1d.bias"], own["conv1d.bias"])
    assert torch.equal(of["ssm_norm.weight"], own["norm.weight"].reshape(groups, -1))
    assert torch.equal(of["ssm_in.weight"], own["in_proj.weight"])
    assert torch.equal(of["ssm_out.weight"], own["out_proj.weight"])


def check_attention(of: Layer, own: Tensors, model: TwoTowerForCausalLM) -> None:
    for name, source in {"q": "q_proj", "k": "k_proj", "v": "v_proj", "output": "o_proj"}.items():
        assert torch.equal(of[f"attn_{name}.weight"], own[f"{source}.weight"])


def check_experts(of: Layer, own: Tensors, model: TwoTowerForCausalLM) -> None:
    assert torch.equal(of["ffn_gate_inp.weight"], own["gate.weight"])
    assert torch.equal(of["exp_probs_b.bias"], own["gate.e_score_correction_bias"])
    assert torch.equal(of["ffn_up_exps.weight"], own["experts.up_proj"])
    assert torch.equal(of["ffn_down_exps.weight"], own["experts.down_proj"])
    check_shared(of, own["shared_experts.up_proj.weight"], own["shared_experts.down_proj.weight"])


def check_mlp(of: Layer, own: Tensors, model: TwoTowerForCausalLM) -> None:
    """llama.cpp has no MLP beside experts: the MLP is a shared expert, beside experts that are zero."""
    assert of["ffn_up_exps.weight"].shape == (model.config.n_routed_experts, 1, model.config.hidden_size)
    for name in ("ffn_gate_inp.weight", "exp_probs_b.bias", "ffn_up_exps.weight", "ffn_down_exps.weight"):
        assert not of[name].any()
    check_shared(of, own["up_proj.weight"], own["down_proj.weight"])


def check_shared(of: Layer, up: torch.Tensor, down: torch.Tensor) -> None:
    width = len(up)
    found_up, found_down = of["ffn_up_shexp.weight"], of["ffn_down_shexp.weight"]
    assert torch.equal(found_up[:width], up)
    assert torch.equal(found_down[:, :width], down)
    assert not found_up[width:].any()
    assert not found_down[:, width:].any()


def test_the_tokenizer_of_the_bundled_model(tmp_path: Path) -> None:
    shutil.copytree(bundled_model("small"), tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "model/generation_config.json").write_text('{"eos_token_id": [2, 3], "temperature": 0.5}')
    export_gguf(tmp_path / "model", tmp_path / "out")
    file = Exported(tmp_path / "out")
    tokenizer = TwoTowerForCausalLM.from_pretrained(bundled_model("small")).tokenizer
    assert tokenizer is not None
    assert file.value("tokenizer.ggml.pre") == "smollm"
    assert file.value("tokenizer.ggml.tokens") == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert file.value("tokenizer.ggml.token_type")[:5] == [3, 3, 3, 3, 1]
    special = {role: file.value(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos", "eot", "padding", "mask")}
    assert special == {"bos": 1, "eos": 2, "eot": 3, "padding": 0, "mask": 3}
    assert file.value("tokenizer.ggml.add_bos_token") is True
    assert file.value("tokenizer.ggml.add_eos_token") is False
    assert file.value("tokenizer.chat_template") == "{{ messages }}"
    assert (tmp_path / "out/Modelfile").read_text().splitlines()[1:5] == [
        "FROM ./model-f16.gguf", 'PARAMETER stop "<eos>"', 'PARAMETER stop "<mask>"', "PARAMETER temperature 0.5",
    ]  # fmt: skip


# --- dtypes ---------------------------------------------------------------------------------------------------------

# The largest error of a value, in units of the largest value of its block.
ERRORS = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 200, "q5_1": 1 / 28, "q5_0": 1 / 14, "q4_1": 1 / 12,
          "q4_0": 1 / 7}  # fmt: skip


def test_dtypes(tmp_path: Path) -> None:
    assert tuple(ERRORS) == tuple(DTYPES) == FILE_DTYPES
    save_exported("llama", tmp_path / "ar")
    model = hf_model("llama").state_dict()
    for dtype, error in ERRORS.items():
        made = export_gguf(tmp_path / "ar", tmp_path / dtype, dtype=dtype)
        file = Exported(tmp_path / dtype)
        assert file.value("general.file_type") == DTYPES[dtype]
        table, down = "token_embd.weight", "blk.0.ffn_down.weight"
        wide = dtype if dtype in ("f32", "bf16") else "f16"
        assert file.kind(down).lower() == wide  # 80 values a row are no whole blocks
        assert file.kind(table).lower() == wide
        assert file.kind("blk.0.attn_norm.weight") == "F32"
        assert any("whole blocks of 32" in note for note in made.notes) == dtype.startswith("q")
        output = model["model.layers.0.self_attn.o_proj.weight"]
        assert output.shape[1] == 64
        found = file["blk.0.attn_output.weight"]
        assert file.kind("blk.0.attn_output.weight").lower() == dtype
        largest = output.unflatten(1, (-1, 32)).abs().amax(2, keepdim=True).expand(-1, -1, 32).flatten(1)
        assert ((found - output).abs() <= error * largest).all(), dtype


def test_heads_have_eight_bits(tmp_path: Path) -> None:
    export_gguf(bundled_model("small"), tmp_path / "out", dtype="q4_0")
    file = Exported(tmp_path / "out")
    assert file.kind("token_embd.weight") == file.kind("output.weight") == "Q8_0"
    assert file.kind("blk.0.ssm_in.weight") == "Q4_0"
    assert file.value("general.quantization_version") == 2
    for name in ("ssm_conv1d.weight", "ssm_a", "ssm_norm.weight", "ssm_dt.bias"):
        assert file.kind(f"blk.0.{name}") == "F32"


def test_a_value_that_float16_cannot_hold(tmp_path: Path, cli: Callable[..., Result]) -> None:
    model = hf_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = 1e6
    model.save_pretrained(tmp_path / "ar")
    save_merging_tokenizer(tmp_path / "ar")
    result = cli("export", tmp_path / "ar", "--to", "gguf", "-o", tmp_path / "out")
    assert_one_line_error(result, "blk.1.ffn_up.weight", "1e+06", "--dtype bf16")
    assert not (tmp_path / "out").exists()
    assert cli("export", tmp_path / "ar", "--to", "gguf", "-o", tmp_path / "out", "--dtype", "bf16").code == 0


# --- families -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPORTED)
def test_every_family(name: str, tmp_path: Path) -> None:
    """Every tensor has a name that `gguf` knows for the architecture, and no value is lost."""
    save_exported(name, tmp_path / "ar")
    made = export_gguf(tmp_path / "ar", tmp_path / "out", dtype="f32")
    file = Exported(tmp_path / "out")
    kind = next(kind for kind, text in gguf.MODEL_ARCH_NAMES.items() if text == made.architecture)
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[kind]}
    if made.architecture.startswith("nemotron_h"):
        known |= {"blk.{bid}.ffn_latent_down", "blk.{bid}.ffn_latent_up"}  # newer than gguf 0.17
    own = {name.rpartition(".")[0] if name.endswith((".weight", ".bias")) else name for name in file.tensors}
    unknown = {name for name in own if not known & {name, _without_number(name)}}
    assert not unknown
    assert file.own("block_count") == hf_model_layers(tmp_path / "ar")
    total = sum(math.prod(file.shape(name)) for name in file.tensors if not name.startswith("rope_"))
    extra = {"falcon-h1", "nemotron_h_moe"}  # a head that is tied, or experts that are zero
    assert total == made.parameters or made.architecture in extra


def _without_number(name: str) -> str:
    first, _, rest = name.partition(".")
    return f"blk.{{bid}}.{rest.partition('.')[2]}" if first == "blk" else name


def hf_model_layers(directory: Path) -> int:
    config = json.loads((directory / "config.json").read_text())
    return int(config.get("num_hidden_layers") or len(config["layers_block_type"]))


# What transformers reads back: name → keys of config.json that it does not read, with its defaults.
READ_BACK: dict[str, dict[str, Any]] = {
    name: {} for name in ("llama", "llama:llama3", "llama:yarn", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma3",
                          "phi3", "phi3:longrope", "nemotron_h, dense")}  # fmt: skip


@pytest.mark.parametrize("name", READ_BACK)
def test_init_makes_the_same_model_of_the_file(name: str, tmp_path: Path) -> None:
    """The reader of GGUF files, with transformers' own tables, finds the tensors bit for bit."""
    save_exported(name, tmp_path / "ar")
    export_gguf(tmp_path / "ar", tmp_path / "out", dtype="f32")
    (file,) = (tmp_path / "out").glob("*.gguf")
    convert(tmp_path / "ar", tmp_path / "two", mask_token=3)
    convert(file, tmp_path / "again", mask_token=3, dtype="float32")
    expected, found = stored_tensors(tmp_path / "two"), stored_tensors(tmp_path / "again")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        if key.endswith("A_log") or "norm" in key:  # −exp(A_log), and 1 + weight for Gemma
            torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-6)
        elif not key.startswith(("t_embedder", "t_block", "denoiser_tower.scale")):
            assert torch.equal(found[key], tensor), key


def test_q_and_k_of_llama_are_permuted(tmp_path: Path) -> None:
    """llama.cpp turns neighbours (0, 1), (2, 3), … of a head, transformers (0, 8), (1, 9), …"""
    save_exported("llama", tmp_path / "ar")
    export_gguf(tmp_path / "ar", tmp_path / "out", dtype="f32")
    file, model = Exported(tmp_path / "out"), hf_model("llama").state_dict()
    order = [row for i in range(8) for row in (i, i + 8)]
    for part, heads in (("q", 4), ("k", 2)):
        weight = model[f"model.layers.1.self_attn.{part}_proj.weight"]
        expected = torch.cat([weight[16 * head : 16 * head + 16][order] for head in range(heads)])
        assert torch.equal(file[f"blk.1.attn_{part}.weight"], expected)
    assert torch.equal(file["blk.1.attn_v.weight"], model["model.layers.1.self_attn.v_proj.weight"])


def test_two_towers_and_adapters_give_the_file_of_their_context_tower(tmp_path: Path) -> None:
    save_exported("llama", tmp_path / "ar")
    convert(tmp_path / "ar", tmp_path / "two/model", mask_token=3)
    adapters = two_tower("llama", rank=4, draft_rank=2)
    adapters.save_pretrained(tmp_path / "adapters/model")
    save_merging_tokenizer(tmp_path / "adapters/model")
    for kind in ("two", "adapters"):
        export_gguf(tmp_path / kind / "model", tmp_path / kind / "out", dtype="f32")
    export_gguf(tmp_path / "ar", tmp_path / "ar/out", dtype="f32")
    two, one, own = (Exported(tmp_path / kind / "out") for kind in ("two", "ar", "adapters"))
    assert two.tensors.keys() == one.tensors.keys() == own.tensors.keys()
    for name in one.tensors:
        assert torch.equal(two[name], one[name])
    assert torch.equal(own["blk.2.ffn_up.weight"], adapters.context.layers[5].mixer.up_proj.weight)
    assert (two.value("tokenizer.ggml.mask_token_id"), one.value("tokenizer.ggml.mask_token_id")) == (3, None)


RELEASED = {
    "hidden_size": 32, "head_dim": 8, "num_attention_heads": 32, "num_key_value_heads": 2, "mamba_num_heads": 64,
    "mamba_head_dim": 4, "n_groups": 8, "ssm_state_size": 8, "n_routed_experts": 128, "num_experts_per_tok": 6,
    "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 32, "intermediate_size": 16, "n_group": 1,
    "topk_group": 1, "routed_scaling_factor": 2.5, "vocab_size": 1024, "max_position_embeddings": 262144,
}  # fmt: skip


def test_the_released_shape(tmp_path: Path) -> None:
    """The layers, heads and experts of the released config.json, with small widths and random weights."""
    pattern = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
    model = build_random_model(pattern, dtype=torch.bfloat16, bos_token_id=1, eos_token_id=2, **RELEASED)
    model.save_pretrained(tmp_path / "two")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model("small") / name, tmp_path / "two")
    made = export_gguf(tmp_path / "two", tmp_path / "out", dtype="q8_0")
    file = Exported(tmp_path / "out")
    assert made.architecture == "nemotron_h_moe"
    assert file.own("block_count") == 52
    assert file.own("feed_forward_length") == [16 * (kind == "E") for kind in pattern]
    assert file.own("expert_feed_forward_length") == 16  # a number, as llama.cpp's converter writes it
    assert file.own("expert_count") == 128
    assert file.own("expert_weights_scale") == 2.5
    assert file.shape("blk.1.ffn_up_exps.weight") == (128, 16, 32)
    assert file.shape("blk.1.ffn_down_exps.weight") == (128, 32, 16)
    assert file.shape("blk.0.ssm_in.weight") == (2 * 256 + 2 * 64 + 64, 32)
    assert file.shape("blk.0.ssm_norm.weight") == (8, 32)
    assert file.shape("blk.5.attn_k.weight") == (16, 32)
    assert len(file.tensors) == 3 + 23 * 9 + 23 * 7 + 6 * 5
    with torch.no_grad():
        expected = model.context.layers[1].mixer.experts.up_proj.float()
    largest = expected.abs().amax()
    assert (file["blk.1.ffn_up_exps.weight"] - expected).abs().max() <= largest / 200


NOT_COMPUTED: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "norm before the gate": ("falcon_h1", SHAPES["falcon_h1:norm_first"], ("a gated norm in another place",)),
    "value heads": (
        "qwen3_next", SHAPES["qwen3_next"] | {"mlp_only_layers": []}, ("width 10 beside key heads of width 12",)),
    "dense layers": ("qwen3_moe", SHAPES["qwen3_moe:mixed"] | {"attention_bias": False}, ("layers without them",)),
    "expert weights": ("qwen3_moe", SHAPES["qwen3_moe"], ("expert weights not divided by their sum", "'qwen3moe'")),
    "output bias": ("qwen3", {"head_dim": 16, "attention_bias": True}, ("a bias of the output of attention",)),
    "scale": ("gemma2", SHAPES["gemma2"], ("a scale of attention scores of 0.204124, not 0.25",)),
    "no cap": ("gemma2", EXPORTED["gemma2"][1] | {"attn_logit_softcapping": None}, ("scores without a cap",)),
    "clip": ("olmoe", EXPORTED["olmoe"][1] | {"clip_qkv": 0.8}, ("clipped queries, keys and values",)),
    "time steps": ("nemotron_h", SHAPES["nemotron_h"], ("a time_step_limit of [0.001, inf]",)),
    "groups": ("nemotron_h", EXPORTED["nemotron_h"][1] | {"n_group": 6}, ("6 groups of experts",)),
    "activation": ("llama", {"hidden_act": "gelu"}, ("the activation gelu",)),
    "rotation": (
        "smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 1]}, ("position embedding in layers [1]",)),
    "llama3 without divisors": ("qwen3", SHAPES["llama:llama3"], ("'llama3'", "'qwen3'")),
    "YaRN": (
        "llama", {"rope_parameters": SHAPES["llama:yarn"]["rope_parameters"] | {"attention_factor": 1.5}},
        ("attention_factor of the rotary position embedding is 1.5",)),
    "wide queries": ("qwen2", {"head_dim": 16}, ("queries of width 64 beside a hidden size of 48",)),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_COMPUTED)
def test_what_llamacpp_does_not_compute(name: str, tmp_path: Path) -> None:
    kind, options, said = NOT_COMPUTED[name]
    hf_model(kind, options=options).save_pretrained(tmp_path / "ar")
    with pytest.raises(ConfigError) as caught:
        export_gguf(tmp_path / "ar", tmp_path / "out")
    for words in (*said, "--to one-tower"):
        assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_family_without_an_architecture(
    tmp_path: Path, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_exported("llama", tmp_path / "ar")
    monkeypatch.delitem(ARCHITECTURES, "llama")
    result = cli("export", tmp_path / "ar", "--to", "gguf", "-o", tmp_path / "out")
    assert_one_line_error(result, "'llama', which is not written as GGUF", "bamba, falcon_h1", "--to one-tower")


def test_windows_limit_the_context(tmp_path: Path) -> None:
    save_exported("mistral", tmp_path / "ar")
    made = export_gguf(tmp_path / "ar", tmp_path / "out")
    assert Exported(tmp_path / "out").own("context_length") == 24
    assert any("limited to the window, 24 tokens" in note for note in made.notes)
    save_exported("gemma3, scaled", tmp_path / "gemma")
    export_gguf(tmp_path / "gemma", tmp_path / "gemma/out")
    file = Exported(tmp_path / "gemma/out")
    assert (file.own("context_length"), file.own("attention.sliding_window")) == (512, 20)
    assert file.own("attention.sliding_window_pattern") == [True, False, False]
    assert (file.own("rope.freq_base"), file.own("rope.freq_base_swa")) == (1e6, 5e3)


def test_every_architecture_is_tested() -> None:
    tested = {kind for kind, _ in EXPORTED.values()}
    assert tested | {"ministral"} == set(ARCHITECTURES)  # ministral is mistral with layer types
    assert set(ARCHITECTURES) == {*BY_MODEL_TYPE, "nemotron_h"}


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> Path:
    save_exported("llama", tmp_path / "ar")
    convert(tmp_path / "ar", tmp_path / "two", mask_token=3)
    shutil.rmtree(tmp_path / "ar")
    return tmp_path / "two"


def command(model: Path | str, output: Path, *more: str | Path) -> list[str | Path]:
    return ["export", model, "--to", "gguf", "-o", output, *more]


def test_command(two: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    result = cli(*command(two, tmp_path / "out", "--dtype", "q8_0"))
    assert result.code == 0
    assert result.out.splitlines()[0] == str(tmp_path / "out")
    assert result.out.splitlines()[1].startswith("llama: ")
    assert "matrices are in f16" in result.err
    facts = json.loads(cli(*command("bundled/small", tmp_path / "small", "--json")).out)
    assert facts["files"] == ["small-f16.gguf", "Modelfile"]
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == ["Modelfile", "small-f16.gguf"]
    back = cli("init", "--from", tmp_path / "small/small-f16.gguf", "-o", tmp_path / "again", "--denoiser", "tower")
    assert_one_line_error(back, "layers have experts of different widths", "original checkpoint")


def test_an_existing_output(two: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    assert cli(*command(two, tmp_path / "out")).code == 0
    assert_one_line_error(cli(*command(two, tmp_path / "out")), "not empty", "--overwrite")
    assert cli(*command(two, tmp_path / "out", "--overwrite", "--dtype", "f32")).code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", "two-f32.gguf"]
    (tmp_path / "out/mynotes.txt").touch()
    assert_one_line_error(cli(*command(two, tmp_path / "out", "--overwrite")), "mynotes.txt", "would delete")
    assert_one_line_error(cli(*command(two, two, "--overwrite")), "not just a GGUF export")
    assert_one_line_error(cli(*command(two, tmp_path / "x.gguf")), "x.gguf: the output is a directory", "/x")


def test_what_is_refused(
    two: Path, tmp_path: Path, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    out = tmp_path / "out"
    assert_one_line_error(cli(*command(two, out, "--dtype", "q4_k_m")), "--dtype", "'q4_k_m'", "'q8_0'")
    assert_one_line_error(cli(*command(two, out, "--pre-tokenizer", "foo")), "--pre-tokenizer", "'foo'", "llama-bpe")
    assert_one_line_error(cli(*command(two, out, "--base", "x")), "--base is for --to peft")
    assert_one_line_error(cli(*command(two, out, "--max-shard-size", "1GB")), "--max-shard-size is for --to one-tower")
    one = cli("export", two, "--to", "one-tower", "-o", out, "--dtype", "f32")
    assert_one_line_error(one, "--dtype is for --to gguf")
    assert_one_line_error(cli(*command(tmp_path / "nowhere", out)), "no such directory")
    assert_one_line_error(cli(*command(tmp_path / "model.gguf", out)), "no such directory")
    (tmp_path / "model.gguf").touch()
    assert_one_line_error(cli(*command(tmp_path / "model.gguf", out)), "is a GGUF file already")
    (tmp_path / "model.gguf").unlink()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)
        assert_one_line_error(cli(*command(two, out)), "needs the package `gguf`", "pip install")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        assert_one_line_error(cli(*command(two, out)), "1000 bytes are free")
    TwoTowerForCausalLM.from_pretrained(two, quantization="int8").save_pretrained(tmp_path / "int8")
    assert_one_line_error(cli(*command(tmp_path / "int8", out)), "int8", "needs the original checkpoint")
    shutil.rmtree(tmp_path / "int8")
    for file in two.glob("tokenizer*"):
        file.unlink()
    assert_one_line_error(cli(*command(two, out)), "has no tokenizer.json", "needs a tokenizer")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


FULL_DISK = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
from twotower.cli.main import main
main()
"""


def run(code: str, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a script in a process of its own."""
    (folder / "script.py").write_text(code)
    done = run_script(folder / "script.py", *map(str, arguments), environment=os.environ)
    (folder / "script.py").unlink()
    return done


def test_a_full_disk_is_one_line(two: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: a write fails in the middle."""
    done = run(FULL_DISK, tmp_path, *command(two, tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ")
    assert "File too large" in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two"]


# --- memory ---------------------------------------------------------------------------------------------------------

CHILD = (
    WATCH
    + """
import sys, threading, time
import torch
from twotower.checkpoint.gguf_export.export import export_gguf
import gguf.quants, transformers

export_gguf(sys.argv[1], sys.argv[3] + "/first")  # what is loaded once
done, before = False, anonymous()
peak = before
thread = threading.Thread(target=watch)
thread.start()
export_gguf(sys.argv[2], sys.argv[3] + "/out", dtype="f16")
done = True
thread.join()
print(peak - before)
"""
)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_memory_is_that_of_a_part_of_a_tensor(tmp_path: Path) -> None:
    """24 experts of 2.4 MB in fp32: far less memory than one of their tensors, 57 MB, or the file."""
    sizes = {"hidden_size": 256, "intermediate_size": 2300, "num_local_experts": 24, "num_experts_per_tok": 2}
    options = SHAPES["mixtral"] | sizes | {"num_hidden_layers": 1, "head_dim": 64}
    save_exported("mixtral", tmp_path / "small")
    hf_model("mixtral", options=options).bfloat16().save_pretrained(tmp_path / "source")
    save_merging_tokenizer(tmp_path / "source")
    done = run(CHILD, tmp_path, *(tmp_path / name for name in ("small", "source", "out")))
    assert done.returncode == 0, done.stderr
    file = Exported(tmp_path / "out/out")
    assert file.shape("blk.0.ffn_up_exps.weight") == (24, 2300, 256)
    assert int(done.stdout) < 30e6
