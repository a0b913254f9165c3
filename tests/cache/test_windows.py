"""States of models with windows: the slots of windows slide, and hold what a state that never slides holds.

A state with room for a pass of `NEVER` tokens never slides. It is the reference, and `test_backbones` compares it with
the oracle.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from backbone_models import MASK, some_text, trained
from conftest import Result
from transformers import Gemma3TextConfig

from twotower import LLM, GenerationParams, Request, TwoTowerForCausalLM
from twotower.cache import kv_group, sliding_window
from twotower.cache.hybrid_cache import TowerState
from twotower.cache.kv_group import KVGroup
from twotower.cache.prefix_cache import PrefixCache
from twotower.cache.replica import DeviceTransfer, PendingTransfer, Replica
from twotower.cache.state_bytes import state_bytes
from twotower.config import GenericTwoTowerConfig
from twotower.engine import budget, core
from twotower.families import tower_spec
from twotower.ops.cpu import library
from twotower.runners.fused_cpu import FusedCPURunner

NEVER = 10_000
NAMES = ("gemma3_text", "mistral", "qwen2", "smollm3:windows")  # windows in all layers, or in some
CHECK = 17  # tokens of the longest pass
ROWS = 5
BACKBONES = Path(__file__).parents[2] / "docs" / "backbones.md"


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def keep_of(model: TwoTowerForCausalLM) -> int:
    return model.spec.windows[-1] - 1


def both(model: TwoTowerForCausalLM, rows: int = ROWS, shared: int | None = None) -> tuple[TowerState, TowerState]:
    """A state that slides, and one that never does."""
    return model.new_state(rows, 4, shared, CHECK), model.new_state(rows, 4, shared, NEVER)


def assert_same(model: TwoTowerForCausalLM, states: Sequence[TowerState], **tolerance: float) -> None:
    """Compares what both towers read."""
    one, two = states
    assert one.lengths.tolist() == two.lengths.tolist()
    masks = torch.full((one.rows, 6), MASK)
    half = torch.full((one.rows,), 0.5, dtype=torch.float64)
    limits = tolerance or {"rtol": 1e-9, "atol": 1e-9}
    found = [model.denoise(masks, half, model.reader(state.clone()).view()) for state in states]
    torch.testing.assert_close(*found, **limits)
    found = [model.extend(masks[:, :3], state.clone()) for state in states]
    torch.testing.assert_close(*found, **limits)


def extend(model: TwoTowerForCausalLM, states: Sequence[TowerState], *args: Any, **given: Any) -> None:
    found = [model.extend(args[0], state, *args[1:], **given) for state in states]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


# --- sliding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_check_and_its_rollback_across_the_seam(name: str) -> None:
    """The tokens move before the check for every place of the seam; then a part of the check is dropped."""
    model = trained(name)
    start = both(model)
    prompts = torch.tensor([some_text(40, seed=row) for row in range(ROWS)])
    for state in start:
        model.prefill(prompts, torch.tensor([40, 33, 12, 1, 0]), state)
    check = torch.tensor([some_text(CHECK, seed=20 + row) for row in range(ROWS)])
    slides = set()
    for offset in range(CHECK + 1):
        states = [state.clone() for state in start]
        before = first_of(states[0])
        extend(model, states, check)
        slides.add(before != first_of(states[0]))
        kept = torch.tensor([(offset + 5 * row) % (CHECK + 1) for row in range(ROWS)])
        for state in states:
            state.rollback(state.lengths - CHECK + kept)
        assert_same(model, states)
        extend(model, states, check.flip(1))
        assert_same(model, states)
        extend(model, start, prompts[:, offset : offset + 1])
    assert slides == {True, False}


def first_of(state: TowerState) -> list[int]:
    window = state.kv_groups[1].slots.window
    assert window is not None
    return window.first.tolist()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NAMES)
def test_any_sequence_of_operations(name: str, seed: int) -> None:
    """Ragged passes over some rows, rollbacks, resets, selections and snapshots, with shared slots or without."""
    rng, model = random.Random(100 * seed + NAMES.index(name)), trained(name)
    shared = 5 * 160 if seed == 0 else None
    states = list(both(model, ROWS, shared))
    lengths = [0] * ROWS
    for row in range(ROWS if shared else 0):
        for state in states:
            state.allocate(row, 160)
    for step in range(45):
        rows = sorted(rng.sample(range(ROWS), rng.randint(1, ROWS)))
        width = rng.choice([1, 1, 1, 5, CHECK, CHECK])
        counts = [rng.randint(0, width) for _ in rows]
        counts[0] = width
        if max(lengths) + width > 150:
            row = lengths.index(max(lengths))
            for state in states:
                state.reset(torch.tensor([row]))
                if shared:
                    state.free(row)
                    state.allocate(row, 160)
            lengths[row] = 0
            continue
        tokens = torch.tensor([some_text(width, seed=1000 * seed + 10 * step + row) for row in rows])
        every = len(rows) == ROWS and rng.random() < 0.5
        for state in states:
            state.max_seq_len = max(lengths)
            if step % 2:
                state.make_room(rows, width)
        found = [model.extend(tokens, s, torch.tensor(counts), None if every else torch.tensor(rows)) for s in states]
        for place, count in enumerate(counts):
            torch.testing.assert_close(found[0][place, :count], found[1][place, :count], rtol=1e-9, atol=1e-9)
        kept = [rng.choice([count, rng.randint(0, count)]) for count in counts]
        for row, count in zip(rows, kept, strict=True):
            lengths[row] += count
        for state in states:
            state.rollback(torch.tensor(lengths))
        if step % 4 == 0:
            assert_same(model, states)
        if shared is None and rng.random() < 0.15:
            order = torch.tensor(rng.sample(range(ROWS), ROWS))
            states = [state.select(order) for state in states]
            lengths = [lengths[row] for row in order.tolist()]
    assert sum(first_of(states[0])) > 0
    assert first_of(states[1]) == [0] * ROWS


@pytest.mark.parametrize("name", NAMES)
def test_fp32_kernels_read_slots_that_slide(name: str) -> None:
    """The kernels of this machine. `test_fused_cpu` and `test_triton` have all code paths."""
    model, exact = trained(name, torch.float32), trained(name)
    states = model.new_state(2, 4, None, CHECK), exact.new_state(2, 4, None, NEVER)
    text = torch.tensor([some_text(120, seed=row) for row in range(2)])
    for start in range(0, 120, 8):
        one, two = (
            m.extend(text[:, start : start + 8], state) for m, state in zip((model, exact), states, strict=True)
        )
        torch.testing.assert_close(one.double(), two, rtol=1e-3, atol=1e-3)
    block, half = torch.full((2, 30), MASK), torch.full((2,), 0.5, dtype=torch.float64)
    one, two = (
        m.denoise(block, half.to(m.dtype), m.reader(state).view())
        for m, state in zip((model, exact), states, strict=True)
    )
    torch.testing.assert_close(one.double(), two, rtol=1e-3, atol=1e-3)
    assert sum(first_of(states[0])) > 0
    assert first_of(states[1]) == [0, 0]
    compiled = not isinstance(library.library(), str)
    assert [runner.prepared > 0 for runner in model.context.runners if isinstance(runner, FusedCPURunner)] == [compiled]


def test_a_pass_longer_than_the_room_grows_it() -> None:
    model = trained("mistral")
    states = both(model)
    for width in (3, 60, 1, 20, 90):
        extend(model, states, torch.tensor([some_text(width, seed=row) for row in range(ROWS)]))
        assert_same(model, states)
    assert states[0].longest_pass == 90


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_windows_hold_their_tokens_and_one_pass(name: str) -> None:
    """The slots of windows do not grow with the text, and `state_bytes` says what a state has."""
    model = trained(name)
    size, keep = state_bytes(model.spec, model.dtype), keep_of(model)
    for tokens in (1, keep + CHECK - 1, keep + CHECK, keep + CHECK + 1, 400):
        state = model.new_state(1, tokens, None, CHECK)
        pools = sum(part.nbytes for _, pool in state.attention_pools for part in (pool.k, pool.v))
        spare = 2 * len(state.attention_pools) * model.spec.attention.head_dim * 8  # type: ignore[union-attr]
        assert size.row + pools - spare == size.of_text(tokens, CHECK)
        assert state.kv_groups[1].slots.total == min(tokens, keep + CHECK)
    state = model.new_state(1, 400, None, CHECK)
    before = state.nbytes
    model.prefill(torch.tensor([some_text(400)]), torch.tensor([400]), state)
    grown = state.nbytes - before
    room = max(model.prefill_chunk, CHECK) - CHECK  # for the chunks of this prompt
    assert grown == size.window_token * room


def test_the_documented_memory_of_windows(cli: Callable[..., Result], tmp_path: Path) -> None:
    """The table of docs/backbones.md, and what `twotower info` counts for the same shape."""
    shape: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 1152, "intermediate_size": 64, "num_hidden_layers": 26,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
        "max_position_embeddings": 32768,
    }  # fmt: skip
    backbones = [Gemma3TextConfig(**shape, **more).to_dict() for more in ({"layer_types": ["full_attention"] * 26}, {})]
    configs = [GenericTwoTowerConfig(backbone=backbone, mask_token_id=4) for backbone in backbones]
    sizes = [state_bytes(tower_spec(config), torch.bfloat16) for config in configs]
    table = re.findall(r"^\| ([\d,]+) \| ([\d.]+) MiB \| ([\d.]+) MiB \|$", BACKBONES.read_text(), re.MULTILINE)
    assert [tokens for tokens, *_ in table] == ["1,024", "8,192", "32,768"]
    for tokens, *figures in table:
        found = [size.of_text(int(tokens.replace(",", "")), 512) / 2**20 for size in sizes]
        assert [f"{size:.1f}" for size in found] == figures
    configs[1].save_pretrained(tmp_path)
    state = json.loads(cli("info", tmp_path / "config.json", "--json").out)["state"]
    scale = getattr(torch, state["dtype"]).itemsize // 2
    assert state["full_context"] == scale * sizes[1].of_text(32768, 512)
    assert state["windows"] == scale * 22 * 1024 * (511 + 512)
    assert state["per_token"] == scale * 4 * 1024


def test_entries_of_the_prefix_cache_hold_the_window() -> None:
    model = trained("gemma3_text")
    keep, text = keep_of(model), some_text(150, seed=3)
    caches = PrefixCache(64, 1 << 30), PrefixCache(8, 1 << 30)  # chunks above and below the window
    for cache in caches:
        filled, empty = both(model, 1)
        for start in range(0, 144, cache.chunk):
            end = min(start + cache.chunk, 144)
            model.extend(torch.tensor([text[start:end]]), filled)
            cache.insert(filled, 0, text, end)
        for node in cache.nodes.values():
            keys, near = node.snapshot.keys
            assert {pair.k.shape[1] for pair in keys} == {cache.chunk}
            assert {pair.k.shape[1] for pair in near} == {min(cache.chunk, keep)}
        restored = model.new_state(1, 200, None, CHECK)
        found = cache.restore(restored, 0, text)
        assert found == 144 // cache.chunk * cache.chunk
        model.prefill(torch.tensor([text[:found]]), torch.tensor([found]), empty)
        restored.max_seq_len = found
        assert_same(model, (restored, empty))


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_divided_among_both_kinds_of_slots(name: str) -> None:
    model = trained(name)
    rng = random.Random(0)
    for _ in range(60):
        rows, length, block = rng.randint(1, 20), rng.randint(1, 400), rng.choice([1, 16, 100])
        memory = rng.randint(20_000, 20_000_000)
        least = budget.memory_for(model, 1, length + block, block)
        if memory < least:
            continue
        got, slots, prefix = budget.divide_memory(model, rows, length, block, 16, memory)
        state = model.new_state(got, 0, slots, sliding_window.longest_pass_of(model.spec, block))
        spare = sum(2 * pool.k[0].nbytes for _, pool in state.attention_pools)
        assert state.nbytes - spare - 4 * 8 * got + prefix <= memory  # without spare vectors and lengths
        assert slots >= length + block
        assert state.has_room_for(length + block)
        assert got == rows or slots < (got + 1) * (length + block)
        full = LLM.memory_for(model, rows, length, block)
        assert budget.divide_memory(model, rows, length, block, 16, full)[0] == rows


def test_the_largest_text_that_fits_is_named() -> None:
    model = trained("gemma3_text")
    (need,) = budget.needs_of(model, 1000, 16, 16, None, False)
    for tokens in (1, 50, 200, 999):
        free = need.logits + need.text(tokens)
        assert need.tokens_that_fit(free) == tokens
        assert need.tokens_that_fit(free - 1) == tokens - 1


# --- engine and replica ---------------------------------------------------------------------------------------------


def requests() -> list[Request]:
    """Long texts of every mode; prompts are beginnings of one text."""
    text, asked = some_text(150, seed=9), []
    for mode, length, options in (
        ("ar", 150, {}),
        ("verified", 120, {"draft_steps": 1, "block_size": 9}),
        ("verified", 37, {"draft_steps": 1, "block_size": CHECK, "acceptance": 0.01}),
        ("diffusion", 101, {"block_size": 16, "steps_per_block": 2}),
        ("diffusion", 5, {"block_size": 30, "steps_per_block": 3}),
        ("mock_ar", 90, {}),
    ):
        params = GenerationParams.of(mode=mode, max_new_tokens=70, mask_token_id=MASK, **options)
        asked.append(Request(text[:length], params))
    return asked


def run(model: TwoTowerForCausalLM, length: int = 220, **given: Any) -> list[list[int]]:
    """Texts of `requests`, run twice, with hits in the prefix cache in the second round."""
    with patch.object(core, "PROMPT_CHUNK", 16):
        llm = LLM(model, rows=3, length=length, block_size=30, **given)
        for _ in range(2):
            results = llm.generate(requests())
        assert llm.stats().reused_tokens > (300 if "memory" not in given else 0)
        llm.close()
    assert not [result.error for result in results if result.error]
    return [result.tokens for result in results]


@pytest.mark.parametrize("name", [*NAMES[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[2:])])
def test_long_texts_in_an_engine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that slide equal texts that do not, on one device and on two, also with room for two texts only."""
    model = trained(name)
    with patch.object(core, "longest_pass_of", return_value=NEVER):
        expected = run(model)
    monkeypatch.setattr(sliding_window, "SHORTEST_CHUNK", 8)  # so that a row slides several times
    slides = Counted(KVGroup.make_room)
    with patch.object(KVGroup, "make_room", slides.method):
        assert run(model) == expected
    assert slides.moved > 20
    assert run(model, memory=LLM.memory_for(model, 2, 220, 30)) == expected
    monkeypatch.setattr(model, "transfer", DeviceTransfer())
    assert run(model) == expected


