"""The released layout on disk: saving and loading are exact, and every damaged checkpoint gives a clear error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from twotower import TwoTowerForCausalLM
from twotower.checkpoint.names import tensor_entries
from twotower.checkpoint.reader import INDEX_FILE, SINGLE_FILE
from twotower.errors import ArgumentError, CheckpointError, ConfigError, TwoTowerError
from twotower.model.fp32_tensors import FP32_SUFFIXES, cast

Factory = Callable[..., TwoTowerForCausalLM]
PROMPT = torch.arange(5, 25)[None]
QUERY = "context_tower.layers.1.mixer.q_proj.weight"  # in the pattern M*E-M, layer 1 is attention


@pytest.fixture(scope="module")
def model(random_model: Factory) -> TwoTowerForCausalLM:
    return random_model(seed=3)


@pytest.fixture
def saved(model: TwoTowerForCausalLM, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def sharded(model: TwoTowerForCausalLM, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    return tmp_path / "sharded"


def tensors(directory: Path) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        out |= load_file(file)
    return out


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal names, dtypes and bytes."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8))
        for name in a
    )


def changed(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Rewrites the single weights file after `change` has changed the dict of tensors."""
    stored = load_file(directory / SINGLE_FILE)
    change(stored)
    save_file({name: tensor.clone() for name, tensor in stored.items()}, directory / SINGLE_FILE)
    return directory


def load_error(directory: Path, *parts: str, **arguments: object) -> str:
    """The message of a failed load: one line that contains all `parts`."""
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        TwoTowerForCausalLM.from_pretrained(directory, **arguments)
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, TwoTowerError)
    assert "\n" not in message
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    for part in parts:
        assert part in message
    return message


# --- there and back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-hybrid", "tiny-groups"])
@pytest.mark.parametrize("shard", ["5GB", "100KB"])
def test_released_checkpoint_saves_to_the_same_bytes(golden_dir: Path, tmp_path: Path, name: str, shard: str) -> None:
    model = TwoTowerForCausalLM.from_pretrained(golden_dir / name)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert same(tensors(tmp_path), load_file(golden_dir / name / SINGLE_FILE))
    assert (tmp_path / INDEX_FILE).exists() == (shard == "100KB")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("pattern", ["M*E-M", "-", "E", "*", "M"])
def test_save_load_save(random_model: Factory, tmp_path: Path, dtype: torch.dtype, pattern: str) -> None:
    model = random_model(pattern, 1, dtype)
    model.save_pretrained(tmp_path / "a", max_shard_size="60KB")
    again = TwoTowerForCausalLM.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    third = TwoTowerForCausalLM.from_pretrained(tmp_path / "b")
    third.save_pretrained(tmp_path / "c", max_shard_size="60KB")
    assert same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "c" / file.name).read_bytes()
    assert again.dtype == third.dtype == dtype
    assert torch.equal(model(PROMPT).logits, third(PROMPT).logits)
    t = torch.tensor([0.5])
    views = [m.new_state(1, 8).view() for m in (model, third)]
    assert torch.equal(model.denoise(PROMPT, t, views[0]), third.denoise(PROMPT, t, views[1]))


def test_names_are_the_released_ones(golden_dir: Path, saved: Path) -> None:
    released = {name.split(".layers.")[0] for name in load_file(golden_dir / "tiny-hybrid" / SINGLE_FILE)}
    ours = {name.split(".layers.")[0] for name in tensors(saved)}
    shared = {name for name in released if not name.startswith("scale_shift_tables")}
    assert shared <= ours
    with safe_open(saved / SINGLE_FILE, "pt") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_shards_keep_to_their_size(model: TwoTowerForCausalLM, sharded: Path) -> None:
    files = sorted(sharded.glob("*.safetensors"))
    index = json.loads((sharded / INDEX_FILE).read_text())
    assert len(files) > 3
    assert set(index["weight_map"]) == {entry.disk for entry in tensor_entries(model)}
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in [*model.parameters(), *model.buffers()])
    for file in files:
        stored = load_file(file)
        assert len(stored) == 1 or sum(t.nbytes for t in stored.values()) <= 40_000
        assert {index["weight_map"][name] for name in stored} == {file.name}
    # the experts of one layer need not stay together
    assert len({f for name, f in index["weight_map"].items() if ".experts." in name}) > 1


def test_sharded_loads_the_same(saved: Path, sharded: Path) -> None:
    one, many = (TwoTowerForCausalLM.from_pretrained(path) for path in (saved, sharded))
    for (name, a), (other, b) in zip(one.state_dict().items(), many.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)


