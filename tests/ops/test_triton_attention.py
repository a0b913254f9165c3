"""Triton attention against its reference in float64, over all its arguments, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton_mode
from pairwise import pairwise
from torch import Tensor

from twotower.ops.reference import attention as reference
from twotower.ops.reference.attention import PLAIN, AttentionOptions, CachedKV
from twotower.ops.self_check_cases import Randn
from twotower.ops.triton.launch import MAX_HEAD_DIM

if importlib.util.find_spec("triton") is None:
    pytest.skip("the Triton kernels are not tested: the package triton is not installed", allow_module_level=True)

triton_mode.mend_interpreter()

from twotower.ops.triton import attention  # noqa: E402

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
ROOM = 400  # slots per row and head of a pool
Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None, bool, CachedKV | None]


@pytest.fixture(autouse=True)
def _small_splits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Smaller splits, so that contexts that are feasible in the interpreter are split too."""
    monkeypatch.setattr(attention, "MIN_SPLIT_KEYS", 64)
    with torch.no_grad():
        yield


def arguments(
    length: int,
    lengths: tuple[int, ...],
    heads: tuple[int, int] = (2, 1),
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    token_mask: str = "none",
    causal: bool = False,
    device: torch.device = DEVICE,
) -> Arguments:
    """Rows with the given numbers of cached tokens, anywhere in a pool; unused slots are NaN.

    token_mask: no padding, or padding that grows from row to row, at the end or at the beginning.
    """
    randn, rows = Randn(0, device), len(lengths)
    q = randn(rows, length, heads[0], width)
    k, v = (randn(rows, length, heads[1], width) for _ in "kv")
    pools = [torch.full((rows * heads[1] * ROOM + 1, width), torch.nan, device=device) for _ in "kv"]
    start = torch.arange(rows, device=device).flip(0) * (heads[1] * ROOM)
    stride = torch.tensor([ROOM - 7 * row for row in range(rows)], device=device)
    for row, count in enumerate(lengths):
        for head in range(heads[1]):
            at = int(start[row] + head * stride[row]) if device.type != "meta" else 0
            for pool in pools:
                pool[at : at + count] = randn(count, width)
    counts = torch.tensor([max(length - 2 * row, 0) for row in range(rows)], device=device)
    ragged = torch.arange(length, device=device) < counts[:, None]
    cached = CachedKV(
        *(pool.to(dtype) for pool in pools), start, stride, torch.tensor(lengths, device=device), max(lengths), 0
    )
    mask = {"none": None, "end": ragged, "start": ragged.flip(1)}[token_mask]
    return q.to(dtype), k.to(dtype), v.to(dtype), mask, causal, cached


def check(*given: Any, options: AttentionOptions = PLAIN, prefix: Tensor | None = None) -> Tensor:
    """Equals the reference up to rounding. (The reference multiplies missing values by 0, so they must be finite.)"""
    q, k, v, token_mask, causal, cached = given
    wide = (
        None if cached is None else cached._replace(k=cached.k.double().nan_to_num(), v=cached.v.double().nan_to_num())
    )
    expected = reference.attention(q.double(), k.double(), v.double(), token_mask, causal, wide, options, prefix)
    found = attention.attention(*given, options, prefix)
    assert found.dtype == q.dtype
    share = {torch.float32: 2e-6, torch.bfloat16: 8e-3}[q.dtype]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=share * float(expected.abs().max()))
    return found


@DTYPES
@pytest.mark.parametrize("token_mask", ["none", "end", "start"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 3])
def test_all_arguments(length: int, causal: bool, token_mask: str, dtype: torch.dtype) -> None:
    """Rows without context, with less than one tile, and with two splits."""
    check(*arguments(length, (100, 0, 3), (4, 2), 24, dtype, token_mask, causal))


@DTYPES
@pytest.mark.parametrize(
    ("heads", "width"), [((1, 1), 7), ((3, 3), 37), ((6, 2), 16), ((8, 1), 64), ((2, 1), 128), ((2, 2), 200)]
)
def test_heads_of_any_kind(heads: tuple[int, int], width: int, dtype: torch.dtype) -> None:
    check(*arguments(3, (40, 0), heads, width, dtype, "end"))