class Counted:
    """Counts the calls of `make_room` that move tokens."""

    def __init__(self, real: Callable[..., None]) -> None:
        self.moved, counter = 0, self

        def method(group: KVGroup, *args: Any) -> None:
            before = group.slots.window and group.slots.window.first
            real(group, *args)
            counter.moved += before is not (group.slots.window and group.slots.window.first)

        self.method = method


class Interrupted:
    """Forwards calls, and raises after one of them."""

    def __init__(self, real: Callable[..., Any], at: int, error: BaseException) -> None:
        self.real, self.at, self.error, self.calls = real, at, error, 0

    def __call__(self, *args: Any) -> Any:
        result = self.real(*args)
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return result


def test_an_exception_while_tokens_move() -> None:
    model = trained("mistral")
    with patch.object(core, "longest_pass_of", return_value=NEVER):
        expected = run(model)
    writes = Interrupted(kv_group.write_slots, 20, ValueError("injected"))
    with patch.object(sliding_window, "SHORTEST_CHUNK", 8), patch.object(kv_group, "write_slots", writes):
        assert run(model) == expected
    assert writes.calls > 40


@pytest.mark.parametrize(
    ("one_by_one", "at"), [(one, at) for one in (True, False) for at in range(1, 13 if one else 7)]
)
def test_an_interrupted_move_leaves_the_state_as_it_was(one_by_one: bool, at: int) -> None:
    """KeyboardInterrupt after any write of a move, of all rows at once or one by one; then the pass is repeated."""
    model = trained("gemma3_text")
    states = both(model, 2)
    text = torch.tensor([some_text(40, seed=row) for row in range(2)])
    extend(model, states, text[:, :CHECK])
    extend(model, states, text[:, CHECK : 2 * CHECK], torch.tensor([CHECK, 9]))
    writes = Interrupted(kv_group.write_slots, at, KeyboardInterrupt())
    moved = patch.object(kv_group, "MOVED_BYTES", 1 if one_by_one else 1 << 20)
    with moved, patch.object(kv_group, "write_slots", writes):
        with pytest.raises(KeyboardInterrupt):
            model.extend(text[:, :8], states[0])
        assert_same(model, states)
        extend(model, states, text[:, :8])
        assert_same(model, states)
    assert first_of(states[0]) == [11, 3]
    assert writes.calls == at + (12 if one_by_one and at <= 6 else 6)


