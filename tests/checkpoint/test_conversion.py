"""Conversion: `twotower init` on models of transformers in both layouts, and on sources with errors."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command import Result, assert_one_line_error
from conftest import build_random_model
from safetensors.torch import load_file, save_file
from test_against_transformers import agree, theirs
from test_loading_memory import CHILD
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from twotower import TwoTowerForCausalLM
from twotower.checkpoint.convert import ConversionResult, convert
from twotower.checkpoint.output_folder import UNFINISHED
from twotower.checkpoint.reader import INDEX_FILE, SINGLE_FILE
from twotower.cli.main import cli as verbs
from twotower.errors import ArgumentError
from twotower.model.fp32_tensors import FP32_SUFFIXES

ORIGINAL, CURRENT = "original", "transformers 5"
LAYOUTS = (ORIGINAL, CURRENT)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("M-*-M", {}),
    "MoE": ("MEM*E", {"n_group": 1}),
    "every kind, expert groups": ("M*E-M", {"n_routed_experts": 12, "n_group": 4, "topk_group": 2}),
    "all biases": ("M-*M", {"mlp_bias": True, "use_bias": True, "use_conv_bias": False, "residual_in_fp32": True}),
}
MOE_FIELDS = (
    "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "moe_shared_expert_intermediate_size",
    "n_group", "topk_group", "n_shared_experts", "routed_scaling_factor", "norm_topk_prob",
)  # fmt: skip


def backbone(
    directory: Path, name: str = "every kind, expert groups", layout: str = ORIGINAL, **arguments: Any
) -> nn.Module:
    """Writes a model of transformers as a one-tower checkpoint; returns the model."""
    dtype = arguments.pop("dtype", torch.float32)
    pattern, overrides = MODELS[name]
    hf = theirs(build_random_model(pattern, seed=7, dtype=dtype, **overrides))
    hf.save_pretrained(directory, save_original_format=layout == ORIGINAL, **arguments)
    if layout == ORIGINAL:  # the released form of the config: a pattern, torch_dtype, `Infinity`
        config = read_config(directory)
        config |= {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern), "norm_eps": 1e-5}
        config |= {"torch_dtype": config.pop("dtype"), "time_step_limit": [0.0, float("inf")]}
        config["auto_map"] = {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"}
        del config["layers_block_type"]
        if name == "dense":
            config = {key: value for key, value in config.items() if key not in MOE_FIELDS}
        write_config(directory, config)
    return hf


def read_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def write_config(directory: Path, config: dict[str, Any]) -> None:
    (directory / "config.json").write_text(json.dumps(config))


def change_config(directory: Path, **values: Any) -> None:
    write_config(directory, read_config(directory) | values)


def change_weights(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    stored = load_file(directory / SINGLE_FILE)
    change(stored)
    save_file({name: tensor.clone() for name, tensor in stored.items()}, directory / SINGLE_FILE)


def tensors(directory: Path) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        out |= load_file(file)
    return out


def some_tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def source(tmp_path: Path) -> Path:
    backbone(tmp_path / "source")
    return tmp_path / "source"


# --- what the towers are ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_both_towers_are_the_backbone(tmp_path: Path, name: str, layout: str) -> None:
    hf = backbone(tmp_path / "source", name, layout)
    made = convert(tmp_path / "source", tmp_path / "made")
    model = TwoTowerForCausalLM.from_pretrained(tmp_path / "made")
    tokens = some_tokens(2, 45)
    ours, theirs = model(tokens).logits, hf(tokens).logits
    agree(ours, theirs)
    best, second = theirs.topk(2, dim=-1).values.unbind(-1)
    clear = best - second > 6e-4  # twice the tolerance of `agree`, without near ties
    assert clear.float().mean() > 0.9
    assert torch.equal(ours.argmax(-1)[clear], theirs.argmax(-1)[clear])
    context, denoiser = model.context.state_dict(), model.denoiser.state_dict()
    assert context.keys() == denoiser.keys()
    assert all(torch.equal(tensor, denoiser[name]) for name, tensor in context.items())
    weights = {name.removeprefix("model."): tensor for name, tensor in hf.state_dict().items()}
    weights["head.weight"] = weights.pop("lm_head.weight")
    assert weights.keys() == context.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in context.items())
    assert made.parameters_per_tower == sum(tensor.numel() for tensor in weights.values())
    assert made.bytes == sum(tensor.nbytes for tensor in tensors(tmp_path / "made").values())
    assert made.pattern == MODELS[name][0]
    assert made.dtype == "float32"


def test_the_source_is_in_the_layout_its_name_says(tmp_path: Path) -> None:
    for layout, expert, root in (
        (ORIGINAL, "experts.3.up_proj.weight", "backbone."),
        (CURRENT, "experts.up_proj", "model."),
    ):
        backbone(tmp_path / layout, layout=layout)
        names = set(load_file(tmp_path / layout / SINGLE_FILE))
        assert {f"{root}embeddings.weight", f"{root}layers.2.mixer.{expert}", "lm_head.weight"} <= names
        assert ("layers_block_type" in read_config(tmp_path / layout)) == (layout == CURRENT)


def test_both_layouts_give_the_same_bytes(tmp_path: Path) -> None:
    for layout in LAYOUTS:
        backbone(tmp_path / layout, layout=layout)
        convert(tmp_path / layout, tmp_path / "made" / layout)
    original, current = (tensors(tmp_path / "made" / layout) for layout in LAYOUTS)
    assert original.keys() == current.keys()
    assert all(torch.equal(tensor, current[name]) for name, tensor in original.items())


def test_what_is_written_is_the_released_layout(source: Path, tmp_path: Path) -> None:
    made = convert(source, tmp_path / "made")
    names = set(tensors(tmp_path / "made"))
    assert {name.split(".")[0] for name in names} == {
        "context_tower", "context_lm_head", "denoiser_tower", "lm_head", "t_embedder", "t_block", "scale_shift_tables",
    }  # fmt: skip
    assert sorted(file.name for file in (tmp_path / "made").iterdir()) == [
        "config.json", "generation_config.json", SINGLE_FILE, "modeling_twotower.py",
    ]  # fmt: skip
    config, before = read_config(tmp_path / "made"), read_config(source)
    assert "Infinity" in (tmp_path / "made/config.json").read_text()
    assert config["architectures"] == ["NemotronHTwoTowerForCausalLM"]
    assert config["model_type"] == "nemotron_h"
    assert config["mask_token_id"] == made.mask_token_id == 3
    assert config["auto_map"]["AutoModelForCausalLM"].startswith("modeling_twotower.")
    same = before.keys() - {"architectures", "auto_map", "transformers_version"}
    unread = {"num_nextn_predict_layers", "mtp_layers_block_type"}
    assert {key: config.get(key) for key in same - unread} == {key: before[key] for key in same - unread}
    assert not unread & config.keys()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made", trust_remote_code=True)
    assert type(model) is TwoTowerForCausalLM


def test_save_pretrained_writes_the_same_bytes(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "made", max_shard_size="100KB")
    TwoTowerForCausalLM.from_pretrained(tmp_path / "made").save_pretrained(tmp_path / "again", max_shard_size="100KB")
    for file in (tmp_path / "made").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_in_and_out(tmp_path: Path, layout: str) -> None:
    backbone(tmp_path / "one", layout=layout)
    backbone(tmp_path / "many", layout=layout, max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    convert(tmp_path / "one", tmp_path / "a")
    made = convert(tmp_path / "many", tmp_path / "b", max_shard_size="50KB")
    assert len(made.files) > 5
    assert (tmp_path / "b" / INDEX_FILE).exists()
    assert all((tmp_path / "b" / name).stat().st_size < 60_000 for name in made.files)
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    TwoTowerForCausalLM.from_pretrained(tmp_path / "b")


def test_seed_draws_the_time_embedder_and_nothing_else(source: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        convert(source, tmp_path / name, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)
    a, b, c = (tensors(tmp_path / name) for name in "abc")
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    assert {name for name, tensor in a.items() if not torch.equal(tensor, c[name])} == {
        f"t_embedder.mlp.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")
    }
    assert a["t_block.1.weight"].count_nonzero() == a["t_block.1.bias"].count_nonzero() == 0
    for i in range(5):
        assert a[f"scale_shift_tables.{i}"].tolist() == [[0.0] * 32, [0.0] * 32, [1.0] * 32]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes(tmp_path: Path, layout: str) -> None:
    backbone(tmp_path / "source", layout=layout, dtype=torch.bfloat16)
    stored = tensors(tmp_path / "source")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    for dtype in (None, "float32", torch.float64):
        made = convert(tmp_path / "source", tmp_path / f"made-{dtype}", dtype=dtype)
        expected = torch.bfloat16 if dtype is None else torch.empty(0, dtype=getattr(torch, made.dtype)).dtype
        wide = torch.promote_types(expected, torch.float32)
        for name, tensor in tensors(tmp_path / f"made-{dtype}").items():
            assert tensor.dtype == (wide if name.endswith(FP32_SUFFIXES) and dtype is not None else expected)
            if name.startswith(("context_tower.layers.0", "denoiser_tower.layers.0")):
                root = "backbone" if layout == ORIGINAL else "model"
                assert torch.equal(tensor, stored[root + name[name.index(".") :]].to(tensor.dtype))
        model = TwoTowerForCausalLM.from_pretrained(tmp_path / f"made-{dtype}")
        assert model.dtype == expected
        assert read_config(tmp_path / f"made-{dtype}")["torch_dtype"] == str(expected).removeprefix("torch.")


def test_tensors_of_mixed_dtype_are_kept(tmp_path: Path) -> None:
    backbone(tmp_path / "source", dtype=torch.bfloat16)
    norm, bias = "layers.0.norm.weight", "layers.2.mixer.gate.e_score_correction_bias"
    change_weights(
        tmp_path / "source", lambda t: t.update({f"backbone.{n}": t[f"backbone.{n}"].double() for n in (norm, bias)})
    )
    convert(tmp_path / "source", tmp_path / "made")
    made = tensors(tmp_path / "made")
    for tower in ("context_tower", "denoiser_tower"):
        assert made[f"{tower}.{norm}"].dtype == made[f"{tower}.{bias}"].dtype == torch.float64
        assert made[f"{tower}.layers.1.norm.weight"].dtype == torch.bfloat16


# --- the denoiser begins as the backbone, exactly -------------------------------------------------------------------


def converted(tmp_path: Path, name: str, layout: str, dtype: torch.dtype) -> TwoTowerForCausalLM:
    backbone(tmp_path / "source", name, layout, dtype=dtype)
    convert(tmp_path / "source", tmp_path / "made")
    return TwoTowerForCausalLM.from_pretrained(tmp_path / "made")


def context_of(model: TwoTowerForCausalLM, tokens: Tensor, lengths: Tensor) -> Any:
    state = model.new_state(len(tokens), tokens.shape[1])
    model.prefill(tokens, lengths, state)
    return state.view()


def released_gates(model: TwoTowerForCausalLM) -> None:
    """The initialisation of the release: tables ~ randn / √H."""
    torch.manual_seed(0)
    for table in model.time.scale_shift_tables:
        table.copy_(torch.randn(table.shape) / table.shape[1] ** 0.5)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
EITHER = pytest.mark.parametrize("layout", LAYOUTS)
DENSE_AND_MOE = pytest.mark.parametrize("name", MODELS)


@DTYPES
@EITHER
@DENSE_AND_MOE
def test_time_changes_nothing(tmp_path: Path, name: str, layout: str, dtype: torch.dtype) -> None:
    model = converted(tmp_path, name, layout, dtype)
    view = context_of(model, some_tokens(3, 20), torch.tensor([20, 0, 7]))
    t = torch.rand(32, 3, generator=torch.Generator().manual_seed(1))
    t[0], t[1] = 0.0, 1.0
    for size in range(1, 33):
        block = some_tokens(3, size, seed=size)
        plain = model.denoise(block, None, view)
        assert plain.std() > 1
        assert torch.equal(model.denoise(block, t[size - 1], view), plain)
    released_gates(model)  # the negative control: gates near zero switch the copied layers off
    for size in range(1, 33):
        block = some_tokens(3, size, seed=size)
        assert (model.denoise(block, t[size - 1], view) - model.denoise(block, None, view)).std() > 0.5


@DTYPES
@EITHER
@DENSE_AND_MOE
def test_a_block_of_one_behind_gives_the_ar_logits(tmp_path: Path, name: str, layout: str, dtype: torch.dtype) -> None:
    model = converted(tmp_path, name, layout, dtype)
    tokens, rows = some_tokens(3, 21), torch.arange(3)
    for lengths in (torch.tensor([20, 0, 7]), torch.tensor([1, 2, 19])):
        state = model.new_state(3, 32)
        model.prefill(tokens, lengths, state)
        block = tokens[rows, lengths][:, None]
        denoised = model.denoise(block, torch.rand(3), state.view())
        assert torch.equal(denoised, model.extend(block, state))
        if dtype == torch.float32:
            agree(denoised[:, 0], model(tokens).logits[rows, lengths])


def test_the_denoiser_is_not_the_backbone_without_its_context(tmp_path: Path) -> None:
    """Shows that the test above can fail: the logits depend on the context."""
    model = converted(tmp_path, "MoE", ORIGINAL, torch.float32)
    block, t = some_tokens(1, 1), torch.rand(1)
    a, b = (model.denoise(block, t, context_of(model, some_tokens(1, 9, seed), torch.tensor([9]))) for seed in (1, 2))
    assert (a - b).std() > 0.5


def test_mock_ar_writes_what_ar_writes(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "made")
    model = TwoTowerForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float64)
    prompt = some_tokens(1, 11)
    assert torch.equal(model.generate_mock_ar(prompt, 20), model.generate_ar(prompt, 20))


# --- what some checkpoints have and others not ----------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tied_embedding(tmp_path: Path, layout: str) -> None:
    hf = backbone(tmp_path / "source", layout=layout)
    hf.lm_head.weight = hf.model.embeddings.weight
    change_weights(tmp_path / "source", lambda t: t.pop("lm_head.weight"))
    change_config(tmp_path / "source", tie_word_embeddings=True)
    made = convert(tmp_path / "source", tmp_path / "made")
    assert "tied" in made.notes[0]
    stored = tensors(tmp_path / "made")
    for name in ("context_lm_head.weight", "lm_head.weight", "denoiser_tower.embeddings.weight"):
        assert torch.equal(stored[name], stored["context_tower.embeddings.weight"])
    assert read_config(tmp_path / "made")["tie_word_embeddings"] is False
    model, tokens = TwoTowerForCausalLM.from_pretrained(tmp_path / "made"), some_tokens(2, 20)
    agree(model(tokens).logits, hf(tokens).logits)


def test_head_that_is_missing_but_not_tied_is_told(source: Path, tmp_path: Path) -> None:
    change_weights(source, lambda t: t.pop("lm_head.weight"))
    made = convert(source, tmp_path / "made")
    assert "lm_head.weight is missing" in made.notes[0]


def test_heads_for_multi_token_prediction_are_left_out(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "plain")
    extra = {"mtp.layers.0.mixer.q_proj.weight": torch.ones(3, 3), "mtp.norm.weight": torch.ones(3)}
    change_weights(source, lambda t: t.update(extra))
    change_config(source, num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*E")
    made = convert(source, tmp_path / "made")
    assert "2 tensors of multi-token prediction" in made.notes[0]
    assert tensors(tmp_path / "made").keys() == tensors(tmp_path / "plain").keys()
    assert not {key for key in read_config(tmp_path / "made") if "mtp" in key or "nextn" in key}


def test_moe_fields_of_a_dense_model_may_be_null_or_zero(tmp_path: Path) -> None:
    hf = backbone(tmp_path / "source", "dense")
    change_config(tmp_path / "source", n_routed_experts=0, num_experts_per_tok=0, moe_intermediate_size=None, n_group=0)
    convert(tmp_path / "source", tmp_path / "made")
    tokens = some_tokens(2, 20)
    agree(TwoTowerForCausalLM.from_pretrained(tmp_path / "made")(tokens).logits, hf(tokens).logits)


def test_older_names_of_config_keys(source: Path, tmp_path: Path) -> None:
    config = read_config(source)
    for old, new in (("mamba_chunk_size", "chunk_size"), ("mamba_dt_limit", "time_step_limit"),
                     ("attention_head_dim", "head_dim")):  # fmt: skip
        config[old] = config.pop(new)
    write_config(source, config | {"mamba_dt_limit": [0.01, 0.5]})
    convert(source, tmp_path / "made")
    made = read_config(tmp_path / "made")
    assert (made["chunk_size"], made["time_step_limit"], made["head_dim"]) == (16, [0.01, 0.5], 12)
    assert not {"mamba_chunk_size", "mamba_dt_limit", "attention_head_dim"} & made.keys()


# --- vocabulary ---------------------------------------------------------------------------------------------------


def write_tokenizer(directory: Path, size: int = 64, **special: str) -> None:
    """A byte-level tokenizer of `size` ids: <pad> <bos> <eos> <other>, then bytes."""
    words = ["<pad>", "<bos>", "<eos>", "<other>", *sorted(pre_tokenizers.ByteLevel.alphabet())][:size]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"} | special
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(directory)


def test_tokenizer_is_copied_as_it_is(source: Path, tmp_path: Path) -> None:
    write_tokenizer(source, additional_special_tokens=["<other>"])
    (source / "chat_template.jinja").write_text("{{ messages }}")
    made = convert(source, tmp_path / "made")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "made" / name).read_bytes() == (source / name).read_bytes()
    assert not made.notes
    assert TwoTowerForCausalLM.from_pretrained(tmp_path / "made").tokenizer("AB!").input_ids


def test_mask_token(source: Path, tmp_path: Path) -> None:
    def mask(**arguments: Any) -> ConversionResult:
        made = convert(source, tmp_path / "made", overwrite=True, **arguments)
        assert TwoTowerForCausalLM.from_pretrained(tmp_path / "made").config.mask_token == made.mask_token_id
        return made

    assert mask().mask_token_id == 3
    assert mask(mask_token=63).mask_token_id == 63
    write_tokenizer(source)
    made = mask(mask_token=3)
    assert made.mask_token_id == 3
    assert "'<other>', an ordinary token" in made.notes[0]
    write_tokenizer(source, additional_special_tokens=["<other>"])
    assert mask().mask_token_id == 3
    assert not mask().notes
    write_tokenizer(source, mask_token="!")
    assert mask().mask_token_id == 4
    assert not mask().notes
    assert mask(mask_token=9).mask_token_id == 9
    change_config(source, mask_token_id=8)
    assert mask().mask_token_id == 8
    assert mask(mask_token=9).mask_token_id == 9


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def cli(cli: Callable[..., Result]) -> Callable[..., Result]:
    return partial(cli, "init", "--denoiser", "tower")


def test_command(source: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    write_tokenizer(source)
    result = cli("--from", source, "-o", tmp_path / "made", "--max-shard-size", "100KB", "--mask-token", "<other>")
    assert result.code == 0
    head, towers, size, mask = result.out.splitlines()
    assert head == str(tmp_path / "made")
    assert "M*E-M" in towers
    assert "float32" in size
    assert mask == "mask token id 3 '<other>': as given"
    assert result.err.splitlines()[0].startswith("Note: the mask token id 3 is '<other>'")
    assert next_command(result.err) == ["train", str(tmp_path / "made"), "--data", "PATH", "-o", "RUN"]
    result = cli("--from", source, "-o", tmp_path / "json", "--json", "--dtype", "bfloat16", "--mask-token-id", "5")
    facts = json.loads(result.out)
    assert (facts["dtype"], facts["mask_token_id"], facts["directory"]) == ("bfloat16", 5, str(tmp_path / "json"))
    assert facts["files"] == [SINGLE_FILE]
    assert facts["bytes"] < (tmp_path / "json" / SINGLE_FILE).stat().st_size < facts["bytes"] + 40_000


def next_command(stderr: str) -> list[str]:
    """The arguments of the command that `init` names, after the command line parser has accepted them."""
    words = shlex.split(stderr.splitlines()[-1])
    assert words[:2] == ["next:", "twotower"]
    command = verbs.commands[words[2]]
    context = command.make_context(words[2], words[3:])
    assert context.params["model"] == words[3]
    return words[2:]


def test_the_next_command_quotes_the_directory(source: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    result = cli("--from", source, "-o", tmp_path / "a model")
    assert next_command(result.err)[1] == str(tmp_path / "a model")


def test_command_is_light() -> None:
    code = "import sys, twotower.cli.init; print(sorted({'torch', 'transformers', 'rich'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def drop(name: str) -> Callable[[Path], None]:
    return lambda source: change_weights(source, lambda t: t.pop(name))


def put(name: str, tensor: Tensor) -> Callable[[Path], None]:
    return lambda source: change_weights(source, lambda t: t.update({name: tensor}))


def configured(**values: Any) -> Callable[[Path], None]:
    return lambda source: change_config(source, **values)


def truncate(source: Path) -> None:
    (source / SINGLE_FILE).write_bytes((source / SINGLE_FILE).read_bytes()[:-8])


def without_pattern(source: Path) -> None:
    write_config(source, {k: v for k, v in read_config(source).items() if k != "hybrid_override_pattern"})


def without_model_type(source: Path) -> None:
    write_config(source, {k: v for k, v in read_config(source).items() if k != "model_type"})


def half(source: Path) -> None:
    change_weights(source, lambda t: t.update({name: tensor.half() for name, tensor in t.items()}))


def renamed(old: str, new: str) -> Callable[[Path], None]:
    def change(stored: dict[str, Tensor]) -> None:
        for name in [name for name in stored if name.startswith(old)]:
            stored[new + name.removeprefix(old)] = stored.pop(name)

    return lambda source: change_weights(source, change)


Q_PROJ, EXPERT = "backbone.layers.1.mixer.q_proj.weight", "backbone.layers.2.mixer.experts.5.up_proj.weight"
WRONG: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "unsupported family": (configured(model_type="gpt2"), ("model_type is 'gpt2'", "supported are nemotron_h")),
    "no model type": (configured(model_type=None), ("model_type is None", "transformers")),
    "model type absent": (without_model_type, ("config.json", "model_type is absent", "add")),
    "two towers by config": (configured(architectures=["NemotronHTwoTowerForCausalLM"]), ("two-tower", "already")),
    "two towers by weights": (renamed("backbone.", "context_tower."), ("already a two-tower checkpoint",)),
    "other names": (renamed("backbone.", "transformer."), ("no tensors named backbone.layers.* or model.layers.*",)),
    "no config": (lambda source: (source / "config.json").unlink(), ("config.json", "no such file")),
    "broken config": (lambda source: (source / "config.json").write_text("{"), ("config.json", "JSON")),
    "list for a config": (lambda source: (source / "config.json").write_text("[]"), ("config.json", "object")),
    "no pattern": (without_pattern, ("hybrid_override_pattern",)),
    "odd pattern": (configured(hybrid_override_pattern="M*X-M"), ("hybrid_override_pattern", "X")),
    "quantised": (configured(quantization_config={"quant_method": "fp8"}), ("quantised",)),
    "latent experts": (configured(moe_latent_size=8), ("fc1_latent_proj", "missing")),
    "gelu": (configured(mlp_hidden_act="gelu"), ("mlp_hidden_act", "gelu")),
    "no weights": (lambda source: (source / SINGLE_FILE).unlink(), ("give a directory with weights",)),
    "truncated": (truncate, (SINGLE_FILE, "not a complete safetensors file")),
    "missing tensor": (drop(Q_PROJ), (SINGLE_FILE, Q_PROJ, "missing")),
    "missing expert": (drop(EXPERT), (EXPERT, "missing")),
    "missing embedding": (drop("backbone.embeddings.weight"), ("backbone.embeddings.weight", "missing")),
    "surplus tensor": (put("backbone.layers.1.mixer.q_proj.bias", torch.ones(48)), ("q_proj.bias", "not a tensor of")),
    "one expert too many": (put(EXPERT.replace(".5.", ".12."), torch.ones(24, 32)), ("experts.12", "not a tensor of")),
    "wrong shape": (put(Q_PROJ, torch.ones(48, 31)), (Q_PROJ, "[48, 31]", "[48, 32]")),
    "integers": (put(Q_PROJ, torch.ones(48, 32, dtype=torch.int8)), (Q_PROJ, "I8", "float")),
    "half precision": (half, ("source: ", "F16", "--dtype bfloat16")),
    "NaN": (put(Q_PROJ, torch.full((48, 32), torch.nan)), ("source: ", Q_PROJ, "NaN or infinite", "download")),
    "one infinity in bf16": (
        put(EXPERT, torch.ones(24, 32).index_fill_(0, torch.tensor(7), -torch.inf).bfloat16()), (EXPERT, "NaN or inf")),
    "pattern of another": (configured(hybrid_override_pattern="MME-M"), ("letter 1", "attention", "Mamba-2")),
    "shorter pattern": (configured(hybrid_override_pattern="M*E-", num_hidden_layers=4), ("names only 4 layers",)),
    "longer pattern": (configured(hybrid_override_pattern="M*E-M-", num_hidden_layers=6), ("layers.5", "missing")),
    "other vocabulary": (configured(vocab_size=65), ("embeddings.weight", "[64, 32]", "[65, 32]")),
    "large tokenizer": (lambda source: write_tokenizer(source, 65), ("tokenizer", "64", "vocab_size is 64")),
    "broken tokenizer": (lambda source: (source / "tokenizer.json").write_text("{"), ("not readable as JSON",)),
    "mask is the tokenizer's padding": (lambda source: write_tokenizer(source, pad_token="<other>"), ("pad token",)),
    "mask is the end": (configured(eos_token_id=[2, 3]), ("3", "eos token")),
    "mask is the beginning": (configured(bos_token_id=3), ("3", "bos token")),
    "no mask": (write_tokenizer, ("no mask token", "--mask-token", "no candidate")),
    "mask beyond the vocabulary": (configured(mask_token_id=64), ("mask_token_id", "64")),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_source(name: str, source: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    spoil, said = WRONG[name]
    spoil(source)
    assert_one_line_error(cli("--from", source, "-o", tmp_path / "made"), *said)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("up_proj", torch.ones(11, 24, 32), ("[11, 24, 32]", "[12, 24, 32]")),
        ("up_proj", torch.ones(12, 32, 24), ("[12, 32, 24]", "[12, 24, 32]")),
        ("down_proj", None, ("experts.down_proj", "missing")),
        ("sideways_proj", torch.ones(3), ("sideways_proj", "is not a tensor of a model")),
    ],
)
def test_wrong_stacked_experts(
    name: str, tensor: Tensor | None, said: tuple[str, ...], tmp_path: Path, cli: Callable[..., Result]
) -> None:
    backbone(tmp_path / "source", layout=CURRENT)
    experts = f"model.layers.2.mixer.experts.{name}"
    (drop(experts) if tensor is None else put(experts, tensor))(tmp_path / "source")
    assert_one_line_error(cli("--from", tmp_path / "source", "-o", tmp_path / "made"), *said)


def test_wrong_source_that_is_no_directory(tmp_path: Path, cli: Callable[..., Result]) -> None:
    assert_one_line_error(cli("--from", tmp_path / "nowhere", "-o", tmp_path / "made"), "nowhere", "no such directory")
    (tmp_path / "file").touch()
    assert_one_line_error(cli("--from", tmp_path / "file", "-o", tmp_path / "made"), "is a file")


def test_a_two_tower_checkpoint_is_no_source(source: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    convert(source, tmp_path / "made")
    assert_one_line_error(cli("--from", tmp_path / "made", "-o", tmp_path / "again"), "already", "two-tower checkpoint")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--mask-token", "64"], ("64", "vocab_size")),
        (["--mask-token", "<mask>"], ("'<mask>' is not in the tokenizer",)),
        (["--mask-token-id", "2"], ("eos token",)),
        (["--mask-token-id", "-1"], ("-1",)),
        (["--max-shard-size", "lots"], ("lots", "5GB")),
        (["--dtype", "int8"], ("int8", "bfloat16")),
        (["--seed", "x"], ("x",)),
    ],
)
def test_wrong_options(
    options: list[str], said: tuple[str, ...], source: Path, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    assert_one_line_error(cli("--from", source, "-o", tmp_path / "made", *options), *said)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_options_that_must_be_there(tmp_path: Path, cli: Callable[..., Result]) -> None:
    assert_one_line_error(cli("-o", tmp_path / "made"), "--from")
    assert_one_line_error(cli("--from", tmp_path), "--output")


def test_half_precision_converts_to_a_dtype_we_have(source: Path, tmp_path: Path) -> None:
    half(source)
    assert convert(source, tmp_path / "made", dtype="bfloat16").dtype == "bfloat16"


# --- where it is written --------------------------------------------------------------------------------------------


def test_existing_directories(source: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    made = tmp_path / "made"
    made.mkdir()
    assert cli("--from", source, "-o", made).code == 0  # an empty directory is allowed
    (made / "model-00009-of-00009.safetensors").touch()
    assert_one_line_error(cli("--from", source, "-o", made), "not empty", "--overwrite")
    assert cli("--from", source, "-o", made, "--overwrite").code == 0
    assert not (made / "model-00009-of-00009.safetensors").exists()
    for name in ("mynotes.txt", "lora.safetensors", "additional_chat_templates/notes.md"):
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).touch()
        assert_one_line_error(cli("--from", source, "-o", made, "--overwrite"), str(made), name, "would delete", "move")
        (made / name).unlink()
    (made / "runs").mkdir()
    assert_one_line_error(cli("--from", source, "-o", made, "--overwrite"), "folders", "remove it")
    assert (made / "config.json").exists()
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").touch()
    assert_one_line_error(cli("--from", source, "-o", home, "--overwrite"), "no config.json")
    assert_one_line_error(cli("--from", source, "-o", home / "letter.txt"), "is a file")
    assert cli("--from", source, "-o", home / "new" / "deep").code == 0
    (tmp_path / "other.partial").mkdir()
    assert_one_line_error(
        cli("--from", source, "-o", tmp_path / "other"), "other.partial", "not an unfinished conversion"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "made", "other.partial", "source"]


def test_output_that_cannot_be_made(
    source: Path, tmp_path: Path, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("afile").touch()
    assert_one_line_error(cli("--from", source, "-o", "afile/sub"), "Error: afile/sub: afile is a file; choose another")
    assert_one_line_error(cli("--from", source, "-o", "afile/deep/sub"), "Error: afile/deep/sub: afile is a file;")

    def read_only(path: str | Path, *arguments: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "mkdir", read_only)
    said = "Error: new: cannot be written (Read-only file system); make it writable, or choose another directory"
    assert_one_line_error(cli("--from", source, "-o", "new"), said)


def test_the_source_is_never_overwritten(source: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    (tmp_path / "link").symlink_to(source)
    for target in (source, tmp_path / "link"):
        assert_one_line_error(cli("--from", source, "-o", target, "--overwrite"), "another directory")
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


def test_disk_too_small(
    source: Path, tmp_path: Path, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, tmp_path / "made")
    before = tensors(tmp_path / "made")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert_one_line_error(cli("--from", source, "-o", tmp_path / "new"), "1000 bytes are free", "needs 6", "MiB")
    assert_one_line_error(cli("--from", source, "-o", tmp_path / "made", "--overwrite"), "1000 bytes are free")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "source"]
    assert before.keys() == tensors(tmp_path / "made").keys()


def test_interrupted(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "old")
    before = {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()}

    def interrupt(done: int, total: int) -> None:
        names = {path.name for path in tmp_path.iterdir()}
        assert names in ({"old", "old.partial", "source"}, {"old", "new.partial", "source"})
        if done > total / 2:
            raise KeyboardInterrupt

    for target in ("new", "old"):
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / target, overwrite=True, seed=1, progress=interrupt)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "source"]
    assert {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()} == before


def test_what_a_killed_conversion_left_is_replaced(source: Path, tmp_path: Path) -> None:
    code = "import os, sys; from twotower.checkpoint.convert import convert; "
    code += "convert(sys.argv[1], sys.argv[2], progress=lambda done, total: os._exit(9) if done > total / 2 else None)"
    done = subprocess.run([sys.executable, "-c", code, str(source), str(tmp_path / "made")], timeout=120)
    assert done.returncode == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made.partial", "source"]
    convert(source, tmp_path / "made")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "source"]
    assert not (tmp_path / "made" / UNFINISHED).exists()
    TwoTowerForCausalLM.from_pretrained(tmp_path / "made")


def test_progress_counts_to_the_end(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    made = convert(source, tmp_path / "made", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (made.bytes, made.bytes)


def test_bad_arguments_in_python(source: Path, tmp_path: Path) -> None:
    for arguments in ({"dtype": "float16"}, {"dtype": torch.int8}, {"max_shard_size": "x"}, {"mask_token": -1}):
        with pytest.raises(ArgumentError):
            convert(source, tmp_path / "made", **arguments)
    assert not (tmp_path / "made").exists()


# --- memory -------------------------------------------------------------------------------------------------------

# torch imports its compiler when a module is first made on the meta device: not a cost of the conversion.
MEASURED = CHILD.replace(
    "from twotower import TwoTowerForCausalLM", "import torch._dynamo; from twotower.checkpoint.convert import convert"
)
MEASURED = MEASURED.replace(
    "model = TwoTowerForCausalLM.from_pretrained(path, **arguments)", "made = convert(path, sys.argv[3], **arguments)"
).replace("weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])", "weights = made.bytes")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
@pytest.mark.parametrize("layout", [ORIGINAL, pytest.param(CURRENT, marks=pytest.mark.slow)])
def test_memory_is_far_below_the_size(tmp_path: Path, layout: str) -> None:
    """A source of 340 MB gives 680 MB (1370 MB in fp32); only about the time conditioning is in memory."""
    source, scale = tmp_path / "source", 1024
    shape = {"hidden_size": scale, "vocab_size": 8192, "num_attention_heads": 8, "num_key_value_heads": 2}
    shape |= {"head_dim": 128, "mamba_num_heads": 8, "mamba_head_dim": 128, "ssm_state_size": 64, "n_groups": 2}
    shape |= {"intermediate_size": 4 * scale, "n_routed_experts": 32, "moe_intermediate_size": 640}
    shape |= {"moe_shared_expert_intermediate_size": 1280, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    write_large(source, "MEM*E-E", shape, layout)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert size > 300e6
    cases = [{"overwrite": True}, {"overwrite": True, "dtype": "float32"}]
    command = [sys.executable, "-c", MEASURED, str(source), json.dumps(cases), str(tmp_path / "made")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for arguments, line in zip(cases, done.stdout.splitlines(), strict=True):
        figures = json.loads(line)
        print(
            f"\n{layout}, {arguments.get('dtype', 'as stored')}: source {size / 1e6:.0f} MB, written "
            f"{figures['weights'] / 1e6:.0f} MB, peak of anonymous memory {figures['peak'] / 1e6:.0f} MB = "
            f"{figures['peak'] / size:.3f} × the source",
            end="",
        )
        assert figures["peak"] < 0.15 * size
    shutil.rmtree(source)
    shutil.rmtree(tmp_path / "made")


def write_large(directory: Path, pattern: str, shape: dict[str, int], layout: str) -> None:
    """A one-tower checkpoint in bf16, in five shards."""
    from twotower import TwoTowerConfig
    from twotower.checkpoint.names import DiskLayout, one_tower_entries
    from twotower.checkpoint.writer import TensorToWrite, write_shards

    config = TwoTowerConfig(hybrid_override_pattern=pattern, **shape)
    with torch.device("meta"):
        model = TwoTowerForCausalLM(config)
    experts = {f"model.{name}" for name, _ in model.context.named_parameters() if ".experts." in name}
    root = "backbone." if layout == ORIGINAL else "model."
    found = {"lm_head.weight", *experts} if layout != ORIGINAL else None
    places = one_tower_entries(model, DiskLayout(root, "lm_head", found))
    directory.mkdir()
    to_write = [
        TensorToWrite(
            place.disk, place.disk_shape, torch.bfloat16, lambda s=place.disk_shape: torch.randn(s).mul(0.02).bfloat16()
        )
        for place in {place.disk: place for place in places}.values()
    ]
    write_shards(directory, to_write, "80MB")
    values = config.to_dict() | {"architectures": ["NemotronHForCausalLM"], "torch_dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(values | {"model_type": "nemotron_h"}))
