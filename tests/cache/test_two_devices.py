"""Towers on two devices: the transferred bytes are counted, and nothing else may cross between the devices.

One CPU simulates both devices. Every tensor belongs to one tower, an operation may not read tensors of both towers,
and only a transfer changes the tower of a tensor. With a GPU, the tests also run on real devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from twotower import TwoTowerForCausalLM
from twotower.cache.replica import DeviceTransfer, LocalReader, Replica
from twotower.engine import denoiser_step
from twotower.ops.host_transfer import AsyncHostCopy
from twotower.ops.precision import accumulation_dtype
from twotower.ops.reference.attention import CachedKV

Factory = Callable[..., TwoTowerForCausalLM]
OTHER = {"context": "denoiser", "denoiser": "context"}
SIZE = 8  # block size


class Homes(TorchDispatchMode):
    """Assigns each storage to a tower; results inherit it. Raises if an operation reads tensors of both towers."""

    def __init__(self, model: TwoTowerForCausalLM) -> None:
        super().__init__()
        self.known: dict[StorageWeakRef, str] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            self.assign(tensor, "context" if name.startswith("context.") else "denoiser")

    def assign(self, tensor: Tensor, home: str) -> None:
        self.known[StorageWeakRef(tensor.untyped_storage())] = home

    def of(self, tensor: Tensor) -> str | None:
        return self.known.get(StorageWeakRef(tensor.untyped_storage()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        homes = {home for home in map(self.of, inputs) if home}
        if len(homes) > 1:
            raise AssertionError(f"{func} reads tensors of both towers")
        for tensor in [*inputs, *(x for x in tree_leaves(out) if isinstance(x, Tensor))]:
            if homes:
                self.assign(tensor, *homes)
        return out


class CountingTransfer(DeviceTransfer):
    """Counts transfers by direction; the only allowed way from one home to the other."""

    def __init__(self, homes: Homes | None = None) -> None:
        self.homes = homes
        self.sent: list[tuple[str | None, int]] = []  # (to, bytes)

    def send(self, tensor: Tensor, device: torch.device) -> Tensor:
        out = super().send(tensor, device).clone()
        home = None if self.homes is None else self.homes.of(tensor)
        if self.homes is not None and home is not None:
            self.homes.assign(out, OTHER[home])
        self.sent.append((OTHER.get(home or ""), tensor.nbytes))
        return out

    def take(self) -> int:
        """Bytes since the last call."""
        total = sum(size for _, size in self.sent)
        self.sent.clear()
        return total


def state_bytes(model: TwoTowerForCausalLM, *columns: int) -> int:
    """Bytes that a block must transfer: K/V of each row's new tokens, and its Mamba states."""
    config = model.config.layer_fields
    size, rows, total = model.dtype.itemsize, len(columns), 0
    for kind in config.hybrid_override_pattern:
        if kind == "*":
            total += 2 * sum(columns) * config.num_key_value_heads * config.head_dim * size
        if kind == "M":
            total += rows * (config.conv_kernel - 1) * config.conv_dim * size
            state = config.mamba_num_heads * config.mamba_head_dim * config.ssm_state_size
            total += rows * state * accumulation_dtype(model.dtype).itemsize
    return total


def slot_map_bytes(rows: int) -> int:
    """Bytes of start and stride of all rows, which are transferred when rows get KV slots."""
    return 2 * rows * torch.long.itemsize


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(4, 64, (n,), generator=generator).tolist() for n in lengths]


def runs(model: TwoTowerForCausalLM, rows: list[list[int]], mode: str, n: int, **arguments: Any) -> list[list[int]]:
    """New tokens of each row."""
    if mode == "diffusion":
        arguments |= {"block_size": SIZE, "steps_per_block": SIZE, "confidence_threshold": 0.6}
    tokens: list[list[int]] = [[] for _ in rows]
    for event in model.stream(rows, mode, max_new_tokens=n, **arguments):
        tokens[event.row] += event.tokens
    return tokens


@pytest.fixture
def model(random_model: Factory) -> TwoTowerForCausalLM:
    return random_model("M*E-M*", seed=9)


@pytest.fixture
def apart(model: TwoTowerForCausalLM) -> Iterator[TwoTowerForCausalLM]:
    """The model with each tower in its own home, and a transfer that counts."""
    with torch.no_grad(), Homes(model) as homes:
        model.transfer = CountingTransfer(homes)
        yield model
    model.transfer = None


