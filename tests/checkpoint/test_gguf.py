"""GGUF files: read as transformers reads them, tensor by tensor; Nemotron-H as llama.cpp's converter writes it."""

from __future__ import annotations

import copy
import math
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from command import Result, assert_one_line_error
from tiny_backbones import BASE, SHAPES, VOCAB, hf_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

from twotower import TwoTowerForCausalLM, bundled_model
from twotower.checkpoint.convert import convert
from twotower.checkpoint.denoiser_tensors import MadeFeedForward
from twotower.checkpoint.one_tower import OneTowerCheckpoint
from twotower.families.nemotron_h import spec_of

# The families whose GGUF files transformers reads: model_type → architecture in the file.
ARCHITECTURES = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3",
}  # fmt: skip
# Values that transformers does not read from these files: it takes the defaults of its configuration class.
NOT_READ: dict[str, dict[str, Any]] = {
    "phi3": {"vocab_size": 32064, "pad_token_id": 32000},
    "qwen3": {"head_dim": 128},
    "qwen2_moe": {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    "qwen3_moe": {"head_dim": 128, "moe_intermediate_size": 768},
}
QUANTISED = gguf.GGMLQuantizationType.Q4_1


def write_gguf(
    file: Path,
    model: PreTrainedModel,
    *,
    quantised: bool = False,
    divisors: Mapping[str, Sequence[float]] = MappingProxyType({}),
    **extra: Any,
) -> None:
    """Writes a model's configuration and tensors of its shapes, random, under the names that transformers expects.

    quantised: large matrices are Q4_1. divisors: tensors of divisors of rotary frequencies. extra: metadata of the
    architecture to add or, with None, to leave out.
    """
    config = model.config
    kind = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(file, kind)
    metadata = {key: getattr(config, name, None) for key, name in GGUF_CONFIG_MAPPING[_section(kind)].items() if name}
    metadata["rope.freq_base"] = _theta(config)
    for key, value in (metadata | extra).items():
        if isinstance(value, int):
            writer.add_uint32(f"{kind}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{kind}.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"{kind}.{key}", value)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    generator = np.random.default_rng(0)
    for name, source in get_gguf_hf_weights_map(model, _processor(kind)).items():
        if source == "lm_head.weight" and config.tie_word_embeddings:
            continue
        shape = shapes[source] if source in shapes else _expert_shape(name, source, shapes)
        if source.endswith("gate_up_proj") and ("ffn_gate_exps" in name or "ffn_up_exps" in name):
            shape = (shape[0], shape[1] // 2, shape[2])
        if "ffn_gate_inp_shexp" in name:
            shape = shape[1:]
        if name.endswith("_exps"):
            name += ".weight"
        values = generator.normal(0, 0.2, shape).astype(np.float32)
        if "norm" in name:
            values = 1 + 0.1 * values
        if quantised and values.ndim == 2 and shape[-1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(values, QUANTISED), raw_dtype=QUANTISED)
        else:
            writer.add_tensor(name, values)
    for name, factors in divisors.items():
        writer.add_tensor(name, np.array(factors, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _section(kind: str) -> str:
    return {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}.get(kind, kind)


def _theta(config: Any) -> float:
    rope = config.rope_parameters
    return float(rope["rope_theta"] if "rope_theta" in rope else rope["full_attention"]["rope_theta"])


def _processor(kind: str) -> Any:
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    return TENSOR_PROCESSORS.get(kind, TensorProcessor)(config={})


def _expert_shape(name: str, source: str, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    return shapes[re.sub(r"\.weight$", "", source)]


def test_a_denoiser_with_some_layers_and_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, kept = "qwen3_moe", torch.tensor([1, 2, 5])
    monkeypatch.setitem(SHAPES, name, SHAPES[name] | NOT_READ[name])
    write_gguf(tmp_path / "model.gguf", hf_model(name))

    def choose(source: OneTowerCheckpoint, origin: Path, folder: Path) -> MadeFeedForward:
        return MadeFeedForward(kept={1: kept, 3: kept})

    shape = {"denoiser_layers": "0,2", "denoiser_feed_forward": "experts:3", "calibration": choose}
    convert(tmp_path / "model.gguf", tmp_path / "two", mask_token=3, dtype="float32", **shape)
    model = TwoTowerForCausalLM.from_pretrained(tmp_path / "two", dtype=torch.float32)
    assert model.denoiser is not None
    for place, layer in enumerate((0, 1, 4, 5)):
        own, its = model.denoiser.layers[place].state_dict(), model.context.layers[layer].state_dict()
        for key, tensor in its.items():
            chosen = "mixer.gate." in key or ".experts." in key
            assert torch.equal(own[key], tensor[kept] if chosen else tensor), (layer, key)


@pytest.mark.parametrize("quantised", [False, True], ids=["fp32", "Q4_1"])
@pytest.mark.parametrize("name", [name for name in SHAPES if name in ARCHITECTURES])
def test_the_model_is_the_one_that_transformers_reads(
    name: str, quantised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.gguf"
    monkeypatch.setitem(SHAPES, name, SHAPES[name] | NOT_READ.get(name, {}))
    write_gguf(file, hf_model(name), quantised=quantised)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
    convert(file, tmp_path / "two", mask_token=3, dtype="float32")
    model = TwoTowerForCausalLM.from_pretrained(tmp_path / "two", dtype=torch.float32)
    ids = torch.randint(4, VOCAB, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = theirs(ids).logits, model(ids).logits
    assert (found - expected).abs().max() < 1e-4 * expected.std()


def llama3_divisors(scaling: Mapping[str, float], theta: float, dim: int) -> list[float]:
    """As llama.cpp's converter computes them."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original, found = scaling["original_max_position_embeddings"], []
    for i in range(0, dim, 2):
        wave = 2 * math.pi * theta ** (i / dim)
        if wave < original / high:
            found.append(1.0)
        elif wave > original / low:
            found.append(factor)
        else:
            smooth = (original / wave - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return found


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LONG: dict[str, Any] = SHAPES["phi3:longrope"]["rope_parameters"]
# Name → its shape, its rotary embedding in config.json, metadata and tensors of the file.
SCALED: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Sequence[float]]]] = {
    "linear": ("llama", {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
               {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {}),
    "linear, older key": ("llama", {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
                          {"rope.scale_linear": 2.0}, {}),
    "YaRN": (
        "llama", SHAPES["llama:yarn"]["rope_parameters"],
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128}, {}),
    "Llama 3": ("llama", {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}, {},
                {"rope_freqs.weight": llama3_divisors(LLAMA3, 5e5, 16)}),
    "a part of layers": (
        "gemma3_text",
        {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
         "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, {}),
    "LongRoPE": (
        "phi3:longrope", LONG,
        {"rope.scaling.original_context_length": 64, "rope.dimension_count": 6,
         "rope.scaling.attn_factor": math.sqrt(1 + math.log(8) / math.log(64))},
        {"rope_factors_long.weight": LONG["long_factor"], "rope_factors_short.weight": LONG["short_factor"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", SCALED)
def test_scaled_rotary_embeddings(case: str, tmp_path: Path) -> None:
    """transformers drops the scaling, and is told here what it is."""
    name, rope, extra, divisors = SCALED[case]
    options = SHAPES[name] | NOT_READ.get(name.partition(":")[0], {}) | {"rope_parameters": rope}
    options |= {"num_hidden_layers": 6} if "full_attention" in rope else {}  # the sixth has no window
    write_gguf(tmp_path / "model.gguf", hf_model(name, options=options), divisors=divisors, **extra)
    wrong = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    config = copy.deepcopy(wrong.config)
    config.update({key: value for key, value in options.items() if key.startswith(("rope", "original", "partial"))})
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    theirs.load_state_dict(wrong.state_dict())
    convert(tmp_path / "model.gguf", tmp_path / "two", mask_token=3, dtype="float32")
    model = TwoTowerForCausalLM.from_pretrained(tmp_path / "two", dtype=torch.float32)
    for length in (40, 100):  # LongRoPE has other frequencies beyond the original length
        ids = torch.randint(4, VOCAB, (1, length), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            expected, found = theirs(ids).logits, model(ids).logits
        assert (found - expected).abs().max() < 1e-4 * expected.std()
    with torch.inference_mode():
        assert (wrong(ids).logits - expected).abs().max() > 0.01 * expected.std()


def refuse(file: Path, **extra: Any) -> None:
    write_gguf(file, hf_model("llama"), **extra)


def cut(file: Path, end: int) -> None:
    refuse(file)
    file.write_bytes(file.read_bytes()[:end])


WRONG: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "unknown scaling": (
        lambda file: refuse(file, **{"rope.scaling.type": "foo"}), ("rope.scaling.type 'foo'", "original checkpoint")),
    "factor of YaRN": (
        lambda file: refuse(file, **{"rope.scaling.type": "yarn", "rope.scaling.yarn_ext_factor": 0.5}),
        ("rope.scaling.yarn_ext_factor scales", "original checkpoint")),
    "divisors of no known scaling": (
        lambda file: refuse(file, divisors={"rope_freqs.weight": [1.0, 7.0, 1.0, 3.0, 1.0, 1.0, 2.0, 8.0]}),
        ("rope_freqs.weight scales", "original checkpoint")),
    "a factor of scores": (lambda file: refuse(file, **{"attention.scale": 0.5}), ("attention.scale", "original")),
    "not a GGUF": (lambda file: file.write_bytes(b"GGML" * 50), ("not a GGUF file", "b'GGML'", "give a GGUF file")),
    "directory": (lambda file: file.mkdir(), ("is a directory; give a file",)),
    "unknown version": (lambda file: file.write_bytes(b"GGUF\x09\0\0\0" * 50), ("GGUF version 9", "update")),
    "truncated": (lambda file: cut(file, -5000), ("model.gguf: the GGUF file is truncated or damaged; download",)),
    "truncated header": (lambda file: cut(file, 40), ("model.gguf: the GGUF file is truncated or damaged; download",)),
    "only the magic": (lambda file: cut(file, 4), ("model.gguf: the GGUF file is truncated or damaged; download",)),
    "missing": (lambda file: None, ("no such file",)),
    "more layers than tensors": (lambda file: refuse(file, block_count=4), ("has no tensor for", "layers.3")),
    "fewer layers than tensors": (lambda file: refuse(file, block_count=2), ("blk.2", "does not have")),
    "other width": (lambda file: refuse(file, feed_forward_length=64), ("shape", "64")),
    "other family": (lambda file: other_family(file, "gpt2"), ("'gpt2'", "supported")),
    "a family that transformers does not read": (lambda file: other_family(file, "gemma"), ("'gemma'", "GGUF")),
    "an unknown family": (lambda file: other_family(file, "foo"), ("'foo'", "GGUF")),
}  # fmt: skip


def other_family(file: Path, kind: str) -> None:
    writer = gguf.GGUFWriter(file, kind)
    writer.add_uint32(f"{kind}.context_length", 64)
    writer.add_uint32(f"{kind}.block_count", 1)
    writer.add_uint32(f"{kind}.embedding_length", 8)
    writer.add_uint32(f"{kind}.attention.head_count", 2)
    writer.add_tensor("token_embd.weight", np.zeros((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files(name: str, tmp_path: Path, cli: Callable[..., Result]) -> None:
    spoil, said = WRONG[name]
    spoil(tmp_path / "model.gguf")
    result = cli("init", "--from", tmp_path / "model.gguf", "-o", tmp_path / "two", "--mask-token-id", 3)
    assert_one_line_error(result, *said)
    assert not (tmp_path / "two").exists()


def test_memory_is_that_of_the_largest_tensor(tmp_path: Path) -> None:
    """The conversion of a file of 60 MB takes far less than the file's tensors in fp32."""
    hidden, vocab, layers = 512, 4096, 24
    file = tmp_path / "model.gguf"
    shape = BASE | {
        "hidden_size": hidden, "intermediate_size": 2048, "num_hidden_layers": layers, "vocab_size": vocab,
        "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    write_gguf(file, AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**shape)), quantised=True)
    child = (
        "import resource, sys\n"
        "from twotower.checkpoint.convert import convert\n"
        "import gguf.quants, transformers.modeling_gguf_pytorch_utils\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "convert(sys.argv[1], sys.argv[2], mask_token=3)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", child, file, tmp_path / "two"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    risen, fp32 = int(done.stdout), 4 * sum(math.prod(t.shape) for t in gguf.GGUFReader(file).tensors)
    assert risen < file.stat().st_size + 0.35 * fp32  # the mapped file, and a few tensors


def test_nemotron_h(tmp_path: Path) -> None:
    """The bundled model as llama.cpp's converter writes it: the tensors come back, bit for bit."""
    source = TwoTowerForCausalLM.from_pretrained(bundled_model("small"), dtype=torch.float32)
    write_nemotron_h(tmp_path / "model.gguf", source)
    convert(tmp_path / "model.gguf", tmp_path / "two", dtype="float32")
    model = TwoTowerForCausalLM.from_pretrained(tmp_path / "two", dtype=torch.float32)
    assert model.spec == spec_of(replace(source.config.layer_fields, chunk_size=128))  # the file has no chunk size
    assert model.config.mask_token == source.config.mask_token
    assert model.denoiser is not None
    for tower in (model.context, model.denoiser):
        found = tower.state_dict()
        for name, tensor in source.context.state_dict().items():
            if name.endswith("A_log"):  # stored as −exp(A_log)
                torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)
            else:
                assert torch.equal(found[name], tensor), name


def write_nemotron_h(file: Path, model: TwoTowerForCausalLM) -> None:
    """The context tower, with a plain MLP beside expert layers left as it is."""
    fields, spec = model.config.layer_fields, model.spec
    kind = "nemotron_h_moe"
    writer = gguf.GGUFWriter(file, kind)
    writer.add_context_length(fields.max_position_embeddings)
    writer.add_embedding_length(fields.hidden_size)
    writer.add_block_count(fields.num_layers)
    writer.add_head_count(fields.num_attention_heads)
    writer.add_head_count_kv([fields.num_key_value_heads if kind == "*" else 0 for kind in spec.pattern])
    writer.add_feed_forward_length([fields.intermediate_size if kind == "-" else 0 for kind in spec.pattern])
    writer.add_key_length(fields.head_dim)
    writer.add_layer_norm_rms_eps(fields.layer_norm_epsilon)
    writer.add_ssm_conv_kernel(fields.conv_kernel)
    writer.add_ssm_state_size(fields.ssm_state_size)
    writer.add_ssm_group_count(fields.n_groups)
    writer.add_ssm_inner_size(fields.mamba_inner)
    writer.add_ssm_time_step_rank(fields.mamba_num_heads)
    writer.add_expert_count(fields.n_routed_experts)
    writer.add_expert_used_count(fields.num_experts_per_tok)
    writer.add_expert_feed_forward_length(fields.moe_intermediate_size)
    writer.add_expert_shared_feed_forward_length(fields.moe_shared_expert_intermediate_size)
    writer.add_expert_weights_norm(fields.norm_topk_prob)
    writer.add_expert_weights_scale(fields.routed_scaling_factor)
    writer.add_expert_group_count(fields.n_group)
    writer.add_uint32(f"{kind}.expert_group_used_count", fields.topk_group)
    writer.add_uint32(f"{kind}.vocab_size", fields.vocab_size)
    writer.add_mask_token_id(model.config.mask_token)
    plain = {
        "embeddings.weight": "token_embd.weight",
        "norm_f.weight": "output_norm.weight",
        "head.weight": "output.weight",
    }
    parts = {
        "norm.weight": "attn_norm.weight", "mixer.in_proj.weight": "ssm_in.weight", "mixer.dt_bias": "ssm_dt.bias",
        "mixer.conv1d.weight": "ssm_conv1d.weight", "mixer.conv1d.bias": "ssm_conv1d.bias", "mixer.A_log": "ssm_a",
        "mixer.D": "ssm_d", "mixer.norm.weight": "ssm_norm.weight", "mixer.out_proj.weight": "ssm_out.weight",
        "mixer.q_proj.weight": "attn_q.weight", "mixer.k_proj.weight": "attn_k.weight",
        "mixer.v_proj.weight": "attn_v.weight", "mixer.o_proj.weight": "attn_output.weight",
        "mixer.up_proj.weight": "ffn_up.weight", "mixer.down_proj.weight": "ffn_down.weight",
        "mixer.gate.weight": "ffn_gate_inp.weight", "mixer.gate.e_score_correction_bias": "exp_probs_b.bias",
        "mixer.experts.up_proj": "ffn_up_exps.weight", "mixer.experts.down_proj": "ffn_down_exps.weight",
        "mixer.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
        "mixer.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    }  # fmt: skip
    for name, tensor in model.context.state_dict().items():
        values = tensor.numpy()
        if name in plain:
            writer.add_tensor(plain[name], values)
            continue
        _, layer, part = name.split(".", 2)
        if part == "mixer.A_log":
            values = -np.exp(values)
        if part in ("mixer.A_log", "mixer.D"):
            values = values[:, None]
        if part == "mixer.conv1d.weight":
            values = values[:, 0]
        if part == "mixer.norm.weight":
            values = values.reshape(fields.n_groups, -1)
        writer.add_tensor(f"blk.{layer}.{parts[part]}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
