"""Sources that cannot become two towers, or whose config and weights disagree: one line of field, value, remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Result, assert_one_line_error
from safetensors.torch import load_file, save_file
from tiny_backbones import SHAPES, VOCAB, hf_config, hf_model, save, save_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from twotower import GenericTwoTowerConfig, TwoTowerForCausalLM
from twotower.checkpoint.convert import convert
from twotower.checkpoint.reader import INDEX_FILE, SINGLE_FILE
from twotower.errors import ConfigError
from twotower.families import BY_MODEL_TYPE, tower_spec
from twotower.families.unsupported import WHAT

Spoil = Callable[[Path], object]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny sources with a tokenizer, which tests copy."""
    root = tmp_path_factory.mktemp("sources")
    for name in sorted({kind for kind, _, _ in (*BAD.values(), *DAMAGED.values())}):
        save(name, root / name)
        save_tokenizer(root / name, "<mask>", mask_token="<mask>")
    return root


@pytest.fixture
def source(kinds: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(kinds / name, tmp_path / "source"))


def configured(*removed: str, **values: Any) -> Spoil:
    def change(directory: Path) -> None:
        file = directory / "config.json"
        config = {key: value for key, value in json.loads(file.read_text()).items() if key not in removed}
        file.write_text(json.dumps(config | values))

    return change


def weights(change: Callable[[dict[str, Tensor]], object]) -> Spoil:
    def apply(directory: Path) -> None:
        stored = load_file(directory / SINGLE_FILE)
        change(stored)
        save_file({name: tensor.clone() for name, tensor in stored.items()}, directory / SINGLE_FILE)

    return apply


def put(name: str, tensor: Tensor) -> Spoil:
    return weights(lambda stored: stored.update({name: tensor}))


def drop(name: str) -> Spoil:
    return weights(lambda stored: stored.pop(name))


def renamed(name: str) -> Spoil:
    return lambda directory: (directory / SINGLE_FILE).rename(directory / name)


def adapter(*kept: str) -> Spoil:
    """Turns a directory into that of an adapter, which keeps some of its files."""

    def change(directory: Path) -> None:
        for file in directory.iterdir():
            if file.name not in kept:
                file.unlink()
        (directory / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base", "peft_type": "LORA"}')
        lora = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 2)}
        save_file(lora, directory / "adapter_model.safetensors")

    return change


def to_fp8(stored: dict[str, Tensor]) -> None:
    stored |= {name: tensor.to(torch.float8_e4m3fn) for name, tensor in stored.items() if "proj" in name}


def rope(**values: Any) -> Spoil:
    return configured(rope_parameters={"rope_theta": 1e4} | values)


LONGROPE: dict[str, Any] = SHAPES["phi3:longrope"]["rope_parameters"]


def longrope(*removed: str, **values: Any) -> Spoil:
    return configured(rope_parameters={k: v for k, v in (LONGROPE | values).items() if k not in removed})


