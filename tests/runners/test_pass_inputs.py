"""What a runner reads for a pass without being given it anew: weights, pools and rotations."""

from __future__ import annotations

import pytest
import torch
from conftest import build_random_model
from tiny_backbones import two_tower

from twotower import options
from twotower.model.layer_io import AttentionMetadata
from twotower.model.tower import steady_weights
from twotower.ops.cpu import huge_pages, library
from twotower.ops.reference.rope import rotation
from twotower.runners import rotation_tables
from twotower.runners.rotation_tables import RotationTables
from twotower.specs import RopeSpec

NATIVE = pytest.mark.skipif(isinstance(library.library(), str), reason="the compiled kernels are not tested")


@NATIVE
@torch.no_grad()
def test_weights_are_checked_once_in_a_steady_period() -> None:
    """A change between two periods is seen by both towers, also if only one of them ran in the first."""
    model = build_random_model("M*-", dtype=torch.float32)
    tokens = torch.tensor([[5, 6, 7]])

    def hidden(tower: object) -> torch.Tensor:
        assert callable(tower)
        return tower(tokens, AttentionMetadata())[0]

    denoiser = model.denoiser
    assert denoiser is not None
    before = hidden(denoiser)
    with steady_weights():
        hidden(model.context)
        denoiser.norm_f.weight = torch.nn.Parameter(2 * denoiser.norm_f.weight)
        torch.testing.assert_close(hidden(denoiser), 2 * before)  # its first pass in this period
    model.context.norm_f.weight = torch.nn.Parameter(3 * model.context.norm_f.weight)
    with steady_weights():
        torch.testing.assert_close(hidden(model.context), model.context.layer_by_layer(tokens, AttentionMetadata())[0])


@torch.no_grad()
def test_an_engine_sees_weights_that_changed_between_calls() -> None:
    model = two_tower("llama", torch.float32)
    prompt = torch.tensor([[5, 6, 7, 8]])
    first = model.generate_ar(prompt, max_new_tokens=12, eos_token_id=[])
    model.context.norm_f.weight = torch.nn.Parameter(-model.context.norm_f.weight)
    changed = model.generate_ar(prompt, max_new_tokens=12, eos_token_id=[])
    assert not torch.equal(first, changed)
    with options.override(native=False):
        assert torch.equal(changed, model.generate_ar(prompt, max_new_tokens=12, eos_token_id=[]))


@NATIVE
@torch.no_grad()
def test_a_pass_stores_the_keys_that_torch_stores() -> None:
    """In passes of growing and shrinking lengths, with Mamba layers before and behind attention."""
    for pattern in ("M*M*", "*MM*"):
        model = build_random_model(pattern, dtype=torch.float32)
        for length in (1, 3, 16, 90, 2):
            tokens = torch.arange(4, 4 + length)[None] % 60 + 2
            states = model.new_state(1, 128), model.new_state(1, 128)
            found = model.extend(tokens, states[0])
            with options.override(native=False):
                expected = model.extend(tokens, states[1])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            for own, other in zip(states[0].attention_pools, states[1].attention_pools, strict=True):
                torch.testing.assert_close(own[1].k, other[1].k, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_view_is_not_read_after_its_state_has_changed() -> None:
    model = two_tower("llama", torch.float64)
    state = model.new_state(1, 8)
    view = state.view()
    model.extend(torch.tensor([[5]]), state)
    with pytest.raises(AssertionError, match="after its state had changed"):
        view.past[0]


def test_rotation_tables_are_the_rotations(monkeypatch: pytest.MonkeyPatch) -> None:
    ropes = tuple(RopeSpec(inverse_frequencies=(1.0, 0.1, 0.003), interleaved=way) for way in (False, True))
    tables = RotationTables(ropes)
    for length in (3, 300, 5):
        found = tables.up_to(length)
        assert found is not None
        for table, rope in zip(found, ropes, strict=True):
            expected = rotation(torch.arange(length)[None], rope, torch.float32)
            assert torch.equal(table.cos[:, :length], expected.cos)
            assert torch.equal(table.sin[:, :length], expected.sin)
            assert table.interleaved == rope.interleaved
    monkeypatch.setattr(rotation_tables, "MAX_POSITIONS", 400)
    assert tables.up_to(401) is None


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_text_beyond_the_rotation_tables(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes before and behind the last position of the tables give the same, with or without tables."""
    model = two_tower("llama", dtype)
    prompt = torch.arange(4, 34)[None]
    texts = []
    for most in (1 << 15, 40, 0):
        monkeypatch.setattr(rotation_tables, "MAX_POSITIONS", most)
        model.context.release()
        texts.append(model.generate_ar(prompt, max_new_tokens=24, eos_token_id=[]))
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])


@pytest.mark.parametrize("count", [0, 5, 3 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_pages(count: int, dtype: torch.dtype) -> None:
    memory = huge_pages.empty(count, dtype)
    assert (memory.shape, memory.dtype, memory.is_contiguous()) == ((count,), dtype, True)
    assert not memory.count_nonzero()
    memory += 1
    assert int(memory.sum(dtype=torch.float64)) == count
