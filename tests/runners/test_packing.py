"""Packed weights: the same products for all sizes, and no use of the copy of a changed weight."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from conftest import EVERY_KIND, build_random_model
from torch import nn

from twotower import LLM, GenerationParams, Request, bundled_model, model_loading, options
from twotower.model.layer_io import AttentionMetadata
from twotower.model.linear import Linear
from twotower.model.tower import PassInputs, Tower
from twotower.ops import cpu_target, self_check_cases
from twotower.ops.cpu import kernels, library, moe_kernels, packed_weights
from twotower.ops.reference import experts
from twotower.runners import packed_weights as packing
from twotower.runners.fused_cpu import FusedCPURunner

pytestmark = pytest.mark.code_path
CPU = torch.device("cpu")
NARROW = (torch.float32, torch.bfloat16)

if isinstance(library.library(), str):
    pytest.skip(f"the compiled kernels are not tested: {library.library()}", allow_module_level=True)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 6, 7, 8, 9, 16, 17, 49, 300])
@pytest.mark.parametrize(("width", "out"), [(1, 1), (15, 17), (64, 3), (201, 50), (32, 16), (8, 130)])
def test_products_of_any_size(tokens: int, width: int, out: int, dtype: torch.dtype) -> None:
    randn = self_check_cases.Randn(1, CPU)
    x, weight, bias = randn(2, tokens, width).to(dtype), randn(out, width).to(dtype), randn(out).to(dtype)
    packed = kernels.pack(weight)
    assert packed is not None
    tolerance = 1e-4 if dtype == torch.float32 else 4e-2
    for given in (bias, None):
        expected = torch.nn.functional.linear(x.double(), weight.double(), None if given is None else given.double())
        torch.testing.assert_close(
            kernels.linear(x, weight, given, packed).double(), expected, rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("dtype", NARROW)
def test_a_tokens_result_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    """Bit for bit, in any tile and with any number of threads."""
    randn = self_check_cases.Randn(2, CPU)
    x, weight = randn(60, 301).to(dtype), randn(170, 301).to(dtype)
    packed = kernels.pack(weight)
    together = kernels.linear(x, weight, None, packed)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for count in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 60):
                assert torch.equal(kernels.linear(x[:count], weight, None, packed), together[:count])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("which", [(True, True), (True, False), (False, True)])
def test_experts(which: tuple[bool, bool], dtype: torch.dtype) -> None:
    """Odd widths; one of the two weights may have no packed copy."""
    randn = self_check_cases.Randn(3, CPU)
    up, down = randn(5, 27, 39).to(dtype) / 4, randn(5, 39, 27).to(dtype) / 4
    copies = tuple(kernels.pack(weight) if wanted else None for weight, wanted in zip((up, down), which, strict=True))
    assert [part is not None for part in copies] == list(which)
    for tokens in (1, 2, 30):
        hidden, weight = randn(tokens, 39).to(dtype), randn(tokens, 2).abs()
        choice = randn(tokens, 5).argsort(-1)[:, :2].contiguous()
        wide = hidden.double(), choice, weight.double(), None, up.double(), down.double()
        expected = experts.experts_dense(*wide, "relu2")
        mine = moe_kernels.experts(hidden, choice, weight, None, up, down, "relu2", (None, *copies)).double()
        tolerance = 1e-4 if dtype == torch.float32 else 4e-2
        torch.testing.assert_close(mine, expected, rtol=tolerance, atol=tolerance * float(expected.std()))


@pytest.mark.parametrize(
    ("dtype", "torch_bf16", "own_bf16", "whole_tower"),
    [
        (torch.float32, False, False, True),
        (torch.bfloat16, False, False, True),
        (torch.bfloat16, True, False, False),
        (torch.bfloat16, True, True, True),
    ],
    ids=["fp32", "emulated-bf16", "fast-bf16-in-torch", "fast-bf16"],
)
@pytest.mark.parametrize("residual_in_fp32", [False, True])
def test_a_packed_model_says_the_same(
    residual_in_fp32: bool,
    dtype: torch.dtype,
    torch_bf16: bool,
    own_bf16: bool,
    whole_tower: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prefill, steps, blocks and drafts of ragged rows. whole_tower: whether a pass of 180 tokens runs in one call.

    At that size torch's products are faster if the processor has bf16 instructions that the kernels do not use. All
    cases run on every processor.
    """
    monkeypatch.setattr(kernels, "has_fast_bf16_matmul", lambda device: torch_bf16)
    monkeypatch.setattr(kernels, "multiplies_bf16", lambda: own_bf16)
    monkeypatch.setattr(cpu_target, "has_amx", lambda: False)
    overrides = {"residual_in_fp32": residual_in_fp32, "use_bias": True, "mlp_bias": True, "attention_bias": True}
    model = build_random_model(EVERY_KIND, dtype=dtype, **overrides)
    tokens = torch.randint(4, 60, (9, 60), generator=torch.Generator().manual_seed(0))
    outs = []
    for packed in (False, True):
        if packed:
            assert model.pack() > 0
        with torch.no_grad():
            state = model.new_state(9, 100)
            last = model.prefill(tokens[:, :40], torch.arange(40, 31, -1), state)
            logits = model.extend(tokens[:, 40:56], state)
            draft = model.denoise(tokens[:, 30:46], torch.full((9,), 0.5), state.view())
            step = model.extend(tokens[:, 56:57], state)
            outs.append((last, logits, draft, step))
    for actual, expected in zip(*outs[::-1], strict=True):
        assert (actual - expected).abs().max() < (5e-4 if dtype == torch.float32 else 0.2) * expected.std()
    assert all_packed(model.context)
    for length, expected in ((20, whole_tower), (5, True)):  # 9 rows: 180 tokens and 45
        with torch.no_grad():
            run = FusedCPURunner().run(model.context, PassInputs(tokens[:, :length], AttentionMetadata()))
        assert (run is not None) == expected
    model.unpack()
    assert all(packed.get(weight) is None for weight, packed in packing.packable_weights(model))


