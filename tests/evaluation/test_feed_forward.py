"""The feed-forward that `twotower init` makes for a denoiser, against computations in float64 written here."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import _randomise
from oracle_tower import _activate, _chosen, _experts, _linear, _mlp
from tiny_backbones import save, save_tokenizer
from torch import Tensor

from twotower import TwoTowerForCausalLM
from twotower.checkpoint.convert import convert
from twotower.evaluation.dense_units import RIDGE, chosen_units
from twotower.evaluation.feed_forward import MEASURED, TextFeedForward, made_feed_forward
from twotower.evaluation.text_batches import BLOCK_SIZE, row_length, text_batches
from twotower.families.denoiser import _dense, _fewer_experts
from twotower.model.moe import MoE
from twotower.model.packed_forward import context_pass
from twotower.model.packed_layout import Layout
from twotower.specs import MLPSpec, MoESpec
from twotower.training.run_tokenizer import encoder_for

HIDDEN = 12
RELU2, GATED = (MLPSpec(width=7, activation=name, gated=gated) for name, gated in (("relu2", False), ("silu", True)))
SPECS = {
    "plain": MoESpec(experts=5, top_k=2, expert=GATED),
    "shared with a gate": MoESpec(
        experts=4, top_k=2, expert=GATED, shared_gate=True, shared=MLPSpec(width=9, activation="silu")
    ),
    "latent, with biases": MoESpec(
        experts=6, top_k=2, expert=RELU2, shared=MLPSpec(width=5, activation="relu2", gated=False, bias=True),
        scores="sigmoid", factor=1.5, num_groups=3, top_groups=2, correction_bias=True, latent=8, latent_bias=True,
    ),
    "factor of the shared gate": MoESpec(
        experts=4, top_k=1, expert=GATED, shared=MLPSpec(width=6, activation="silu", gate_factor=0.7)
    ),
}  # fmt: skip


def layer(name: str) -> MoE:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        moe = MoE(SPECS[name], HIDDEN)
        for module in moe.modules():
            _randomise(module)
    return moe.double().requires_grad_(False)


def inputs(count: int = 9, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(30 + i, HIDDEN, generator=generator, dtype=torch.float64) for i in range(count)]


class Unit(NamedTuple):
    """A unit as numbers: expert (−1: the shared one), its row, its score, gate and up over the hidden size, down."""

    expert: int
    row: int
    score: float
    gate: Tensor | None
    gate_bias: float
    up: Tensor
    up_bias: float
    down: Tensor


def units(moe: MoE, tokens: Tensor) -> list[Unit]:
    """All units, one by one; the scores are sums over tokens (T, H)."""
    spec, found = moe.spec, []
    routes = [dict(_chosen(moe.gate, spec, token)) for token in tokens]
    experts = [-1] * (spec.shared is not None) + list(range(spec.experts))
    for expert in experts:
        own = spec.expert if expert >= 0 else spec.shared
        assert own is not None
        for row in range(own.width):
            if expert < 0:
                part = moe.shared_experts
                down, up = part.down_proj.weight[:, row], part.up_proj.weight[row]
                up_bias = 0.0 if part.up_proj.bias is None else float(part.up_proj.bias[row])
                gate = part.gate_proj.weight[row] * own.gate_factor if own.gated else None
                gate_bias = 0.0
            else:
                down, up = moe.experts.down_proj[expert][:, row], moe.experts.up_proj[expert][row]
                gate, up_bias, gate_bias = moe.experts.gate_proj[expert][row] if own.gated else None, 0.0, 0.0
                if spec.latent is not None:
                    into, out = moe.fc1_latent_proj, moe.fc2_latent_proj
                    up_bias, up, down = float(up @ into.bias), into.weight.T @ up, out.weight @ down
            score = 0.0
            for token, route in zip(tokens, routes, strict=True):
                weight = float(route.get(expert, 0.0)) if expert >= 0 else 1.0
                if expert < 0 and spec.shared_gate:
                    weight = float(torch.sigmoid(_linear(moe.shared_expert_gate, token)))
                value = token @ up + up_bias
                read = _activate(value, own) if gate is None else _activate(token @ gate + gate_bias, own) * value
                score += (weight * float(read)) ** 2
            found.append(Unit(expert, row, score * float(down @ down), gate, gate_bias, up, up_bias, down))
    return found


def expected_mlp(moe: MoE, width: int, parts: list[Tensor]) -> tuple[list[Unit], Tensor, float]:
    """The units of the MLP, its down weights (width, H) with the bias in a last row, if any, and its relative error."""
    fitted = [x for i, x in enumerate(parts) if (i + 1) % MEASURED]
    measured = [x for i, x in enumerate(parts) if not (i + 1) % MEASURED] or parts
    every = units(moe, torch.cat(fitted))
    shared = [unit for unit in every if unit.expert < 0]
    routed = sorted((unit for unit in every if unit.expert >= 0), key=lambda unit: -unit.score)
    chosen = [*shared, *routed][:width]
    bias = moe.spec.latent_bias or (moe.spec.shared is not None and moe.spec.shared.bias)

    def activations(x: Tensor) -> Tensor:
        columns = []
        for unit in chosen:
            value = x @ unit.up + unit.up_bias
            own = moe.spec.expert
            columns.append(_activate(value, own) if unit.gate is None else _activate(x @ unit.gate, own) * value)
        return torch.stack([*columns, *([torch.ones(len(x), dtype=x.dtype)] * bias)], 1)

    x = torch.cat(fitted)
    read, wanted = activations(x), torch.stack([_experts(moe, moe.spec, token) for token in x])
    penalty = RIDGE * float(read[:, :width].square().sum(0).mean())
    damping = torch.eye(read.shape[1], dtype=x.dtype)[:width] * penalty**0.5
    rows = torch.cat([read, damping]), torch.cat([wanted, wanted.new_zeros(width, wanted.shape[1])])
    weights = torch.linalg.lstsq(*rows).solution
    x = torch.cat(measured)
    true = torch.stack([_experts(moe, moe.spec, token) for token in x])
    return chosen, weights, float((activations(x) @ weights - true).norm() / true.norm())


def compare(mlp: Any, spec: MLPSpec, chosen: list[Unit], weights: Tensor, tolerance: float) -> None:
    def close(one: Tensor, two: Tensor) -> None:
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance * float(two.abs().max()))

    close(mlp.up_proj.weight, torch.stack([unit.up for unit in chosen]))
    if spec.gated:
        close(mlp.gate_proj.weight, torch.stack([unit.gate for unit in chosen if unit.gate is not None]))
    if spec.bias:
        close(mlp.up_proj.bias, torch.tensor([unit.up_bias for unit in chosen], dtype=torch.float64))
        close(mlp.down_proj.bias, weights[spec.width])
    close(mlp.down_proj.weight, weights[: spec.width].T)


@pytest.mark.parametrize("name", SPECS)
def test_a_dense_mlp_is_made_of_the_best_units(name: str) -> None:
    moe, width = layer(name), 16
    spec = _dense(moe.spec, width)
    mlp, kept, error = made_feed_forward(moe, spec, inputs())
    assert kept is None
    chosen, weights, wrong = expected_mlp(moe, width, inputs())
    compare(mlp, spec, chosen, weights, 1e-7)
    assert error == pytest.approx(wrong, rel=1e-6)
    assert 0.01 < error < 1
    x = inputs(1, seed=5)[0]
    torch.testing.assert_close(mlp(x), _mlp(mlp, spec, x))


def test_all_units_of_an_always_selected_expert_are_its_mlp() -> None:
    """One expert, selected for every token with weight 1: the MLP is the expert, and the error is that of the ridge."""
    spec = MoESpec(experts=1, top_k=1, expert=GATED)
    moe = MoE(spec, HIDDEN).double().requires_grad_(False)
    for module in moe.modules():
        _randomise(module)
    mlp, _, error = made_feed_forward(moe, _dense(spec, GATED.width), inputs())
    assert error < 1e-3
    close = mlp.down_proj.weight.T[:, 0].sort().values - moe.experts.down_proj[0].T[:, 0].sort().values
    assert close.abs().max() < 1e-2


def test_a_width_below_the_shared_experts_takes_its_best_units() -> None:
    scores = torch.tensor([3.0, 9.0, 5.0, 100.0, 200.0])
    assert chosen_units(scores, 3, 2).tolist() == [1, 2]
    assert chosen_units(scores, 3, 4).tolist() == [0, 1, 2, 4]
    assert chosen_units(torch.ones(5), 2, 4).tolist() == [0, 1, 2, 3]  # ties: the first


@pytest.mark.parametrize(("name", "count"), [("plain", 3), ("latent, with biases", 4)])
@torch.no_grad()
def test_the_most_used_experts_are_kept_with_their_router(name: str, count: int) -> None:
    """With groups, whole ones."""
    moe = layer(name)
    spec = _fewer_experts(moe.spec, count)
    mixer, kept, error = made_feed_forward(moe, spec, inputs())
    assert kept is not None
    fitted = torch.cat([x for i, x in enumerate(inputs()) if (i + 1) % MEASURED])
    uses = Counter(expert for token in fitted for expert, _ in _chosen(moe.gate, moe.spec, token))
    each = moe.spec.experts // moe.spec.num_groups if moe.spec.num_groups > 1 else 1
    groups = [range(first, first + each) for first in range(0, moe.spec.experts, each)]
    best = sorted(groups, key=lambda group: -sum(uses[expert] for expert in group))[: count // each]
    assert kept.tolist() == sorted(expert for group in best for expert in group)
    assert torch.equal(mixer.gate.weight, moe.gate.weight[kept])
    if moe.spec.correction_bias:
        assert torch.equal(mixer.gate.e_score_correction_bias, moe.gate.e_score_correction_bias[kept])
    assert torch.equal(mixer.experts.down_proj, moe.experts.down_proj[kept])
    x = torch.cat([x for i, x in enumerate(inputs()) if not (i + 1) % MEASURED])
    true = torch.stack([_experts(moe, moe.spec, token) for token in x])
    own = torch.stack([_experts(mixer, spec, token) for token in x])
    assert error == pytest.approx(float((own - true).norm() / true.norm()), rel=1e-9)


# --- the whole of it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shape"), [("nemotron_h:latent", "dense:30"), ("granitemoehybrid", "experts:3")])
@torch.no_grad()
def test_init_in_float64(name: str, shape: str, tmp_path: Path) -> None:
    """The inputs of each MoE layer are those of the source, which reads the whole text at once here."""
    source = tmp_path / "ar"
    save(name, source)
    save_tokenizer(source, "<mask>")
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"{i * i}: {chr(97 + i % 26) * 30} and more"}) + "\n" for i in range(60))
    )
    maker = TextFeedForward(data=[str(text)], tokens=4000)
    made = convert(
        source, tmp_path / "two", mask_token=3, dtype="float64", denoiser_feed_forward=shape, calibration=maker
    )
    model = TwoTowerForCausalLM.from_pretrained(tmp_path / "two")
    plain = convert(source, tmp_path / "plain", mask_token=3, dtype="float64")
    assert made.denoiser_parameters != plain.parameters_per_tower
    encoder = encoder_for(model.tokenizer, model.config)
    batches = text_batches([str(text)], encoder, 4000, row_length(model.spec.max_position_embeddings))
    read: dict[int, list[Tensor]] = {}
    hooks = [
        own.mixer.register_forward_pre_hook(lambda _, given, place=i: read.setdefault(place, []).append(given[0]))
        for i, own in enumerate(model.context.all_layers())
        if own.kind == "E"
    ]
    for batch in batches:
        layout = Layout(batch.document, BLOCK_SIZE)
        context_pass(model.context, batch.tokens, layout)
        for parts in read.values():
            parts[-1] = parts[-1][layout.token_mask]
    for hook in hooks:
        hook.remove()
    assert sorted(read) == [i for i, kind in enumerate(model.spec.pattern) if kind == "E"]
    for i, parts in read.items():
        moe, own = model.context.layers[i].mixer, model.denoiser.layers[i].mixer
        fast, kept, error = made_feed_forward(moe, model.denoiser.spec.layers[i].mixer, parts)
        assert made.feed_forward_errors[model.spec.layers[i].source] == pytest.approx(error, rel=1e-4)
        for key, tensor in fast.state_dict().items():
            torch.testing.assert_close(own.state_dict()[key], tensor, rtol=1e-3, atol=1e-4)
        if kept is not None:
            assert torch.equal(own.experts.up_proj, moe.experts.up_proj[kept])
