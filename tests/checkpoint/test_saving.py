"""Saving over a checkpoint: whatever happens, the directory has the old checkpoint or the new one, and no rubbish."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny_run
import torch
from safetensors.torch import load_file
from tiny_backbones import slow_but, two_tower
from transformers import AutoModelForCausalLM

from twotower import TwoTowerForCausalLM
from twotower.checkpoint import atomic
from twotower.checkpoint.atomic import FOLDER, replace_folder, restore_folder
from twotower.checkpoint.reader import SINGLE_FILE
from twotower.errors import TwoTowerError
from twotower.model.fp32_tensors import named_tensors

SHARDS = "100KB"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    directory = tiny_run.two_towers(tmp_path / "two")
    TwoTowerForCausalLM.from_pretrained(directory).save_pretrained(directory, max_shard_size=SHARDS)
    (directory / "notes.txt").write_text("mine")
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


def other_model(directory: Path) -> TwoTowerForCausalLM:
    """The model of a directory with other weights."""
    model = TwoTowerForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    return model


def weight_sum(model: TwoTowerForCausalLM) -> float:
    return sum(parameter.double().sum().item() for parameter in model.parameters())


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """A write beyond `room` bytes of a file fails, with an error of the operating system."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("shards", [SHARDS, "5GB"])
@pytest.mark.parametrize("room", [0, 2000, 60_000])
def test_a_full_disk_leaves_the_checkpoint_as_it_was(saved: Path, room: int, shards: str) -> None:
    before = contents(saved)
    model = other_model(saved)
    with full_disk(room), pytest.raises(TwoTowerError, match=r"cannot be written .* unchanged"):
        model.save_pretrained(saved, max_shard_size=shards)
    assert contents(saved) == before
    model.save_pretrained(saved, max_shard_size=shards)
    assert weight_sum(TwoTowerForCausalLM.from_pretrained(saved)) == weight_sum(model)


def mapped_model(directory: Path) -> TwoTowerForCausalLM:
    """A model whose parameters are memory-mapped from the files of the directory."""
    model = TwoTowerForCausalLM.from_pretrained(directory)
    files = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    with torch.no_grad():
        model.context.embeddings.weight = torch.nn.Parameter(files["context_tower.embeddings.weight"])
    return model


@pytest.mark.parametrize("shards", [SHARDS, "5GB"])
def test_a_model_with_mapped_weights_saves_over_its_own_files(saved: Path, shards: str) -> None:
    model = mapped_model(saved)
    before = weight_sum(model)
    with full_disk(60_000), pytest.raises(TwoTowerError):
        model.save_pretrained(saved, max_shard_size=shards)
    assert weight_sum(TwoTowerForCausalLM.from_pretrained(saved)) == before
    model.save_pretrained(saved, max_shard_size=shards)
    assert weight_sum(TwoTowerForCausalLM.from_pretrained(saved)) == before == weight_sum(model)


class Killed(BaseException):
    """Stands for the end of the process."""


def killed_at(call: int, monkeypatch: pytest.MonkeyPatch, name: str) -> Callable[[], int]:
    """`atomic` is interrupted at the nth call of a method of Path, and cleans nothing up; returns the count."""
    original = getattr(Path, name)
    calls = 0

    def counted(self: Path, *args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, name, counted)
    monkeypatch.setattr(atomic.shutil, "rmtree", lambda *args, **kwargs: None)
    return lambda: calls


@pytest.mark.parametrize(("name", "calls"), [("rename", [1]), ("replace", [1, 2, 5]), ("unlink", [1, 2])])
def test_a_killed_process_leaves_the_old_or_the_new_checkpoint(
    saved: Path, monkeypatch: pytest.MonkeyPatch, name: str, calls: list[int]
) -> None:
    old = weight_sum(TwoTowerForCausalLM.from_pretrained(saved))
    for call in calls:
        model = other_model(saved)
        new = weight_sum(model)
        with monkeypatch.context() as patch:
            killed_at(call, patch, name)
            with pytest.raises(Killed):
                model.save_pretrained(saved, max_shard_size="90KB")
        assert (saved / FOLDER).exists()
        found = weight_sum(TwoTowerForCausalLM.from_pretrained(saved))
        assert found == (old if name == "rename" else new)
        model.save_pretrained(saved, max_shard_size=SHARDS)
        assert not (saved / FOLDER).exists()
        assert (saved / "notes.txt").read_text() == "mine"
        assert weight_sum(TwoTowerForCausalLM.from_pretrained(saved)) == new


def test_templates_of_another_tokenizer_go(saved: Path) -> None:
    (saved / "chat_template.jinja").write_text("{{ messages }}")
    model = TwoTowerForCausalLM.from_pretrained(saved)
    model.tokenizer = tiny_run.tokenizer()
    model.save_pretrained(saved)
    assert not (saved / "chat_template.jinja").exists()


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("new", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with monkeypatch.context() as patch:
        killed_at(2, patch, "rename")
        with pytest.raises(Killed):
            replace_folder(tmp_path / "new", tmp_path / "final")
    restore_folder(tmp_path / "final")
    assert (tmp_path / "final/file").read_text() == "final"
    replace_folder(tmp_path / "new", tmp_path / "final")
    assert [str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*")] == ["final", "final/file"]
    assert (tmp_path / "final/file").read_text() == "new"


# --- every family -----------------------------------------------------------------------------------------------------

# A tied head, stacked experts, Mamba-2, and both side by side; the others in the full form.
SHORT = ("llama", "mixtral", "granitemoehybrid", "falcon_h1")


@pytest.mark.parametrize("name", slow_but(SHORT))
def test_shards_give_the_same_model(name: str, tmp_path: Path) -> None:
    """Saved in shards and whole, loaded by this package and by an Auto class."""
    model = two_tower(name, torch.bfloat16)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    files = list((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 4
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    loaded.save_pretrained(tmp_path / "whole")
    again = TwoTowerForCausalLM.from_pretrained(tmp_path / "whole")
    for found in (loaded, again):
        assert type(found) is TwoTowerForCausalLM
        assert found.spec == model.spec
        expected = dict(named_tensors(model))
        for part, tensor in named_tensors(found):
            assert torch.equal(tensor, expected.pop(part)), part
        assert not expected
    assert (tmp_path / "shards/config.json").read_bytes() == (tmp_path / "whole/config.json").read_bytes()
    stored = {part: tensor for file in files for part, tensor in load_file(file).items()}
    whole = load_file(tmp_path / "whole" / SINGLE_FILE)
    assert stored.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[part]) for part, tensor in stored.items())
