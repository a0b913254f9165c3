"""`TwoTowerModel` without transformers, and the parts of a model: names, runners, prepared passes."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from conftest import EVERY_KIND, build_random_model
from torch import Tensor

from twotower import TwoTowerForCausalLM, bundled_model
from twotower.checkpoint import names, reader
from twotower.model.layer_io import AttentionMetadata
from twotower.model.towers import TwoTowerModel
from twotower.ops.cpu import library
from twotower.runners.cuda_graph import CUDAGraphRunner
from twotower.runners.fused_cpu import MAX_TABLES, FusedCPURunner

compiled = pytest.mark.skipif(isinstance(library.library(), str), reason="needs the compiled kernels")
TOKENS = torch.tensor([[5, 6, 7], [8, 9, 10]])


def fused(model: TwoTowerModel) -> FusedCPURunner:
    """The context tower's fused runner."""
    (runner,) = (runner for runner in model.context.runners if isinstance(runner, FusedCPURunner))
    return runner


@torch.no_grad()
def logits_of(model: TwoTowerModel) -> list[Tensor]:
    """Logits of a prefill, an extend and a denoising pass."""
    state = model.new_state(2, 16)
    first = model.prefill(TOKENS, torch.tensor([3, 2]), state)
    second = model.extend(TOKENS.flip(1), state)
    assert second is not None
    return [first, second, model.denoise(TOKENS, torch.tensor([1.0, 0.5]), model.reader(state).view())]


def test_names_in_memory_and_on_disk() -> None:
    """The keys of a state dict and the tensors of a checkpoint match one to one."""
    model = TwoTowerForCausalLM.from_pretrained(bundled_model("small"))
    entries = names.tensor_entries(model)
    assert {entry.memory for entry in entries} == set(model.state_dict())
    assert {entry.disk for entry in entries} == set(reader.read_headers(bundled_model("small")))
    assert {name.split(".")[0] for name in model.state_dict()} == {"context", "denoiser", "time"}


def test_the_towers_need_no_hugging_face_class() -> None:
    """The same keys and logits; only `TwoTowerForCausalLM` has runners."""
    face = build_random_model(EVERY_KIND, dtype=torch.float64)
    plain = TwoTowerModel(face.config).double().eval()
    assert list(plain.state_dict()) == list(face.state_dict())
    plain.load_state_dict(face.state_dict())
    assert plain.context.runners == ()
    for mine, twin in zip(logits_of(plain), logits_of(face), strict=True):
        assert torch.equal(mine, twin)


@pytest.mark.parametrize("towers", ["both", "context"])
def test_runners_of_a_copy_are_its_own(towers: Any) -> None:
    model = TwoTowerForCausalLM(build_random_model(EVERY_KIND).config, towers).eval()
    with torch.no_grad():
        model.extend(TOKENS, model.new_state(2, 8))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        kinds = [[type(runner) for runner in tower.runners] for tower in twin.towers()]
        assert kinds == [[CUDAGraphRunner, FusedCPURunner]] * (2 if towers == "both" else 1)
        owned = {id(runner) for tower in model.towers() for runner in tower.runners}
        assert owned.isdisjoint(id(runner) for tower in twin.towers() for runner in tower.runners)
        with torch.no_grad():
            expected, found = (one.extend(TOKENS, one.new_state(2, 8)) for one in (model, twin))
        assert torch.equal(expected, found)


@compiled
@pytest.mark.parametrize("how", ["release", "move", "dtype", "place"])
def test_releasing_frees_what_was_prepared(how: str) -> None:
    """As a change of dtype or device does; `release` also frees the workspace. Results do not change."""

    class Workspace:
        released = 0

        def release(self) -> None:
            self.released += 1

    model = build_random_model(EVERY_KIND)
    model.workspace = Workspace()
    before = logits_of(model)
    assert fused(model).prepared
    {
        "release": model.release,
        "move": lambda: model.to("cpu"),
        "dtype": model.float,
        "place": lambda: model.place_towers_on_devices("cpu", "cpu"),
    }[how]()
    assert not fused(model).prepared
    assert model.workspace.released == 1
    for mine, twin in zip(logits_of(model), before, strict=True):
        assert torch.equal(mine, twin)


@compiled
def test_threads_do_not_share_a_prepared_pass() -> None:
    """Passes of one shape and one tower from several threads at once."""
    model = build_random_model(EVERY_KIND)
    expected = logits_of(model)
    wrong: list[int] = []

    def work() -> None:
        for _ in range(40):
            wrong.extend(i for i, mine in enumerate(logits_of(model)) if not torch.equal(mine, expected[i]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@compiled
@torch.no_grad()
def test_few_prepared_passes_are_kept() -> None:
    model = build_random_model("M*")
    for rows in range(1, MAX_TABLES + 10):
        model.context(torch.full((rows, 1), 5), AttentionMetadata())
    assert fused(model).prepared == MAX_TABLES
