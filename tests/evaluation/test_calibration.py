"""Calibrated int4 weights: the rule of rounding, the streams of both towers, and what calibration gains."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from backbone_models import MASK, trained
from command import Result, assert_one_line_error
from safetensors.torch import save_file
from shaped_models import SHAPES as SHAPED
from shaped_models import shaped
from tiny_backbones import VOCAB

from twotower import TwoTowerForCausalLM, bundled_model
from twotower.checkpoint.calibrated_rounding import (
    DAMPING,
    best_integers,
    best_scales,
    round_columns,
    round_int4,
    with_damping,
)
from twotower.checkpoint.layer_reader import LayerReader
from twotower.checkpoint.quantize import large_weights, quantize_, scheme_of
from twotower.checkpoint.quantized_copy import quantize_checkpoint
from twotower.evaluation.calibration import TextCalibration, _Streams
from twotower.evaluation.layer_rounding import expert_moments
from twotower.evaluation.quantization_report import compare_likelihoods, final_hidden
from twotower.evaluation.tasks import make_problems
from twotower.evaluation.text_batches import BLOCK_SIZE, text_batches
from twotower.model.moe import Experts
from twotower.model.towers import TwoTowerModel
from twotower.ops.reference import int4
from twotower.training.data import Document, collate, to_piece
from twotower.training.noise import corrupt
from twotower.training.run_tokenizer import encoder_for

# --- one weight -------------------------------------------------------------------------------------------------------


def correlated(width: int, seed: int = 0) -> torch.Tensor:
    """Inputs (T, width) whose components are correlated and of different size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    return torch.randn(400, width, generator=generator) @ (mix + 0.5) * torch.linspace(0.2, 3, width)


