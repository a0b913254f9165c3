"""`CUDAGraphRunner` on a CPU: the capturer traces the operations of a pass and replays them.

Like a CUDA graph, a trace fixes all addresses and all numbers of the host. Tracing fails for a pass that reads values
on the host.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import build_random_model
from shaped_models import shaped
from test_engine import alone, some_request
from test_native import only_torch
from tiny_backbones import two_tower
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from twotower import LLM, GenerationParams, TwoTowerForCausalLM, options
from twotower.cache.layer_cache import MambaCache
from twotower.denoiser_fields import DenoiserConfig
from twotower.engine import Request
from twotower.model.layer_io import AttentionMetadata
from twotower.model.tower import PassInputs, PassResult, Tower
from twotower.ops import registry
from twotower.ops.reference.attention import CachedKV
from twotower.ops.self_check import tensors_of
from twotower.runners import cuda_graph
from twotower.runners.captured_step import CapturedStep
from twotower.runners.cuda_graph import CapturedGraph, CUDAGraphRunner
from twotower.runners.graph_capture import Capturer


def graphs(tower: Tower) -> CUDAGraphRunner:
    """The CUDA graph runner of a tower."""
    (runner,) = (runner for runner in tower.runners if isinstance(runner, CUDAGraphRunner))
    return runner


@pytest.fixture
def model() -> TwoTowerForCausalLM:
    return build_random_model("M*E", dtype=torch.float64)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Captures passes on the CPU by tracing torch operations → a list that grows with each capture."""
    recordings: list[int] = []

    def record(_: Capturer, compute: Callable[[], PassResult]) -> tuple[Callable[[], object], PassResult]:
        recordings.append(len(recordings))
        traced = make_fx(lambda: list(tensors_of(compute())))()
        result = compute()

        def replay() -> None:
            for place, value in zip(tensors_of(result), traced(), strict=True):
                place.copy_(value)

        for place in tensors_of(result):
            place.fill_(
                float("nan") if place.is_floating_point() else -1
            )  # so that results of the first run are not taken for those of a replay
        return replay, result

    only_torch(monkeypatch)
    gathered = tuple(b for b in registry.REGISTRY["experts"] if b.name == "gathered")  # for a GPU without bf16
    monkeypatch.setattr(registry, "REGISTRY", registry.REGISTRY | {"experts": gathered})
    monkeypatch.setattr(cuda_graph, "cuda_graph_unsupported_reason", lambda device: None)
    monkeypatch.setattr(Capturer, "__call__", record)
    monkeypatch.setattr(cuda_graph, "EAGER_PASSES", 0)
    return recordings


@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
def test_an_engine_writes_the_same_from_few_recordings(
    model: TwoTowerForCausalLM, made: list[int], monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    """Rows of all modes and lengths start and end, contexts grow, and slots are reused."""
    rng = random.Random(5)
    requests = [some_request(rng) for _ in range(8)]
    requests = [replace(one, params=replace(one.params, block_size=2, max_new_tokens=9)) for one in requests]
    llm = LLM(model, rows=2, length=160)
    llm.core.async_scheduling = ahead
    written = [output.tokens for output in llm.generate(requests)]
    assert 4 <= len(made) <= 16
    with monkeypatch.context() as patch:
        patch.setattr(CUDAGraphRunner, "run", lambda *_: None)
        assert written == [alone(model, request).tokens for request in requests]
    assert not any(graphs(tower).disabled_reason for tower in (model.context, model.denoiser))


def test_a_recording_serves_other_numbers_of_rows_and_other_contexts(
    model: TwoTowerForCausalLM, made: list[int]
) -> None:
    def passes(tokens: Tensor) -> Tensor:
        state = model.new_state(8, 0, 8 * 64)
        for row in range(8):
            state.allocate(row, 64)
        slots = torch.randperm(8)[: len(tokens)]
        with torch.no_grad():
            first = model.extend(tokens, state, rows=slots)
            second = model.extend(tokens.flip(1), state, rows=slots)
            drafted = model.denoise(tokens, torch.rand(len(tokens)).double(), state.view(slots))
        assert first is not None
        assert second is not None
        return torch.cat([first, second, drafted], dim=1)

    for rows in (3, 4):
        tokens = torch.randint(64, (rows, 5))
        torch.manual_seed(rows)
        replayed = passes(tokens)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CUDAGraphRunner, "run", lambda *_: None)
            torch.manual_seed(rows)
            assert torch.allclose(replayed, passes(tokens), rtol=1e-11, atol=1e-11)
    # Four rows: extend on an empty and on a filled context, and a denoising pass; each state has pools of its own.
    assert len(made) <= 6