def transfer_of(model: TwoTowerForCausalLM) -> CountingTransfer:
    assert isinstance(model.transfer, CountingTransfer)
    return model.transfer


# --- tests of the test helpers ------------------------------------------------------------------------------------


def test_a_meeting_of_both_homes_is_noticed(apart: TwoTowerForCausalLM) -> None:
    a, b = apart.context.embeddings.weight, apart.denoiser.embeddings.weight
    with pytest.raises(AssertionError, match="both towers"):
        a + b
    with pytest.raises(AssertionError, match="both towers"):
        torch.zeros_like(a).copy_(a).mul_(2).add_(b[0] * 2)
    assert (a + transfer_of(apart).send(b, apart.device)).shape == a.shape
    assert transfer_of(apart).take() == b.nbytes


def test_without_the_transport_the_towers_do_meet(apart: TwoTowerForCausalLM) -> None:
    """`Homes` must detect a denoiser that reads the context state in place."""
    state = apart.new_state(1, 16)
    apart.prefill(torch.tensor(prompts(5)), torch.tensor([5]), state)
    with pytest.raises(AssertionError, match="both towers"):
        apart.denoise(torch.full((1, SIZE), 3), torch.ones(1), LocalReader(state).view())


# --- transferred bytes---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 6, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_block(
    random_model: Factory, length: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The context crosses to the denoiser's device. The block goes back through the host, a few bytes a position."""
    fetched: list[int] = []

    class CountingFetched(AsyncHostCopy):
        def __init__(self, *tensors: Tensor) -> None:
            fetched.append(sum(tensor.nbytes for tensor in tensors))
            super().__init__(*tensors)

    monkeypatch.setattr(denoiser_step, "AsyncHostCopy", CountingFetched)
    model = random_model("M*E-M*", seed=9, dtype=dtype)
    with torch.no_grad(), Homes(model) as homes:
        model.transfer = transfer = CountingTransfer(homes)
        counted = []
        for _ in model.stream(prompts(length), max_new_tokens=5 * SIZE, block_size=SIZE):
            assert "context" not in {to for to, _ in transfer.sent}  # nothing in the other direction
            counted.append(transfer.take())
    first, *others = counted
    assert first == state_bytes(model, length) + slot_map_bytes(1)
    assert others == [state_bytes(model, SIZE)] * 4  # independent of the length of the text
    position = torch.bool.itemsize + 2 * torch.long.itemsize + accumulation_dtype(dtype).itemsize
    assert set(fetched) == {SIZE * position}  # masked, token, pass, confidence


def test_bytes_of_a_batch(apart: TwoTowerForCausalLM) -> None:
    transfer = transfer_of(apart)
    counted = []
    for event in apart.stream(prompts(3, 40, 11), max_new_tokens=3 * SIZE, block_size=SIZE):
        if event.row == 0:  # the rows of a block come together
            counted.append(transfer.take())
    first, *others = counted
    assert first == state_bytes(apart, 3, 40, 11) + slot_map_bytes(3)  # no padding
    assert others == [state_bytes(apart, SIZE, SIZE, SIZE)] * 2


@pytest.mark.parametrize("length", [2, 50])
def test_bytes_of_a_mock_ar_token(apart: TwoTowerForCausalLM, length: int) -> None:
    transfer = transfer_of(apart)
    counted = [transfer.take() for _ in apart.stream(prompts(length), "mock_ar", max_new_tokens=5)]
    first, *others = counted
    assert first == state_bytes(apart, length - 1) + slot_map_bytes(1)
    assert others == [state_bytes(apart, 1)] * 4


def test_ar_needs_no_crossing(apart: TwoTowerForCausalLM) -> None:
    runs(apart, prompts(4, 9), "ar", 6)
    assert transfer_of(apart).take() == 0


def test_steps_of_a_block_cross_nothing(apart: TwoTowerForCausalLM) -> None:
    transfer = transfer_of(apart)
    seen: list[int] = []

    def callback(step: int, steps: int, block: Tensor, t: Any, logits: Tensor | None, block_idx: int) -> None:
        seen.append(transfer.take() if logits is not None else 0 * transfer.take())

    apart.generate_mask_diffusion(prompts(9), 2 * SIZE, SIZE, SIZE, confidence_threshold=1.0, step_callback=callback)
    assert len(seen) == 2 * (SIZE + 1)
    assert set(seen) == {0}


