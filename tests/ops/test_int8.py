"""int8 weights: arithmetic against its definition, kernels against their references, loading and generation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Result
from conftest import EVERY_KIND, build_random_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from twotower import GenerationParams, TwoTowerForCausalLM, generate
from twotower.checkpoint.quantize import quantization_of, quantize_
from twotower.checkpoint.reader import SINGLE_FILE
from twotower.engine import LLM, Request
from twotower.errors import ArgumentError
from twotower.model.fp32_tensors import named_tensors
from twotower.model.layer_io import AttentionMetadata
from twotower.model.linear import Int8Linear, Linear, TiedHead
from twotower.model.tower import PassInputs
from twotower.model.towers import PREFILL_CHUNK
from twotower.ops import self_check_cases
from twotower.ops.cpu import kernels, library
from twotower.ops.reference import int8
from twotower.ops.reference.experts import experts_dense
from twotower.runners import fused_cpu
from twotower.runners.fused_cpu import FusedCPURunner
from twotower.specs import Activation

pytestmark = pytest.mark.code_path
CPU = torch.device("cpu")
BIASES = {"use_bias": True, "mlp_bias": True, "attention_bias": True}
compiled = pytest.mark.skipif(isinstance(library.library(), str), reason="the kernels are not compiled here")


def meant(q: Tensor, scale: Tensor) -> Tensor:
    """The dequantized weights in float64."""
    return int8.unpack(q, scale, torch.float64) * scale.double()[..., None]


def as_meant(model: TwoTowerForCausalLM) -> TwoTowerForCausalLM:
    """A float64 model of plain layers with the dequantized weights of an int8 model."""
    plain = TwoTowerForCausalLM(model.config)
    for tower in plain.towers():
        if isinstance(tower.head, TiedHead):  # the head is rounded, and the embedding is not
            tower.head = Linear(tower.spec.hidden_size, tower.spec.vocab_size, bias=False)
    plain = plain.double().eval()
    own = dict(named_tensors(model))
    for name, tensor in named_tensors(plain):
        scale = own.get(f"{name}_scale")
        tensor.data = own[name].double() if scale is None else meant(own[name], scale)
    return plain


# --- quantizing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (3, 4, 6), (0, 4)])
@pytest.mark.parametrize("part", [int8.CHUNK, 10])
def test_quantization_error_is_at_most_half_a_step(
    shape: tuple[int, ...], dtype: torch.dtype, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "CHUNK", part)  # several chunks, the last one short
    weight = self_check_cases.Randn(0, CPU)(*shape).to(dtype)
    before = weight.clone()
    q, scale = int8.quantize(weight)
    assert (q.dtype, int8.weight_shape(q, scale), scale.dtype) == (torch.int8, shape, torch.float32)
    assert torch.equal(weight, before)
    if weight.numel():
        assert ((meant(q, scale) - weight.double()).abs() <= scale[..., None] * 0.5001).all()
        assert (int8.unpack(q, scale, torch.float32).abs().amax(-1) == int8.QMAX).all()


def test_rows_of_zeros_and_non_finite_rows() -> None:
    """Zeros stay zeros; a row with infinity or NaN never gives finite results."""
    weight = torch.tensor([[0.0, 0.0], [1e-44, 0.0], [1.0, float("inf")], [float("nan"), 1.0], [2.0, -1.0]])
    q, scale = int8.quantize(weight)
    out = int8.linear(torch.ones(1, 2), q, scale)[0]
    assert out[0] == 0
    assert abs(out[1]) < 1e-40
    assert not out[2:4].isfinite().any()
    assert abs(out[4] - 1) < 0.01


# --- the references, in float64 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_linear_uses_the_dequantized_weights(bias: bool) -> None:
    randn = self_check_cases.Randn(1, CPU)
    layer = Int8Linear(Linear(31, 17, bias=bias))
    x = randn(2, 3, 31).double()
    own = None if layer.bias is None else layer.bias.double()
    expected = F.linear(x, meant(layer.weight, layer.weight_scale), own)
    torch.testing.assert_close(int8.linear(x, layer.weight, layer.weight_scale, own), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", [int8.experts_sorted, int8.experts_gathered, int8.experts_grouped])
@pytest.mark.parametrize(("tokens", "top"), [(0, 2), (1, 2), (3, 1), (19, 3)])
@pytest.mark.parametrize(("activation", "gated"), [("relu2", False), ("gelu", True)])
def test_experts_use_the_dequantized_weights(
    backend: Callable[..., Tensor],
    tokens: int,
    top: int,
    activation: Activation,
    gated: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    randn = self_check_cases.Randn(2, CPU)
    up, down = int8.quantize(randn(7, 21, 37)), int8.quantize(randn(7, 37, 21))
    weights = int8.quantize(randn(7, 21, 37)) if gated else None, up, down
    hidden, weight = randn(tokens, 37).double(), randn(tokens, top).double().abs()
    choice = randn(tokens, 7).argsort(-1)[:, :top]
    if backend is int8.experts_grouped:
        monkeypatch.setattr(torch, "_grouped_mm", grouped)
    wide = [None if pair is None else meant(*pair) for pair in weights]
    expected = experts_dense(hidden, choice, weight, *wide, activation)
    found = backend(hidden, choice, weight, *weights, activation)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def grouped(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """`torch._grouped_mm` by its definition; torch supports only bf16 on a GPU."""
    ends = [0, *offs.tolist()]
    return torch.cat([x[a:b] @ w for a, b, w in zip(ends, ends[1:], weight, strict=False)])


@pytest.mark.parametrize("pattern", ["M", "*", "E", "-", EVERY_KIND])
def test_a_float64_model_uses_the_dequantized_weights(pattern: str) -> None:
    model = quantize_(build_random_model(pattern, dtype=torch.float64, **BIASES))
    assert_same_passes(model, as_meant(model))


def assert_same_passes(model: TwoTowerForCausalLM, plain: TwoTowerForCausalLM) -> None:
    """Both towers and `forward` of two models in float64."""
    tokens = torch.randint(4, 60, (2, 40), generator=torch.Generator().manual_seed(0))
    outs = []
    for each in (model, plain):
        with torch.no_grad():
            state = each.new_state(2, 60)
            logits = each.extend(tokens, state)
            draft = each.denoise(tokens[:, :6], torch.tensor([1.0, 0.3]), each.reader(state).view())
        outs.append((logits, draft, each(tokens).logits))
    for actual, expected in zip(*outs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


# --- the compiled kernels ---------------------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 5, 7, 16, 47, 64, kernels.MAX_TOKENS, kernels.MAX_TOKENS + 1])
@pytest.mark.parametrize(("width", "out"), [(1, 1), (15, 17), (64, 3), (200, 50), (352, 6)])
def test_linear_of_any_size(tokens: int, width: int, out: int, dtype: torch.dtype) -> None:
    randn = self_check_cases.Randn(3, CPU)
    x, (q, scale), bias = randn(2, tokens, width).to(dtype)[:1], int8.quantize(randn(out, width)), randn(out).to(dtype)
    expected = F.linear(x.double(), meant(q, scale), bias.double())
    tolerance = 1e-4 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(
        kernels.linear_int8(x, q, scale, bias).double(), expected, rtol=tolerance, atol=tolerance
    )


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tokens_result_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    """Bit-identical, whatever tile the token is in."""
    randn = self_check_cases.Randn(4, CPU)
    x, bias = randn(48, 300).to(dtype), randn(71).to(dtype)
    q, scale = int8.quantize(randn(71, 300))
    together = kernels.linear_int8(x, q, scale, bias)
    for count in (1, 2, 3, 4, 5, 7, 16):
        for start in (0, 5):
            some = slice(start, start + count)
            assert torch.equal(kernels.linear_int8(x[some], q, scale, bias), together[some])


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 3, 5, 16])
def test_a_tower_in_one_call_is_its_layers(length: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_one_call_is_its_layers(quantize_(build_random_model(EVERY_KIND, dtype=dtype, **BIASES)), length, monkeypatch)


def assert_one_call_is_its_layers(model: TwoTowerForCausalLM, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of both towers over `length` tokens, in one call and layer by layer; in bf16 they are equal."""
    tokens = torch.randint(4, 60, (3, 30), generator=torch.Generator().manual_seed(0))
    outs = []
    for at_once in (True, False):
        if not at_once:
            monkeypatch.setattr(FusedCPURunner, "run", lambda *_: None)
        with torch.no_grad():
            state = model.new_state(3, 60)
            model.prefill(tokens[:, :12], torch.tensor([12, 7, 0]), state)
            logits = model.extend(tokens[:, 12 : 12 + length], state, torch.tensor([length, 1, 0]))
            draft = model.denoise(tokens[:, -length:], torch.tensor([1.0, 0.5, 0.2]), model.reader(state).view())
        assert logits.isfinite().all()
        real = torch.arange(length) < torch.tensor([length, 1, 0])[:, None]  # the results at padding are undefined
        outs.append((logits[real], draft))
    for actual, expected in zip(*outs, strict=True):
        assert torch.equal(actual, expected) or model.dtype == torch.float32
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@compiled
def test_a_quantized_tower_runs_in_one_call() -> None:
    """Also if only some layers are int8; not with scales of another dtype."""
    model = build_random_model(EVERY_KIND, dtype=torch.float32)
    tower, tokens = model.context, torch.tensor([[5, 6, 7]])

    def ran() -> bool:
        with torch.no_grad():
            inputs = PassInputs(tokens, AttentionMetadata(), keep_step_inputs=False)
            return FusedCPURunner().run(tower, inputs) is not None

    assert ran()
    quantize_(tower.layers[0])
    assert ran()
    quantize_(model)
    assert ran()
    layer = tower.layers[EVERY_KIND.index("M")].mixer.in_proj
    layer.weight_scale = layer.weight_scale.double()
    assert not ran()


