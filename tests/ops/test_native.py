"""The C++ kernels against their torch references: every argument, rows alone and in batches."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from conftest import EVERY_KIND, build_random_model
from pairwise import pairwise
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from twotower.model.layer_io import AttentionMetadata
from twotower.model.linear import Linear
from twotower.model.tower import PassInputs, Tower
from twotower.ops import registry, self_check_cases
from twotower.ops.cpu import kernels as ops
from twotower.ops.cpu import library
from twotower.ops.reference.attention import CachedKV
from twotower.ops.reference.mamba_block import MambaStepInputs
from twotower.ops.registry import REGISTRY, Backend
from twotower.ops.self_check import Case, find_mismatch
from twotower.runners import fused_cpu, module_plan
from twotower.runners.fused_cpu import FusedCPURunner

CPU = torch.device("cpu")
NARROW = (torch.float32, torch.bfloat16)

if isinstance(library.library(), str):
    pytest.skip(f"the compiled kernels are not tested: {library.library()}", allow_module_level=True)

pytestmark = pytest.mark.code_path
NATIVE = [(op, backend) for op, backends in REGISTRY.items() for backend in backends if backend.name == "native"]


def test_a_gpu_has_one_self_check_by_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "cuda" and "cuda:0" are one device; its kernels were checked twice."""
    checked: list[torch.device] = []
    kernel = Backend("kernel", lambda x: x, "", compiled=True)

    def cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
        checked.append(device)
        return []

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setitem(REGISTRY, "probe", (kernel,))
    monkeypatch.setitem(self_check_cases.CASES, "probe", cases)
    for name in ("cuda", "cuda:0", "cuda"):
        assert registry.select("probe", torch.device(name), torch.float32, differentiable=False) is kernel
    assert checked == [torch.device("cuda:0")]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(("op", "backend"), NATIVE, ids=[op for op, _ in NATIVE])
def test_each_agrees_with_its_reference_in_float64(op: str, backend: Backend, dtype: torch.dtype) -> None:
    assert find_mismatch(backend.function, REGISTRY[op][-1].function, self_check_cases.CASES[op](CPU, dtype)) is None


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 5, 16, 47, 48, 49, 130])
@pytest.mark.parametrize(("width", "out"), [(1, 1), (15, 17), (64, 3), (200, 50)])
def test_linear_of_any_size(tokens: int, width: int, out: int, dtype: torch.dtype) -> None:
    randn = self_check_cases.Randn(1, CPU)
    x, weight, bias = randn(2, tokens, width).to(dtype), randn(out, width).to(dtype), randn(out).to(dtype)
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    tolerance = 1e-4 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(ops.linear(x, weight, bias).double(), expected, rtol=tolerance, atol=tolerance)


def test_a_tokens_result_does_not_depend_on_its_neighbours() -> None:
    """Bit-identical, so that verifying a block gives the same tokens as single AR steps."""
    randn = self_check_cases.Randn(2, CPU)
    x, weight = randn(48, 300), randn(70, 300)
    together = ops.linear(x, weight)
    for count in (1, 2, 3, 7, 16):
        assert torch.equal(ops.linear(x[:count], weight), together[:count])
        assert torch.equal(ops.linear(x[5 : 5 + count], weight), together[5 : 5 + count])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads: int) -> None:
    before = torch.get_num_threads()
    results = []
    for count in (1, threads):
        torch.set_num_threads(count)
        results.append([list(_run(op, backend)) for op, backend in NATIVE])
    torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b)


def _run(op: str, backend: Backend) -> Any:
    for case in self_check_cases.CASES[op](CPU, torch.float32):
        out = backend.function(*case.arguments())
        yield from (part for part in _flat(out) if part is not None)


def _flat(value: Any) -> list[Tensor | None]:
    return [value] if isinstance(value, Tensor) or value is None else [leaf for part in value for leaf in _flat(part)]