@DTYPES
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "heads"), [(19, (8, 1)), (70, (2, 1)), (33, (1, 1))])
def test_blocks_of_many_tiles(length: int, heads: tuple[int, int], causal: bool, dtype: torch.dtype) -> None:
    """More queries than a tile and more own keys than a loop step, with and without context."""
    given = arguments(length, (60, 5), heads, 16, dtype, "end", causal)
    check(*given)
    check(*given[:5], None)


@DTYPES
@pytest.mark.parametrize("length", [1, 2])
def test_many_splits(length: int, dtype: torch.dtype) -> None:
    """One row has more splits than one loop step combines, with growing scores; the other rows use one split."""
    lengths = (1, 1300, 64)
    q, k, v, _, _, cached = arguments(length, (1, 300, 64), dtype=dtype)
    assert cached is not None
    randn = Randn(1, DEVICE)
    pool = [(randn(5000, 16) * factor).to(dtype) for factor in (torch.linspace(0, 8, 5000, device=DEVICE)[:, None], 1)]
    cached = cached._replace(k=pool[0], v=pool[1], lengths=torch.tensor(lengths, device=DEVICE), max_length=2048)
    check(q, k, v, None, True, cached._replace(start=torch.tensor([3000, 7, 1500], device=DEVICE)))
    assert attention.num_splits(3, 2048, 4) == 32 > attention.PARTS


@pytest.mark.parametrize("width", [300, 512, 4096])
def test_the_rounded_max_length_of_a_recording(width: int) -> None:
    """Nothing beyond a row's length is read, whatever max_length is: the pool is NaN there, or ends."""
    *given, cached = arguments(2, (300, 0, 17))
    check(*given, cached._replace(max_length=max(cached.lengths.tolist())))
    found = attention.attention(*given, cached._replace(max_length=width))
    torch.testing.assert_close(found, attention.attention(*given, cached), rtol=1e-5, atol=1e-6)
    assert found.isfinite().all()


@pytest.mark.parametrize("splits", [1, 3])
def test_a_row_equals_the_row_alone(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "num_splits", lambda *_: splits)
    q, k, v, token_mask, causal, cached = arguments(5, (200, 0, 130), (4, 2), token_mask="end")
    together = attention.attention(q, k, v, token_mask, causal, cached)
    for row in range(3):
        at = slice(row, row + 1)
        own = cached._replace(start=cached.start[at], stride=cached.stride[at], lengths=cached.lengths[at])
        assert torch.equal(attention.attention(q[at], k[at], v[at], token_mask[at], causal, own), together[at])


@pytest.mark.parametrize("causal", [True, False])
def test_values_at_padding_have_no_effect(causal: bool) -> None:
    q, k, v, token_mask, _, cached = arguments(9, (0, 3, 70), token_mask="end")
    clean = attention.attention(q, k, v, token_mask, causal, cached)
    dirty = [part.masked_fill(~token_mask[..., None, None], torch.nan) for part in (q, k, v)]
    found = attention.attention(*dirty, token_mask, causal, cached)
    assert torch.equal(found[token_mask], clean[token_mask])


def test_queries_attend_to_themselves_in_rows_of_padding() -> None:
    q, k, v, _, causal, cached = arguments(4, (0, 0), (2, 2))
    found = check(q, k, v, torch.zeros(2, 4, dtype=torch.bool, device=DEVICE), causal, cached._replace(max_length=8))
    torch.testing.assert_close(found, v)


def test_large_scores() -> None:
    """Scores whose exponentials overflow; the largest score is in the context or in the block."""
    for share in (0.01, 100.0):
        q, k, v, *rest = arguments(3, (0, 80, 200))
        check(q * 300, k * share, v, *rest)


@pytest.mark.parametrize("cached", ["none", "no columns"])
@DTYPES
def test_without_context(cached: str, dtype: torch.dtype) -> None:
    *given, context = arguments(6, (0, 0), (4, 2), dtype=dtype, causal=True)
    check(*given, None if cached == "none" else context._replace(max_length=0))


