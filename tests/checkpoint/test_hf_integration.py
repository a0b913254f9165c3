"""A two-tower model in transformers: the Auto classes, the published snippet, the behaviour of `PreTrainedModel`."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_backbones import save_tokenizer, two_tower
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    NemotronHConfig,
    NemotronHForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from twotower import GenericTwoTowerConfig, TwoTowerConfig, TwoTowerForCausalLM
from twotower.errors import ArgumentError, CheckpointError

Factory = Callable[..., TwoTowerForCausalLM]

# Runs in a process without the Auto classes, one fork per case: what is imported first must not matter.
SNIPPET = """
from transformers import AutoModelForCausalLM, AutoTokenizer
assert "twotower" not in sys.modules
name = paths["saved"]
tok = AutoTokenizer.from_pretrained(name)
ids = tok("abc abd", return_tensors="pt").input_ids

model = AutoModelForCausalLM.from_pretrained(name, torch_dtype=torch.bfloat16, trust_remote_code=True)
model.place_towers_on_devices("cpu", "cpu")      # context, denoiser
out = model.generate_mask_diffusion(ids, max_new_tokens=20, block_size=16, steps_per_block=16, mask_token_id=3,
                                    temperature=0.1, confidence_threshold=0.8, eos_token_id=tok.eos_token_id)
report["diffusion"] = [list(out.shape), model._last_nfe, out[:, : ids.shape[1]].tolist() == ids.tolist()]
out = model.generate_mock_ar(ids, max_new_tokens=5, temperature=0.5, top_k=4, top_p=0.9, eos_token_id=tok.eos_token_id)
report["mock_ar"] = [list(out.shape), model._last_nfe, out[:, : ids.shape[1]].tolist() == ids.tolist()]
out = model.generate_ar(ids, max_new_tokens=5, temperature=0.5, top_k=4, top_p=0.9, eos_token_id=tok.eos_token_id)
report["ar"] = [list(out.shape), model._last_nfe, out[:, : ids.shape[1]].tolist() == ids.tolist()]
report["class"] = [f"{type(model).__module__}.{type(model).__name__}", str(model.dtype), ids.shape[1]]
"""
EVERY_WAY = """
ids = torch.arange(5, 15)[None]
for place, path in paths.items():
    for auto in (AutoModel, AutoModelForCausalLM):
        for trust in (None, False, True):
            try:
                model = auto.from_pretrained(path, trust_remote_code=trust)
                outcome = f"{type(model).__module__}.{type(model).__name__} {checksum(model)}"
            except Exception as error:
                outcome = f"{type(error).__name__}: {error}"
            report[f"{place} {auto.__name__} {trust}"] = outcome