def test_stale_files_go(model: TwoTowerForCausalLM, sharded: Path) -> None:
    (sharded / "notes.txt").write_text("mine")
    model.save_pretrained(sharded)
    assert sorted(f.name for f in sharded.iterdir()) == [
        "config.json", SINGLE_FILE, "modeling_twotower.py", "notes.txt",
    ]  # fmt: skip
    model.save_pretrained(sharded, max_shard_size="100KB")
    model.save_pretrained(sharded, max_shard_size="200KB")
    assert not (sharded / SINGLE_FILE).exists()
    files = {f.name for f in sharded.glob("*.safetensors")}
    assert files == set(json.loads((sharded / INDEX_FILE).read_text())["weight_map"].values())
    TwoTowerForCausalLM.from_pretrained(sharded)


def test_a_model_saves_over_its_own_files(saved: Path) -> None:
    before = tensors(saved)
    TwoTowerForCausalLM.from_pretrained(saved).save_pretrained(saved)
    assert same(tensors(saved), before)


def test_config_is_written_as_released(golden_dir: Path, tmp_path: Path) -> None:
    TwoTowerForCausalLM.from_pretrained(golden_dir / "tiny-hybrid").save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    released = json.loads((golden_dir / "tiny-hybrid/config.json").read_text())
    written = json.loads(text)
    assert "Infinity" in text
    assert "__float__" not in text
    assert written["architectures"] == ["NemotronHTwoTowerForCausalLM"]
    assert written["model_type"] == "nemotron_h"
    assert written["torch_dtype"] == "float32"
    for key in ("auto_map", "dtype", "transformers_version"):
        released.pop(key, None)
    assert {key: written.get(key) for key in released} == released


# --- dtypes -------------------------------------------------------------------------------------------------------


def wide(model: TwoTowerForCausalLM) -> dict[str, torch.dtype]:
    return {name: t.dtype for name, t in model.state_dict().items() if f".{name}".endswith(FP32_SUFFIXES)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, "bfloat16"])
@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_dtype_asked_for(saved: Path, dtype: torch.dtype | str, argument: str) -> None:
    model = TwoTowerForCausalLM.from_pretrained(saved, **{argument: dtype})
    asked = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert model.dtype == model.config.dtype == asked
    least = torch.promote_types(asked, torch.float32)
    assert len(wide(model)) == 2 * (2 * 3 + 1)
    assert set(wide(model).values()) == {least}
    narrow = {t.dtype for name, t in model.state_dict().items() if name not in wide(model)}
    assert narrow == {asked}
    assert model(PROMPT).logits.dtype == least


def test_wide_tensors_survive_a_narrow_model_exactly(model: TwoTowerForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "full")
    TwoTowerForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    full, narrow = tensors(tmp_path / "full"), tensors(tmp_path / "bf16")
    for name in full:
        expected = full[name] if name.endswith(FP32_SUFFIXES) else full[name].bfloat16()
        assert torch.equal(narrow[name], expected)
        assert narrow[name].dtype == expected.dtype


def test_stored_narrow_wide_tensors_are_widened(saved: Path) -> None:
    changed(saved, lambda t: t.update({name: tensor.bfloat16() for name, tensor in t.items()}))
    for dtype in ("auto", torch.bfloat16):
        model = TwoTowerForCausalLM.from_pretrained(saved, dtype=dtype)
        assert set(wide(model).values()) == {torch.float32}


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32, torch.float64])
def test_without_a_word_in_the_config_the_stored_dtype_counts(saved: Path, stored: torch.dtype) -> None:
    changed(saved, lambda t: t.update({name: tensor.to(stored) for name, tensor in t.items()}))
    config = json.loads((saved / "config.json").read_text())
    del config["torch_dtype"]
    (saved / "config.json").write_text(json.dumps(config))
    assert TwoTowerForCausalLM.from_pretrained(saved).dtype == stored


def test_half_precision_files_load_in_a_dtype_we_have(saved: Path) -> None:
    changed(saved, lambda t: t.update({name: tensor.half() for name, tensor in t.items()}))
    assert TwoTowerForCausalLM.from_pretrained(saved, dtype=torch.float32).dtype == torch.float32
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"torch_dtype": None}))
    load_error(saved, SINGLE_FILE, "F16", "bfloat16")
    (saved / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))
    with pytest.raises(ArgumentError, match=r"torch_dtype is torch.float16; choose dtype bfloat16"):
        TwoTowerForCausalLM.from_pretrained(saved)