def test_strided_inputs() -> None:
    """Strides of the projections, slices, and vectors that are not contiguous."""
    q, k, v, token_mask, causal, cached = arguments(6, (0, 50), (4, 2), token_mask="end")
    expected = check(q, k, v, token_mask, causal, cached)
    by_heads = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in (q, k, v)]
    slices = [torch.cat([part, part], dim=-1)[..., : part.shape[-1]] for part in (q, k, v)]
    apart = [part.mT.contiguous().mT for part in (q, k, v)]
    unlike = [q, by_heads[1], v]
    for given in (by_heads, slices, apart, unlike):
        assert torch.equal(attention.attention(*given, token_mask.mT.contiguous().mT, causal, cached), expected)


def test_a_uniform_stride() -> None:
    """Rows with a uniform stride (`CachedKV.uniform_stride`)."""
    q, k, v, token_mask, causal, _ = arguments(3, (0, 0), (4, 2))
    pool = Randn(2, DEVICE)(2, 2 * 2 * 40 + 1, 16)
    order = torch.arange(2, device=DEVICE)
    cached = CachedKV(pool[0], pool[1], order * 80, order * 0 + 40, torch.tensor([40, 11], device=DEVICE), 40, 40)
    check(q, k, v, token_mask, causal, cached)


def test_wide_heads_go_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments(2, (3,), width=MAX_HEAD_DIM + 1)
    monkeypatch.setattr(reference, "attention", lambda *_: "the reference")
    assert attention.attention(*given) == "the reference"


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_attention_of_no_tokens(shape: tuple[int, int]) -> None:
    q, k, v, _, causal, cached = arguments(4, (3, 5))
    rows, length = shape
    q, k, v = (part[:rows, :length] for part in (q, k, v))
    cached = CachedKV(*cached[:2], *(part[:rows] for part in cached[2:5]), *cached[5:])
    assert attention.attention(q, k, v, None, causal, cached).shape == q.shape


# --- scale, window, softcap -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "window", "causal", "dtype"),
    pairwise([1, 7], [1, 2, 5, 64, 101, 102, 300, None], [True, False], [torch.float32, torch.bfloat16]),
)
def test_windows(length: int, window: int | None, causal: bool, dtype: torch.dtype) -> None:
    """Windows of one key, shorter than a block, of the row's length ± 1 and longer; rows with less context."""
    options = AttentionOptions(window=window)
    check(*arguments(length, (101, 0, 3), (4, 2), 24, dtype, "end", causal), options=options)


@pytest.mark.parametrize(
    ("shape", "window", "causal"), pairwise([(19, (8, 1)), (70, (2, 1))], [3, 70, 129, 250], [True, False])
)
def test_windows_of_blocks_of_many_tiles(shape: tuple[int, tuple[int, int]], window: int, causal: bool) -> None:
    """Several tiles of queries, each with its own first key; several splits, of which a query may see none."""
    length, heads = shape
    given = arguments(length, (300, 40), heads, 16, torch.float32, "end", causal)
    check(*given, options=AttentionOptions(window=window))
    check(*given[:5], None, options=AttentionOptions(window=window))