PREFIX_CAUSAL = DenoiserConfig(prediction_shift=1, block_attention="prefix_causal")
# Biases, a window and a tied head; norms of heads; gated experts and a softmax router; gated DeltaNet.
BACKBONES = ["qwen2", "qwen3", "mixtral", pytest.param("qwen3_5_text", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", BACKBONES)
def test_recordings_of_other_backbones(name: str, made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary position embeddings follow each row's own position, in few recordings."""
    one_layer = {"num_hidden_layers": 1, "layer_types": ["full_attention"]} if name in ("qwen3", "mixtral") else {}
    model = two_tower(name, torch.float64, **one_layer)
    rng = random.Random(6)
    requests = [some_request(rng) for _ in range(6)]
    requests = [replace(one, params=replace(one.params, block_size=3, max_new_tokens=9)) for one in requests]
    written = [output.tokens for output in LLM(model, rows=2, length=160).generate(requests)]
    assert 4 <= len(made) <= 16
    with monkeypatch.context() as patch:
        patch.setattr(CUDAGraphRunner, "run", lambda *_: None)
        assert written == [alone(model, request).tokens for request in requests]
    assert not any(graphs(tower).disabled_reason for tower in (model.context, model.denoiser))


@torch.no_grad()
def test_recordings_of_a_denoiser_that_lacks_layers(made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, state = shaped("one window"), shaped("one window").new_state(2, 64)
    monkeypatch.setattr(model.context, "runners", ())
    block, t = torch.randint(4, 60, (2, 3)), torch.tensor([1.0, 0.5], dtype=torch.float64)
    for _ in range(2):
        model.extend(torch.randint(4, 60, (2, 20)), state)
        replayed = model.denoise(block, t, state.view())
        with monkeypatch.context() as patch:
            patch.setattr(CUDAGraphRunner, "run", lambda *_: None)
            torch.testing.assert_close(replayed, model.denoise(block, t, state.view()), rtol=1e-11, atol=1e-11)
    assert len(made) == 1
    assert len(graphs(model.denoiser).graphs) == 1


def test_recordings_of_long_rope(made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording takes the frequencies of each row; rows below, across and beyond the original length, together."""
    model, replay = two_tower("phi3:longrope", torch.float64, num_hidden_layers=1), CapturedGraph.run
    kinds = {"ar": {}, "diffusion": {"steps_per_block": 2}, "verified": {"draft_steps": 1}}
    requests = [
        Request(
            [4 + i % 50 for i in range(length)], GenerationParams.of(mode=mode, max_new_tokens=7, block_size=3, **own)
        )
        for length, (mode, own) in zip((60, 70, 62), kinds.items(), strict=True)
    ]
    replayed: set[tuple[bool, ...]] = set()

    def noting(graph: CapturedGraph, inputs: PassInputs) -> PassResult:
        assert inputs.meta.long is not None
        replayed.add(tuple(inputs.meta.long.tolist()))
        return replay(graph, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(CapturedGraph, "run", noting)
        written = [output.tokens for output in LLM(model, rows=2, length=160).generate(requests)]
    assert any(len(set(long)) == 2 for long in replayed)
    assert len(made) <= 24
    with monkeypatch.context() as patch:
        patch.setattr(CUDAGraphRunner, "run", lambda *_: None)
        assert written == [alone(model, request).tokens for request in requests]
    assert not any(graphs(tower).disabled_reason for tower in (model.context, model.denoiser))


@torch.no_grad()
def test_a_recording_serves_rounds_of_any_width(made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph of 4 rows × 8 tokens: rounds of 5 to 8 positions, each row with its own masks, slot and length.

    After a round each row keeps a part of its prefix, and the next round begins there.
    """
    model = two_tower("nemotron_h", torch.float64, rank=3)
    order = torch.tensor([5, 0, 2, 3])
    rounds = (
        ([8, 1, 4, 6], [3, 1, 2, 6], [2, 1, 1, 6]),  # tokens of each row, those before its first mask, and those kept
        ([7, 7, 5, 2], [7, 1, 1, 1], [3, 1, 0, 1]),
        ([5, 3, 4], [4, 3, 1], [4, 2, 1]),
    )

    def played() -> list[Tensor]:
        generator, found = torch.Generator().manual_seed(3), []
        state = model.new_state(6, 0, 6 * 64)
        for row in range(6):
            state.allocate(row, 64)
        prompt = torch.randint(4, 64, (4, 6), generator=generator)
        model.prefill(prompt, torch.tensor([6, 1, 3, 5]), state, order)
        for widths, prefix, kept in rounds:
            slots, length = order[: len(widths)], max(widths)
            tokens = torch.randint(4, 64, (len(widths), length), generator=generator)
            before, first = state.lengths.clone(), torch.tensor(prefix)
            tokens = torch.where(torch.arange(length) >= first[:, None], 3, tokens)
            lengths = torch.tensor(widths) if min(widths) < length else None
            logits = model.extend(tokens, state, lengths, slots, prefix=first)
            assert logits is not None
            assert state.lengths[slots].tolist() == (before[slots] + first).tolist()
            found += [own[:width] for own, width in zip(logits, widths, strict=True)]
            state.rollback(before.index_add(0, slots, torch.tensor(kept)))
        return found

    replayed = played()
    recorded = [graph.tokens.shape for graph in graphs(model.context).graphs.values()]
    assert recorded.count((4, 8)) == 1
    assert len(recorded) == 2  # and one for prompts
    with monkeypatch.context() as patch:
        patch.setattr(CUDAGraphRunner, "run", lambda *_: None)
        for own, expected in zip(replayed, played(), strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-11, atol=1e-11)
    assert not graphs(model.context).refused


@pytest.mark.parametrize("name", ["nemotron_h", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_recordings_of_a_model_with_adapters(name: str, made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of all widths replay graphs of a few; rows of AR, prompts and rounds share passes."""
    model = two_tower(name, torch.float64, rank=3)
    kinds = ({"mode": "verified", "draft_steps": 1}, {"mode": "diffusion", "confidence_threshold": 0.1}, {"mode": "ar"})
    requests = [
        Request([5 + i, 9, 7, 11][: 1 + i % 4], GenerationParams.of(max_new_tokens=8, block_size=6, **kinds[i % 3]))
        for i in range(5)
    ]
    widths: set[tuple[int, int]] = set()
    real = CapturedGraph.run

    def noting(graph: CapturedGraph, inputs: PassInputs) -> PassResult:
        if inputs.meta.prefix is not None:
            widths.add(tuple(graph.tokens.shape))
        return real(graph, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(CapturedGraph, "run", noting)
        written = [output.tokens for output in LLM(model, rows=2, length=160).generate(requests)]
    # 6, the block size, is below the next power of two; in the first step of a request it is not known to repeat.
    assert {6} < {width for _, width in widths} <= {2, 4, 6, 8}
    assert len(made) <= 16
    with monkeypatch.context() as patch:
        patch.setattr(CUDAGraphRunner, "run", lambda *_: None)
        assert written == [alone(model, request).tokens for request in requests]
    assert not graphs(model.context).refused


@pytest.mark.parametrize("choice", [DenoiserConfig.with_adapters(3, gate="everywhere"), PREFIX_CAUSAL])
def test_recordings_of_other_denoisers_with_a_prefix(
    choice: DenoiserConfig, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters at all positions of a block, and a tower with prefix-causal attention."""
    model = two_tower("llama", torch.float64, denoiser=choice, num_hidden_layers=1)
    params = GenerationParams.of(mode="diffusion", max_new_tokens=7, block_size=4)
    requests = [Request([5 + i, 9, 7], params) for i in range(2)]
    written = [output.tokens for output in LLM(model, rows=2, length=160).generate(requests)]
    tower = model.denoiser or model.context
    kinds = {graph.static.meta.prefix is not None for graph in graphs(tower).graphs.values()}
    assert kinds == ({True} if model.denoiser else {True, False})
    with monkeypatch.context() as patch:
        patch.setattr(CUDAGraphRunner, "run", lambda *_: None)
        assert written == [alone(model, request).tokens for request in requests]
    assert not graphs(tower).refused


class _NoTensorsFromTheHost(TorchFunctionMode):
    """Fails where numbers of the host become a tensor of another device, which a CUDA graph cannot capture."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = torch.device(kwargs.get("device") or "cpu")
        assert func not in (torch.tensor, torch.as_tensor) or device.type == "cpu", "numbers are copied to the device"
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", [*BACKBONES, "phi3:longrope"])
@torch.no_grad()
def test_a_second_pass_copies_nothing_to_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for a GPU; the first pass keeps the inverse frequencies there."""
    only_torch(monkeypatch)
    tower = two_tower(name).context.to("meta")
    tokens, start = torch.zeros(2, 3, dtype=torch.long, device="meta"), torch.zeros(2, dtype=torch.long, device="meta")
    inputs = PassInputs(tokens, AttentionMetadata(start=start))
    tower.layer_by_layer(*inputs)
    with _NoTensorsFromTheHost():
        assert tower.layer_by_layer(*inputs)[0].is_meta
        with pytest.raises(AssertionError, match="copied to the device"):
            torch.tensor([1.0], device="meta")


@torch.no_grad()
def test_layers_with_several_row_layouts(made: list[int]) -> None:
    """A recording keeps apart the caches of layers that have rows of other lengths."""
    tower = build_random_model("**-", dtype=torch.float64).context
    assert isinstance(tower, Tower)
    tokens = torch.randint(64, (2, 3))
    pools = [torch.randn(400, 12, dtype=torch.float64) for _ in range(4)]
    start, stride = torch.tensor([0, 100]), torch.tensor([50, 50])
    meta = AttentionMetadata(token_mask=torch.ones(2, 3, dtype=torch.bool))

    def inputs(first: list[int], second: list[int], shared: bool = False) -> PassInputs:
        lengths = torch.tensor(first), torch.tensor(second)
        both = (lengths[0], lengths[0]) if shared else lengths
        caches = [CachedKV(*pools[2 * i : 2 * i + 2], start, stride, own, 40, 0) for i, own in enumerate(both)]
        return PassInputs(tokens, meta, [*caches, None])

    runner = graphs(tower)
    for given in (inputs([3, 40], [1, 7]), inputs([30, 2], [0, 5]), inputs([3, 40], [], shared=True)):
        expected = tower.layer_by_layer(*given)[0]
        found = runner.run(tower, given)
        assert found is not None
        assert torch.allclose(found[0], expected, rtol=1e-11, atol=1e-11)
    assert len(made) == 2
    assert runner.disabled_reason is None


def test_replaced_modules_and_hooks_disable_graphs(model: TwoTowerForCausalLM, made: list[int]) -> None:
    """A graph would not call a replaced module."""
    tokens = torch.randint(64, (2, 3))

    def read() -> Tensor:
        with torch.no_grad():
            logits = model.extend(tokens, model.new_state(2, 8))
        assert logits is not None
        return logits

    before = read()
    assert len(made) == 1
    calls: list[Any] = []
    handle = model.context.layers[0].register_forward_hook(lambda *_: calls.append(1))
    assert torch.allclose(read(), before)
    assert calls == [1]
    handle.remove()
    model.context.norm_f.weight = torch.nn.Parameter(2 * model.context.norm_f.weight)
    assert torch.allclose(read(), 2 * before)
    assert len(made) == 2


def test_a_recording_that_differs_is_refused_for_its_shape(
    model: TwoTowerForCausalLM, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers run this shape one by one, without another capture. Other shapes are captured."""
    real = Capturer.__call__

    def wrong(self: Capturer, compute: Callable[[], PassResult]) -> tuple[Callable[[], object], PassResult]:
        replay, result = real(self, compute)
        return lambda: (replay(), result[0].mul_(1.0 + 1e-15)), result

    tokens = torch.randint(64, (2, 3))
    with torch.no_grad():
        expected = TwoTowerForCausalLM.extend(model, tokens, model.new_state(2, 8))
    for capture, words in (
        (wrong, "differs from the layers on the same inputs: result 0"),
        (failing, "raised Runtime"),
    ):
        graphs(model.context).release()
        state = model.new_state(2, 80)
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(Capturer, "__call__", capture)
            state.reset(torch.arange(2))
            with pytest.warns(RuntimeWarning, match=f"not used for passes of 2 × 3 tokens on cpu: one {words}"):
                assert torch.equal(model.extend(tokens, state), expected)
            state.max_seq_len = 0
            state.reset(torch.arange(2))
            assert torch.equal(model.extend(tokens, state), expected)
        count = len(made)
        with torch.no_grad():
            model.extend(tokens[:, :2], model.new_state(2, 8))
        assert len(made) == count + 1
        assert graphs(model.context).disabled_reason is None


def failing(self: Capturer, compute: Callable[[], PassResult]) -> tuple[Callable[[], object], PassResult]:
    raise RuntimeError("operation not permitted when stream is capturing")


def test_a_time_limit_of_the_caller_turns_no_graphs_off(
    model: TwoTowerForCausalLM, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(self: Capturer, compute: Callable[[], PassResult]) -> tuple[Callable[[], object], PassResult]:
        raise TimeoutError("cut off after 30 s")

    def passes() -> None:
        for _ in range(4):
            model.extend(torch.randint(64, (2, 3)), model.new_state(2, 8))

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(Capturer, "__call__", late)
        with pytest.raises(TimeoutError):
            passes()
    assert graphs(model.context).disabled_reason is None


def test_after_many_refusals_nothing_is_captured(
    model: TwoTowerForCausalLM, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graph, "MAX_REFUSED", 2)
    monkeypatch.setattr(Capturer, "__call__", failing)
    one, where = "one raised RuntimeError: operation not permitted", "for passes of 1 × 1 tokens "
    for length, words in ((1, f"not used {where}on cpu: {one}"), (2, f"not used for any pass: {one}")):
        with torch.no_grad(), pytest.warns(RuntimeWarning, match=words):
            model.extend(torch.randint(64, (1, length)), model.new_state(1, 8))
    with torch.no_grad():
        model.extend(torch.randint(64, (1, 3)), model.new_state(1, 8))
    assert len(graphs(model.context).refused) == 2
    assert graphs(model.context).disabled_reason is not None


@pytest.mark.parametrize("chained", [False, True])
def test_out_of_memory_is_no_refusal(
    model: TwoTowerForCausalLM, made: list[int], monkeypatch: pytest.MonkeyPatch, chained: bool
) -> None:
    """The layers run, graphs are freed, and the shape is captured again later. A capture may end with another error."""
    monkeypatch.setattr(cuda_graph, "PAUSE", 2)

    def full(self: Capturer, compute: Callable[[], PassResult]) -> tuple[Callable[[], object], PassResult]:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except torch.OutOfMemoryError:
            if not chained:
                raise
            raise RuntimeError("capture ended")  # noqa: B904  as torch.cuda.graph does

    state = model.new_state(1, 64)
    with torch.no_grad():
        model.extend(torch.randint(64, (1, 2)), state)
        assert len(graphs(model.context).graphs) == 1
        with monkeypatch.context() as patch:
            patch.setattr(Capturer, "__call__", full)
            model.extend(torch.randint(64, (1, 3)), state)
        assert not graphs(model.context).graphs
        for pause in (True, True, False):
            model.extend(torch.randint(64, (1, 3)), state)
            assert bool(graphs(model.context).graphs) != pause
    assert not graphs(model.context).refused


def test_a_shape_is_captured_at_its_third_pass(
    model: TwoTowerForCausalLM, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graph, "EAGER_PASSES", 2)
    state, found = model.new_state(1, 64), []
    with torch.no_grad():
        for length in (1, 2, 1, 1, 2, 3, 1, 2):
            model.extend(torch.randint(64, (1, length)), state)
            found.append(len(made))
    assert found[:3] == [0, 0, 0]
    assert found[-1] <= 2


def test_prompts_of_any_length_are_not_captured(model: TwoTowerForCausalLM, made: list[int]) -> None:
    """An engine repeats steps of one token and blocks; in earlier versions each length of a prompt was captured."""
    llm = LLM(model, rows=1, length=64)
    lengths = set()
    real = CapturedGraph.run

    def noting(graph: CapturedGraph, inputs: PassInputs) -> PassResult:
        lengths.add(inputs.tokens.shape[1])
        return real(graph, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CapturedGraph, "run", noting)
        for mode in ("ar", "diffusion"):
            params = GenerationParams.of(mode=mode, max_new_tokens=6, block_size=4)
            llm.generate([Request(list(range(5, 5 + length)), params) for length in (3, 6, 7)])
    assert lengths == {1, 4, llm.core.blocks.size}


def test_graphs_are_evicted_by_bytes(
    model: TwoTowerForCausalLM, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least recently used graph is freed first; the newest stays, whatever its size."""
    runner, state = graphs(model.context), model.new_state(1, 64)

    def extend(length: int) -> None:
        with torch.no_grad():
            model.extend(torch.randint(64, (1, length)), state)

    extend(4)
    assert runner.nbytes > 0
    monkeypatch.setattr(cuda_graph, "graph_bytes_limit", lambda device: 2 * runner.nbytes // len(runner.graphs))
    for length in (1, 2, 1, 3):
        extend(length)
    assert runner.nbytes <= cuda_graph.graph_bytes_limit(torch.device("cpu"))
    monkeypatch.setattr(cuda_graph, "graph_bytes_limit", lambda device: 0)
    extend(2)
    assert len(runner.graphs) == 1


def test_graphs_of_replaced_weights_are_freed(model: TwoTowerForCausalLM, made: list[int]) -> None:
    state = model.new_state(1, 64)
    with torch.no_grad():
        for length in (1, 2):
            model.extend(torch.randint(64, (1, length)), state)
        assert len(graphs(model.context).graphs) == 2
        model.context.norm_f.weight = torch.nn.Parameter(2 * model.context.norm_f.weight)
        model.extend(torch.randint(64, (1, 1)), state)
    assert len(graphs(model.context).graphs) == 1


def test_a_recording_copies_few_inputs(model: TwoTowerForCausalLM, made: list[int]) -> None:
    """The modulation of all layers is one tensor, and Mamba states are read in their pools."""
    state = model.new_state(3, 64)
    rows = torch.tensor([2, 0])
    with torch.no_grad():
        for _ in range(2):
            model.extend(torch.randint(64, (2, 3)), state, rows=rows)
            model.denoise(torch.randint(64, (2, 3)), torch.rand(2).double(), state.view(rows))
    for tower in (model.context, model.denoiser):
        for graph in graphs(tower).graphs.values():
            assert len(graph.inputs) <= 7  # tokens, start, slots, three of keys and values, modulation
            pools = [own for _, pool in state.mamba_pools for own in (pool.conv_window, pool.ssm_state)]
            static = [own for own in graph.static.past if isinstance(own, MambaCache)]
            read = [part for own in static for part in own[:2]]
            assert [part.data_ptr() for part in read] == [part.data_ptr() for part in pools]


def test_rows_of_an_earlier_pass_select_no_experts(made: list[int]) -> None:
    """A pass of 3 rows in a graph of 4, after a pass of 4: the surplus row is padding again."""
    model = build_random_model("E", dtype=torch.float64)
    tower, tokens = model.context, torch.arange(4).view(4, 1) * 13 % 64
    runner = graphs(tower)
    with torch.no_grad():
        for count in (4, 3):
            meta = AttentionMetadata(token_mask=torch.ones(count, 1, dtype=torch.bool))
            assert runner.run(tower, PassInputs(tokens[:count], meta, [None])) is not None
        (graph,) = runner.graphs.values()
        static = graph.static
        assert static.meta.token_mask is not None
        assert static.meta.token_mask.flatten().tolist() == [True, True, True, False]
        choice, _ = tower.layers[0].mixer.gate(tower.embed(static.tokens).flatten(0, 1))
        routed = static.meta.with_representative().route_padding(choice)
    assert set(choice[3].tolist()) != set(choice[0].tolist())
    assert set(routed[3].tolist()) == set(routed[0].tolist())


@pytest.mark.parametrize("pattern", ["M*E", "M"])
def test_steps_as_one_graph(pattern: str, made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With graph_steps, greedy steps replay the states, the head and the choice too, and the texts stay the same."""
    model = build_random_model(pattern, dtype=torch.float64)
    modes = ({"mode": "ar"}, {"mode": "diffusion", "block_size": 3}, {"mode": "ar", "temperature": 1.0, "seed": 4})
    requests = [
        Request([5 + i, 9, 7][: 1 + i % 3], GenerationParams.of(max_new_tokens=7 + i, **modes[kind]))
        for i, kind in enumerate((0, 0, 1, 0, 0, 2))
    ]
    replayed: list[int] = []
    real = CapturedStep.run

    def noting(step: CapturedStep, *given: Tensor) -> Any:
        replayed.append(len(given[0]))
        return real(step, *given)

    monkeypatch.setattr(CapturedStep, "run", noting)
    expected = [output.tokens for output in LLM(model, rows=2, length=64).generate(requests)]
    assert not replayed  # the option is off until it is measured
    with options.override(graph_steps=True):
        llm = LLM(model, rows=2, length=64)
        assert [output.tokens for output in llm.generate(requests)] == expected
    assert set(replayed) == {1, 2}
    assert not graphs(model.context).refused


def test_each_tower_has_a_memory_pool(model: TwoTowerForCausalLM, made: list[int]) -> None:
    """Graphs of one pool share intermediate memory: a graph of the other tower must not write into it."""
    assert graphs(model.context)._pool is not graphs(model.denoiser)._pool


def test_few_are_kept(model: TwoTowerForCausalLM, made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "MAX_GRAPHS", 2)
    with torch.no_grad():
        for length in (1, 2, 3, 1):
            model.extend(torch.randint(64, (1, length)), model.new_state(1, 8))
    assert len(graphs(model.context).graphs) == 2
    assert len(made) == 4


def test_gradients_and_many_tokens_are_left_to_the_layers(model: TwoTowerForCausalLM, made: list[int]) -> None:
    assert isinstance(model.context, Tower)
    model.extend(torch.randint(64, (2, 3)), model.new_state(2, 8))
    with torch.no_grad():
        model.extend(torch.randint(64, (cuda_graph.MAX_TOKENS + 1, 1)), model.new_state(cuda_graph.MAX_TOKENS + 1, 8))
    assert not made


def test_on_a_processor_nothing_is_recorded() -> None:
    assert cuda_graph.cuda_graph_unsupported_reason(torch.device("cpu")) == "needs CUDA"
    assert cuda_graph.cuda_graph_unsupported_reason(torch.device("cuda")) is None
    with options.override(graphs=False):
        assert cuda_graph.cuda_graph_unsupported_reason(torch.device("cuda")) == "is turned off by TWOTOWER_GRAPHS=0"