Q_PROJ = "model.layers.0.self_attn.q_proj"
BAD: dict[str, tuple[str, Spoil, tuple[str, ...]]] = {
    # families
    "unsupported family": (
        "llama", configured(model_type="gpt2"), ("model_type is 'gpt2'", "LayerNorm with learned positions", "llama")),
    "unknown family": ("llama", configured(model_type="qqq"), ("model_type is 'qqq'", "does not know", "transformers")),
    "no family": ("llama", configured("model_type"), ("model_type is absent",)),
    "code of the checkpoint": (
        "llama", configured(model_type="qqq", auto_map={"AutoConfig": "configuration_q.Q"}),
        ("'qqq'", "needs Python code of the checkpoint (auto_map)", "without trust_remote_code")),
    "nesting of a string": ("llama", configured(text_config="x"), ("text_config is 'x'", "JSON object")),
    "nesting of an unknown family": ("llama", configured(text_config={"model_type": "foo"}), ("model_type is 'foo'",)),
    "nesting of a bad size": (
        "llama", configured(model_type="gemma3", text_config={"hidden_size": 0}), ("text_config.hidden_size is 0",)),
    # options
    "dynamic RoPE": ("llama", rope(rope_type="dynamic", factor=2.0), ("rope_type is 'dynamic'", "supported are")),
    "unknown RoPE": ("llama", rope(rope_type="foo"), ("rope_type is 'foo'",)),
    "older spelling of RoPE": (
        "llama", configured("rope_parameters", rope_theta=1e4, rope_scaling={"type": "dynamic", "factor": 2.0}),
        ("rope_type is 'dynamic'",)),
    "RoPE without its factor": ("llama", rope(rope_type="linear"), ("rope_parameters", "factor")),
    "YaRN without its factor": ("llama", rope(rope_type="yarn"), ("'yarn'", "'factor'")),
    "negative factor of RoPE": ("llama", rope(rope_type="linear", factor=-2.0), ("factor of rope_parameters is -2.0",)),
    "text for the factor of YaRN": ("llama", rope(rope_type="yarn", factor="x"), ("factor of rope_parameters is 'x'",)),
    "text for theta": ("llama", configured(rope_parameters={"rope_theta": "x"}), ("rope_theta is 'x'", "positive")),
    "theta 0": ("llama", configured(rope_parameters={"rope_theta": 0}), ("rope_theta is 0", "positive number")),
    "more than a whole head": (
        "phi3:longrope", configured(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 2.0}),
        ("partial_rotary_factor is 2.0", "at most 1")),
    "LongRoPE without factors": ("phi3:longrope", longrope("long_factor"), ("'longrope'", "long_factor")),
    "LongRoPE with few factors": ("phi3:longrope", longrope(short_factor=[1.0]), ("short_factor", "length 3, got 1")),
    "LongRoPE with a factor of 0": (
        "phi3:longrope", longrope(long_factor=[0.0, 1.0, 1.0]), ("long_factor", "[0.0, 1.0, 1.0]", "3 positive")),
    "LongRoPE of a family that transformers does not check": (
        "llama", rope(rope_type="longrope", short_factor=[1.0], long_factor=[2.0], original_max_position_embeddings=64),
        ("short_factor of rope_parameters is [1.0]", "8 positive numbers")),
    "LongRoPE, original length 0": (
        "phi3:longrope", configured(original_max_position_embeddings=0), ("original_max_position_embeddings is 0",)),
    "LongRoPE in the older spelling, without a length": (
        "phi3:longrope", configured("rope_parameters", rope_theta=1e4, rope_scaling={
            "type": "su", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}),
        ("'longrope'", "original_max_position_embeddings")),
    "clip": ("olmoe", configured(clip_qkv=-1.0), ("clip_qkv is -1.0", "positive number")),
    "text for a clip": ("olmoe", configured(clip_qkv="x"), ("clip_qkv", "'x'", "correct it")),
    "clip of a family with LayerNorm": ("llama", configured(model_type="olmo", clip_qkv=8.0), ("'olmo'", "LayerNorm")),
    "attention in both directions": ("gemma", configured(use_bidirectional_attention=True), ("is True; only False",)),
    "scale of scores": ("gemma2", configured(query_pre_attn_scalar=0), ("query_pre_attn_scalar is 0", "positive")),
    "cap": ("gemma2", configured(attn_logit_softcapping=-3.0), ("attn_logit_softcapping is -3.0", "positive")),
    "factor of logits": ("granite", configured(logits_scaling=0), ("logits_scaling is 0", "positive number")),
    "null factor": ("falcon_h1", configured(key_multiplier=None), ("key_multiplier is None", "finite number")),
    "few factors": ("falcon_h1", configured(ssm_multipliers=[1.0]), ("ssm_multipliers is [1.0]", "list of 5")),
    "limits of steps": ("bamba", configured(time_step_limit=None), ("time_step_limit is None", "two numbers")),
    "norm": ("llama", configured(rms_norm_eps=-1.0), ("rms_norm_eps is -1.0", "positive number")),
    "windows without a window": (
        "ministral", configured(sliding_window=None), ("'sliding_attention', but sliding_window is None", "give")),
    "chunked attention": ("ministral", configured(layer_types=["chunked_attention"] * 3), ("'chunked_attention'",)),
    "windows that are switched off": (
        "qwen3", configured(layer_types=["sliding_attention"] * 3), ("use_sliding_window is false", "change one")),
    "activation": ("llama", configured(hidden_act="quick_gelu"), ("hidden_act is 'quick_gelu'", "silu")),
    "null activation": ("llama", configured(hidden_act=None), ("hidden_act", "None")),
    "text for a number": ("llama", configured(rms_norm_eps="x"), ("rms_norm_eps", "'x'", "correct it")),
    "null for a number": ("llama", configured(max_position_embeddings=None), ("max_position_embeddings", "None")),
    "text for a flag": ("llama", configured(tie_word_embeddings="yes"), ("tie_word_embeddings", "'yes'")),
    "unknown layer type": ("qwen3", configured(layer_types=["foo"] * 3), ("layer_types", "foo")),
    "window 0": ("mistral", configured(sliding_window=0), ("sliding_window is 0",)),
    "layer type of no family": (
        "qwen3_5_text", configured(layer_types=["sliding_attention"] * 3),
        ("layer_types has 'sliding_attention'", "'full_attention' and 'linear_attention'")),
    "key heads that do not divide": (
        "qwen3_5_text", configured(linear_num_key_heads=3),
        ("linear_num_value_heads is 4", "multiple of linear_num_key_heads, 3")),
    "no taps": ("qwen3_next", configured(linear_conv_kernel_dim=0), ("linear_conv_kernel_dim is 0", "at least 1")),
    "LongRoPE beside a recurrence": (
        "qwen3_5_text",
        rope(rope_type="longrope", short_factor=[1.0] * 2, long_factor=[2.0] * 2, original_max_position_embeddings=64,
             partial_rotary_factor=0.25),
        ("rope_type is 'longrope'", "not supported beside recurrent layers")),
    "text for a window": ("mistral", configured(sliding_window="all"), ("sliding_window", "'all'")),
    **{
        f"{name} {value}": ("llama", configured(**{name: value}), (f"{name} is {value}", "positive integer"))
        for name in ("hidden_size", "vocab_size", "max_position_embeddings", "num_hidden_layers")
        for value in (0, -1)
    },
    "no heads": ("llama", configured(num_attention_heads=0), ("num_attention_heads is 0",)),
    "no KV heads": ("llama", configured(num_key_value_heads=0), ("num_key_value_heads is 0",)),
    "KV heads that do not divide": ("llama", configured(num_key_value_heads=3), ("num_key_value_heads, 3", "is 4")),
    "more experts for a token than there are": ("mixtral", configured(num_experts_per_tok=9), ("9 experts", "are 5")),
    # config and weights that disagree
    "heads": ("llama", configured(num_attention_heads=8), (Q_PROJ, "[64, 48]", "num_attention_heads 8", "config.json")),
    "KV heads": ("llama", configured(num_key_value_heads=1), ("k_proj", "[32, 48]", "num_key_value_heads 1")),
    "width of heads": ("llama", configured(head_dim=8), ("q_proj", "head_dim 8")),
    "width of the MLP": ("llama", configured(intermediate_size=81), ("[80, 48]", "intermediate_size 81")),
    "hidden size": ("llama", configured(hidden_size=64), ("embed_tokens", "[160, 48]", "hidden_size 64")),
    "heads of a recurrence": (
        "qwen3_next", configured(linear_num_value_heads=8), ("linear_attn.", "linear_num_value_heads 8")),
    "width of a recurrence": (
        "qwen3_5_text", configured(linear_key_head_dim=8), ("linear_attn.", "linear_key_head_dim 8")),
    "larger vocabulary": ("llama", configured(vocab_size=200), ("embed_tokens", "[160, 48]", "vocab_size 200")),
    "more layers": ("llama", configured(num_hidden_layers=5), ("have 3 layers", "num_hidden_layers 5")),
    "fewer layers": ("llama", configured(num_hidden_layers=2), ("have 3 layers", "num_hidden_layers 2")),
    "types of fewer layers": ("qwen3", configured(layer_types=["full_attention"]), ("num_hidden_layers", "(1)")),
    "fewer experts": ("mixtral", configured(num_local_experts=4), ("has 5 experts", "num_local_experts 4")),
    "more experts": ("mixtral", configured(num_local_experts=8), ("has 5 experts", "num_local_experts 8")),
    "experts by another name": ("olmoe", configured(num_experts=4), ("has 6 experts", "has num_experts 4")),
    "width of experts": (
        "qwen3_moe", configured(moe_intermediate_size=25), ("[24, 48]", "experts 6, moe_intermediate_size 25")),
    "shared expert": (
        "qwen2_moe", configured(shared_expert_intermediate_size=33), ("shared_expert_intermediate_size 33",)),
    "Mamba's state": ("bamba", configured(mamba_d_state=12), ("in_proj.weight has shape", "mamba_d_state 12")),
    "Mamba's convolution": ("bamba", configured(mamba_d_conv=3), ("conv1d.weight has shape", "mamba_d_conv 3")),
    "null size of Mamba": ("bamba", configured(mamba_n_groups=None), ("mamba_n_groups is None", "integer")),
    "fraction for a size": ("llama", configured(head_dim=7.5), ("head_dim is 7.5", "positive integer")),
    "layers of Mamba": ("bamba", configured(attn_layer_indices=[2]), ("layers.1.mamba", "is missing")),
    "biases": ("llama", configured(attention_bias=True), ("q_proj.bias is missing", "config.json of these weights")),
    "missing tensor": ("llama", drop(f"{Q_PROJ}.weight"), (f"{Q_PROJ}.weight is missing",)),
    "surplus tensor": ("llama", put("model.layers.1.mlp.foo.weight", torch.ones(2)), ("foo.weight is not a tensor",)),
    "integers": ("llama", put("model.norm.weight", torch.ones(48, dtype=torch.int32)), ("I32", "float")),
    # quantised
    **{
        f"quantised by {method}": (
            "llama", configured(quantization_config={"quant_method": method}),
            (f"quantization_config has quant_method '{method}'", "quantised", "bf16 or fp32"))
        for method in ("gptq", "awq", "fp8", "bitsandbytes", "compressed-tensors", "mxfp4")
    },
    "quantised, as text": ("llama", configured(quantization_config="fp8"), ("quant_method 'fp8'",)),
    "quantised, older key": ("llama", configured(compression_config={"quant_method": "x"}), ("compression_config",)),
    "quantised text model": (
        "llama", configured(text_config={"model_type": "llama", "quantization_config": {"quant_method": "awq"}}),
        ("text_config.quantization_config has quant_method 'awq'",)),
    "GPTQ tensors": ("llama", put(f"{Q_PROJ}.qweight", torch.ones(4, 4, dtype=torch.int32)), ("qweight", "quantised")),
    "FP8 tensors": ("llama", weights(to_fp8), ("stored as F8_E4M3, so the weights are quantised", "bf16")),
    "FP8 scales": ("llama", put(f"{Q_PROJ}.weight_scale_inv", torch.ones(1)), ("weight_scale_inv", "quantised")),
    "half precision": ("llama", weights(lambda t: t.update({n: x.half() for n, x in t.items()})), ("F16", "bfloat16")),
    # adapters and other formats
    "adapter": ("llama", adapter(), ("is an adapter of 'owner/base'", "adapter_config.json", "merge_and_unload()")),
    "adapter beside a config": ("llama", adapter("config.json"), ("is an adapter of 'owner/base'",)),
    "adapter's tensors": ("llama", put(f"{Q_PROJ}.lora_A.default.weight", torch.ones(2, 2)), ("lora_A", "not merged")),
    "pickled weights": ("llama", renamed("pytorch_model.bin"), ("pytorch_model.bin is there", "save_pretrained")),
    "weights of another program": ("llama", renamed("consolidated.safetensors"), ("consolidated.safetensors is",)),
    "a GGUF inside": ("llama", renamed("model-q4.gguf"), ("model-q4.gguf is there", "twotower init")),
    "wrapped names": (
        "llama", weights(lambda t: [t.update({f"_orig_mod.{n}": t.pop(n)}) for n in list(t)]), ("no tensors named",)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_one_line(name: str, source: Callable[[str], Path], tmp_path: Path, cli: Callable[..., Result]) -> None:
    kind, spoil, said = BAD[name]
    spoil(directory := source(kind))
    assert_one_line_error(cli("init", "--from", directory, "-o", tmp_path / "made"), *said)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("command", ["info", "generate"])
def test_other_verbs_refuse_a_source(command: str, source: Callable[[str], Path], cli: Callable[..., Result]) -> None:
    """A source that can become two towers gets the command, another one its reason."""
    arguments = {"info": [], "generate": ["-n", "2", "a", "--model"]}[command]
    directory = source("llama")
    assert_one_line_error(
        cli(command, *arguments, directory), "'llama'" if command == "generate" else "(llama)", "init"
    )
    configured(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})(directory)
    said = ("'dynamic'",) if command == "info" else ("'llama'",)
    assert_one_line_error(cli(command, *arguments, directory), *said)