@compiled
@pytest.mark.parametrize("name", ["linear_int8", "experts_int8"])
def test_a_wrong_int8_kernel_costs_only_int8_towers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fused_cpu.select

    def select(op: str, *arguments: Any, **options: Any) -> Any:
        backend = real(op, *arguments, **options)
        return dataclasses.replace(backend, name="torch") if op == name else backend

    monkeypatch.setattr(fused_cpu, "select", select)
    with torch.no_grad():
        model = build_random_model(EVERY_KIND)
        assert model.prefill_chunk == fused_cpu.MAX_ROW_TOKENS
        assert quantize_(model).prefill_chunk == PREFILL_CHUNK


# --- which weights are quantized, and moving the model ----------------------------------------------------------------


def test_only_large_products_are_quantized() -> None:
    model = quantize_(build_random_model(EVERY_KIND))
    kept = {name.split("mixer.")[-1] for name, tensor in named_tensors(model) if tensor.dtype == torch.int8}
    assert kept == {
        "in_proj.weight", "out_proj.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight",
        "experts.up_proj", "experts.down_proj", "shared_experts.up_proj.weight", "shared_experts.down_proj.weight",
        "up_proj.weight", "down_proj.weight", "context.head.weight", "denoiser.head.weight",
    }  # fmt: skip
    assert all(not tensor.is_floating_point() or tensor.dtype == torch.float32 for _, tensor in named_tensors(model))
    assert quantization_of(model) == model.quantization == "int8"
    assert quantization_of(build_random_model("M")) == "none"


