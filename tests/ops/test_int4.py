"""int4 weights: arithmetic against its definition, kernels against their references, loading and generation."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EVERY_KIND, build_random_model
from test_int8 import (
    BIASES,
    MODES,
    PROMPTS,
    assert_one_call_is_its_layers,
    assert_same_passes,
    compiled,
    grouped,
    written,
)
from torch import Tensor
from torch.nn import functional as F

from twotower import GenerationParams, TwoTowerForCausalLM
from twotower.checkpoint.names import int4_shapes
from twotower.checkpoint.quantize import quantize_
from twotower.engine import LLM, Request
from twotower.errors import ArgumentError
from twotower.model.fp32_tensors import named_tensors
from twotower.model.layer_io import AttentionMetadata
from twotower.model.linear import Int4Linear, Linear, TiedHead
from twotower.model.tower import PassInputs
from twotower.ops import self_check_cases
from twotower.ops.cpu import kernels, moe_kernels
from twotower.ops.reference import int4, int8
from twotower.ops.reference.experts import experts_dense
from twotower.runners.fused_cpu import FusedCPURunner

pytestmark = pytest.mark.code_path
CPU = torch.device("cpu")
WIDTHS = (1, 7, 8, 31, 32, 33, 60, 64, 100)  # whole and short last groups, and runs of 8


def meant(data: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The dequantized weight in float64, by the definition of the layout, one number at a time."""
    out = torch.empty(shape, dtype=torch.float64)
    flat, weight = data[None].flatten(0, -4), out[None].flatten(0, -3)
    for each, of in zip(flat, weight, strict=True):
        for n in range(shape[-2]):
            for k in range(shape[-1]):
                block, i, row = each[n // 16, k // 32], k % 32, n % 16
                scale = block[2 * row : 2 * row + 2].view(torch.bfloat16).double()
                byte = int(block[32 + i // 8 * 64 + row * 4 + i % 4])
                of[n, k] = ((byte >> 4 if i % 8 >= 4 else byte & 15) - 8) * scale
    return out


def as_meant(model: TwoTowerForCausalLM) -> TwoTowerForCausalLM:
    """A float64 model of plain layers with the dequantized weights of a quantised model."""
    plain = TwoTowerForCausalLM(model.config)
    for tower in plain.towers():
        if isinstance(tower.head, TiedHead):  # the head is rounded, and the embedding is not
            tower.head = Linear(tower.spec.hidden_size, tower.spec.vocab_size, bias=False)
    plain = plain.double().eval()
    own, shapes = dict(named_tensors(model)), int4_shapes(model)
    for name, tensor in named_tensors(plain):
        scale = own.get(f"{name}_scale")
        if name in shapes:
            tensor.data = int4.dequantize(own[name], *shapes[name][-2:], torch.float64)
        elif scale is not None:
            tensor.data = int8.unpack(own[name], scale, torch.float64) * scale.double()[..., None]
        else:
            tensor.data = own[name].double()
    return plain


# --- quantizing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (17, 33), (3, 4, 70), (0, 4), (902, 3)])
@pytest.mark.parametrize("chunk", [int8.CHUNK, 10])
def test_the_layout_is_as_documented(shape: tuple[int, ...], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4, "CHUNK", chunk)  # several chunks, the last one short
    weight = self_check_cases.Randn(0, CPU)(*shape)
    data = int4.quantize(weight)
    assert (data.dtype, tuple(data.shape)) == (torch.uint8, int4.data_shape(shape))
    expected = meant(data, shape)
    assert torch.equal(int4.dequantize(data, *shape[-2:], torch.float64), expected)
    assert torch.equal(int4.dequantize(data, *shape[-2:], torch.float32).double(), expected)  # exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_error_is_small_and_the_integers_make_the_same_data(width: int, dtype: torch.dtype) -> None:
    weight = self_check_cases.Randn(1, CPU)(35, width).to(dtype)
    data = int4.quantize(weight)
    q, scales = int4.integers(data, 35, width), int4.scales(data, 35)
    assert q.min() >= -8
    assert q.max() <= 7
    off = (int4.dequantize(data, 35, width, torch.float64) - weight.double()).abs()
    each = scales.double().abs().repeat_interleave(32, 1)[:, :width]
    assert (off <= each * 1.52).all()  # a value opposite to the largest one, up to 8.5 scales, becomes 7
    assert (off <= each * 0.52).double().mean() > 0.9
    again = torch.empty_like(data)
    int4.pack_into(again, q, scales)
    assert torch.equal(again, data)


def test_each_group_has_the_best_of_three_scales() -> None:
    weight = self_check_cases.Randn(2, CPU)(16, 64)
    found = int4.dequantize(int4.quantize(weight), 16, 64, torch.float32)
    for n in range(16):
        for group in (slice(0, 32), slice(32, 64)):
            part = weight[n, group]
            largest = part[part.abs().argmax()]
            errors = []
            for divisor in (-8, -8.5, 7):
                scale = (largest / divisor).bfloat16().float()
                errors.append((((part / scale).round().clamp(-8, 7) * scale - part) ** 2).sum())
            assert torch.isclose(((found[n, group] - part) ** 2).sum(), min(errors))


def test_zeros_stay_zero_and_non_finite_values_never_give_finite_products() -> None:
    weight = torch.zeros(5, 40)
    weight[2, 3], weight[3, 39], weight[4, 0] = float("inf"), float("nan"), 2.0
    out = int4.linear(torch.ones(1, 40), int4.quantize(weight), 5)[0]
    assert out[:2].tolist() == [0, 0]
    assert not out[2:4].isfinite().any()
    assert out[4] == 2
    assert not int4.quantize(torch.zeros(5, 40))[..., :32].any()  # no negative zero


# --- the references, in float64 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [31, 64])
def test_linear_uses_the_dequantized_weights(bias: bool, width: int) -> None:
    randn = self_check_cases.Randn(3, CPU)
    layer = Int4Linear(Linear(width, 17, bias=bias))
    x = randn(2, 3, width).double()
    own = None if layer.bias is None else layer.bias.double()
    expected = F.linear(x, meant(layer.weight, (17, width)), own)
    torch.testing.assert_close(int4.linear(x, layer.weight, 17, own), expected, rtol=1e-12, atol=1e-12)


@cache
def experts_of_37_inputs() -> tuple[list[Tensor], list[Tensor]]:
    """Data of the gates, up and down matrices of seven experts, and the weights they stand for."""
    randn = self_check_cases.Randn(4, CPU)
    shapes = ((7, 21, 37), (7, 21, 37), (7, 37, 21))
    every = [int4.quantize(randn(*shape)) for shape in shapes]
    return every, [meant(data, shape) for data, shape in zip(every, shapes, strict=True)]


@pytest.mark.parametrize("backend", [int4.experts_sorted, int4.experts_gathered, int4.experts_grouped])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("tokens", "top"), [(0, 2), (1, 2), (3, 1), (19, 3)])
def test_experts_use_the_dequantized_weights(
    backend: Callable[..., Tensor], gated: bool, tokens: int, top: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "_grouped_mm", grouped)
    randn = self_check_cases.Randn(8, CPU)
    (gate, up, down), wide = experts_of_37_inputs()
    hidden, weight = randn(tokens, 37).double(), randn(tokens, top).double().abs()
    choice = randn(tokens, 7).argsort(-1)[:, :top]
    activation = "gelu" if gated else "relu2"
    expected = experts_dense(hidden, choice, weight, wide[0] if gated else None, *wide[1:], activation)
    found = backend(hidden, choice, weight, gate if gated else None, up, down, 21, activation)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("plan", ["int4", "experts=int4,rest=int8", "denoiser=int4,context=int8"])
def test_a_float64_model_uses_the_dequantized_weights(plan: str) -> None:
    model = quantize_(build_random_model(EVERY_KIND, dtype=torch.float64, **BIASES), plan)
    assert model.quantization == ("context=int8,denoiser=int4" if "context" in plan else plan)
    assert_same_passes(model, as_meant(model))


# --- the compiled kernels ---------------------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 47, kernels.MAX_TOKENS + 1])
@pytest.mark.parametrize(("width", "out"), [(1, 1), (15, 17), (64, 3), (200, 50), (352, 6), (72, 902)])
def test_linear_of_any_size(tokens: int, width: int, out: int, dtype: torch.dtype) -> None:
    """What lies beyond a token's inputs is not read: infinity there changes nothing."""
    randn = self_check_cases.Randn(5, CPU)
    x, data, bias = randn(2, tokens, width).to(dtype)[:1], int4.quantize(randn(out, width)), randn(out).to(dtype)
    kernels.linear_int4(torch.full((3, 400), float("inf")), int4.quantize(randn(2, 400)), 2)  # fills the buffer
    expected = F.linear(x.double(), int4.dequantize(data, out, width, torch.float64), bias.double())
    tolerance = 1e-4 if dtype == torch.float32 else 4e-2 if tokens < 50 else 0.1  # torch's weights are rounded to bf16
    torch.testing.assert_close(
        kernels.linear_int4(x, data, out, bias).double(), expected, rtol=tolerance, atol=tolerance
    )


@compiled
def test_the_output_width_of_the_released_in_proj() -> None:
    randn = self_check_cases.Randn(6, CPU)
    x, data = randn(3, 48), int4.quantize(randn(10304, 48))
    expected = F.linear(x.double(), int4.dequantize(data, 10304, 48, torch.float64))
    torch.testing.assert_close(kernels.linear_int4(x, data, 10304).double(), expected, rtol=1e-4, atol=1e-4)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tokens_result_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    """Bit-identical, whatever tile the token is in; also for experts."""
    randn = self_check_cases.Randn(7, CPU)
    x, bias = randn(48, 300).to(dtype), randn(71).to(dtype)
    data = int4.quantize(randn(71, 300))
    together = kernels.linear_int4(x, data, 71, bias)
    up, down = int4.quantize(randn(3, 40, 300)), int4.quantize(randn(3, 300, 40))
    choice, weight = randn(48, 3).argsort(-1)[:, :2].contiguous(), randn(48, 2).abs()
    routed = moe_kernels.experts_int4(x, choice, weight, up, up, down, 40, "silu")
    for count in (1, 2, 3, 4, 5, 7, 8, 9, 16):
        for start in (0, 5):
            some = slice(start, start + count)
            assert torch.equal(kernels.linear_int4(x[some], data, 71, bias), together[some])
            found = moe_kernels.experts_int4(x[some], choice[some], weight[some], up, up, down, 40, "silu")
            assert torch.equal(found, routed[some])


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", ["int4", "experts=int4,rest=int8", "projections=int4"])
def test_a_tower_in_one_call_is_its_layers(plan: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantize_(build_random_model(EVERY_KIND, dtype=dtype, **BIASES), plan)
    with torch.no_grad():
        inputs = PassInputs(torch.tensor([[5, 6, 7]]), AttentionMetadata(), keep_step_inputs=False)
        assert FusedCPURunner().run(model.context, inputs) is not None
    assert_one_call_is_its_layers(model, 5, monkeypatch)


# --- which weights are quantized, and moving the model ----------------------------------------------------------------


def test_heads_have_eight_bits_and_small_tensors_stay() -> None:
    model = quantize_(build_random_model(EVERY_KIND), "int4")
    names = {name.split("mixer.")[-1]: tensor.dtype for name, tensor in named_tensors(model)}
    heads = {"context.head.weight", "denoiser.head.weight"}
    assert {name for name, dtype in names.items() if dtype == torch.int8} == heads
    assert {name for name, dtype in names.items() if dtype == torch.uint8} == {
        "in_proj.weight", "out_proj.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight",
        "experts.up_proj", "experts.down_proj", "shared_experts.up_proj.weight", "shared_experts.down_proj.weight",
        "up_proj.weight", "down_proj.weight",
    }  # fmt: skip
    assert model.quantization == "int4"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_and_another_device_keep_the_quantized_weights(dtype: torch.dtype) -> None:
    model = quantize_(build_random_model(EVERY_KIND), "int4")
    before = {name: tensor.clone() for name, tensor in named_tensors(model)}
    model.to(dtype)
    assert model.dtype == dtype
    for name, tensor in named_tensors(model):
        if before[name].dtype == torch.uint8:
            assert torch.equal(tensor, before[name])
    model.place_towers_on_devices("cpu", "meta")
    assert model.denoiser.layers[0].mixer.in_proj.weight.device.type == "meta"


# --- loading and generation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-hybrid", "tiny-groups"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_a_checkpoint_is_quantized_while_loading(golden_dir: Path, name: str, dtype: str) -> None:
    """From the stored weights, before the conversion to the model's dtype."""
    loaded = TwoTowerForCausalLM.from_pretrained(golden_dir / name, dtype=dtype, quantization="int4")
    stored = quantize_(TwoTowerForCausalLM.from_pretrained(golden_dir / name, dtype="float64"), "int4")
    plain = TwoTowerForCausalLM.from_pretrained(golden_dir / name, dtype=dtype)
    assert loaded.quantization == "int4"
    own, widest = dict(named_tensors(plain)), dict(named_tensors(stored))
    for key, tensor in named_tensors(loaded):
        if tensor.dtype in (torch.int8, torch.uint8) or key.endswith("_scale"):
            assert torch.equal(tensor.double(), widest[key].double()), key
        else:
            assert torch.equal(tensor, own[key]), key


def test_int4_weights_cannot_be_trained() -> None:
    model = quantize_(build_random_model("M"), "projections=int4").eval()
    with pytest.raises(ArgumentError, match="projections=int4 weights cannot be trained"):
        model.train()


@pytest.mark.parametrize("mode", MODES)
def test_text_equals_that_of_the_dequantized_weights(mode: str) -> None:
    model = quantize_(build_random_model(EVERY_KIND, dtype=torch.float64), "int4")
    assert written(model, PROMPTS, mode) == written(as_meant(model), PROMPTS, mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("plan", ["int4", "context=int4,denoiser=int8"])
def test_verified_text_is_ar_text(dtype: torch.dtype, plan: str) -> None:
    model = quantize_(build_random_model(EVERY_KIND, dtype=dtype), plan)
    for given in ({"temperature": 0.0}, {"temperature": 0.8, "seed": [1, 2, 3]}):
        assert written(model, PROMPTS, "verified", **given) == written(model, PROMPTS, "ar", **given)


@pytest.mark.parametrize("mode", MODES)
def test_an_engine_row_equals_the_row_alone(mode: str) -> None:
    model = quantize_(build_random_model(EVERY_KIND), "int4")
    given: dict[str, Any] = MODES[mode]
    params = GenerationParams.of(mode=mode, max_new_tokens=24, **given)
    outputs = LLM(model, rows=3, length=64).generate([Request(prompt, params) for prompt in PROMPTS])
    assert [out.tokens for out in outputs] == [written(model, [prompt], mode)[0] for prompt in PROMPTS]
