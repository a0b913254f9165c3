"""The context state depends only on the text of a row, however the text was read, rolled back or batched.

All tests use float64, so that the tolerances can be about 1e-9.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from conftest import EVERY_KIND, build_random_model
from tiny_backbones import two_tower
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from twotower import TwoTowerForCausalLM
from twotower.cache.hybrid_cache import TowerState
from twotower.cache.layer_cache import ParallelCache
from twotower.cache.pools import MambaPool
from twotower.cache.replica import DeviceTransfer, Replica
from twotower.cache.state_bytes import state_bytes
from twotower.model import moe, towers
from twotower.ops.reference.attention import CachedKV
from twotower.ops.registry import REGISTRY, Backend, select

MASK = 3
LENGTHS = (0, 1, 2, 3, 5, 17, 70)  # empty, around the convolution window, several chunks, two buckets


@pytest.fixture(scope="module", params=["nemotron_h", "falcon_h1", "qwen3_5_text"])
def model(request: pytest.FixtureRequest) -> TwoTowerForCausalLM:
    """A layer of each kind of Nemotron-H; attention and Mamba-2 side by side; gated DeltaNet and attention."""
    if request.param != "nemotron_h":
        return two_tower(request.param, torch.float64, seed=1).requires_grad_(False)
    return build_random_model(EVERY_KIND, seed=1, dtype=torch.float64).requires_grad_(False)


def some_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(4, 64, shape, generator=torch.Generator().manual_seed(seed))


def texts(lengths: Sequence[int], seed: int = 0) -> list[Tensor]:
    return [some_tokens(length, seed=seed + i) for i, length in enumerate(lengths)]


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Ragged rows as (tokens, lengths). The padding is a token that changes results if it is read."""
    width = max(len(row) for row in rows)
    filled = [torch.cat([row, torch.full((width - len(row),), 9)]) for row in rows]
    return torch.stack(filled), torch.tensor([len(row) for row in rows])


def prefilled(model: TwoTowerForCausalLM, rows: Sequence[Tensor], capacity: int = 128) -> TowerState:
    state = model.new_state(len(rows), capacity)
    model.prefill(*padded(rows), state)
    return state


