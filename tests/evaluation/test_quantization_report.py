"""What quantization costs: likelihoods and divergences of both towers, and the report of `twotower quantize`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import Result

from twotower import TwoTowerForCausalLM, bundled_model
from twotower.evaluation.likelihood import ar_nats
from twotower.evaluation.quantization_report import compare_likelihoods, final_hidden
from twotower.evaluation.text_batches import BLOCK_SIZE, text_batches
from twotower.training.data import Batch
from twotower.training.noise import corrupt
from twotower.training.objective import DenoisingObjective, DenoisingOptions
from twotower.training.run_tokenizer import encoder_for

LINES = [f"User: I need a table for {n} in London.\nAssistant: At which time shall it be?" for n in range(2, 40)]


@pytest.fixture(scope="module")
def model() -> TwoTowerForCausalLM:
    return TwoTowerForCausalLM.from_pretrained(bundled_model("small"), dtype="float32")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    return file


def batches(model: TwoTowerForCausalLM, *data: Path, tokens: int = 2048) -> list[Batch]:
    encoder = encoder_for(model.tokenizer, model.config)
    return text_batches([str(file) for file in data], encoder, tokens, 256)


@torch.no_grad()
def test_hidden_states_are_those_of_training(model: TwoTowerForCausalLM, text: Path) -> None:
    (batch,) = batches(model, text, tokens=1024)
    noise = corrupt(batch, BLOCK_SIZE, 3, "block")
    context, denoiser = final_hidden(model, batch, noise)
    assert model.denoiser is not None
    assert model.time is not None
    options = DenoisingOptions(mask_token_id=model.config.mask_token, train_context=True, ar_weight=1.0)
    objective = DenoisingObjective(model.context, model.denoiser, model.time, options)
    expected, clean = objective.hidden(batch, noise, BLOCK_SIZE)
    torch.testing.assert_close(denoiser, expected)
    torch.testing.assert_close(context, model.context.norm_f(clean))


def test_the_likelihood_is_that_of_the_context_tower(model: TwoTowerForCausalLM, text: Path) -> None:
    found = compare_likelihoods((model, model), batches(model, text, tokens=1024), 0)
    ids = [[*model.tokenizer(line)["input_ids"], 2] for line in LINES]
    (batch,) = batches(model, text, tokens=1024)
    read = [document for document in ids if any(document == _tokens(batch, r, n) for r in range(4) for n in range(9))]
    assert len(read) > 10
    assert found.nll[0] * found.tokens == pytest.approx(ar_nats(model, read), rel=1e-4)
    assert found.nll[0] == found.nll[1]
    assert found.kl == {"context": 0.0, "denoiser": 0.0}


def _tokens(batch: Batch, row: int, number: int) -> list[int]:
    own = (batch.document[row] == number) & batch.text[row]
    found: list[int] = batch.tokens[row][own].tolist()
    return found


def test_coarser_weights_diverge_more(model: TwoTowerForCausalLM) -> None:
    suite = batches(model)
    kl = []
    for plan in ("int8", "denoiser=int4,context=int8", "int4"):
        other = TwoTowerForCausalLM.from_pretrained(bundled_model("small"), dtype="float32", quantization=plan)
        kl.append(compare_likelihoods((model, other), suite, 0).kl)
    assert 0 < 5 * kl[0]["context"] < kl[2]["context"]
    assert kl[1]["context"] == kl[0]["context"]
    assert 0 < 5 * kl[0]["denoiser"] < kl[1]["denoiser"]


def test_the_command_prints_and_writes_a_report(text: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    small = (bundled_model("small"), "--scheme", "int4", "--text", text, "--tokens", "1024", "-n", "1")
    result = cli("quantize", "-o", tmp_path / "a", *small, "--report", tmp_path / "cost.json", "--json")
    assert result.code == 0, result.err
    shown, stored = json.loads(result.out)["report"], json.loads((tmp_path / "cost.json").read_text())
    assert stored["quantized"] == shown["quantized"]
    assert (shown["original"]["plan"], shown["quantized"]["plan"]) == ("none", "int4")
    assert shown["kl"]["context"] > 0 < shown["kl"]["denoiser"]
    assert 1 <= shown["quantized"]["passes_per_block"] <= 16
    assert set(shown["times"]) == set(shown["original"]["accuracy"]) == {"ar", "diffusion", "verified:draft_steps=1"}
    assert all(0.02 < times < 50 for times in shown["times"].values())
    result = cli("quantize", "-o", tmp_path / "b", *small, "--report", tmp_path / "cost.md")
    assert "KL of the denoiser at masks, nats" in result.out
    table = (tmp_path / "cost.md").read_text().splitlines()
    assert table[0] == "|  | none | int4 | change |"
    assert sum(line.startswith("| ") for line in table) == 16
    assert "tokens of text" in table[-1]


def test_the_conditioning_of_one_layer(model: TwoTowerForCausalLM) -> None:
    assert model.time is not None
    t = torch.tensor([0.0, 0.3, 1.0])
    with torch.no_grad():
        for i, expected in enumerate(model.time(t)):
            for ours, part in zip(model.time.of_layer(t, i), expected, strict=True):
                torch.testing.assert_close(ours, part)
