"""The C++ pass of every family of backbones against its layers one by one, packed and in int8 too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from pairwise import pairwise
from shaped_models import shaped
from tiny_backbones import FAMILY_NAMES, SHAPES, slow_but, two_tower
from torch import Tensor

from twotower import TwoTowerForCausalLM
from twotower.checkpoint.quantize import quantize_
from twotower.model.layer_io import AttentionMetadata
from twotower.model.tower import PassInputs, PassResult, Tower
from twotower.ops.cpu import library
from twotower.runners import packed_weights
from twotower.runners.fused_cpu import FusedCPURunner
from twotower.runners.layer_options import spec_unsupported_reason
from twotower.specs import Activation, AttentionSpec, MoESpec, TowerSpec

if isinstance(library.library(), str):
    pytest.skip(f"the compiled kernels are not tested: {library.library()}", allow_module_level=True)

pytestmark = pytest.mark.code_path
NARROW = (torch.float32, torch.bfloat16)
Weights = Literal["plain", "packed", "int8"]
CHUNK = 11  # prompt tokens of a pass; with fast bf16, a pass of 3 rows reads 48 tokens at most


@torch.no_grad()
def passes(model: TwoTowerForCausalLM, length: int) -> list[Tensor]:
    """Logits and cache of passes over ragged rows of a shared pool, before and behind the windows of every family.

    Slots of windows have room for one chunk of a prompt, so their tokens move.
    """
    tokens = torch.randint(4, 60, (3, 40 + length), generator=torch.Generator().manual_seed(0))
    state = model.new_state(4, 0, 240, CHUNK)
    for row in (3, 0, 1):
        state.allocate(row, 70)
    rows, lengths = torch.tensor([3, 0, 1]), torch.tensor([length, 1, 0])
    model.prefill(tokens[:, :40], torch.tensor([40, 17, 0]), state, rows)
    logits = model.extend(tokens[:, 40:], state, lengths, rows=rows)
    assert logits is not None
    valid = torch.arange(length) < lengths[:, None]
    state.rollback(state.lengths - (state.uncommitted > 1).long())
    assert all(group.slots.window.first[3] > 0 for group in state.kv_groups if group.slots.window is not None)
    view, block, own = state.view(rows), tokens[:, -length:], lengths.clamp(min=1)
    drafts = [
        model.denoise(block, t, view, causal=t is None, lengths=own)[torch.arange(length) < own[:, None]]
        for t in (None, torch.tensor([1.0, 0.5, 0.2]))
    ]
    state.commit_state()
    return [logits[valid], *drafts, *state._tensors()]


def both_ways(
    model: TwoTowerForCausalLM, length: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tensor], list[Tensor]]:
    """`passes` in one call a pass, and layer by layer."""
    real, calls = FusedCPURunner.run, []

    def counted(runner: FusedCPURunner, tower: Tower, inputs: PassInputs) -> PassResult | None:
        result = real(runner, tower, inputs)
        calls.append(result is not None)
        return result

    monkeypatch.setattr(FusedCPURunner, "prefill_chunk", lambda *_: CHUNK)
    monkeypatch.setattr(FusedCPURunner, "run", counted)
    at_once = passes(model, length)
    assert set(calls) == {spec_unsupported_reason(model.spec) is None}
    monkeypatch.setattr(FusedCPURunner, "run", lambda *_: None)
    one_by_one = passes(model, length)
    monkeypatch.undo()
    return at_once, one_by_one


def prepared(name: str, dtype: torch.dtype, weights: Weights, **overrides: Any) -> TwoTowerForCausalLM:
    model = two_tower(name, dtype, **overrides)
    if weights == "int8":
        quantize_(model)
    if weights == "packed":
        packed_weights.pack_weights(model)
    return model


@pytest.mark.proves("compiled pass")
@pytest.mark.parametrize(("name", "length", "dtype"), pairwise(list(SHAPES), [1, 7], NARROW))
def test_a_pass_is_its_layers(name: str, length: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spec for which there is a reason is declined: the table of docs/backbones.md prints it."""
    model = prepared(name, dtype, "plain")
    for actual, expected in zip(*both_ways(model, length, monkeypatch), strict=True):
        compare(actual, expected)