@pytest.mark.parametrize("known", [True, False], ids=["pending", "appended"])
@pytest.mark.parametrize("name", NAMES)
def test_a_replica_follows_with_steps_of_any_size(name: str, known: bool) -> None:
    """known: whether the host says which tokens the replica lacks."""
    model, rng = trained(name), random.Random(5)
    state, reference = both(model, 2, 2 * 600 if known else None)
    for row in range(2 if known else 0):
        state.allocate(row, 600)
        reference.allocate(row, 600)
    replica = Replica(state, torch.device("cpu"), DeviceTransfer())
    half, masks = torch.full((2,), 0.5, dtype=torch.float64), torch.full((2, 6), MASK)
    lengths, shown = [0, 0], [0, 0]
    for step in range(30):
        if step == 14:  # a new text in a slot
            for each in (state, reference):
                each.reset(torch.tensor([1]))
            lengths[1] = shown[1] = 0
        for _ in range(rng.choice([1, 1, 2, 4])):
            tokens = torch.tensor([some_text(9, seed=rng.randrange(10**6)) for _ in range(2)])
            counts = [rng.randint(0, 9), rng.randint(0, 9)]
            extend_rows = [
                model.extend(tokens, each, torch.tensor(counts), logits=False) for each in (state, reference)
            ]
            assert extend_rows == [None, None]
            lengths = [length + count for length, count in zip(lengths, counts, strict=True)]
        pending = [PendingTransfer(row, shown[row], lengths[row]) for row in range(2) if shown[row] < lengths[row]]
        view = replica.view(None, pending if known else None)
        shown = list(lengths)
        found = [model.denoise(masks, half, each) for each in (view, reference.view())]
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
