"""Arguments of transformers and the hub: each is honoured, refused, or has only the value that changes nothing."""

from __future__ import annotations

import inspect
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from hub import FakeHub
from transformers import AutoModelForCausalLM, PreTrainedModel

from twotower import TwoTowerForCausalLM
from twotower.errors import ArgumentError, CheckpointError, TwoTowerError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose folder `inside` has another one."""
    directory = tiny_run.two_towers(tmp_path_factory.mktemp("model") / "two", "M*")
    tiny_run.two_towers(directory / "inside", "*")
    return directory


@pytest.mark.parametrize("load", [TwoTowerForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_a_subfolder_is_loaded(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    assert load(checkpoint).config.hybrid_override_pattern == "M*"
    model = load(checkpoint, subfolder="inside")
    assert model.config.hybrid_override_pattern == "*"
    assert model.tokenizer.name_or_path.endswith("inside")
    if load == TwoTowerForCausalLM.from_pretrained:
        hub = FakeHub(tmp_path / "hub", monkeypatch)
        name = hub.publish("someone/two", checkpoint)
        assert load(name, subfolder="inside").config.hybrid_override_pattern == "*"
        assert not (tmp_path / "hub/snapshots/someone/two/config.json").exists()  # only the folder is downloaded


def test_a_subfolder_that_is_not_there(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="has no folder nope; correct subfolder"):
        TwoTowerForCausalLM.from_pretrained(checkpoint, subfolder="nope")
    for given in ("../two", "/tmp", 3):
        with pytest.raises(ArgumentError, match="subfolder is"):
            TwoTowerForCausalLM.from_pretrained(checkpoint, subfolder=given)


def test_a_config_given_by_its_path(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(checkpoint / "config.json", tmp_path / "other.json")
    text = (tmp_path / "other.json").read_text()
    (tmp_path / "other.json").write_text(
        re.sub(r'"max_position_embeddings": \d+', '"max_position_embeddings": 77', text)
    )
    for given in (tmp_path / "other.json", str(tmp_path / "other.json")):
        model = TwoTowerForCausalLM.from_pretrained(checkpoint, config=given)
        assert model.config.max_position_embeddings == 77
    with pytest.raises(ArgumentError, match="config is a dict"):
        TwoTowerForCausalLM.from_pretrained(checkpoint, config={})


@pytest.mark.parametrize("source", [None, "", 5, b"x", ["a"]])
def test_a_source_that_is_no_path(source: Any) -> None:
    with pytest.raises(ArgumentError, match="checkpoint"):
        TwoTowerForCausalLM.from_pretrained(source)


MEANINGFUL: dict[str, Any] = {
    "state_dict": {}, "proxies": {"https": "proxy:80"}, "tqdm_class": object, "output_loading_info": True,
    "max_memory": {0: "1GB"}, "offload_folder": "x", "offload_buffers": True, "quantization_config": {"bits": 4},
    "variant": "fp16", "adapter_kwargs": {"a": 1}, "adapter_name": "mine", "generation_config": object(),
    "gguf_file": "x.gguf", "distributed_config": object(), "device_mesh": object(), "tp_plan": "auto", "tp_size": 2,
    "allow_all_kernels": True, "use_kernels": True, "kernel_config": object(), "key_mapping": {"a": "b"},
    "use_safetensors": False, "ignore_mismatched_sizes": True, "attn_implementation": "eager", "local_dir": "x",
    "experts_implementation": "eager", "load_in_8bit": True, "repo_type": "dataset",
    "disable_mmap": True, "fusion_config": {"a": 1}, "from_tf": True, "mirror": "x",
}  # fmt: skip


@pytest.mark.parametrize("name", MEANINGFUL)
def test_an_argument_with_a_meaning_is_refused(checkpoint: Path, name: str) -> None:
    with pytest.raises(ArgumentError, match=f"from_pretrained: {name} is not supported"):
        TwoTowerForCausalLM.from_pretrained(checkpoint, **{name: MEANINGFUL[name]})


def test_every_argument_of_transformers_is_known_here() -> None:
    """A new version of transformers with a new argument fails this test."""
    source = inspect.getsource(PreTrainedModel.from_pretrained)
    theirs = set(re.findall(r'kwargs\.pop\("(\w+)"', source)) | set(
        inspect.signature(PreTrainedModel.from_pretrained).parameters
    )
    harmless = {"_from_pipeline", "_from_auto", "_commit_hash", "weights_only", "use_safetensors"}
    honoured = {
        "cls", "pretrained_model_name_or_path", "model_args", "kwargs", "config", "cache_dir", "force_download",
        "local_files_only", "token", "revision", "dtype", "torch_dtype", "device_map", "subfolder", "trust_remote_code",
    }  # fmt: skip
    assert theirs - harmless - honoured - set(MEANINGFUL) == set()


def test_values_that_change_nothing_are_accepted(checkpoint: Path) -> None:
    TwoTowerForCausalLM.from_pretrained(
        checkpoint, use_safetensors=True, output_loading_info=False, variant=None, weights_only=True, adapter_kwargs={},
        ignore_mismatched_sizes=False, low_cpu_mem_usage=True, torch_dtype="float32", dtype=torch.float32,
        trust_remote_code=True, subfolder="", attn_implementation=None,
    )  # fmt: skip
    TwoTowerForCausalLM.from_pretrained(checkpoint, adapter_kwargs={"revision": "main", "token": "x"})  # of AutoModel
    with pytest.raises(ArgumentError, match="dtype is 'float32' and torch_dtype 'bfloat16'"):
        TwoTowerForCausalLM.from_pretrained(checkpoint, dtype="float32", torch_dtype="bfloat16")


def test_arguments_of_saving(checkpoint: Path, tmp_path: Path) -> None:
    model = TwoTowerForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "a", variant=None, token=None, push_to_hub=False, safe_serialization=True)
    for given in ({"variant": "fp16"}, {"push_to_hub": True}, {"save_original_format": False}, {"state_dict": {}}):
        with pytest.raises(TwoTowerError, match=f"save_pretrained: {next(iter(given))} is not supported"):
            model.save_pretrained(tmp_path / "b", **given)
    assert not (tmp_path / "b").exists()