# Values of another kind than any key of a config.json has, or out of range.
WRONG_VALUES = (None, "x", "", -1, 0, 1.5, -1.5, float("nan"), [], [1], {}, True, 1000)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *(pytest.param(name, (None, "x", -1.5, []), id=name) for name in ("llama", "phi3:longrope", "falcon_h1")),
        *(pytest.param(name, WRONG_VALUES, id=f"{name}-full", marks=pytest.mark.slow) for name in SHAPES),
    ],
)
def test_no_value_of_a_config_is_another_error(name: str, values: tuple[object, ...]) -> None:
    """Every key with every wrong value: a tower, or a ConfigError of one line."""
    config = json.loads(json.dumps(hf_config(name).to_dict()))
    if config["model_type"] == "nemotron_h":
        pytest.skip("tests/test_config.py has the released format")
    refused = []
    for key in config.keys() - {"model_type"}:
        for value in values:
            try:
                tower_spec(GenericTwoTowerConfig(backbone=config | {key: value}))
            except ConfigError as error:
                refused.append(str(error))
    assert len(refused) > 20
    assert not [text for text in refused if "\n" in text]


def test_what_is_unsupported_is_not_supported() -> None:
    assert not WHAT.keys() & BY_MODEL_TYPE.keys()


# --- damaged shards -------------------------------------------------------------------------------------------------