@pytest.mark.parametrize("counts", [[[1, 1, 0, 0], [0, 0, 0, 0]], [[0, 0, 0, 0], [0, 1, 1, 1]], [[0] * 4] * 2])
@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "by layers"])
@torch.no_grad()
def test_padding_reads_no_additional_expert(counts: list[list[int]], at_once: bool) -> None:
    """Experts that no valid token selected are NaN here. Without a valid token, one token's experts are read."""
    tower = build_random_model("ME", dtype=torch.float32).context
    tokens, token_mask = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]), torch.tensor(counts).bool()
    meta, chosen = AttentionMetadata(token_mask=token_mask), []
    mixer = tower.layers[1].mixer
    hook = mixer.gate.register_forward_hook(lambda _, given, out: chosen.append(out[0]))
    before, _ = tower.layer_by_layer(tokens, meta)
    hook.remove()
    visited = chosen[0][token_mask.flatten()] if token_mask.any() else chosen[0][:1]
    idle = [expert for expert in range(len(mixer.experts.up_proj)) if expert not in visited]
    assert set(chosen[0].flatten().tolist()) & set(idle)
    mixer.experts.up_proj.data[idle] = torch.nan
    if at_once:
        run = FusedCPURunner().run(tower, PassInputs(tokens, meta))
        assert run is not None
        after = run[0]
    else:
        after, _ = tower.layer_by_layer(tokens, meta)
    assert after.isfinite().all()
    torch.testing.assert_close(after[token_mask], before[token_mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ["before", "after"])
def test_modulation_of_rows(order: Any) -> None:
    randn = self_check_cases.Randn(3, CPU)
    x, weight, shift, scale = randn(4, 3, 48), randn(48), randn(4, 1, 48), randn(4, 1, 48)
    expected = registry.norm.rms_norm(x, weight, 1e-5, (shift, scale), order)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5, (shift, scale), order), expected, rtol=1e-5, atol=1e-5)


def test_gradients_and_float64_are_left_to_torch() -> None:
    weight = torch.randn(4, 4, requires_grad=True)
    assert registry.select("linear", CPU, torch.float32).name == "torch"
    with torch.no_grad():
        assert registry.select("linear", CPU, torch.float32).name == "native"
        assert registry.select("linear", CPU, torch.float64).name == "torch"
        with FlopCounterMode(display=False) as counter:  # the mode must see torch operations
            build_random_model("M*").context(torch.ones(1, 3, dtype=torch.long), AttentionMetadata())
        assert counter.get_total_flops() > 0
    assert weight.grad is None