def test_layers_that_are_shared_stay_shared() -> None:
    model = build_random_model(EVERY_KIND)
    model.denoiser.head = model.context.head
    quantize_(model)
    assert model.denoiser.head is model.context.head
    assert isinstance(model.context.head, Int8Linear)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_keeps_the_quantized_weights(dtype: torch.dtype) -> None:
    model = quantize_(build_random_model(EVERY_KIND))
    before = {name: tensor.clone() for name, tensor in named_tensors(model)}
    model.to(dtype)
    assert model.dtype == dtype
    for name, tensor in named_tensors(model):
        if before[name].dtype == torch.int8:
            assert torch.equal(tensor, before[name])
        elif name.endswith("_scale"):
            assert tensor.dtype == torch.promote_types(dtype, torch.float32)
            assert torch.equal(tensor.float(), before[name])


def test_towers_move_with_their_scales() -> None:
    model = quantize_(build_random_model(EVERY_KIND)).place_towers_on_devices("cpu", "meta")
    for name, tensor in named_tensors(model):
        assert tensor.device.type == ("cpu" if name.startswith("context.") else "meta"), name


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-hybrid", "tiny-groups"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32", "float64"])
def test_a_checkpoint_is_quantized_while_loading(golden_dir: Path, name: str, dtype: str) -> None:
    """From the stored weights, before the conversion to the model's dtype."""
    loaded = TwoTowerForCausalLM.from_pretrained(golden_dir / name, dtype=dtype, quantization="int8")
    stored = quantize_(TwoTowerForCausalLM.from_pretrained(golden_dir / name, dtype="float64"))
    plain = TwoTowerForCausalLM.from_pretrained(golden_dir / name, dtype=dtype)
    assert loaded.quantization == "int8"
    assert loaded.dtype == plain.dtype
    own, widest = dict(named_tensors(plain)), dict(named_tensors(stored))
    for key, tensor in named_tensors(loaded):
        if tensor.dtype == torch.int8 or key.endswith("_scale"):
            assert torch.equal(tensor.double(), widest[key].double()), key
        else:
            assert tensor.dtype == own[key].dtype
            assert torch.equal(tensor, own[key]), key


def test_a_context_tower_alone(golden_dir: Path) -> None:
    both = TwoTowerForCausalLM.from_pretrained(golden_dir / "tiny-hybrid", quantization="int8")
    alone = TwoTowerForCausalLM.from_pretrained(golden_dir / "tiny-hybrid", quantization="int8", towers="context")
    assert alone.denoiser is None
    expected = {name: tensor for name, tensor in named_tensors(both) if name.startswith("context.")}
    assert dict(named_tensors(alone)).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in named_tensors(alone))