"""
# Without `import twotower`: the code file of the checkpoint imports it.
CODE_FILE = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
for auto in (AutoTokenizer, AutoModelForCausalLM, AutoConfig, AutoModel):
    found = auto.from_pretrained(paths["generic"], trust_remote_code=True)
    summed = checksum(found) if hasattr(found, "parameters") else ""
    report[auto.__name__] = f"{type(found).__module__}.{type(found).__name__} {summed}"
"""
CASES = {
    "snippet": SNIPPET,
    "code file": CODE_FILE,
    "twotower first": "import twotower\nfrom transformers import AutoModel, AutoModelForCausalLM\n" + EVERY_WAY,
    "transformers first": "from transformers import AutoModel, AutoModelForCausalLM\nimport twotower\n" + EVERY_WAY,
}
CHILD = """
import json, os, sys, torch, transformers.modeling_utils
late = {"twotower", "transformers.models.auto.auto_factory", "transformers.models.auto.modeling_auto"}
assert not late & set(sys.modules)
torch.set_num_threads(1)
paths, cases = json.loads(sys.argv[1]), json.loads(sys.argv[2])

def checksum(model):
    return round(sum(float(p.detach().double().sum()) for p in model.parameters()), 6)

for case in cases:
    if os.fork():
        assert os.wait()[1] == 0, case
        continue
    report = {}
    exec(cases[case])
    print(json.dumps({case: report}), flush=True)
    os._exit(0)
"""
REMOTE_CONFIG = """
from transformers import PretrainedConfig

class NemotronHConfig(PretrainedConfig):  # the name under which transformers knows its own
    model_type = "nemotron_h"
"""


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes, 64 in all."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<mask>": 3}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary |= {letter: i for i, letter in enumerate((a for a in alphabet if a.isascii() or a == "Ġ"), start=4)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def checksum(model: torch.nn.Module) -> float:
    return round(sum(float(p.detach().double().sum()) for p in model.parameters()), 6)


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The folder to which transformers copies the code files of loaded directories."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="module")
def model(random_model: Factory) -> TwoTowerForCausalLM:
    out = random_model(seed=5, vocab_size=128, eos_token_id=2, pad_token_id=0)
    out.tokenizer = letters()
    return out


@pytest.fixture(scope="module")
def places(model: TwoTowerForCausalLM, golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories to load with an Auto class."""
    folder = tmp_path_factory.mktemp("places")
    model.save_pretrained(folder / "saved")
    model.save_pretrained(folder / "sharded", max_shard_size="100KB")
    # The released layout with a configuration file of its own, which defines another class called NemotronHConfig.
    model.save_pretrained(folder / "remote")
    config = json.loads((folder / "remote/config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_nemotron_h.NemotronHConfig",
        "AutoModelForCausalLM": "modeling_absent.NemotronHTwoTowerForCausalLM",
    }
    (folder / "remote/config.json").write_text(json.dumps(config))
    (folder / "remote/configuration_nemotron_h.py").write_text(REMOTE_CONFIG)
    plain_nemotron_h().save_pretrained(folder / "plain")
    two_tower("llama").save_pretrained(folder / "generic", max_shard_size="30KB")
    save_tokenizer(folder / "generic")
    return {
        "saved": folder / "saved",
        "generic": folder / "generic",
        "sharded": folder / "sharded",
        "remote": folder / "remote",
        "released": golden_dir / "tiny-hybrid",  # its auto_map names files that do not exist
        "plain": folder / "plain",
    }


def plain_nemotron_h() -> NemotronHForCausalLM:
    torch.manual_seed(0)
    config = NemotronHConfig(
        hybrid_override_pattern="M*E-", hidden_size=32, vocab_size=64, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8, n_groups=2, intermediate_size=32,
        n_routed_experts=4, moe_intermediate_size=16, moe_shared_expert_intermediate_size=16, chunk_size=16,
    )  # fmt: skip
    return NemotronHForCausalLM(config).eval()


@pytest.fixture(scope="module")
def reports(places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The result of each case of `CASES`, each from its own process."""
    paths = json.dumps({name: str(path) for name, path in places.items()})
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules")), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", CHILD, paths, json.dumps(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    out: dict[str, dict[str, Any]] = {}
    for line in done.stdout.splitlines():
        out |= json.loads(line)
    return out


# --- the Auto classes ---------------------------------------------------------------------------------------------


def test_published_snippet_runs_as_it_stands(reports: dict[str, dict[str, Any]]) -> None:
    report = reports["snippet"]
    name, dtype, length = report["class"]
    assert (name, dtype) == ("twotower.modeling_twotower.TwoTowerForCausalLM", "torch.bfloat16")
    for mode, most in {"diffusion": 20, "mock_ar": 5, "ar": 5}.items():
        (rows, columns), nfe, prompt_kept = report[mode]
        assert prompt_kept
        assert rows == 1
        assert length < columns <= length + most
        assert nfe == {"ar": 0, "mock_ar": columns - length}.get(mode, nfe)
    assert 1 <= report["diffusion"][1] <= 32


@pytest.mark.parametrize("order", ["twotower first", "transformers first"])
def test_auto_classes_give_ours_or_one_clear_error(
    reports: dict[str, dict[str, Any]], places: dict[str, Path], order: str
) -> None:
    for case, outcome in reports[order].items():
        place, auto, trust = case.split()
        if place == "plain":
            own = {"AutoModel": "NemotronHModel", "AutoModelForCausalLM": "NemotronHForCausalLM"}[auto]
            assert outcome.startswith(f"transformers.models.nemotron_h.modeling_nemotron_h.{own} "), case
        elif place == "released" and trust == "True":  # the user requests code that does not exist
            assert "does not appear to have a file named configuration_nemotron_h.py" in outcome, case
        else:
            expected = checksum(TwoTowerForCausalLM.from_pretrained(places[place]))
            assert outcome == f"twotower.modeling_twotower.TwoTowerForCausalLM {expected}", case


def test_the_code_file_of_another_backbone_is_enough(
    reports: dict[str, dict[str, Any]], places: dict[str, Path]
) -> None:
    """With `trust_remote_code=True`, in a process without `import twotower`."""
    expected = checksum(TwoTowerForCausalLM.from_pretrained(places["generic"]))
    ours = f"twotower.modeling_twotower.TwoTowerForCausalLM {expected}"
    found = reports["code file"]
    assert found["AutoModel"] == found["AutoModelForCausalLM"] == ours
    assert found["AutoConfig"] == "twotower.config.GenericTwoTowerConfig "
    assert "Tokenizer" in found["AutoTokenizer"]


def test_the_table_of_transformers_names_the_class_of_another_backbone() -> None:
    """Code that reads the table itself finds a class that stands for ours."""
    for auto in (AutoModel, AutoModelForCausalLM):
        found = auto._model_mapping[GenericTwoTowerConfig]
        assert (found.__module__, found.__name__) == (TwoTowerForCausalLM.__module__, TwoTowerForCausalLM.__name__)
        assert found.main_input_name == "input_ids"
        assert found.from_pretrained == TwoTowerForCausalLM.from_pretrained


def test_plain_checkpoints_keep_their_weights(places: dict[str, Path]) -> None:
    ids = torch.arange(5, 25)[None]
    loaded = AutoModelForCausalLM.from_pretrained(places["plain"])
    assert type(loaded) is NemotronHForCausalLM
    assert type(AutoConfig.from_pretrained(places["plain"])) is NemotronHConfig
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, plain_nemotron_h()(ids).logits)
    with pytest.raises(CheckpointError, match="NemotronHForCausalLM"):
        TwoTowerForCausalLM.from_pretrained(places["plain"])


def test_auto_model_from_config(places: dict[str, Path]) -> None:
    for trust in (None, True):
        config = AutoConfig.from_pretrained(places["saved"], trust_remote_code=trust)
        for auto in (AutoModel, AutoModelForCausalLM):
            built = auto.from_config(config, trust_remote_code=trust)
            assert type(built) is TwoTowerForCausalLM
            assert type(built.config) is TwoTowerConfig
            assert built.config.hybrid_override_pattern == "M*E-M"
    narrow = AutoModel.from_config(TwoTowerConfig(**built.config.to_dict()), dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    assert narrow.context.layers[0].mixer.A_log.dtype == torch.float32
    assert type(AutoModelForCausalLM.from_config(plain_nemotron_h().config)) is NemotronHForCausalLM


def test_auto_model_from_the_config_of_another_backbone(places: dict[str, Path]) -> None:
    for trust in (None, True):
        config = AutoConfig.from_pretrained(places["generic"], trust_remote_code=trust)
        assert type(config) is GenericTwoTowerConfig
        tokenizer = AutoTokenizer.from_pretrained(places["generic"], trust_remote_code=trust)
        assert tokenizer.decode(tokenizer("abc").input_ids) == "abc"
        config.architectures = None  # the model_type is enough
        for auto in (AutoModel, AutoModelForCausalLM):
            built = auto.from_config(config, trust_remote_code=trust)
            assert type(built) is TwoTowerForCausalLM
            assert built.spec.tied_head


def test_auto_config_with_trust_is_ours(places: dict[str, Path]) -> None:
    config = AutoConfig.from_pretrained(places["saved"], trust_remote_code=True)
    assert type(config) is TwoTowerConfig
    assert config.layer_fields == TwoTowerConfig.read(places["saved"]).layer_fields


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
@pytest.mark.parametrize("place", ["saved", "remote"])
def test_when_our_class_was_asked_for_first(places: dict[str, Path], auto: Any, place: str) -> None:
    """As in this process: transformers' registry was imported on the way to our class."""
    for trust in (False, True):
        loaded = auto.from_pretrained(places[place], trust_remote_code=trust)
        assert type(loaded) is TwoTowerForCausalLM


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_what_a_caller_changes_through_auto_counts(places: dict[str, Path], auto: Any) -> None:
    for trust in (False, True):
        loaded = auto.from_pretrained(
            places["saved"], trust_remote_code=trust, max_position_embeddings=99, dtype=torch.float64
        )
        assert loaded.config.max_position_embeddings == 99
        assert loaded.dtype == torch.float64
    alone = auto.from_pretrained(places["saved"], towers="context", low_cpu_mem_usage=True, device_map="cpu")
    assert alone.denoiser is None
    with pytest.raises(ArgumentError, match="load_in_4bit is not supported"):
        auto.from_pretrained(places["saved"], load_in_4bit=True)


def test_saved_directory_is_whole(places: dict[str, Path]) -> None:
    config = json.loads((places["saved"] / "config.json").read_text())
    assert config["architectures"] == ["NemotronHTwoTowerForCausalLM"]
    for reference in config["auto_map"].values():
        file, name = reference.split(".")
        assert f'"{name}"' in (places["saved"] / f"{file}.py").read_text()
    tokenizer = AutoTokenizer.from_pretrained(places["saved"])
    assert tokenizer.eos_token_id == 2
    assert tokenizer("abc").input_ids == letters()("abc").input_ids


def test_tokenizer_is_loaded_when_asked_for(places: dict[str, Path], model: TwoTowerForCausalLM) -> None:
    loaded = TwoTowerForCausalLM.from_pretrained(places["saved"])
    assert loaded._tokenizer is None
    assert torch.equal(loaded.generate_ar("abc", 4), model.generate_ar("abc", 4))
    assert TwoTowerForCausalLM.from_pretrained(places["released"]).tokenizer is None


def test_saving_hands_the_tokenizer_on(places: dict[str, Path], tmp_path: Path) -> None:
    TwoTowerForCausalLM.from_pretrained(places["saved"]).save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("abc").input_ids == letters()("abc").input_ids


# --- PreTrainedModel's manners ------------------------------------------------------------------------------------


def test_is_a_pretrained_model(model: TwoTowerForCausalLM) -> None:
    assert isinstance(model, PreTrainedModel)
    assert model.config_class is TwoTowerConfig
    parameters = sum(p.numel() for p in model.parameters())
    assert model.num_parameters() == model.num_parameters(only_trainable=True) == parameters
    assert model.get_memory_footprint() == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert model.device == torch.device("cpu")
    assert model.place_towers_on_devices("cpu", "cpu") is model
    assert model.can_generate() is False
    assert "denoiser" in repr(model)


def test_copies_and_pickles(model: TwoTowerForCausalLM, places: dict[str, Path]) -> None:
    ids = torch.arange(5, 15)[None]
    loaded = AutoModelForCausalLM.from_pretrained(places["saved"])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), pickle.loads(pickle.dumps(loaded))):
        assert type(twin) is TwoTowerForCausalLM
        assert torch.equal(twin.generate_mask_diffusion(ids, 20), model.generate_mask_diffusion(ids, 20))
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.context.head.weight.zero_()
    assert not torch.equal(changed(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_moving_to_another_dtype(random_model: Factory, dtype: torch.dtype) -> None:
    ids = torch.arange(5, 15)[None]
    moved = random_model(seed=5).to(dtype)
    assert moved.dtype == dtype
    assert torch.equal(moved(ids).logits, random_model(seed=5, dtype=dtype)(ids).logits)
    assert moved.generate_mask_diffusion(ids, 20).shape == (1, 30)


def test_state_dict_round_trip(random_model: Factory) -> None:
    a, b = random_model(seed=1), random_model(seed=2)
    b.load_state_dict(a.state_dict())
    ids = torch.arange(5, 15)[None]
    assert torch.equal(a.generate_mask_diffusion(ids, 20), b.generate_mask_diffusion(ids, 20))


# --- the forward --------------------------------------------------------------------------------------------------


def hf_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """transformers' definition: token i is predicted from position i − 1; the mean over labels other than −100."""
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_logits_and_loss(random_model: Factory, dtype: torch.dtype) -> None:
    model = random_model(dtype=dtype)
    ids = torch.randint(4, 64, (3, 37), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :20] = -100
    labels[2, 30:] = -100
    out = model(ids, labels=labels)
    assert out.logits.shape == (3, 37, 64)
    assert out.logits.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.allclose(out.loss, hf_loss(out.logits, labels))
    assert model(ids).loss is None
    assert torch.equal(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, model(ids).logits) or (
        (model(ids, torch.ones_like(ids)).logits - model(ids).logits).abs().max() < 1e-4 * out.logits.abs().max()
    )


def test_loss_is_what_transformers_computes(model: TwoTowerForCausalLM) -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    ids = torch.randint(4, 128, (2, 21), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(torch.rand(2, 21, generator=torch.Generator().manual_seed(2)) < 0.3, -100)
    out = model(ids, labels=labels)
    assert torch.allclose(out.loss, ForCausalLMLoss(out.logits, labels, vocab_size=128))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_leaves_no_mark(random_model: Factory, side: str) -> None:
    model = random_model(dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(4, 64, (n,), generator=generator) for n in (1, 5, 16, 33)]
    ids = torch.randint(0, 64, (4, 40), generator=generator)  # padding of any tokens
    mask = torch.zeros(4, 40, dtype=torch.long)
    spans = [slice(40 - len(row), 40) if side == "left" else slice(0, len(row)) for row in rows]
    for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
        ids[i, span], mask[i, span] = row, 1
    logits = model(ids, attention_mask=mask).logits
    for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
        assert torch.allclose(logits[i, span], model(row[None]).logits[0], atol=1e-9)


def test_forward_refuses_what_it_does_not_do(model: TwoTowerForCausalLM) -> None:
    ids = torch.arange(5, 15)[None]
    with pytest.raises(ArgumentError, match="past_key_values is not supported"):
        model(ids, past_key_values=object())
    model(ids, use_cache=False, return_dict=True)
    for name in ("attention_mask", "labels"):
        with pytest.raises(ArgumentError, match=rf"{name} is \(1, 9\), input_ids \(1, 10\)"):
            model(ids, **{name: ids[:, 1:]})


def test_gradients_reach_the_context_tower(random_model: Factory) -> None:
    model = random_model()
    model(torch.arange(5, 25)[None], labels=torch.arange(5, 25)[None]).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.context.parameters())
    assert all(p.grad is None for p in model.denoiser.parameters())


# --- generate -----------------------------------------------------------------------------------------------------


def test_generate_is_ar(model: TwoTowerForCausalLM) -> None:
    encoded = letters()("abc abd", return_tensors="pt")
    expected = model.generate_ar(encoded.input_ids, 6, eos_token_id=2)
    assert torch.equal(model.generate(encoded.input_ids, max_new_tokens=6), expected)
    assert torch.equal(model.generate(**encoded, max_new_tokens=6, do_sample=False), expected)
    assert torch.equal(model.generate(inputs=encoded.input_ids, max_new_tokens=6, pad_token_id=0), expected)
    sampled = model.generate_ar(encoded.input_ids, 6, 0.7, 5, 0.9, 2, seed=3)
    arguments = {"max_new_tokens": 6, "do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 3}
    assert torch.equal(model.generate(encoded.input_ids, **arguments), sampled)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 4},
        {"generation_config": object()},
        {"max_length": 20},
        {"streamer": print},
        {"assistant_model": 1},
    ],
)
def test_generate_refuses_by_name(model: TwoTowerForCausalLM, arguments: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError) as caught:
        model.generate(torch.arange(5, 15)[None], **arguments)
    for name in (*arguments, "generate_mask_diffusion", "generate_ar", "generate_mock_ar"):
        assert name in str(caught.value)
    with pytest.raises(ArgumentError, match="generation_config"):  # the second position in transformers
        model.generate(torch.arange(5, 15)[None], object())


def test_generate_ends_at_the_configs_eos(random_model: Factory) -> None:
    model = random_model(seed=5, dtype=torch.float64)
    ids = torch.arange(5, 15)[None]
    free = model.generate_ar(ids, 20)[0, 10:].tolist()
    for eos in (free[4], [free[9], free[4]]):
        model.config.eos_token_id = eos
        assert model.generate(ids, max_new_tokens=20)[0, 10:].tolist() == free[: free.index(free[4]) + 1]


def test_generate_without_prompt(model: TwoTowerForCausalLM) -> None:
    with pytest.raises(ArgumentError, match="input_ids"):
        model.generate()


def test_logits_are_finite_with_an_infinite_step_limit(model: TwoTowerForCausalLM) -> None:
    assert model.config.time_step_limit == (0.0, math.inf)
    assert model(torch.arange(5, 60)[None]).logits.isfinite().all()