def assert_same(actual: TowerState, expected: TowerState, model: TwoTowerForCausalLM) -> None:
    """Compares lengths, keys and values up to each length, Mamba states, and the results of both towers."""
    actual, expected = actual.clone(), expected.clone()
    views = actual.view(), expected.view()
    assert actual.lengths.tolist() == expected.lengths.tolist()
    for layer, _ in actual.attention_pools:
        both = [keys_and_values(state, layer) for state in (actual, expected)]
        for row, length in enumerate(expected.lengths.tolist()):
            for a, b in zip(*both, strict=True):
                torch.testing.assert_close(a[row, :, :length], b[row, :, :length], rtol=1e-9, atol=1e-10)
    for (_, mine), (_, theirs) in zip(actual.mamba_pools, expected.mamba_pools, strict=True):
        torch.testing.assert_close(mine.conv_window, theirs.conv_window, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(mine.ssm_state, theirs.ssm_state, rtol=1e-9, atol=1e-10)
    rows = expected.rows
    half = torch.full((rows,), 0.5)
    drafts = [model.denoise(torch.full((rows, 4), MASK), half, view) for view in views]
    torch.testing.assert_close(drafts[0], drafts[1], rtol=1e-8, atol=1e-9)
    following = [model.extend(some_tokens(rows, 2, seed=99), state) for state in (actual, expected)]
    torch.testing.assert_close(following[0], following[1], rtol=1e-8, atol=1e-9)


def keys_and_values(state: TowerState, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values, (R, Hkv, T, D) each."""
    past = state.view().past[layer]
    past = past.attention if isinstance(past, ParallelCache) else past
    assert isinstance(past, CachedKV)
    return past.dense(state.spec.attention.num_kv_heads)[:2]


def contents(state: TowerState) -> list[bytes]:
    """Every tensor of a state, byte for byte."""
    return [t.contiguous().numpy().tobytes() for t in state._tensors()]


# --- extend and rollback ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", range(6))
def test_rollback_reaches_every_prefix_of_the_last_extend(model: TwoTowerForCausalLM, kept: int) -> None:
    """Ragged blocks after ragged prompts; a row keeps `kept` tokens, or all if it has fewer."""
    prompts, blocks = texts(LENGTHS), texts((5, 5, 3, 0, 5, 5, 4), seed=50)
    state = prefilled(model, prompts)
    model.extend(*_with_lengths(state, blocks), logits=False)
    state.rollback(torch.tensor([len(p) + min(kept, len(b)) for p, b in zip(prompts, blocks, strict=True)]))
    whole = [torch.cat([p, b[:kept]]) for p, b in zip(prompts, blocks, strict=True)]
    assert_same(state, prefilled(model, whole), model)


def _with_lengths(state: TowerState, blocks: Sequence[Tensor]) -> tuple[Tensor, TowerState, Tensor]:
    tokens, lengths = padded(blocks)
    return tokens, state, lengths


def test_rows_roll_back_independently_and_in_several_steps(model: TwoTowerForCausalLM) -> None:
    prompts, block = texts((4, 9, 20)), some_tokens(3, 16)
    state = prefilled(model, prompts)
    model.extend(block, state, logits=False)
    for kept in ((16, 12, 7), (16, 5, 7), (1, 5, 0)):
        state.rollback(torch.tensor([len(p) + n for p, n in zip(prompts, kept, strict=True)]))
        whole = [torch.cat([p, b[:n]]) for p, b, n in zip(prompts, block, kept, strict=True)]
        assert_same(state, prefilled(model, whole), model)
    model.extend(some_tokens(3, 2, seed=8), state, logits=False)
    whole = [torch.cat([text, new]) for text, new in zip(whole, some_tokens(3, 2, seed=8), strict=True)]
    assert_same(state, prefilled(model, whole), model)


@pytest.mark.parametrize("overrides", [{"conv_kernel": 1}, {"conv_kernel": 7}, {"chunk_size": 3, "n_groups": 4}])
@pytest.mark.parametrize("pattern", ["M", "*", "-M", EVERY_KIND])
def test_rollback_on_other_shapes_of_model(pattern: str, overrides: dict[str, int]) -> None:
    other = build_random_model(pattern, dtype=torch.float64, **overrides).requires_grad_(False)
    prompts, block = texts((0, 1, 12)), some_tokens(3, 6)
    state = prefilled(other, prompts)
    other.extend(block, state, logits=False)
    state.rollback(torch.tensor([4, 1, 17]))
    whole = [torch.cat([p, b[:n]]) for p, b, n in zip(prompts, block, (4, 0, 5), strict=True)]
    assert_same(state, prefilled(other, whole), other)


def test_rollback_refuses_what_it_cannot_reach(model: TwoTowerForCausalLM) -> None:
    state = prefilled(model, texts((5, 5)))
    model.extend(some_tokens(2, 4), state)
    for unreachable in ([4, 9], [9, 10]):  # before the last extend; beyond the text
        with pytest.raises(RuntimeError, match="prefixes of the last extend"):
            state.rollback(torch.tensor(unreachable))
    state.view()  # a view commits the state
    with pytest.raises(RuntimeError, match="prefixes of the last extend"):
        state.rollback(torch.tensor([8, 9]))


@pytest.mark.parametrize("width", [1, 2, 3, 16, 40])
def test_extending_in_steps_equals_one_prefill(model: TwoTowerForCausalLM, width: int) -> None:
    """Compares the state and the logits of every step."""
    tokens = some_tokens(2, 80)
    expected = model(tokens).logits
    state = prefilled(model, [tokens[0, :7], tokens[1, :7]])
    for start in range(7, 80, width):
        logits = model.extend(tokens[:, start : start + width], state)
        torch.testing.assert_close(logits, expected[:, start : start + width], rtol=1e-8, atol=1e-9)
    assert_same(state, prefilled(model, list(tokens)), model)


def test_prefill_in_chunks_equals_one_pass(model: TwoTowerForCausalLM) -> None:
    """Ragged prompts around multiples of the chunk of 512 tokens; logits are those after the last token of a row."""
    chunk = towers.PREFILL_CHUNK
    rows = texts((1, chunk - 1, chunk, chunk + 1, 2 * chunk + 30))
    state = model.new_state(len(rows), 64)
    last = model.prefill(*padded(rows), state)
    for row, text in enumerate(rows):
        torch.testing.assert_close(last[row], model(text[None]).logits[0, -1], rtol=1e-8, atol=1e-9)
        assert_same(state.select(torch.tensor([row])), prefilled(model, [text]), model)


# --- rows that share a pool ---------------------------------------------------------------------------------------


def test_a_row_given_no_tokens_is_untouched(model: TwoTowerForCausalLM) -> None:
    state = prefilled(model, texts((6, 0, 30)))
    before = state.select(torch.tensor([1, 2])).clone()
    model.extend(some_tokens(3, 4), state, lengths=torch.tensor([4, 0, 0]))
    state.commit_state()
    after = state.select(torch.tensor([1, 2]))
    for _, pool in (*before.attention_pools, *after.attention_pools):  # the spare vector takes the writes of padding
        pool.k, pool.v = pool.k[:-1], pool.v[:-1]
    assert contents(after) == contents(before)


def test_row_slots_of_a_pool(model: TwoTowerForCausalLM) -> None:
    """Passes over slots [4, 1] of five read and write only these, in this order; rollback takes all slots."""
    prompts, block = texts((3, 11, 70)), some_tokens(2, 6)
    pool = model.new_state(5, 8)
    model.prefill(*padded(prompts), pool, rows=torch.tensor([1, 4, 2]))
    idle = pool.select(torch.tensor([0, 2, 3]))
    slots = torch.tensor([4, 1])
    logits = model.extend(block, pool, lengths=torch.tensor([6, 5]), rows=slots)

    alone = prefilled(model, [prompts[1], prompts[0]])
    expected = model.extend(block, alone, lengths=torch.tensor([6, 5]))
    torch.testing.assert_close(logits, expected, rtol=1e-8, atol=1e-9)
    pool.rollback(torch.tensor([0, 3 + 2, 70, 0, 11 + 4]))
    alone.rollback(torch.tensor([11 + 4, 3 + 2]))
    assert_same(pool.select(slots), alone, model)
    assert_same(pool.select(torch.tensor([0, 2, 3])), idle, model)
    view, own = pool.view(slots), alone.view()
    half = torch.tensor([0.5, 0.25])
    torch.testing.assert_close(model.denoise(block, half, view), model.denoise(block, half, own))


def test_blocks_of_several_lengths_in_one_pass(model: TwoTowerForCausalLM) -> None:
    """Each denoiser row equals its pass alone; the context tower computes logits only for the requested rows."""
    prompts, block, sizes = texts((3, 11, 70)), some_tokens(3, 9), [9, 1, 6]
    state, t = prefilled(model, prompts), torch.tensor([1.0, 0.5, 0.25])
    together = model.denoise(block, t, state.view(), lengths=torch.tensor(sizes))
    for row, size in enumerate(sizes):
        own = prefilled(model, [prompts[row]])
        alone = model.denoise(block[row : row + 1, :size], t[row : row + 1], own.view())
        torch.testing.assert_close(together[row : row + 1, :size], alone, rtol=1e-8, atol=1e-9)
    wanted = torch.tensor([2, 0])
    some = model.extend(block, state.clone(), lengths=torch.tensor(sizes), logits=wanted)
    every = model.extend(block, state, lengths=torch.tensor(sizes))
    assert some is not None
    assert every is not None
    torch.testing.assert_close(some, every[wanted])


def test_passes_over_some_slots_one_after_another(model: TwoTowerForCausalLM) -> None:
    """Later passes over other slots keep the rolled back state of earlier slots, and so do copies."""
    prompts, block = texts((3, 11, 70, 5)), some_tokens(4, 6)
    pool = prefilled(model, prompts)
    for slots, kept in (([2, 0], [1, 4]), ([3], [6]), ([0, 1], [0, 5])):
        before = pool.lengths.clone()
        model.extend(block[slots], pool, rows=torch.tensor(slots))
        pool.rollback(before.index_add(0, torch.tensor(slots), torch.tensor(kept)))
        copy = pool.clone()
    read = [block[0, :4], block[1, :5], block[2, :1], block[3, :6]]  # slot 0: 4 tokens, then none
    alone = prefilled(model, [torch.cat(parts) for parts in zip(prompts, read, strict=True)])
    assert_same(pool, alone, model)
    assert_same(copy, alone, model)
    assert_same(pool.select(torch.tensor([3, 0])), alone.select(torch.tensor([3, 0])), model)


def test_a_reset_row_begins_anew(model: TwoTowerForCausalLM) -> None:
    state = prefilled(model, texts((40, 9, 3)))
    others = state.select(torch.tensor([0, 2]))
    state.reset(torch.tensor([1]))
    assert state.lengths.tolist() == [40, 0, 3]
    second = some_tokens(5, seed=77)
    model.prefill(second[None], torch.tensor([5]), state, rows=torch.tensor([1]))
    assert_same(state.select(torch.tensor([1])), prefilled(model, [second]), model)
    assert_same(state.select(torch.tensor([0, 2])), others, model)


@pytest.mark.parametrize("recorded", [False, True])
def test_emptying_and_filling_rows_costs_only_those_rows(model: TwoTowerForCausalLM, recorded: bool) -> None:
    """The pools are written in place; under autograd the old tensors keep their values."""
    state = prefilled(model, texts((5, 9, 70)))
    piece = state.snapshot_row(2, 0, 70)
    before, old = state.clone(), _parts(state)
    rows = torch.tensor([1])
    with torch.set_grad_enabled(recorded):
        state.reset(rows)
        zero_slots = _parts(state)
        assert all((part[1] == 0).all() for part in zero_slots)
        state.restore(1, [piece])
        filled = _parts(state)
    places = [[part.data_ptr() for part in parts] for parts in (old, zero_slots, filled)]
    if recorded:
        assert all(torch.equal(now, then) for now, then in zip(old, _parts(before), strict=True))
        assert not any(set(places[0]) & set(after) for after in places[1:])
    else:
        assert places[0] == places[1] == places[2]
    for now, then in zip(filled, _parts(before), strict=True):
        assert torch.equal(now[[0, 2, 1]], then[[0, 2, 2]])
    assert state.lengths.tolist() == [5, 70, 70]


def _parts(state: TowerState) -> list[Tensor]:
    """The Mamba pools."""
    return [part for _, pool in state.mamba_pools for part in (pool.conv_window, pool.ssm_state)]


def test_select_and_snapshot_are_independent_copies(model: TwoTowerForCausalLM) -> None:
    """Copies between an extend and its rollback can be rolled back independently."""
    prompts, block = texts((3, 11, 0)), some_tokens(3, 6)
    state = prefilled(model, prompts)
    model.extend(block, state)
    copy, part = state.clone(), state.select(torch.tensor([2, 0]))
    state.rollback(torch.tensor([3, 11, 0]))
    model.extend(some_tokens(3, 9, seed=5), state)

    part.rollback(torch.tensor([2, 9]))
    assert_same(part, prefilled(model, [block[2, :2], torch.cat([prompts[0], block[0]])]), model)
    assert_same(copy, prefilled(model, [torch.cat(pair) for pair in zip(prompts, block, strict=True)]), model)


# --- room ---------------------------------------------------------------------------------------------------------


def test_a_state_grows_as_the_text_does(model: TwoTowerForCausalLM) -> None:
    tokens = some_tokens(2, 90)
    state, growths = model.new_state(2, 1), 0
    for token in tokens.split(1, dim=1):
        before = state.capacity
        model.extend(token, state, logits=False)
        growths += state.capacity > before
    assert 90 <= state.capacity <= 135
    assert growths < 15  # by a factor of 1.5 each time, so that appending is linear
    assert_same(state, prefilled(model, list(tokens)), model)


def test_reserving_less_than_there_is_changes_nothing(model: TwoTowerForCausalLM) -> None:
    state = prefilled(model, texts((5,)))
    before, size = contents(state), state.nbytes
    state.reserve(3)
    assert (contents(state), state.nbytes) == (before, size)


def test_nbytes_counts_what_is_held(model: TwoTowerForCausalLM) -> None:
    """Per row: K/V of attention layers, states of Mamba layers, three counters; and the spare vector of each layer."""
    attention, mamba = model.spec.attention, model.spec.mamba or model.spec.delta_net
    assert attention is not None
    assert mamba is not None
    with_keys, with_states = (len([kind for kind in model.spec.pattern if kind in kinds]) for kinds in ("*P", "MPD"))
    keys = 2 * attention.num_kv_heads * 100 * attention.head_dim * with_keys
    states = with_states * ((mamba.conv_kernel - 1) * mamba.conv_dim + mamba.inner * mamba.state_size)
    assert model.new_state(3, 100).nbytes == 8 * (3 * (keys + states + 3) + 2 * attention.head_dim * with_keys)
    assert state_bytes(model.spec, torch.float64)[:2] == (8 * states, 8 * keys // 100)


# --- read-only views ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["mask_diffusion", "mock_ar"])
def test_the_context_is_not_written_while_a_block_is_denoised(
    model: TwoTowerForCausalLM, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Every byte of the state is the same before the first and after the last pass of each block."""
    states: list[TowerState] = []
    new_state, denoise, extend = model.new_state, model.denoise, model.extend
    seen: list[bytes] = []
    checked = 0

    def watched_denoise(*args: object, **kwargs: object) -> Tensor:
        nonlocal seen, checked
        before = contents(states[0])
        assert not seen or before == seen
        out = denoise(*args, **kwargs)
        seen = contents(states[0])
        assert seen == before
        checked += 1
        return out

    def watched_extend(*args: object, **kwargs: object) -> Tensor | None:
        nonlocal seen
        assert contents(states[0]) == seen if checked else not seen  # the prompts are read before the first block
        seen = []
        return extend(*args, **kwargs)

    model.release()  # frees the idle state, so that the call makes a new one
    monkeypatch.setattr(model, "new_state", lambda *args: states.append(new_state(*args)) or states[-1])
    monkeypatch.setattr(model, "denoise", watched_denoise)
    monkeypatch.setattr(model, "extend", watched_extend)
    getattr(model, f"generate_{mode}")([[5, 6, 7], [8]], max_new_tokens=32)
    assert checked == model._last_nfe > 2


def test_the_denoiser_leaves_no_trace_in_the_state_it_reads(model: TwoTowerForCausalLM) -> None:
    state = prefilled(model, texts((3, 11)))
    view = state.view()
    before = contents(state)
    first = model.denoise(some_tokens(2, 8), torch.tensor([0.5, 0.5]), view)
    model.denoise(some_tokens(2, 16, seed=4), None, view, causal=True)
    assert contents(state) == before
    assert torch.equal(model.denoise(some_tokens(2, 8), torch.tensor([0.5, 0.5]), view), first)


# --- passes under autograd ----------------------------------------------------------------------------------------


def two_blocks(model: TwoTowerForCausalLM, capacity: int) -> Tensor:
    """Prefill, denoise, extend, rollback, denoise, extend → one number that depends on all results."""
    state = model.new_state(2, capacity)
    last = model.prefill(*padded(texts((5, 2))), state)
    block, half = some_tokens(2, 6), torch.tensor([0.5, 0.25])
    first = model.denoise(block, half, state.view())
    scored = model.extend(block, state)
    state.rollback(torch.tensor([8, 8]))
    second = model.denoise(block, half, state.view())
    final = model.extend(block[:, :2], state, lengths=torch.tensor([2, 1]))
    return sum((part.cos() * (i + 1)).sum() for i, part in enumerate((last, first, scored, second, final[:, 0])))


# With capacity 4, autograd also goes through growth; with 64, several passes share one buffer.
CAPACITIES = pytest.mark.parametrize("capacity", [4, 64])


@CAPACITIES
def test_gradients_through_state_and_verbs_equal_finite_differences(capacity: int) -> None:
    """For all parameters of both towers and of the time conditioning at once, along random directions."""
    model = build_random_model(EVERY_KIND, seed=2, dtype=torch.float64)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(two_blocks(model, capacity), parameters)
    step = 1e-6
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        values = []
        with torch.no_grad():
            for sign in (1, -2):  # to +step, then to −step
                for p, d in zip(parameters, direction, strict=True):
                    p += sign * step * d
                values.append(two_blocks(model, capacity))
            for p, d in zip(parameters, direction, strict=True):
                p += step * d
        expected = (values[0] - values[1]) / (2 * step)
        actual = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@CAPACITIES
@pytest.mark.parametrize("frozen", ["context", "denoiser"])
def test_one_tower_can_be_trained_through_the_verbs(frozen: str, capacity: int) -> None:
    """The gradient of a tower does not depend on whether the other tower is trained too."""
    model = build_random_model(EVERY_KIND, seed=2, dtype=torch.float64)
    trained = [p for name, p in model.named_parameters() if not name.startswith(frozen)]
    expected = torch.autograd.grad(two_blocks(model, capacity), trained)
    getattr(model, frozen).requires_grad_(False)
    actual = torch.autograd.grad(two_blocks(model, capacity), trained)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# --- no dependence on values --------------------------------------------------------------------------------------


def all_verbs(model: TwoTowerForCausalLM, prompts: tuple[Tensor, Tensor], kept: Tensor, device: str) -> None:
    """Runs each kind of pass once, on given slots; all lengths are tensors."""
    state = model.new_state(3, 128)
    rows = torch.tensor([2, 0], device=device)
    tokens, lengths = (t.to(device) for t in prompts)
    block = torch.full((2, 8), MASK, device=device)
    model.prefill(tokens, lengths, state, rows)
    model.extend(block, state, lengths=lengths.clamp(max=8), rows=rows)
    state.rollback(torch.where(state.uncommitted > 0, state.lengths - kept.to(device), state.lengths))
    model.denoise(block, torch.full((2,), 0.5, device=device), state.view(rows))
    model.extend(block[:, :1], state.select(rows))
    state.reset(rows)


def test_no_verb_reads_a_value_on_the_host() -> None:
    """On the meta device tensors have no values: any `.item()`, boolean index or data-dependent shape raises."""
    model = build_random_model(EVERY_KIND).to("meta")
    all_verbs(model, padded(texts((5, 12))), torch.tensor([1, 0, 2]), "meta")


class Shapes(TorchDispatchMode):
    """Records every operation with the shapes of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[object, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [tuple(a.shape) for a in torch.utils._pytree.tree_leaves(args) if isinstance(a, Tensor)]
        self.seen.append((func, *tensors))
        return func(*args, **(kwargs or {}))


def test_the_work_of_a_pass_does_not_depend_on_what_the_rows_hold(
    model: TwoTowerForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same rows, width and bucket, other tokens, lengths and rollbacks: the same operations on the same shapes."""
    gathered = next(b for b in REGISTRY["experts"] if b.name == "gathered")  # the backend for accelerators

    def with_gathered(op: str, *rest: Any, **options: Any) -> Backend:
        return gathered if op == "experts" else select(op, *rest, **options)

    monkeypatch.setattr(moe, "select", with_gathered)
    logs = []
    for seed, lengths, kept in ((0, (5, 12), (1, 0, 2)), (1, (0, 12), (0, 0, 0)), (2, (12, 1), (1, 0, 1))):
        prompts = padded(texts(lengths, seed))
        with Shapes() as shapes:
            all_verbs(model, prompts, torch.tensor(kept), "cpu")
        logs.append(shapes.seen)
    assert len(logs[0]) > 100
    assert logs[0] == logs[1] == logs[2]


# --- the denoiser's copy on another device ------------------------------------------------------------------------


class Counter(DeviceTransfer):
    def __init__(self) -> None:
        self.bytes = 0

    def send(self, tensor: Tensor, device: torch.device) -> Tensor:
        self.bytes += tensor.nbytes
        return tensor.clone()


@pytest.fixture
def follow(model: TwoTowerForCausalLM) -> Callable[[TowerState, Replica], None]:
    """Checks that the denoiser gets the same logits from a replica and from the state."""

    def check(state: TowerState, replica: Replica) -> None:
        block, half = torch.full((state.rows, 4), MASK), torch.full((state.rows,), 0.5)
        through, local = (model.denoise(block, half, source.view()) for source in (replica, state))
        assert torch.equal(through, local)

    return check


def test_a_replica_follows_extend_rollback_growth_and_select(
    model: TwoTowerForCausalLM, follow: Callable[[TowerState, Replica], None]
) -> None:
    state = model.new_state(3, 16)
    replica = Replica(state, torch.device("cpu"), Counter())
    follow(state, replica)
    model.prefill(*padded(texts((5, 0, 30))), state)
    follow(state, replica)
    model.extend(some_tokens(3, 6), state)
    state.rollback(torch.tensor([8, 6, 30]))
    follow(state, replica)
    model.extend(some_tokens(3, 40), state, lengths=torch.tensor([1, 40, 0]))
    model.extend(some_tokens(3, 2), state)  # two appends between two views
    follow(state, replica)
    kept = torch.tensor([2, 0])
    state = state.select(kept)
    replica = replica.select(state, kept)
    model.extend(some_tokens(2, 3), state)
    follow(state, replica)


def test_a_replica_follows_a_reset_row(
    model: TwoTowerForCausalLM, follow: Callable[[TowerState, Replica], None]
) -> None:
    state = prefilled(model, texts((20, 20)))
    replica = Replica(state, torch.device("cpu"), Counter())
    follow(state, replica)
    for length in (5, 30):  # shorter and longer than the text before it
        state.reset(torch.tensor([1]))
        model.prefill(some_tokens(1, length), torch.tensor([length]), state, rows=torch.tensor([1]))
        follow(state, replica)
    state.reset(torch.tensor([1]))
    follow(state, replica)  # there is nothing to transfer, but the row is empty


def test_a_replica_transfers_only_new_tokens(model: TwoTowerForCausalLM) -> None:
    state, counter = prefilled(model, texts((200, 100)), capacity=400), Counter()
    replica = Replica(state, torch.device("cpu"), counter)
    replica.view()
    counter.bytes = 0
    replica.view()
    assert counter.bytes == 0
    model.extend(some_tokens(2, 8), state)
    replica.view()
    per_row, per_token, *_ = state_bytes(state.spec, state.dtype)
    columns, mamba = 2 * 8 * per_token, 2 * per_row
    assert counter.bytes <= columns + mamba + 2 * state.lengths.nbytes


# --- narrow models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual_in_fp32", [False, True])
@torch.no_grad()
def test_a_bf16_model_computes_what_its_weights_say(residual_in_fp32: bool) -> None:
    """Against a float64 model with the same rounded weights; states and decay rates are in fp32."""
    narrow = build_random_model("M-*M", dtype=torch.bfloat16, residual_in_fp32=residual_in_fp32)  # no router to flip
    exact = build_random_model("M-*M", dtype=torch.float64)
    exact.load_state_dict(narrow.state_dict())
    tokens = some_tokens(2, 300)
    logits = []
    for model in (narrow, exact):
        state = prefilled(model, list(tokens[:, :280]), capacity=300)
        logits.append(model.extend(tokens[:, 280:], state))
        wide = torch.float64 if model is exact else torch.float32
        assert logits[-1].dtype == wide
        for layer, pool in zip(model.context.layers, state.pools, strict=True):
            if isinstance(pool, MambaPool):
                assert {pool.ssm_state.dtype, layer.mixer.A_log.dtype, layer.mixer.dt_bias.dtype} == {wide}
    error = logits[0] - logits[1]
    assert error.square().mean().sqrt() < 0.05 * logits[1].std()
