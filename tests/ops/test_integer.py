"""Activations in int8: products against their definition, kernels bit for bit, plans, passes and generation."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EVERY_KIND, build_random_model
from test_int8 import BIASES, MODES, PROMPTS, assert_one_call_is_its_layers, compiled, written
from tiny_backbones import two_tower
from torch import Tensor

from twotower import GenerationParams, TwoTowerForCausalLM
from twotower.checkpoint.quantize import quantize_
from twotower.engine import LLM, Request
from twotower.errors import ArgumentError
from twotower.model.layer_io import AttentionMetadata
from twotower.model.linear import Int4Linear, Int8Linear, Linear
from twotower.model.tower import PassInputs
from twotower.ops import registry, self_check_cases
from twotower.ops.cpu import kernels, library, moe_kernels
from twotower.ops.reference import int4, int8, integer
from twotower.runners.decode_pass import StateRows
from twotower.runners.fused_cpu import FusedCPURunner
from twotower.runners.pass_tables import PassShape

pytestmark = pytest.mark.code_path
CPU = torch.device("cpu")
PLANS = ["int8,activations=int8", "int4,activations=int8"]
SIZES = ((1, 1), (7, 17), (31, 16), (33, 902), (300, 40), (70, 10304))  # inputs, outputs


def tokens_of(count: int, width: int, seed: int = 0) -> Tensor:
    """Tokens of very different sizes; the first is ±its largest value, the second is zero."""
    x = self_check_cases.Randn(seed, CPU)(count, width) * 10.0 ** torch.arange(-3, count - 3)[:, None].clamp(max=4)
    x[0] = x[0].sign() * 3.5
    if count > 1:
        x[1] = 0
    return x


def weights_of(width: int, out: int) -> Tensor:
    """A third of the rows has the largest integers of both signs, a third the largest negative ones."""
    weight = self_check_cases.Randn(1, CPU)(out, width)
    weight[::3] = weight[::3].sign() * 0.75
    weight[1::3] = -0.5
    return weight


def product(name: str, weight: Tensor) -> Callable[..., Tensor]:
    """A kernel, or a reference, with a quantised weight: f(x, bias)."""
    where = kernels if name.startswith("kernel") else integer
    if name.endswith("int8"):
        pair = int8.quantize(weight)
        return lambda x, bias=None: where.linear_w8a8(x, *pair, bias)
    data = int4.quantize(weight)
    return lambda x, bias=None: where.linear_w4a8(x, data, len(weight), bias)


# --- the references ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activations_are_rounded_to_the_nearest_integer(dtype: torch.dtype) -> None:
    x = tokens_of(6, 50).to(dtype)
    x[3, 2] = float("nan")
    x[4, 3] = -float("inf")
    q, scale = integer.round_activations(x)
    assert torch.equal(q, q.round())
    assert q.abs().amax(-1).tolist() == [127, 0, 127, 0, 0, 127]
    assert scale.isnan().flatten().tolist() == [False, False, False, True, True, False]
    for m in (0, 1, 2, 5):
        assert ((q[m] * scale[m] - x[m]).abs() <= scale[m] * 0.5001).all()
    assert integer.round_activations(torch.tensor([0.5, 1.5, 127.0]))[0].tolist() == [0, 2, 127]  # ties to even


@compiled
def test_subnormal_tokens_stay_in_eight_bits() -> None:
    x = torch.tensor([[190.0, 3.0, 0.0, -190.0]]) * 2.0**-149  # the scale is rounded to 1 · 2⁻¹⁴⁹
    assert integer.round_activations(x)[0].abs().max() == 127
    weight = weights_of(4, 16)
    assert torch.equal(product("kernel int8", weight)(x), product("reference int8", weight)(x))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("width", "out"), [(1, 1), (33, 17), (2500, 5)])
def test_the_references_are_exact_sums_with_the_scales_in_their_order(bits: int, width: int, out: int) -> None:
    x, weight, bias = tokens_of(4, width), weights_of(width, out), self_check_cases.Randn(2, CPU)(out)
    a, step = integer.round_activations(x)
    if bits == 8:
        q, scale = int8.quantize(weight)
        sums = a.long() @ int8.unpack(q, scale, torch.int64).mT
        expected = sums.float() * step * scale + bias
        assert torch.equal(integer.linear_w8a8(x, q, scale, bias), expected)
        return
    data = int4.quantize(weight)
    q, scales = int4.integers(data, out, width).long(), int4.scales(data, out)
    total = torch.zeros(4, out)
    for group, at in enumerate(range(0, width, 32)):
        sums = a[:, at : at + 32].long() @ q[:, at : at + 32].mT
        assert torch.equal(
            (sums.double() * scales[:, group].double()).float().double(), sums * scales[:, group].double()
        )
        total = total + sums.float() * scales[:, group].float()
    assert torch.equal(integer.linear_w4a8(x, data, out, bias), total * step + bias)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("tokens", "top", "gated"), [(0, 2, True), (3, 1, False), (19, 3, True)])
def test_experts_of_each_backend_agree(plan: str, tokens: int, top: int, gated: bool, monkeypatch: Any) -> None:
    """The gathered form gathers a few pairs at a time; the kernel sums the experts of a token in another order."""
    monkeypatch.setattr(integer, "GATHERED", 2000)
    randn = self_check_cases.Randn(4, CPU)
    up, down = randn(7, 21, 37), randn(7, 37, 21)
    routed = randn(tokens, 37), randn(tokens, 7).argsort(-1)[:, :top].contiguous(), randn(tokens, top).abs()
    if plan.startswith("int8"):
        made = (int8.quantize(up) if gated else None, int8.quantize(up), int8.quantize(down))
        every = [integer.experts_w8a8, integer.experts_w8a8_gathered, moe_kernels.experts_w8a8]
        outs = [f(*routed, *made, "relu2") for f in every[: 2 + native()]]
    else:
        data = (int4.quantize(up) if gated else None, int4.quantize(up), int4.quantize(down))
        every = [integer.experts_w4a8, integer.experts_w4a8_gathered, moe_kernels.experts_w4a8]
        outs = [f(*routed, *data, 21, "relu2") for f in every[: 2 + native()]]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-5, atol=1e-6 * float(outs[0].abs().sum()))


def native() -> bool:
    return not isinstance(library.library(), str)


# --- the compiled kernels ---------------------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize(("width", "out"), SIZES)
def test_kernels_have_the_bits_of_the_references(bits: str, width: int, out: int) -> None:
    """Every number of tokens up to 17, with the largest integers; a row alone is the row in a batch."""
    x, weight = tokens_of(17, width), weights_of(width, out)
    kernel, reference = product(f"kernel {bits}", weight), product(f"reference {bits}", weight)
    for dtype in (torch.float32, torch.bfloat16):
        bias = self_check_cases.Randn(2, CPU)(out).to(dtype)
        expected = reference(x.to(dtype), bias)
        assert torch.equal(reference(x.to(dtype)[3:4], bias), expected[3:4])
        for count in range(1, 18):
            assert torch.equal(kernel(x[-count:].to(dtype), bias), expected[-count:])
    assert torch.equal(kernel(x), reference(x))


@compiled
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_many_and_no_tokens_and_tokens_that_are_not_finite(bits: str) -> None:
    weight = weights_of(40, 20)
    kernel, reference = product(f"kernel {bits}", weight), product(f"reference {bits}", weight)
    x = self_check_cases.Randn(3, CPU)(2, kernels.MAX_TOKENS + 1, 40)[:1]
    x[0, 5, 3], x[0, 6, 39], x[0, 7, 0] = float("nan"), float("inf"), -float("inf")
    out = kernel(x)
    assert torch.equal(out.isnan(), reference(x).isnan())
    assert out.isnan().all(-1).nonzero()[:, 1].tolist() == [5, 6, 7]
    assert torch.equal(out.nan_to_num(), reference(x).nan_to_num())
    assert kernel(x[:, :0]).shape == (1, 0, 20)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_of_a_token_do_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    randn = self_check_cases.Randn(7, CPU)
    x = randn(20, 300).to(dtype)
    up, down = randn(3, 40, 300), randn(3, 300, 40)
    choice, weight = randn(20, 3).argsort(-1)[:, :2].contiguous(), randn(20, 2).abs()
    of_int4 = int4.quantize(up), int4.quantize(up), int4.quantize(down)
    of_int8 = int8.quantize(up), int8.quantize(up), int8.quantize(down)
    whole = moe_kernels.experts_w4a8(x, choice, weight, *of_int4, 40, "silu")
    other = moe_kernels.experts_w8a8(x, choice, weight, *of_int8, "silu")
    for count in (1, 2, 5, 9):
        some = slice(3, 3 + count)
        routed = x[some], choice[some], weight[some]
        assert torch.equal(moe_kernels.experts_w4a8(*routed, *of_int4, 40, "silu"), whole[some])
        assert torch.equal(moe_kernels.experts_w8a8(*routed, *of_int8, "silu"), other[some])


FORMS = {
    "AVX-512 VNNI": ("-march=x86-64-v4 -mavx512vnni", "avx512_vnni"),
    "AVX-VNNI": ("-march=x86-64-v3 -mavxvnni", "avx_vnni"),
    "plain": ("-march=x86-64", ""),
}
HARNESS = """
#include "matmul.h"
extern "C" void product(const float* x, const void* w, const float* scale, long M, long K, long N, float* y) {
    linear(x, Matrix<float>{nullptr, w, scale, true}, (const float*)nullptr, y, M, K, N, 1);
}
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_other_processors_have_the_same_bits(form: str, tmp_path: Path) -> None:
    """Compiled alone, where this processor can run them: the paths of `tests/paths` have no VNNI of AVX2."""
    flags, needed = FORMS[form]
    info = Path("/proc/cpuinfo")
    if shutil.which("g++") is None or not info.exists() or needed not in info.read_text():
        pytest.skip(f"needs g++ and a processor with {needed or 'x86-64'}")
    (tmp_path / "form.cpp").write_text(HARNESS)
    command = ["g++", *library.FLAGS, *flags.split(), "-Wno-psabi", f"-I{library.HERE}", "form.cpp", "-o", "form.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    call = ctypes.CDLL(str(tmp_path / "form.so")).product
    call.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_long] * 3 + [ctypes.c_void_p]
    for width, out in SIZES:
        x, weight = tokens_of(17, width), weights_of(width, out)
        q, scale = int8.quantize(weight)
        data = int4.quantize(weight)
        for count in (1, 2, 5, 17):
            y = torch.empty(count, out)
            call(x.data_ptr(), q.data_ptr(), scale.data_ptr(), count, width, out, y.data_ptr())
            assert torch.equal(y, integer.linear_w8a8(x[:count], q, scale))
            call(x.data_ptr(), data.data_ptr(), data.data_ptr(), count, width, out, y.data_ptr())
            assert torch.equal(y, integer.linear_w4a8(x[:count], data, out))