@pytest.mark.parametrize("dtype", NARROW)
def test_a_model_gives_the_same_without_kernels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both towers, every kind of layer, ragged rows of a pool; the state is carried from pass to pass."""
    model = build_random_model(EVERY_KIND, dtype=dtype)
    outs = []
    for plain in (False, True):
        if plain:
            only_torch(monkeypatch)
        with torch.no_grad():
            tokens = torch.randint(4, 60, (3, 40), generator=torch.Generator().manual_seed(0))
            state = model.new_state(5, 0, 300)
            for row, length in ((4, 100), (0, 50), (2, 90)):
                state.allocate(row, length)
            rows = torch.tensor([4, 0, 2])
            model.prefill(tokens, torch.tensor([40, 11, 0]), state, rows)
            logits = model.extend(tokens[:, :9], state, torch.tensor([9, 3, 6]), rows=rows)
            state.rollback(state.lengths - torch.tensor([0, 0, 2, 0, 5]))
            draft = model.denoise(tokens[:, :8], torch.tensor([1.0, 0.5, 0.1]), state.view(rows))
            step = model.extend(tokens[:, 9:10], state, rows=rows)
            outs.append((logits[0], logits[1, :3], logits[2, :6], draft, step))
    for actual, expected in zip(*outs, strict=True):
        limit = 5e-4 if dtype == torch.float32 else 0.2
        assert (actual - expected).abs().max() < limit * expected.std()


def only_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {op: tuple(b for b in backends if b.name != "native") for op, backends in REGISTRY.items()}
    monkeypatch.setattr(registry, "REGISTRY", plain)
    registry._select.cache_clear()
    monkeypatch.setattr(registry, "_select", registry._select.__wrapped__)


def test_a_wrong_kernel_is_not_used_and_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    right = next(backend for op, backend in NATIVE if op == "linear")
    wrong = Backend("native", lambda *a: right.function(*a) * 1.01, "", right.unsupported_reason, compiled=True)
    monkeypatch.setattr(registry, "REGISTRY", REGISTRY | {"linear": (wrong, REGISTRY["linear"][-1])})
    monkeypatch.setattr(registry, "_select", registry._select.__wrapped__)
    with pytest.warns(RuntimeWarning, match="linear: native is not used on cpu"):
        assert registry.select("linear", CPU, torch.float32, differentiable=False).name == "torch"


def test_a_time_limit_of_the_caller_refuses_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit ends the first self-check; the next one decides."""
    right, calls = next(backend for op, backend in NATIVE if op == "linear"), []

    def late(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 1:
            raise TimeoutError("cut off after 30 s")
        return right.function(*arguments)

    backend = Backend("native", late, "", right.unsupported_reason, compiled=True)
    monkeypatch.setattr(registry, "REGISTRY", REGISTRY | {"linear": (backend, REGISTRY["linear"][-1])})
    monkeypatch.setattr(registry, "_select", registry._select.__wrapped__)
    with pytest.raises(TimeoutError):
        registry.select("linear", CPU, torch.float32, differentiable=False)
    assert registry.select("linear", CPU, torch.float32, differentiable=False).name == "native"


def test_every_kernel_passes_its_self_check_here() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in NARROW:
            chosen = {op: name for op, name, _ in registry.report(CPU, dtype)}
            assert {op for op, name in chosen.items() if name == "native"} == {op for op, _ in NATIVE}


@pytest.mark.parametrize("dtype", NARROW)
def test_no_rows_at_all(dtype: torch.dtype) -> None:
    """A process of a distributed run may have no tokens."""
    model = build_random_model(EVERY_KIND, dtype=dtype)
    with torch.no_grad():
        state = model.new_state(0, 64)
        none = torch.zeros(0, 5, dtype=torch.long)
        assert model.extend(none, state).shape == (0, 5, model.config.vocab_size)
        assert model.denoise(none, torch.zeros(0), state.view()).shape == (0, 5, model.config.vocab_size)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("residual_in_fp32", [False, True])
@pytest.mark.parametrize("length", [1, 5, 16])
def test_a_tower_in_one_call_is_its_layers(
    length: int, residual_in_fp32: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of layer, biases, ragged rows of a shared pool, with and without modulation, causal or not."""
    overrides = {"residual_in_fp32": residual_in_fp32, "use_bias": True, "mlp_bias": True, "attention_bias": True}
    model = build_random_model(EVERY_KIND, dtype=dtype, **overrides)
    tokens = torch.randint(4, 60, (3, 30), generator=torch.Generator().manual_seed(0))
    outs = []
    for at_once in (True, False):
        calls = []
        real = FusedCPURunner.run

        def run(*arguments: Any, at_once: bool = at_once, real: Any = real, calls: list[bool] = calls) -> Any:
            out = real(*arguments) if at_once else None
            calls.append(out is not None)
            return out

        monkeypatch.setattr(FusedCPURunner, "run", run)
        with torch.no_grad():
            state = model.new_state(4, 0, 200)
            for row in (3, 0, 1):
                state.allocate(row, 60)
            rows, lengths = torch.tensor([3, 0, 1]), torch.tensor([length, 1, 0])
            model.prefill(tokens[:, :12], torch.tensor([12, 7, 0]), state, rows)
            calls.clear()
            logits = model.extend(tokens[:, 12 : 12 + length], state, lengths, rows=rows)
            state.rollback(state.lengths - (state.uncommitted > 1).long())
            view = state.view(rows)
            block = tokens[:, -length:]
            drafts = [model.denoise(block, t, view, causal=t is None, lengths=lengths.clamp(min=1))
                      for t in (None, torch.tensor([1.0, 0.5, 0.2]))]  # fmt: skip
            state.commit_state()
            assert all(part.isfinite().all() for part in (logits, *drafts))
            real = torch.arange(length) < lengths[:, None]  # the results at padding are undefined
            drafted = torch.arange(length) < lengths.clamp(min=1)[:, None]
            outs.append([logits[real], *(draft[drafted] for draft in drafts), *state._tensors()])
        assert calls == [at_once] * 3
        monkeypatch.undo()
    for actual, expected in zip(*outs, strict=True):  # in fp32, gate and sum may be rounded once
        assert torch.equal(actual, expected) or dtype == torch.float32
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_tower_that_was_changed_runs_as_written() -> None:
    """Detects hooks, foreign modules, and weights with another layout or address."""
    model = build_random_model(EVERY_KIND, dtype=torch.float32)
    tower = model.context
    tokens = torch.tensor([[5, 6, 7]])

    def ran() -> bool:
        return _at_once(tower)

    assert ran()
    seen: list[int] = []
    hook = tower.layers[1].register_forward_hook(lambda *_: seen.append(1))
    assert not ran()
    with torch.no_grad():
        tower(tokens, AttentionMetadata())
    assert seen
    hook.remove()
    assert ran()

    class Doubled(Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    mixer = tower.layers[EVERY_KIND.index("M")].mixer
    old = mixer.in_proj
    mixer.in_proj = Doubled(old.in_features, old.out_features, bias=old.bias is not None)
    assert not ran()
    mixer.in_proj = old
    assert ran()
    with torch.no_grad():
        before = tower(tokens, AttentionMetadata())[0]
        old.weight = torch.nn.Parameter(old.weight * 2)
        assert ran()
        assert not torch.equal(tower(tokens, AttentionMetadata())[0], before)
        old.weight = torch.nn.Parameter(old.weight.t().contiguous().t())
        assert not ran()
    old.weight = torch.nn.Parameter(old.weight.contiguous())
    assert ran()
    old.forward = lambda input: input  # like libraries that offload weights
    assert not ran()
    del old.forward
    assert ran()
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert not ran()
    model.double()
    assert not ran()


def test_a_plan_outlives_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is made once, not per pass, also for a tower with hooks or foreign modules."""
    tower = build_random_model(EVERY_KIND).context
    made: list[bool] = []

    class Counted(module_plan.ModulePlan):
        def __init__(self, tower: Tower) -> None:
            made.append(True)
            super().__init__(tower)

    monkeypatch.setattr(fused_cpu, "ModulePlan", Counted)

    def ran() -> list[bool]:
        return [_at_once(tower) for _ in range(3)]

    assert ran() == [True] * 3
    hook = tower.layers[0].mixer.register_forward_pre_hook(lambda *_: None)
    assert ran() == [False] * 3
    hook.remove()
    assert ran() == [True] * 3
    assert len(made) == 1
    tower.norm_f = type("Another", (type(tower.norm_f),), {})(tower.spec.hidden_size, 1e-5)
    assert ran() == [False] * 3
    assert len(made) == 2


def test_a_tower_of_another_dtype_runs_in_one_call_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """After each change of dtype, back and forth, the result equals layer by layer."""
    model = build_random_model(EVERY_KIND, dtype=torch.float32)
    tower, tokens = model.context, torch.tensor([[5, 6, 7]])
    for change in (model.float, model.bfloat16, model.float, model.double, model.bfloat16):
        change()
        assert _at_once(tower) == (tower.embeddings.weight.dtype != torch.float64)
        with torch.no_grad():
            at_once, _ = tower(tokens, AttentionMetadata())
            monkeypatch.setattr(FusedCPURunner, "run", lambda *_: None)
            one_by_one, _ = tower(tokens, AttentionMetadata())
            monkeypatch.undo()
        torch.testing.assert_close(at_once, one_by_one, rtol=1e-5, atol=1e-5)


def _at_once(tower: Tower) -> bool:
    with torch.no_grad():
        (runner,) = (runner for runner in tower.runners if isinstance(runner, FusedCPURunner))
        return runner.run(tower, PassInputs(torch.tensor([[5, 6, 7]]), AttentionMetadata())) is not None


@torch.no_grad()
@pytest.mark.parametrize("length", [17, 60, fused_cpu.MAX_ROW_TOKENS])
def test_a_pass_longer_than_a_chunk_is_the_chunked_scan(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused pass handles in one piece what the layers handle chunk by chunk; the state is equal."""
    model = build_random_model(EVERY_KIND, dtype=torch.float32)
    assert model.spec.chunk_size < length
    tokens = torch.randint(4, 60, (1, length), generator=torch.Generator().manual_seed(1))
    outs = []
    for at_once in (True, False):
        if not at_once:
            monkeypatch.setattr(FusedCPURunner, "run", lambda *_: None)
        assert _at_once(model.context) == at_once
        state = model.new_state(1, 2 * length)
        logits = [model.extend(tokens, state) for _ in range(2)]
        state.commit_state()
        outs.append([*logits, *state._tensors()])
    for actual, expected in zip(*outs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# --- shapes with their own code path ----------------------------------------------------------------------------------

# Head widths that are multiples of a vector or not, around 16 and 32; one and several query heads per KV head.
HEADS = [(1, 1, 5), (6, 2, 16), (4, 2, 40), (6, 2, 32), (8, 8, 64)]


def attention_arguments(
    length: int, heads: int, shared: int, width: int, contexts: tuple[int, ...], ragged: bool = False
) -> tuple[Any, ...]:
    """The arguments of `ops.attention` except `causal`: one row per context length, anywhere in a pool."""
    randn = self_check_cases.Randn(11, CPU)
    rows, longest = len(contexts), max(contexts)
    pool = randn(2, rows * shared * (longest + 3) + 1, width)
    start = torch.arange(rows).flip(0) * shared * (longest + 3)
    cached = CachedKV(
        pool[0], pool[1], start, torch.full((rows,), longest + 3), torch.tensor(contexts), longest, 0
    )  # fmt: skip
    q, k, v = randn(rows, length, heads, width), randn(rows, length, shared, width), randn(rows, length, shared, width)
    token_mask = None
    if ragged:  # padding on the right, on the left, and everywhere
        place = torch.arange(length)
        token_mask = torch.stack([place < length - 1, place > length // 2, place < 0])[torch.arange(rows) % 3]
    return q, k, v, token_mask, cached


@pytest.mark.parametrize(
    ("sizes", "length", "causal", "ragged", "dtype"),
    pairwise(HEADS, [1, 2, 9, 16, 33], [True, False], [True, False], NARROW),
)
def test_attention_of_any_shape(
    sizes: tuple[int, int, int], length: int, causal: bool, ragged: bool, dtype: torch.dtype
) -> None:
    """Context lengths 0, around one softmax chunk, around one task, and several tasks."""
    heads, shared, width = sizes
    contexts = (0, 7, 250, 256, 1024, 1025, 2300)
    q, k, v, token_mask, cached = attention_arguments(length, heads, shared, width, contexts, ragged)
    q, k, v = (part.to(dtype) for part in (q, k, v))
    cached = cached._replace(k=cached.k.to(dtype), v=cached.v.to(dtype))
    wide = cached._replace(k=cached.k.double(), v=cached.v.double())
    expected = registry.attention.attention(q.double(), k.double(), v.double(), token_mask, causal, wide)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    found = ops.attention(q, k, v, token_mask, causal, cached).double()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_attention_within_a_block_longer_than_a_chunk() -> None:
    """All keys of the first chunk are masked for a query, and own keys follow."""
    q, k, v, _, _ = attention_arguments(300, 3, 1, 24, (0, 0, 0))
    for causal in (True, False):
        for first in (0, 270, 299):
            token_mask = (torch.arange(300) >= first).expand(3, -1)
            expected = registry.attention.attention(q.double(), k.double(), v.double(), token_mask, causal)
            found = ops.attention(q, k, v, token_mask, causal).double()
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_a_query_is_bit_identical_in_any_batch(causal: bool) -> None:
    """Bit-identical beside other rows and longer contexts, and with padding in its block."""
    q, k, v, _, cached = attention_arguments(33, 6, 2, 32, (0, 40, 250, 1100))
    lengths = torch.tensor([33, 1, 16, 7])
    token_mask = torch.arange(33) < lengths[:, None]
    together = ops.attention(q, k, v, token_mask, causal, cached)
    for row, length in enumerate(lengths.tolist()):
        own = cached._replace(
            start=cached.start[row : row + 1], stride=cached.stride[row : row + 1],
            lengths=cached.lengths[row : row + 1], max_length=int(cached.lengths[row]),
        )  # fmt: skip
        alone = ops.attention(*(part[row : row + 1, :length] for part in (q, k, v)), None, causal, own)
        assert torch.equal(alone[0], together[row, :length])
        if causal and length > 1:  # later tokens do not change it either
            first = ops.attention(*(part[row : row + 1, :1] for part in (q, k, v)), None, causal, own)
            assert torch.equal(first[0, 0], together[row, 0])


SIZES = [
    self_check_cases.Sizes(heads=2, groups=1, width=5, state=3, taps=2),
    self_check_cases.Sizes(heads=6, groups=2, width=64, state=32, taps=4),
    self_check_cases.Sizes(heads=4, groups=2, width=20, state=17, taps=4),
    self_check_cases.Sizes(heads=2, groups=2, width=48, state=40, taps=5),
]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("length", [1, 3, 4, 8, 16, 21, 70])
@pytest.mark.parametrize("sizes", SIZES)
def test_a_mamba_block_of_any_shape(sizes: self_check_cases.Sizes, length: int, dtype: torch.dtype) -> None:
    """With and without a state before, ragged or not, and the state after the block."""
    projected, token_mask, window, state, weights = self_check_cases.mamba_block_arguments(sizes, length, CPU, dtype)
    for seen, past, before in ((token_mask, window, state), (None, window, state), (None, None, None)):
        case = Case("any shape", lambda a=(projected, seen, past, before, weights): a)
        assert find_mismatch(ops.mamba_block, registry.mamba_block.mamba_block, [case]) is None

    def state_update(window: Tensor, state: Tensor, inputs: MambaStepInputs, accepted: Tensor, rows: Tensor) -> Any:
        return ops.state_update([(window, state)], [inputs], accepted, rows)[0]

    case = Case("any shape", lambda: self_check_cases.state_update_arguments(sizes, length, CPU, dtype))
    assert find_mismatch(state_update, registry.mamba_block.state_update, [case]) is None


def test_a_mamba_token_is_bit_identical_in_any_batch() -> None:
    """Bit-identical beside other rows, more tokens after it, and padding."""
    projected, token_mask, window, state, weights = self_check_cases.mamba_block_arguments(
        SIZES[1], 21, CPU, torch.float32
    )
    together, _ = ops.mamba_block(projected, token_mask, window, state, weights)
    for row, length in enumerate(token_mask.sum(1).tolist()):
        for count in {min(length, 1), min(length, 8), length} - {0}:
            part = slice(row, row + 1)
            alone, _ = ops.mamba_block(projected[part, :count], None, window[part], state[part], weights)
            assert torch.equal(alone[0], together[row, :count])


def test_strong_and_weak_decay() -> None:
    """Heads that forget everything within a token (exponentials exceed fp32), beside heads that keep everything."""
    projected, _, window, state, weights = self_check_cases.mamba_block_arguments(SIZES[1], 16, CPU, torch.float32)
    weights = weights._replace(A_log=torch.tensor([8.0, 5.0, 0.0, -3.0, -8.0, 2.0]), time_step_limit=(0.0, torch.inf))
    width = weights.heads
    for shift in (-60.0, -20.0, 0.0, 15.0, 60.0):  # from dt near 0 to large dt
        moved = torch.cat([projected[..., :-width], projected[..., -width:] + shift], -1)
        case = Case("decay", lambda a=(moved, None, window, state, weights): a)
        assert find_mismatch(ops.mamba_block, registry.mamba_block.mamba_block, [case]) is None


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("size", [1, 5, 16, 17, 100])
def test_argmax_of_any_vocabulary(size: int, dtype: torch.dtype) -> None:
    """Excludes each token in turn, among them the best and the last; ties go to the lowest id."""
    if size > 1:
        logits = (self_check_cases.Randn(12, CPU)(size, 3, size) * 2).round().to(dtype)
        case = Case("any vocabulary", lambda: (logits, torch.arange(size)))
        assert find_mismatch(ops.argmax, registry.argmax.argmax, [case]) is None
    tokens, sure = ops.argmax(torch.zeros(1, 2, size, dtype=dtype), torch.tensor([-1]))
    assert tokens.tolist() == [[0, 0]]
    torch.testing.assert_close(sure, torch.full((1, 2), 1 / size))