@pytest.mark.parametrize("dtype", NARROW)
def test_a_row_is_bit_identical_alone_and_in_a_ragged_batch(dtype: torch.dtype) -> None:
    """Whole passes with packed weights, at widths 1 to 17, in the arithmetic of this code path."""
    model = build_random_model(EVERY_KIND, dtype=dtype, mlp_bias=True)
    model.pack()
    widths = torch.tensor([17, 1, 9, 16])
    tokens = torch.randint(4, 60, (4, 17), generator=torch.Generator().manual_seed(1))
    token_mask = torch.arange(17) < widths[:, None]
    with torch.no_grad():
        together, _ = model.context(tokens, AttentionMetadata(token_mask=token_mask))
        assert all_packed(model.context)
        for row, longest in enumerate(widths.tolist()):
            for width in range(1, longest + 1):
                alone, _ = model.context(tokens[row : row + 1, :width], AttentionMetadata())
                assert torch.equal(alone[0], together[row, :width])


def test_bf16_products_round_sums_and_not_products() -> None:
    """Products of bf16 values are exact in fp32. With two inputs, only the sum and the result are rounded."""
    randn = self_check_cases.Randn(4, CPU)
    x, weight = randn(9, 2).bfloat16(), randn(33, 2).bfloat16()
    exact = x.double() @ weight.double().T
    found = kernels.linear(x, weight, None, kernels.pack(weight))
    assert torch.equal(found, exact.float().bfloat16())


def all_packed(tower: Tower) -> bool:
    """Whether the last pass of the tower read packed weights in every product."""
    (runner,) = (runner for runner in tower.runners if isinstance(runner, FusedCPURunner))
    return runner.weights is not None and runner.weights.all_packed


def test_a_weight_changed_in_place_has_no_copy() -> None:
    randn = self_check_cases.Randn(4, CPU)
    layer, x = Linear(24, 40, bias=False), randn(3, 24)
    layer.weight = nn.Parameter(randn(40, 24))
    assert packing.pack_weights(layer) == packed_weights.packed_size(layer.weight) * 4
    optimizer = torch.optim.SGD([layer.weight], lr=0.1)
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    assert layer.packed.get(layer.weight) is None
    with torch.no_grad():
        assert torch.equal(layer(x), kernels.linear(x, layer.weight))
    packing.pack_weights(layer)  # again
    assert layer.packed.get(layer.weight) is not None
    with torch.no_grad():
        torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight))