def index_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / INDEX_FILE).read_text())


def reindexed(change: Callable[[dict[str, str]], object]) -> Spoil:
    def apply(directory: Path) -> None:
        index = index_of(directory)
        change(index["weight_map"])
        (directory / INDEX_FILE).write_text(json.dumps(index))

    return apply


SHARDS: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "missing shard": (lambda d: (d / index_of(d)["weight_map"]["model.norm.weight"]).unlink(), ("is not in", "again")),
    "truncated shard": (
        lambda d: (d / index_of(d)["weight_map"]["model.norm.weight"]).write_bytes(b"\0" * 20), ("not a complete",)),
    "index of another file": (lambda d: (d / INDEX_FILE).write_text("{}"), ("not a safetensors index",)),
    "broken index": (lambda d: (d / INDEX_FILE).write_text("{"), ("weight_map (Expecting", "); download it again")),
    "tensor that is not listed": (reindexed(lambda m: m.pop("model.norm.weight")), ("model.norm.weight", "not list")),
    "tensor in another shard": (
        reindexed(lambda m: m.update({"model.norm.weight": m["model.embed_tokens.weight"]})), ("model.norm.weight",)),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARDS)
def test_damaged_shards(name: str, tmp_path: Path, cli: Callable[..., Result]) -> None:
    save("llama", tmp_path / "source", max_shard_size="30KB")
    spoil, said = SHARDS[name]
    spoil(tmp_path / "source")
    command = ["init", "--from", tmp_path / "source", "-o", tmp_path / "made", "--mask-token", "3"]
    assert_one_line_error(cli(*command), *said)