NARROWED: list[Callable[[TwoTowerForCausalLM], object]] = [
    lambda m: m.to(torch.bfloat16),
    lambda m: m.bfloat16(),
    lambda m: cast(m, torch.bfloat16),
]


@pytest.mark.parametrize("narrowed", NARROWED)
def test_narrowing_a_model_leaves_the_wide_tensors(random_model: Factory, narrowed: Callable) -> None:
    model = random_model(seed=3)
    before = {name: model.state_dict()[name] for name in wide(model)}
    model(PROMPT, labels=PROMPT).loss.backward()
    narrowed(model)
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert set(wide(model.to(torch.float64)).values()) == {torch.float64}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_states_and_router_scores_are_at_least_fp32(random_model: Factory, dtype: torch.dtype) -> None:
    model = random_model(dtype=dtype)
    least = torch.promote_types(dtype, torch.float32)
    seen: list[torch.dtype] = []
    model.context.layers[2].mixer.gate.register_forward_hook(lambda _, __, out: seen.append(out[1].dtype))
    state = model.new_state(1, 32)
    model.prefill(PROMPT, torch.tensor([20]), state)
    past = state.view().past
    assert past[0].ssm_state.dtype == least
    assert past[1].k.dtype == dtype
    assert seen == [least]


# --- one tower ----------------------------------------------------------------------------------------------------


def test_context_tower_alone(saved: Path) -> None:
    both = TwoTowerForCausalLM.from_pretrained(saved)
    context = TwoTowerForCausalLM.from_pretrained(saved, towers="context")
    assert context.denoiser is None
    assert context.num_parameters() <= both.num_parameters() / 2
    assert torch.equal(context(PROMPT).logits, both(PROMPT).logits)
    assert torch.equal(context.generate_ar(PROMPT, 8), both.generate_ar(PROMPT, 8))
    for call in (context.generate_mask_diffusion, context.generate_mock_ar):
        with pytest.raises(ValueError, match='towers="both"'):
            call(PROMPT, 8)
    with pytest.raises(TwoTowerError, match='towers="both"'):
        context.denoise(PROMPT, None, context.new_state(1, 4).view())
    with pytest.raises(ArgumentError, match='load it with towers="both" to save it'):
        context.save_pretrained(saved)
    context.place_towers_on_devices("cpu", "cpu")


def test_context_tower_loads_from_its_own_shards_only(saved: Path) -> None:
    """Loading the context tower ignores wrong denoiser tensors, but not tensors with an unknown name."""
    changed(saved, lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:3]}))
    TwoTowerForCausalLM.from_pretrained(saved, towers="context")
    load_error(saved, "lm_head.weight")
    changed(saved, lambda t: t.update({"lm_feet.weight": t["lm_head.weight"]}))
    load_error(saved, "lm_feet.weight", towers="context")


# --- wrong on disk ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "context_tower.layers.2.mixer.experts.5.up_proj.weight",
        "denoiser_tower.layers.0.mixer.A_log",
        "context_tower.norm_f.weight",
        "lm_head.weight",
        "t_block.1.bias",
        "scale_shift_tables.4",
    ],
)
def test_missing_tensor(saved: Path, name: str) -> None:
    shape = list(load_file(saved / SINGLE_FILE)[name].shape)
    changed(saved, lambda t: t.pop(name))
    message = load_error(saved, str(saved / SINGLE_FILE), f"{name} is missing", str(shape))
    assert "more" not in message


def test_missing_tensors_are_counted(saved: Path) -> None:
    changed(saved, lambda t: [t.pop(name) for name in list(t) if ".layers.3." in name])
    load_error(saved, "context_tower.layers.3.norm.weight is missing", "and 5 more")


@pytest.mark.parametrize(
    "name", ["surprise.weight", "context_tower.layers.1.mixer.q_proj.bias", "scale_shift_tables.5"]
)
def test_surplus_tensor(saved: Path, name: str) -> None:
    changed(saved, lambda t: t.update({name: torch.zeros(3)}))
    load_error(saved, str(saved / SINGLE_FILE), name, "is not a tensor of a model")


def test_one_expert_too_many(saved: Path) -> None:
    experts = "context_tower.layers.2.mixer.experts."
    parts = ("up_proj.weight", "down_proj.weight")
    changed(saved, lambda t: t.update({f"{experts}8.{part}": t[f"{experts}7.{part}"] for part in parts}))
    load_error(saved, SINGLE_FILE, f"{experts}8.down_proj.weight", "nor are 1 more")