# --- equal results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["diffusion", "mock_ar", "ar"])
@pytest.mark.parametrize("arguments", [{}, {"temperature": 1.0, "seed": [1, 2, 3, 4]}])
def test_apart_is_as_together(model: TwoTowerForCausalLM, mode: str, arguments: dict[str, Any]) -> None:
    rows = prompts(1, 20, 7, 12)
    free = runs(model, rows, mode, 20, **arguments)
    eos = [free[0][4], free[1][11], free[3][16]]
    together = runs(model, rows, mode, 20, eos_token_id=eos, **arguments)
    assert len({len(tokens) for tokens in together}) > 2  # rows end at different times
    with torch.no_grad(), Homes(model) as homes:
        model.transfer = CountingTransfer(homes)
        assert runs(model, rows, mode, 20, **arguments) == free
        assert runs(model, rows, mode, 20, eos_token_id=eos, **arguments) == together
    model.transfer = None


def test_replica_equals_the_state(model: TwoTowerForCausalLM) -> None:
    """Over extends of ragged lengths, rollbacks, growth and rows that end."""
    rows = [torch.tensor(p) for p in prompts(20, 20, 20)]
    state = model.new_state(3, 24)
    model.transfer = CountingTransfer()
    replica = model.reader(state)
    assert isinstance(replica, Replica)
    tokens = torch.stack(rows)
    with torch.no_grad():
        model.prefill(tokens, torch.tensor([20, 3, 0]), state)
        same(replica, state)
        model.extend(tokens[:, :9], state, torch.tensor([9, 0, 4]), logits=False)
        state.rollback(torch.tensor([22, 3, 1]))
        model.extend(tokens[:, :5], state, torch.tensor([5, 5, 0]), logits=False)  # two extends, one transfer
        same(replica, state)
        same(replica, state)  # nothing new, no transfer
        kept = torch.tensor([2, 0])
        model.extend(tokens[:, :2], state, logits=False)
        smaller = state.select(kept)
        replica = replica.select(smaller, kept)
        same(replica, smaller)
        smaller.reset(torch.tensor([1]))
        model.extend(tokens[:2, :30], smaller, torch.tensor([1, 17]), logits=False)
        same(replica, smaller)
    model.transfer = None


def same(replica: Any, state: Any) -> None:
    ours, theirs = replica.view(), state.view()
    assert torch.equal(ours.lengths, theirs.lengths)
    heads = state.spec.attention.num_kv_heads
    for a, b in zip(ours.past, theirs.past, strict=True):
        assert (a is None) == (b is None)
        if isinstance(a, CachedKV):
            (*one, exists), (*other, _) = a.dense(heads), b.dense(heads)
            for mine, real in zip(one, other, strict=True):
                assert torch.equal(mine * exists[:, None, :, None], real * exists[:, None, :, None])
        elif a is not None:
            assert torch.equal(a.conv_window, b.conv_window)
            assert torch.equal(a.ssm_state, b.ssm_state)


# --- on real devices ----------------------------------------------------------------------------------------------

PLACES = [("cuda:0", "cuda:0"), ("cpu", "cuda:0"), ("cuda:0", "cpu"), ("cuda:0", "cuda:1")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["diffusion", "mock_ar", "ar"])
@pytest.mark.parametrize("places", PLACES, ids="-".join)
def test_on_real_devices(random_model: Factory, mode: str, places: tuple[str, str]) -> None:
    if "cuda:1" in places and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model = random_model("M*E-M*", seed=9, dtype=torch.float64)
    rows = prompts(1, 30, 7, 12)
    arguments = {"temperature": 1.0, "seed": [1, 2, 3, 4]}
    free = runs(model, rows, mode, 30, **arguments)
    eos = [free[0][4], free[1][17], free[3][25]]
    expected = runs(model, rows, mode, 30, eos_token_id=eos, **arguments)
    model.place_towers_on_devices(*places)
    assert (model.context.device, model.denoiser.device) == tuple(map(torch.device, places))
    assert runs(model, rows, mode, 30, eos_token_id=eos, **arguments) == expected
    ids = torch.tensor([rows[1]], device=places[0])
    assert model.generate_ar(ids, 3).device == ids.device