# --- plans on models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [*PLANS, "experts=int4,rest=int8,activations=int8", "context=int4,activations=int8"])
def test_a_model_says_its_plan(plan: str) -> None:
    model = quantize_(build_random_model(EVERY_KIND), plan)
    assert model.quantization == plan
    quantised = [module for module in model.modules() if isinstance(module, Int8Linear | Int4Linear)]
    assert all(module.int8_activations for module in quantised)
    with pytest.raises(ArgumentError, match="load the original weights, and quantise them with one plan"):
        quantize_(model, "int8")


def test_a_head_that_is_the_embedding_rounds_its_tokens() -> None:
    model = quantize_(two_tower("llama"), "int8,activations=int8")
    assert model.config.tie_word_embeddings
    assert isinstance(model.context.head, Int8Linear)
    assert model.context.head.int8_activations


def test_a_weight_that_is_too_wide_is_refused() -> None:
    model = torch.nn.ModuleDict({"up_proj": Linear(integer.MAX_WIDTH + 1, 1, bias=False)})
    with pytest.raises(ArgumentError, match=r"activations=int8 allows 131072 inputs of a weight, and one has 131073"):
        quantize_(model, "int8,activations=int8")
    quantize_(model, "int8")


@compiled
@pytest.mark.parametrize(
    "plan", [*PLANS, "experts=int4,rest=int8,activations=int8", "projections=int4,activations=int8"]
)
def test_a_tower_in_one_call_is_its_layers(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, where both have the same bits."""
    model = quantize_(build_random_model(EVERY_KIND, dtype=torch.bfloat16, **BIASES), plan)
    with torch.no_grad():
        inputs = PassInputs(torch.tensor([[5, 6, 7]]), AttentionMetadata(), keep_step_inputs=False)
        assert FusedCPURunner().run(model.context, inputs) is not None
    assert_one_call_is_its_layers(model, 5, monkeypatch)


@compiled
def test_a_wrong_kernel_costs_only_its_towers(monkeypatch: pytest.MonkeyPatch) -> None:
    def runs(plan: str) -> bool:
        model = quantize_(build_random_model("*-", dtype=torch.float32), plan)
        inputs = PassInputs(torch.tensor([[5, 6]]), AttentionMetadata(), keep_step_inputs=False)
        with torch.no_grad():
            return FusedCPURunner().run(model.context, inputs) is not None

    names = ("linear_w8a8", "linear_w4a8", "linear_int8", "linear_int4")
    chosen = registry.select
    for wrong in names:
        reference = registry.REGISTRY[wrong][-1]
        monkeypatch.setattr(
            "twotower.runners.fused_cpu.select",
            lambda op, *rest, w=wrong, r=reference, **more: r if op == w else chosen(op, *rest, **more),
        )
        plans = ("int8,activations=int8", "projections=int4,activations=int8", "int8", "projections=int4")
        assert [runs(plan) for plan in plans] == [name != wrong for name in names]


@compiled
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("pattern", ["*-", "E"])
@torch.no_grad()
def test_a_pass_has_the_bits_of_single_steps(pattern: str, plan: str) -> None:
    """Over 1 to 17 tokens, in a ragged batch. Mamba-2 layers sum in another order for each length."""
    model = quantize_(build_random_model(pattern, dtype=torch.float32), plan)
    tokens, lengths = torch.randint(4, 60, (3, 30), generator=torch.Generator().manual_seed(0)), [12, 7, 1]
    steps: list[list[Tensor]] = []
    for row, length in enumerate(lengths):
        state = model.new_state(1, 64)
        model.prefill(tokens[row : row + 1, :length], torch.tensor([length]), state)
        own = tokens[row : row + 1, 12:29]
        steps.append([model.extend(own[:, i : i + 1], state)[0, 0] for i in range(17)])
    for length in range(1, 18):
        state, counts = model.new_state(3, 64), [length, max(length // 2, 1), 1]
        model.prefill(tokens[:, :12], torch.tensor(lengths), state)
        out = model.extend(tokens[:, 12 : 12 + length], state, torch.tensor(counts))
        for row, count in enumerate(counts):
            for i in range(count):
                assert torch.equal(out[row, i], steps[row][i]), (length, row, i)


@compiled
@pytest.mark.parametrize("plan", ["heads=int8,activations=int8", *PLANS])
@torch.no_grad()
def test_compiled_steps_have_the_arithmetic_of_the_plan(plan: str) -> None:
    """Also of the head, which they compute themselves: their confidences are those of the logits one by one."""
    model = quantize_(build_random_model("*-", dtype=torch.float32), plan)
    states = []
    for _ in range(2):
        state = model.new_state(1, 64)
        model.prefill(torch.tensor([PROMPTS[2]]), torch.tensor([7]), state)
        states.append(state)
    shape = PassShape(1, 1, torch.float32, True, False, True, True)
    own = FusedCPURunner().decode_pass(model.context, shape, StateRows(states[0], [0], [7], 20))
    assert own is not None
    tokens, confidences = own.ar_steps([5], [[]], 20)
    token = 5
    for chosen, confidence in zip(tokens, confidences, strict=True):
        best = model.extend(torch.tensor([[token]]), states[1])[0, 0].softmax(-1).max(-1)
        token = chosen[0]
        assert int(best.indices) == token
        assert confidence[0] == pytest.approx(float(best.values), rel=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_verified_text_is_ar_text(plan: str) -> None:
    model = quantize_(build_random_model(EVERY_KIND, dtype=torch.float32), plan)
    for given in ({"temperature": 0.0}, {"temperature": 0.8, "seed": [1, 2, 3]}):
        assert written(model, PROMPTS, "verified", **given) == written(model, PROMPTS, "ar", **given)


@pytest.mark.parametrize("mode", MODES)
def test_an_engine_row_equals_the_row_alone(mode: str) -> None:
    model = quantize_(build_random_model(EVERY_KIND), PLANS[1])
    params = GenerationParams.of(mode=mode, max_new_tokens=24, **MODES[mode])
    outputs = LLM(model, rows=3, length=64).generate([Request(prompt, params) for prompt in PROMPTS])
    assert [out.tokens for out in outputs] == [written(model, [prompt], mode)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("plan", PLANS)
def test_a_saved_model_keeps_its_activations(plan: str, golden_dir: Path, tmp_path: Path) -> None:
    made = TwoTowerForCausalLM.from_pretrained(golden_dir / "tiny-hybrid", dtype="float32", quantization=plan)
    made.save_pretrained(tmp_path)
    loaded = TwoTowerForCausalLM.from_pretrained(tmp_path)
    assert loaded.quantization == plan
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded.generate_ar(ids, max_new_tokens=8), made.generate_ar(ids, max_new_tokens=8))
    weights = plan.split(",")[0]
    assert TwoTowerForCausalLM.from_pretrained(tmp_path, quantization=weights).quantization == weights
    group = made.config.__class__.read(tmp_path).quantization_config["config_groups"]["context.heads"]
    assert group["input_activations"]["strategy"] == "token"
    with pytest.raises(ArgumentError, match=f"and the checkpoint is stored in '{plan}'"):
        TwoTowerForCausalLM.from_pretrained(tmp_path, quantization="experts=int4,activations=int8")