@pytest.mark.parametrize(
    "name", [QUERY, "context_tower.layers.2.mixer.experts.5.up_proj.weight", "t_embedder.mlp.0.bias"]
)
def test_misshapen_tensor(saved: Path, name: str) -> None:
    expected = list(load_file(saved / SINGLE_FILE)[name].shape)
    changed(saved, lambda t: t.update({name: t[name][..., :-1]}))
    found = [*expected[:-1], expected[-1] - 1]
    load_error(saved, str(saved / SINGLE_FILE), name, f"has shape {found}", f"expects {expected}")


def test_tensor_that_is_not_of_floats(saved: Path) -> None:
    changed(saved, lambda t: t.update({QUERY: t[QUERY].to(torch.int8)}))
    load_error(saved, str(saved / SINGLE_FILE), QUERY, "I8", "float")


@pytest.mark.parametrize("keep", [0, 4, 500, -1])
def test_truncated_file(saved: Path, keep: int) -> None:
    whole = (saved / SINGLE_FILE).read_bytes()
    (saved / SINGLE_FILE).write_bytes(whole[:keep] if keep >= 0 else whole[:-100])
    load_error(saved, str(saved / SINGLE_FILE), "not a complete safetensors file")


def test_truncated_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-8])
    load_error(sharded, str(shard), "not a complete safetensors file")


def test_not_safetensors_at_all(saved: Path) -> None:
    (saved / SINGLE_FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n")
    load_error(saved, str(saved / SINGLE_FILE), "download it again")


def test_pattern_of_another_model(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())

    def with_pattern(pattern: str) -> Path:
        changes = {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)}
        (saved / "config.json").write_text(json.dumps(config | changes))
        return saved

    load_error(with_pattern("MME-M"), SINGLE_FILE, "layers.1.mixer", "'*' (attention)", "letter 1", "'M' (Mamba-2)")
    load_error(with_pattern("M*--M"), "layers.2.mixer", "'E' (MoE)", "letter 2", "'-' (MLP)")
    load_error(with_pattern("M*EEM"), "layers.3.mixer", "'-' (MLP)", "letter 3", "'E' (MoE)")
    load_error(with_pattern("**E-M"), "layers.0.mixer", "'M' (Mamba-2)", "'*' (attention)")
    load_error(with_pattern("M*E-"), "layers.4.", "names only 4 layers")
    load_error(with_pattern("M*E-M*"), "context_tower.layers.5.", "missing")


def test_layer_count_that_disagrees(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    load_error(saved, str(saved / "config.json"), "num_hidden_layers is 4", "5 letters")


def test_config_of_another_size(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))
    load_error(saved, "context_tower.", "expects")
    (saved / "config.json").write_text(json.dumps(config | {"n_routed_experts": 4}))
    load_error(saved, ".experts.", "is not a tensor of a model")


