"""Kernels of a training pass, and reads that would make the host wait for a GPU: none in a pass, one in a step."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from benchmark_parts import BENCHMARKS, load
from tiny_backbones import two_tower
from torch import Tensor, nn

from twotower.config import TwoTowerConfig
from twotower.families.nemotron_h import spec_of
from twotower.ops.reference.routing import selections
from twotower.recipes.small import SHAPE
from twotower.specs import TowerSpec
from twotower.training.fsdp import World
from twotower.training.optimizer import ShardedAdamW, squared_norm

BLOCK = 16
META = torch.device("meta")
ALONE = World(0, 1, META, None)  # type: ignore[arg-type]
# Kernels of a pass over 4 rows of 512 columns of the bundled shape in bf16, with torch 2.13. They may only fall.
LIMITS = {
    "ar": {"forward": 614, "backward": 821, "norm": 11},
    "denoiser": {"forward": 1156, "backward": 700, "norm": 11},
    "adapters": {"forward": 1275, "backward": 602, "norm": 5},
}


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """The modules of the benchmarks: the counts, and the batch."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import train
    from common import training_counts

    yield training_counts, train
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def bundled_spec() -> TowerSpec:
    return spec_of(TwoTowerConfig(**{key: value for key, value in SHAPE.items() if key != "model_type"}).layer_fields)


@pytest.mark.parametrize("kind", LIMITS)
def test_a_pass_reads_nothing_from_the_device_and_launches_no_more_kernels(kind: str, parts: tuple[Any, Any]) -> None:
    """The weights have no storage, so a read of a value that depends on them would raise an error."""
    counts, train = parts
    spec = bundled_spec()
    batch = train.packed(4, 512, spec.vocab_size)
    objective = counts.objective_without_storage(kind, spec, torch.bfloat16)
    found = counts.count_pass(objective, batch, BLOCK)
    print(kind, found.kernels())
    assert found.host_reads() == {"forward": 0, "backward": 0, "norm": 0}
    for name, count in found.kernels().items():
        limit = LIMITS[kind][name]
        assert 0.5 * limit < count <= limit, f"{name}: {count} kernels, and the limit is {limit}"


@pytest.mark.parametrize("name", ["qwen3_next", "granitemoehybrid", "gemma3_text"])
@pytest.mark.parametrize("kind", LIMITS)
def test_a_pass_of_other_backbones_reads_nothing_from_the_device(name: str, kind: str, parts: tuple[Any, Any]) -> None:
    """Rows of conversations with weighted and aligned losses: no tensor of the pass stays on the host either."""
    counts, train = parts
    spec = two_tower(name, torch.float32).context.spec
    objective = counts.objective_without_storage(kind, spec, torch.bfloat16)
    if kind != "ar":
        recipe = replace(objective.options.recipe, position_decay=4.0, alignment=0.1)
        objective.options = replace(objective.options, recipe=recipe)
    plain = train.packed(2, 4 * BLOCK, spec.vocab_size)
    filler = (torch.arange(4 * BLOCK) % (2 * BLOCK) >= 2 * BLOCK - 3).expand(2, -1)
    found = counts.count_pass(objective, replace(plain, filler=filler, target=~filler), BLOCK)
    assert found.host_reads() == {"forward": 0, "backward": 0, "norm": 0}
    assert found.kernels()["backward"] > 100


def test_one_process_adds_host_values_without_its_device() -> None:
    assert ALONE.totals([3, torch.tensor([True, True, False]).sum(), 0.5]) == [3.0, 2.0, 0.5]
    with pytest.raises(NotImplementedError, match="meta"):  # a value of the device is read
        ALONE.total(torch.ones((), device=META))


def test_norm_and_clipping_equal_those_of_each_tensor_bit_for_bit() -> None:
    torch.manual_seed(0)
    module = nn.ModuleDict({str(n): nn.Linear(n, 7) for n in (1, 5, 64, 300)})
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter) * 3
    alone = World(0, 1, torch.device("cpu"), None)  # type: ignore[arg-type]
    optimizer = ShardedAdamW(module, alone, 0.1, 1.0)
    grads = [p.grad for p in optimizer.parts if p.grad is not None]
    norms = [torch.linalg.vector_norm(grad).double() for grad in grads]
    assert torch.equal(squared_norm(grads, torch.device("cpu")), torch.stack(norms).square().sum())
    norm = optimizer.gradient_norm()
    assert norm == float(torch.stack(norms).square().sum()) ** 0.5
    wanted = [grad * (1.0 / norm) for grad in grads]
    seen: list[Tensor] = []
    optimizer.adam.step = lambda: seen.extend(grads)  # type: ignore[method-assign]
    counts = load("common/operation_counts.py").counted(lambda: optimizer.step(0.1, norm))
    assert counts.kernels == {"_foreach_mul_": 1}
    assert all(map(torch.equal, seen, wanted))


@pytest.mark.parametrize("shape", [(0, 2), (1, 1), (9, 3), (2, 4, 3)])
def test_selections_are_counted_without_a_read(shape: tuple[int, ...]) -> None:
    chosen = torch.randint(0, 6, shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(selections(chosen, 6), torch.bincount(chosen.flatten(), minlength=6))
    assert not load("common/operation_counts.py").counted(lambda: selections(chosen, 6)).host_reads