@pytest.mark.proves("compiled pass")
@pytest.mark.parametrize(
    ("name", "weights", "dtype"),
    pairwise(slow_but(FAMILY_NAMES), ["packed", pytest.param("int8", marks=pytest.mark.proves("int8"))], NARROW),
)
def test_packed_and_quantized_passes(
    name: str, weights: Weights, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prepared(name, dtype, weights)
    for actual, expected in zip(*both_ways(model, 5, monkeypatch), strict=True):
        compare(actual, expected)


@pytest.mark.parametrize(("name", "dtype"), [("windows", torch.float32), ("hybrid, fewer experts", torch.bfloat16)])
def test_passes_of_a_denoiser_that_lacks_layers(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for actual, expected in zip(*both_ways(shaped(name, dtype), 5, monkeypatch), strict=True):
        compare(actual, expected)


def compare(actual: Tensor, expected: Tensor) -> None:
    """In bf16, the values that a pass and its layers round are equal; in fp32, sums may be rounded once."""
    if actual.dtype == torch.bfloat16:
        assert torch.equal(actual, expected)
    else:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * max(float(expected.abs().max()), 1.0))


def test_a_spec_that_the_pass_cannot_run_has_a_reason() -> None:
    """And the runner declines its passes."""
    moe, latent, llama = (two_tower(name).spec for name in ("mixtral", "olmo2", "llama"))
    for spec, reason in (
        (two_tower("qwen3_5_text").spec, "the C++ pass has no gated DeltaNet layers"),
        (with_output_gate(llama), "the C++ pass has no attention with an output gate"),
        (with_expert(moe, bias=True), "the C++ pass has no experts with biases"),
        (
            replace(latent, residual_in_fp32=True),
            "the C++ pass has no residual stream in fp32 for layers without a norm",
        ),
    ):
        found = spec_unsupported_reason(spec)
        assert found is not None
        assert found.startswith(reason)
    tower = two_tower("olmo2").context
    inputs = PassInputs(torch.tensor([[5, 6, 7]]), AttentionMetadata())
    with torch.no_grad():
        assert FusedCPURunner().run(tower, inputs) is not None
        tower.spec = replace(latent, residual_in_fp32=True)
        assert FusedCPURunner().run(tower, inputs) is None


def test_the_pass_runs_all_kinds_of_layers_but_one() -> None:
    specs = {name: two_tower(name).spec for name in SHAPES}
    declined = {name for name, spec in specs.items() if spec_unsupported_reason(spec) is not None}
    assert declined == {name for name, spec in specs.items() if "D" in spec.pattern}


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@torch.no_grad()
def test_a_pass_with_experts_without_a_gate(activation: Activation, dtype: torch.dtype) -> None:
    """Every family whose experts have no gate has relu²."""
    tower = Tower(with_expert(two_tower("mixtral").spec, gated=False, activation=activation)).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in tower.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    inputs = PassInputs(torch.tensor([[5, 6, 7], [8, 9, 5]]), AttentionMetadata())
    found = FusedCPURunner().run(tower, inputs)
    assert found is not None
    compare(found[0], tower.layer_by_layer(*inputs)[0])


def with_output_gate(spec: TowerSpec) -> TowerSpec:
    """The spec with a gate of the output of its attention."""
    layers = [
        replace(layer, mixer=replace(layer.mixer, output_gate=True))
        if isinstance(layer.mixer, AttentionSpec)
        else layer
        for layer in spec.layers
    ]
    return replace(spec, layers=tuple(layers))


def with_expert(spec: TowerSpec, **changes: Any) -> TowerSpec:
    """The spec with changed options of its experts."""
    layers = [
        replace(layer, mixer=replace(layer.mixer, expert=replace(layer.mixer.expert, **changes)))
        if isinstance(layer.mixer, MoESpec)
        else layer
        for layer in spec.layers
    ]
    return replace(spec, layers=tuple(layers))