@pytest.mark.parametrize("causal", [True, False])
def test_keys_outside_the_window_are_not_read(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are NaN here; also if the launch has more splits than the window needs."""
    window, options = 40, AttentionOptions(window=40)
    *given, cached = arguments(3, (300, 90), (4, 2), causal=causal)
    expected = attention.attention(*given, cached, options)
    dirty = [pool.clone() for pool in cached[:2]]
    for row in range(2):
        first = int(cached.lengths[row]) - (window - 1)
        for head in range(2):
            at = int(cached.start[row] + head * cached.stride[row])
            for pool in dirty:
                pool[at : at + first] = torch.nan
    cached = cached._replace(k=dirty[0], v=dirty[1])
    assert torch.equal(attention.attention(*given, cached, options), expected)
    monkeypatch.setattr(attention, "num_splits", lambda *_: 5)
    torch.testing.assert_close(attention.attention(*given, cached, options), expected, rtol=1e-5, atol=1e-6)


@DTYPES
@pytest.mark.parametrize("options", [AttentionOptions(0.3), AttentionOptions(1.0, None, 4.0)])
@pytest.mark.parametrize("causal", [True, False])
def test_scales_and_caps(causal: bool, options: AttentionOptions, dtype: torch.dtype) -> None:
    check(*arguments(5, (100, 0, 3), (4, 2), 24, dtype, "end", causal), options=options)
    check(*arguments(5, (100, 0, 3), (4, 2), 24, dtype, "end", causal), options=options._replace(window=9))


@pytest.mark.parametrize("factor", [1e-3, 1.0, 300.0])
def test_caps_of_small_and_of_large_scores(factor: float) -> None:
    """Scores far below the cap, near it, and far above it, where exponentials overflow."""
    q, k, v, *rest = arguments(3, (0, 80, 200))
    check(q * factor, k, v, *rest, options=AttentionOptions(0.25, None, 20.0))


@pytest.mark.parametrize("splits", [1, 3])
def test_a_row_equals_the_row_alone_with_a_window(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "num_splits", lambda *_: splits)
    options = AttentionOptions(0.2, 150, 30.0)
    q, k, v, token_mask, causal, cached = arguments(5, (200, 0, 130), (4, 2), token_mask="end", causal=True)
    together = attention.attention(q, k, v, token_mask, causal, cached, options)
    for row in range(3):
        at = slice(row, row + 1)
        own = cached._replace(start=cached.start[at], stride=cached.stride[at], lengths=cached.lengths[at])
        alone = attention.attention(q[at], k[at], v[at], token_mask[at], causal, own, options)
        assert torch.equal(alone, together[at])


def test_splits_of_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of splits follows the window, not the context."""
    seen: list[int] = []
    real = attention.num_splits

    def recorded(programs: int, width: int, warps: int) -> int:
        seen.append(width)
        return real(programs, width, warps)

    monkeypatch.setattr(attention, "num_splits", recorded)
    given = arguments(2, (300, 5))
    for window in (None, 1000, 129, 1):
        attention.attention(*given, AttentionOptions(window=window))
    assert seen == [300, 300, 128]


# --- a causal prefix --------------------------------------------------------------------------------------------------


def naive_seen(length: int, cached: int, prefix: int, window: int | None) -> list[list[bool]]:
    """Which of `cached` keys, then of the tokens of a block, each token of the block attends to; without padding."""
    rows = []
    for query in range(length):
        place = query if query < prefix else 0  # a mask has the window of the block's first token
        near = [window is None or cached + place - key < window for key in range(cached)]
        if query < prefix:
            own = [key <= query and (window is None or query - key < window) for key in range(length)]
        else:
            own = [True] * length
        rows.append(near + own)
    return rows


@DTYPES
@pytest.mark.parametrize("window", [None, 2, 5, 64, 101])
@pytest.mark.parametrize("length", [1, 6, 16])
def test_prefixes_beside_plain_loops(length: int, window: int | None, dtype: torch.dtype) -> None:
    """Tokens before the first mask see earlier ones; masks see the prefix and each other. Each row has its own."""
    lengths, counts = (100, 0, 3, 70), [min(length, 3), length, 1, 0]
    prefix = torch.tensor(counts, device=DEVICE)
    given = arguments(length, lengths, (4, 2), 16, dtype)
    found = attention.attention(*given, AttentionOptions(window=window), prefix)
    q, k, v, _, _, cached = given
    assert cached is not None
    for row, (seen, count) in enumerate(zip(lengths, counts, strict=True)):
        mask = torch.tensor(naive_seen(length, seen, count, window), device=DEVICE)
        for head in range(4):
            at = int(cached.start[row] + head // 2 * cached.stride[row])
            keys, values = (
                torch.cat([pool[at : at + seen], own[row, :, head // 2]]).double()
                for pool, own in zip(cached[:2], (k, v), strict=True)
            )
            scores = (q[row, :, head].double() @ keys.T / 16**0.5).masked_fill(~mask, -torch.inf)
            expected = scores.softmax(-1) @ values
            share = {torch.float32: 4e-6, torch.bfloat16: 1e-2}[dtype]
            limit = share * float(v[row].double().abs().max())
            torch.testing.assert_close(found[row, :, head].double(), expected, rtol=0, atol=limit)


@DTYPES
@pytest.mark.parametrize("token_mask", ["none", "end"])
@pytest.mark.parametrize(("length", "heads"), [(7, (4, 2)), (19, (8, 1)), (70, (2, 1)), (33, (1, 1))])
@pytest.mark.parametrize("window", [None, 9, 129])
def test_prefixes_of_blocks_of_many_tiles(
    window: int | None, length: int, heads: tuple[int, int], token_mask: str, dtype: torch.dtype
) -> None:
    """A tile that ends in the prefix, one that crosses its end, and tiles of masks alone; several splits."""
    for causal, counts in ((True, (length // 2, 5)), (False, (length, 0))):
        given = arguments(length, (300, 60), heads, 16, dtype, token_mask, causal)
        prefix = torch.tensor(counts, device=DEVICE)
        check(*given, options=AttentionOptions(window=window), prefix=prefix)
        check(*given[:5], None, options=AttentionOptions(window=window), prefix=prefix)


def test_a_prefix_is_computed_as_in_a_causal_pass() -> None:
    """Bit for bit, whatever stands at the masks."""
    q, k, v, _, _, cached = arguments(6, (130, 7), (4, 2), dtype=torch.bfloat16)
    prefix = torch.tensor([4, 2], device=DEVICE)
    found = attention.attention(q, k, v, None, True, cached, PLAIN, prefix)
    causal = attention.attention(q, k, v, None, True, cached)
    masks = torch.arange(6, device=DEVICE)[None] >= prefix[:, None]
    changed = [part.masked_fill(masks[..., None, None], 3.0) for part in (q, k, v)]
    other = attention.attention(*changed, None, True, cached, PLAIN, prefix)
    assert torch.equal(found[~masks], causal[~masks])
    assert torch.equal(other[~masks], causal[~masks])
    assert not torch.allclose(found[masks].float(), causal[masks].float(), rtol=0.1)


# --- launches --------------------------------------------------------------------------------------------------------


class Launches:
    """Replaces a kernel and records its launches."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            shapes = [a.shape if isinstance(a, Tensor) else a for a in arguments]
            self.seen.append((grid, shapes, constants))

        return launch


def test_launches_depend_on_shapes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors: launches depend on shapes only, not on values."""
    launches = Launches()
    monkeypatch.setattr(attention, "_attention_kernel", launches)
    monkeypatch.setattr(attention, "_combine_kernel", launches)
    meta = torch.device("meta")
    given = arguments(16, (300, 2), (4, 2), token_mask="end")
    for _ in range(2):
        attention.attention(*_on(meta, given))
    *rest, cached = given
    attention.attention(*rest, cached._replace(lengths=cached.lengths * 0))
    assert len(launches.seen) == 6
    assert launches.seen[:2] == launches.seen[2:4] == launches.seen[4:]
    launches.seen.clear()
    for counts in ((1, 16), (16, 3)):
        attention.attention(*_on(meta, given), PLAIN, torch.tensor(counts, device=meta))
    assert launches.seen[:2] == launches.seen[2:]


def _on(device: torch.device, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        parts = [_on(device, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


@pytest.mark.parametrize(
    ("rows", "queries", "width", "splits", "programs"),
    [
        (1, 256, 131072, 33, 132),  # a block of 16 tokens of the 30B shape: two tiles for each of two KV heads
        (1, 16, 131072, 132, 264),  # a token: programs of 4 warps, so twice as many
        (1, 256, 1024, 4, 16),  # at least 256 keys per program
        (1, 16, 256, 1, 2),
        (64, 256, 1024, 1, 256),  # the device is full without splits
        (16, 256, 131072, 32, 2048),  # at most 4096 keys per program
        (64, 256, 131072, 8, 2048),  # limited by the number of programs
        (1, 65536, 131072, 2, 2048),  # a prefill chunk
    ],
)
def test_splits_fill_the_device(
    rows: int, queries: int, width: int, splits: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    tile = attention.tile_shape(queries, 128, torch.bfloat16)
    each = rows * 2 * (queries // tile.rows)
    assert attention.num_splits(each, width, tile.warps) == splits
    assert each * splits == programs