def test_another_weight_at_the_same_address_has_no_copy() -> None:
    """A different tensor with the same address, dtype and version."""
    layer = Linear(24, 40, bias=False)
    layer.weight = nn.Parameter(torch.randn(40, 24))
    packing.pack_weights(layer)
    other = nn.Parameter(layer.weight.data)
    assert (other.data_ptr(), other._version) == (layer.weight.data_ptr(), layer.weight._version)
    assert layer.packed.get(layer.weight) is not None
    assert layer.packed.get(other) is None


@pytest.mark.parametrize("change", ["step", "load", "assign", "to and fro", "replace"])
def test_a_model_changed_in_any_way_says_what_it_now_is(change: str) -> None:
    """Also for the fused runner, which checks the weights once a pass."""
    model = build_random_model(EVERY_KIND, dtype=torch.float32)
    model.pack()
    tower, tokens = model.context, torch.tensor([[5, 6, 7]])
    weight = tower.layers[EVERY_KIND.index("M")].mixer.in_proj.weight
    with torch.no_grad():
        before = tower(tokens, AttentionMetadata())[0]
        assert all_packed(tower)
        match change:
            case "step":
                weight.add_(0.5)
            case "load" | "assign":
                other = {name: tensor * 2 for name, tensor in model.state_dict().items()}
                model.load_state_dict(other, assign=change == "assign")
            case "to and fro":
                model.bfloat16().float()
            case "replace":
                tower.layers[EVERY_KIND.index("M")].mixer.in_proj.weight = nn.Parameter(weight * 2)
        after = tower(tokens, AttentionMetadata())[0]
        assert not torch.equal(after, before)
        model.unpack()
        torch.testing.assert_close(after, tower(tokens, AttentionMetadata())[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_packed_weights_belong_to_their_module(duplicate: Any) -> None:
    """Not in a state dict, not in a model's copy; freed with the model, without the garbage collector."""
    model = build_random_model("M*E", dtype=torch.float32)
    names = set(model.state_dict())
    model.pack()
    with torch.no_grad():
        model.context(torch.tensor([[5, 6, 7]]), AttentionMetadata())
    assert all_packed(model.context)
    assert set(model.state_dict()) == names
    other = duplicate(model)
    assert all(packed.data is None for _, packed in packing.packable_weights(other))
    assert other.context.runners != model.context.runners
    copies = [weakref.ref(packed.get(weight)) for weight, packed in packing.packable_weights(model)]
    gc.collect()
    gc.disable()
    try:
        del model
        assert all(ref() is None for ref in copies)
    finally:
        gc.enable()


def test_what_cannot_be_packed_is_left() -> None:
    weight = torch.randn(8, 8)
    for unfit in (weight.double(), weight.t(), weight.to("meta"), weight[0]):
        assert kernels.pack(unfit) is None
    with torch.inference_mode():
        assert kernels.pack(torch.randn(8, 8)) is None  # such a tensor has no version counter
    assert build_random_model("M*", dtype=torch.float64).pack() == 0


def test_loading_packs_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def packed() -> bool:
        model = model_loading.load_model(bundled_model("small"), dtype="float32")
        return all(packed.get(weight) is not None for weight, packed in packing.packable_weights(model))

    assert packed()
    with options.override(pack=False):
        assert not packed()
    monkeypatch.setattr(packing, "available_memory", lambda: 1 << 20)
    assert not packed()
    monkeypatch.setattr(packing, "available_memory", lambda: None)
    assert not packed()


def test_verified_is_ar_when_packed() -> None:
    """As without packed weights: a verified block and single steps give the same bits."""
    model = model_loading.load_model(bundled_model("small"), dtype="float32")
    prompts = [model.tokenizer(text)["input_ids"] for text in ("User: I need a taxi.", "12+30=", "User: Hi")]
    texts: list[Any] = []
    for mode in ("ar", "verified"):
        params = GenerationParams.of(mode=mode, max_new_tokens=40, mask_token_id=model.config.mask_token)
        texts.append(
            [out.tokens for out in LLM(model, rows=3, length=128).generate([Request(p, params) for p in prompts])]
        )
    assert texts[0] == texts[1]