# --- heads ------------------------------------------------------------------------------------------------------------


def logits_of(directory: Path, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")(ids).logits


@pytest.mark.parametrize("case", ["equal", "different", "alone"])
def test_a_head_beside_the_flag_that_ties_it(case: str, tmp_path: Path) -> None:
    """As transformers reads each file: equal and alone are tied; a different head is kept."""
    table = "model.embed_tokens.weight"
    hf_model("llama").save_pretrained(tmp_path / "source")
    changes: dict[str, Callable[[dict[str, Tensor]], object]] = {
        "equal": lambda t: t.update({"lm_head.weight": t[table]}),
        "different": lambda t: t.update({"lm_head.weight": t[table].flip(0)}),
        "alone": lambda t: t.update({"lm_head.weight": t.pop(table)}),
    }
    weights(changes[case])(tmp_path / "source")
    made = convert(tmp_path / "source", tmp_path / "two", mask_token=3)
    said = {"equal": "equals it and is left out", "different": "the head stays untied", "alone": "is its embedding"}
    assert said[case] in made.notes[0]
    model = TwoTowerForCausalLM.from_pretrained(tmp_path / "two")
    assert model.spec.tied_head == (case != "different")
    ids = torch.randint(4, VOCAB, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert (model(ids).logits - logits_of(tmp_path / "source", ids)).abs().max() < 1e-3


def test_buffers_of_older_versions_are_left_out(source: Callable[[str], Path], tmp_path: Path) -> None:
    put("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8))(source("llama"))
    convert(tmp_path / "source", tmp_path / "two")
    assert not [name for name in load_file(tmp_path / "two" / SINGLE_FILE) if "inv_freq" in name]


# --- two-tower checkpoints --------------------------------------------------------------------------------------------


def nested(**values: Any) -> Spoil:
    def change(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        config["backbone"] |= values
        (directory / "config.json").write_text(json.dumps(config))

    return change


DAMAGED: dict[str, tuple[str, Spoil, tuple[str, ...]]] = {
    "no backbone": ("llama", configured("backbone"), ("backbone is missing",)),
    "text for a backbone": ("llama", configured(backbone="llama"), ("backbone is 'llama'", "config.json of the")),
    "empty backbone": ("llama", configured(backbone={}), ("model_type is absent",)),
    "unsupported backbone": ("llama", nested(model_type="gpt2"), ("config.json", "'gpt2'", "LayerNorm")),
    "no mask token": ("llama", configured("mask_token_id"), ("mask_token_id is missing",)),
    "mask token beyond the vocabulary": ("llama", configured(mask_token_id=999), ("mask_token_id is 999", "0 to 159")),
    "block size": ("llama", configured(block_size=0), ("block_size is 0", "positive")),
    "layers": ("llama", nested(num_hidden_layers=4), ("have 3 layers", "num_hidden_layers 4")),
    "experts": ("mixtral", nested(num_local_experts=4), ("has 5 experts", "num_local_experts 4")),
    "dynamic RoPE": ("llama", nested(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
                     ("config.json", "'dynamic'")),
    "untied": ("llama", nested(tie_word_embeddings=False), ("context_lm_head.weight is missing",)),
    "tied": ("qwen3", nested(tie_word_embeddings=True), ("context_lm_head.weight is not a tensor",)),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_two_towers(
    name: str, source: Callable[[str], Path], tmp_path: Path, cli: Callable[..., Result]
) -> None:
    kind, spoil, said = DAMAGED[name]
    convert(source(kind), tmp_path / "two")
    spoil(tmp_path / "two")
    assert_one_line_error(cli("generate", "--model", tmp_path / "two", "-n", "2", "a"), *said)


def test_python_refuses_a_backbone_of_another_type() -> None:
    with pytest.raises(ValueError, match="backbone is 3"):
        GenericTwoTowerConfig(backbone=3)  # type: ignore[arg-type]