def test_not_two_tower(saved: Path, tmp_path: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"architectures": ["NemotronHForCausalLM"]}))
    load_error(saved, "config.json", "NemotronHForCausalLM", "NemotronHTwoTowerForCausalLM")
    (saved / "config.json").write_text(json.dumps(config))
    save_file({"backbone.embeddings.weight": torch.zeros(64, 32)}, saved / SINGLE_FILE)
    load_error(saved, str(saved), "one-tower model", "context_tower.*", "denoiser_tower.*")
    save_file({"w": torch.zeros(2)}, saved / SINGLE_FILE)
    load_error(saved, str(saved), "not a two-tower checkpoint")
    (saved / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    load_error(saved, "config.json", "'llama'", "'nemotron_h'")


# --- wrong index --------------------------------------------------------------------------------------------------


def edited(directory: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((directory / INDEX_FILE).read_text())
    change(index)
    (directory / INDEX_FILE).write_text(json.dumps(index))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": 3}', "\x00"])
def test_index_that_is_none(sharded: Path, content: str) -> None:
    (sharded / INDEX_FILE).write_text(content)
    load_error(sharded, str(sharded / INDEX_FILE), "not a safetensors index")


def test_index_names_an_absent_file(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    load_error(sharded, str(sharded / INDEX_FILE), shard.name, "download it again")


def test_index_puts_a_tensor_in_the_wrong_file(sharded: Path) -> None:
    first = sorted(sharded.glob("*.safetensors"))[0].name
    edited(sharded, lambda index: index["weight_map"].update({"lm_head.weight": first}))
    load_error(sharded, str(sharded / INDEX_FILE), "lm_head.weight", first)


def test_index_lists_a_tensor_that_no_file_has(sharded: Path) -> None:
    first = sorted(sharded.glob("*.safetensors"))[0].name
    edited(sharded, lambda index: index["weight_map"].update({"ghost": first}))
    load_error(sharded, str(sharded / INDEX_FILE), "ghost", first)


def test_index_leaves_a_tensor_out(sharded: Path) -> None:
    edited(sharded, lambda index: index["weight_map"].pop("lm_head.weight"))
    load_error(sharded, "lm_head.weight", INDEX_FILE)


def test_two_shards_hold_the_same_tensor(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    twice = next(iter(load_file(first)))
    save_file(load_file(second) | {twice: load_file(first)[twice]}, second)
    load_error(sharded, str(second), twice, first.name)


def test_missing_tensor_of_a_sharded_checkpoint(sharded: Path) -> None:
    file = sharded / json.loads((sharded / INDEX_FILE).read_text())["weight_map"]["lm_head.weight"]
    stored = load_file(file)
    del stored["lm_head.weight"]
    save_file(stored, file)
    edited(sharded, lambda index: index["weight_map"].pop("lm_head.weight"))
    load_error(sharded, str(sharded / INDEX_FILE), "lm_head.weight is missing")


# --- wrong place --------------------------------------------------------------------------------------------------


def test_wrong_places(saved: Path, tmp_path: Path) -> None:
    load_error(tmp_path / "nowhere", "nowhere", "no such directory")
    load_error(saved / "config.json", "is a file", "directory")
    (tmp_path / "empty").mkdir()
    load_error(tmp_path / "empty", "config.json", "no such file")
    shutil.copy(saved / "config.json", tmp_path / "empty")
    load_error(tmp_path / "empty", str(tmp_path / "empty"), SINGLE_FILE, INDEX_FILE)


def test_a_name_that_the_hub_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> str:
        raise OSError("no network here\nand a second line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    load_error("someone/some-model", "someone/some-model", "no network here")  # type: ignore[arg-type]


def test_hub_snapshot_is_loaded(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def snapshot(name: str, **kwargs: object) -> str:
        asked.update(kwargs, name=name)
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    model = TwoTowerForCausalLM.from_pretrained("someone/some-model", revision="v2", cache_dir="here")
    assert model.config.name_or_path == "someone/some-model"
    assert (asked["name"], asked["revision"], asked["cache_dir"]) == ("someone/some-model", "v2", "here")
    assert "*.py" not in asked["allow_patterns"]


# --- arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"towers": "denoiser"}, "towers is 'denoiser'"),
        ({"dtype": torch.float16}, "dtype is torch.float16"),
        ({"dtype": "fp32"}, "dtype is 'fp32'"),
        ({"device_map": "auto"}, "device_map is 'auto'; give one device"),
        ({"device_map": {"context": 0, "denoiser": 1}}, "device_map is {'context': 0, 'denoiser': 1}"),
        ({"context_device": "gpu"}, "device is 'gpu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
        ({"load_in_8bit": True, "foo": 1}, "foo, load_in_8bit is not supported"),
    ],
)
def test_loading_arguments_without_meaning(saved: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        TwoTowerForCausalLM.from_pretrained(saved, **arguments)


@pytest.mark.parametrize("device_map", ["cpu", torch.device("cpu"), {"": "cpu"}, None])
def test_device_map_of_one_device(saved: Path, device_map: object) -> None:
    assert TwoTowerForCausalLM.from_pretrained(saved, device_map=device_map).device.type == "cpu"


def test_saving_arguments(model: TwoTowerForCausalLM, tmp_path: Path) -> None:
    for arguments in ({"safe_serialization": False}, {"push_to_hub": True}, {"state_dict": {}}):
        with pytest.raises(ArgumentError, match="save_pretrained"):
            model.save_pretrained(tmp_path / "no", **arguments)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="is a file"):
        model.save_pretrained(tmp_path / "file")
    model.save_pretrained(tmp_path / "no", is_main_process=False)
    assert not (tmp_path / "no").exists()


def test_a_given_config_counts(saved: Path) -> None:
    config = TwoTowerForCausalLM.from_pretrained(saved).config
    config.max_position_embeddings = 99
    model = TwoTowerForCausalLM.from_pretrained(saved, config=config)
    assert model.config.max_position_embeddings == 99
    assert model.config is not config