@pytest.mark.parametrize("width", [32, 40, 96])
def test_each_column_is_the_best_one_after_the_errors_before_it(width: int) -> None:
    """Given the errors of the columns before, the others' best values are a least squares solution; each is rounded."""
    weight = torch.randn(5, width, generator=torch.Generator().manual_seed(1))
    x = correlated(width).double()
    moments = x.T @ x
    damped = moments + torch.eye(width) * DAMPING * moments.diagonal().mean()
    torch.testing.assert_close(with_damping(moments), damped)
    q, scale = round_columns(weight.double(), damped)
    assert scale.shape == (5, -(-width // 32))
    wide = scale.repeat_interleave(32, 1)[:, :width]
    errors = weight.double() - q * wide
    for i in range(width):
        moved = torch.linalg.solve(damped[i:, i:], damped[i:, :i] @ errors[:, :i].T).T[:, 0] if i else 0.0
        best = (weight[:, i].double() + moved) / wide[:, i]
        assert ((best - q[:, i]).abs() <= 0.5 + 1e-6).logical_or(best.clamp(-8, 7).round() == q[:, i]).all()


@pytest.mark.parametrize("width", [32, 72])
def test_best_scales_and_best_integers_lower_the_error(width: int) -> None:
    weight, x = torch.randn(20, width, generator=torch.Generator().manual_seed(4)).double(), correlated(width).double()
    damped = with_damping(x.T @ x)

    def errors(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        left = weight - q * scale.repeat_interleave(32, 1)[:, :width]
        return ((left @ damped) * left).sum(1)

    q, scale = round_columns(weight, damped)
    first = errors(q, scale)
    scale = best_scales(weight, damped, q, scale)
    assert (errors(q, scale) < first * 1.0001).all()  # the rounding of a scale to bf16 may cost a little
    assert errors(q, scale).sum() < 0.995 * first.sum()
    better = best_integers(weight, damped, q, scale)
    assert (errors(better, scale) <= errors(q, scale) * (1 + 1e-9)).all()
    assert better.abs().max() <= 8
    final, narrow = round_int4(weight.float(), x.T @ x)
    assert errors(final.double(), narrow.double()).sum() < 0.97 * first.sum()
    for value in range(-8, 8):  # the column that was set last: no other value is better
        changed = better.clone()
        changed[:, -1] = value
        assert (errors(changed, scale) >= errors(better, scale) * (1 - 1e-9)).all()


def test_outputs_are_closer_than_those_of_rounding_to_nearest() -> None:
    weight, x = torch.randn(48, 160, generator=torch.Generator().manual_seed(2)), correlated(160)
    data = torch.empty(int4.data_shape((48, 160)), dtype=torch.uint8)
    int4.pack_into(data, *round_int4(weight, x.T @ x))
    exact = x @ weight.T
    errors = [
        float((x @ int4.dequantize(each, 48, 160, torch.float32).T - exact).norm() / exact.norm())
        for each in (data, int4.quantize(weight))
    ]
    assert errors[0] < 0.5 * errors[1]


def test_inputs_that_never_occur_and_weights_of_zero() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    weight[1] = 0
    for moments in (torch.zeros(64, 64), torch.diag(torch.arange(64.0))):
        q, scale = round_int4(weight, moments)
        wide = q * scale.float().repeat_interleave(32, 1)
        assert (wide[1] == 0).all()
        assert float((wide - weight).norm() / weight.norm()) < 0.1


def test_moments_of_experts_count_tokens_with_the_routers_weight() -> None:
    model = trained("mixtral", torch.float32)
    experts = next(module for module in model.context.modules() if isinstance(module, Experts))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, experts.up_proj.shape[-1], generator=generator)
    ids = torch.stack([torch.randperm(len(experts.up_proj), generator=generator)[:2] for _ in range(20)])
    weight = torch.rand(20, 2, generator=generator)
    for expert in range(len(experts.up_proj)):
        outer, inner = expert_moments(
            experts, expert, [(hidden[:8], ids[:8], weight[:8]), (hidden[8:], ids[8:], weight[8:])]
        )
        expected_outer, expected_inner = torch.zeros_like(outer), torch.zeros_like(inner)
        for x, chosen, share in zip(hidden, ids.tolist(), weight.tolist(), strict=True):
            for i in (i for i in range(2) if chosen[i] == expert):
                read = torch.nn.functional.silu(experts.gate_proj[expert] @ x) * (experts.up_proj[expert] @ x)
                expected_outer += torch.outer(x, x).double() * share[i] ** 2
                expected_inner += torch.outer(read, read).double() * share[i] ** 2
        torch.testing.assert_close(outer, expected_outer, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(inner, expected_inner, rtol=1e-4, atol=1e-5)


# --- streams of both towers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "mixtral",
        "qwen3_next",
        "falcon_h1",
        "granitemoehybrid",
        "phi3",
        pytest.param("two mixers", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_layers_read_what_the_rounded_layers_before_them_compute(name: str, tmp_path: Path) -> None:
    """At the end the streams are those of the saved model: no layer and no weight was left out."""
    original = shaped(name, torch.float32) if name in SHAPED else trained(name, torch.float32)
    original.save_pretrained(tmp_path / "source")
    config = original.config
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(MASK + 1, VOCAB, (n,), generator=generator).numpy() for n in (40, 70)]
    pieces = [[to_piece(Document(each.astype("int32"), 1, False, True), BLOCK_SIZE, "fixed")] for each in tokens]
    batch = collate(pieces, range(2), 80, BLOCK_SIZE, eos=1, pad=0)
    with torch.device("meta"):
        model, made = TwoTowerModel(config), quantize_(TwoTowerModel(config), "denoiser.projections=int8,rest=int4")
    streams = _Streams(
        LayerReader.of_two_towers(model, tmp_path / "source", torch.float32, torch.device("cpu")), [batch], 0
    )
    schemes = {path: scheme_of(module) for path, module in large_weights(made)}
    found: dict[str, torch.Tensor] = {}
    for i in range(model.spec.num_layers):
        found |= streams.round_layer(i, schemes)
        assert all(tensor.is_meta for tensor in model.context.layers.parameters())
    assert {name.rpartition(".")[0] for name in found} == {path for path, s in schemes.items() if s == "int4"}

    def calibration(origin: Path, made: TwoTowerModel, folder: Path) -> dict[str, Path]:
        save_file(found, folder / "all.safetensors")
        return dict.fromkeys(found, folder / "all.safetensors")

    plan = "denoiser.projections=int8,rest=int4"
    written = quantize_checkpoint(tmp_path / "source", tmp_path / "made", plan, calibration=calibration)
    assert written.calibrated == len(found)
    assert not (tmp_path / "made" / "calibrated").exists()
    loaded = TwoTowerForCausalLM.from_pretrained(tmp_path / "made", dtype="float32").eval()
    noise = corrupt(batch, BLOCK_SIZE, 0, "block")
    clean, noisy = final_hidden(loaded, batch, noise)
    assert loaded.denoiser is not None
    shown = (
        loaded.context.norm_f(streams.clean[0]),
        streams.layouts[0].to_rows(loaded.denoiser.norm_f(streams.noisy[0])),
    )
    text = batch.document >= 0
    for ours, expected in zip(shown, (clean, noisy), strict=True):
        torch.testing.assert_close(ours[text], expected[text], rtol=1e-3, atol=1e-3)


# --- the bundled model ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training problems of the suite as text."""
    file = tmp_path_factory.mktemp("data") / "problems.jsonl"
    lines = [{"prompt": each.prompt, "text": each.answer} for each in make_problems("train", 400, 0)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_calibration_brings_both_towers_closer_to_the_original(problems: Path, tmp_path: Path) -> None:
    calibration = TextCalibration(data=[str(problems)], tokens=4096)
    quantize_checkpoint(bundled_model("small"), tmp_path / "made", "int4", calibration=calibration)
    original = TwoTowerForCausalLM.from_pretrained(bundled_model("small"), dtype="float32")
    encoder = encoder_for(original.tokenizer, original.config)
    batches = text_batches([], encoder, 4096, 512)
    found = []
    for source, options in ((bundled_model("small"), {"quantization": "int4"}), (tmp_path / "made", {})):
        other = TwoTowerForCausalLM.from_pretrained(source, dtype="float32", **options)
        found.append(compare_likelihoods((original, other), batches, 0).kl)
    nearest, calibrated = found
    assert calibrated["context"] < 0.85 * nearest["context"]
    assert calibrated["denoiser"] < 0.85 * nearest["denoiser"]


def test_errors_are_one_line(problems: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    def refused(*arguments: str | Path, said: str) -> None:
        assert_one_line_error(cli("quantize", bundled_model("small"), "-o", tmp_path / "new", *arguments), said)

    refused(
        "--scheme", "int8", "--calibrate", problems, said="--calibrate rounds int4 weights, and --scheme int8 has none"
    )
    refused("--scheme", "int4", "--calibrate", tmp_path / "absent.txt", said="absent.txt")
    (tmp_path / "empty.txt").write_text("\n")
    refused("--scheme", "int4", "--calibrate", tmp_path / "empty.txt", said="empty.txt")
    (tmp_path / "bad.jsonl").write_text("no JSON\n")
    refused("--scheme", "int4", "--calibrate", tmp_path / "bad.jsonl", said="bad.jsonl")
    refused("--scheme", "int4", "--report", "cost.txt", said="give a file that ends with .md or .json")
    refused("--scheme", "int4", "--report", tmp_path / "no" / "cost.md", said="there is no folder")
    refused("--scheme", "int4", "--text", problems, said="--text is the text of a report; add --report")
    assert not list(tmp_path.glob("new*"))