def test_errors_of_damaged_checkpoints_are_unchanged(golden_dir: Path, tmp_path: Path) -> None:
    stored = load_file(golden_dir / "tiny-hybrid" / SINGLE_FILE)
    name = next(name for name in stored if name.endswith("in_proj.weight"))
    (tmp_path / "config.json").write_text((golden_dir / "tiny-hybrid" / "config.json").read_text())
    for change in ({name: stored[name][1:].clone()}, {f"{name}_scale": torch.ones(3)}):
        save_file(stored | change, tmp_path / SINGLE_FILE)
        with pytest.raises(ValueError, match=next(iter(change))):
            TwoTowerForCausalLM.from_pretrained(tmp_path, quantization="int8")


def test_refusals(golden_dir: Path) -> None:
    with pytest.raises(ArgumentError, match="quantization: 'int3' in 'int3' is not valid; give a scheme"):
        TwoTowerForCausalLM.from_pretrained(golden_dir / "tiny-hybrid", quantization="int3")
    model = TwoTowerForCausalLM.from_pretrained(golden_dir / "tiny-hybrid", quantization="int8")
    with pytest.raises(ArgumentError, match="int8 weights cannot be trained; load the model without quantization"):
        model.train()
    assert not model.training


# --- generation -------------------------------------------------------------------------------------------------------

PROMPTS = [[5, 9, 11], [7] * 20, [8, 30, 31, 32, 33, 34, 35]]
MODES: dict[str, dict[str, Any]] = {
    "ar": {},
    "mock_ar": {},
    "diffusion": {"block_size": 8, "confidence_threshold": 0.6},
    "verified": {"block_size": 8},
}


def written(model: TwoTowerForCausalLM, prompts: list[list[int]], mode: str, **given: Any) -> list[list[int]]:
    params = GenerationParams.of(mode=mode, max_new_tokens=24, **{**MODES[mode], **given})
    return [row.tokens for row in generate(model, prompts, params)]


@pytest.mark.parametrize("mode", MODES)
def test_text_equals_that_of_the_dequantized_weights(mode: str) -> None:
    model = quantize_(build_random_model(EVERY_KIND, dtype=torch.float64))
    assert written(model, PROMPTS, mode) == written(as_meant(model), PROMPTS, mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_verified_text_is_ar_text(dtype: torch.dtype, temperature: float) -> None:
    model = quantize_(build_random_model(EVERY_KIND, dtype=dtype))
    given = {"temperature": temperature, "seed": [1, 2, 3]}
    assert written(model, PROMPTS, "verified", **given) == written(model, PROMPTS, "ar", **given)


@pytest.mark.parametrize("mode", MODES)
def test_an_engine_row_equals_the_row_alone(mode: str) -> None:
    model = quantize_(build_random_model(EVERY_KIND))
    params = GenerationParams.of(mode=mode, max_new_tokens=24, **MODES[mode])
    llm = LLM(model, rows=3, length=64)
    outputs = llm.generate([Request(prompt, params) for prompt in PROMPTS])
    assert [out.tokens for out in outputs] == [written(model, [prompt], mode)[0] for prompt in PROMPTS]


def test_the_bundled_model_gives_the_same_text_in_ar(cli: Callable[..., Result]) -> None:
    prompt = "User: I want to book a table for two in San Jose.\nAssistant:"
    outs = [
        json.loads(cli("generate", prompt, "--mode", "ar", "-n", "24", "--json", "--dtype", "float32", *more).out)
        for more in ((), ("--quantization", "int8"))
    ]
    assert [out["quantization"] for out in outs] == ["none", "int8"]
    assert outs[0]["text"] == outs[1]["text"]


# --- command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["generate", "serve", "bench", "eval", "batch", "report"])
def test_every_verb_that_loads_a_model_has_the_option(verb: str, cli: Callable[..., Result]) -> None:
    assert "--quantization PLAN" in cli(verb, "--help").out
    result = cli(verb, "--quantization", "int3")
    assert result.code == 2
    assert "int3" in result.err


def test_info_counts_what_loading_allocates(cli: Callable[..., Result], golden_dir: Path) -> None:
    facts = json.loads(cli("info", golden_dir / "tiny-hybrid", "--json").out)
    for plan in ("int8", "int4"):
        loaded = TwoTowerForCausalLM.from_pretrained(golden_dir / "tiny-hybrid", dtype="bfloat16", quantization=plan)
        assert facts["memory"][plan]["both"] == sum(tensor.nbytes for _, tensor in named_tensors(loaded))


def test_the_released_model_fits_eighty_gigabytes(cli: Callable[..., Result], golden_dir: Path) -> None:
    memory = json.loads(cli("info", golden_dir / "released" / "config.json", "--json").out)["memory"]
    assert 59 * 2**30 < memory["int8"]["both"] < 60 * 2**30
    assert memory["int8"]["both"] < 0.51 * memory["bfloat16"]["both"]
    assert 34 * 2**30 < memory["int4"]["both"] < 35 * 2**30
