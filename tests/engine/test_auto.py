"""`mode="auto"`: its choice and the reason, from the cost of passes and from recent drafts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from command import Result
from conftest import build_random_model

from twotower.decoding.auto_mode import EXPLORE_EVERY, Costs, ModeChooser, RecentStats
from twotower.decoding.output import Generation
from twotower.decoding.params import GenerationParams
from twotower.decoding.presets import parse_setting
from twotower.engine import mode_choice
from twotower.engine.generation import generate, stream
from twotower.engine.mode_choice import measure
from twotower.errors import ArgumentError

CHEAP = Costs(step=1.0, draft=1.2, check=1.3)  # AR steps
DEAR = Costs(step=1.0, draft=9.0, check=9.0)


def chooser(kept: float, agreement: float, passes: float = 1.0, block_passes: float | None = None) -> ModeChooser:
    recent = RecentStats()
    recent.kept.add(kept)
    recent.passes.add(passes)
    recent.agreement.add(agreement)
    if block_passes is not None:
        recent.block_passes.add(block_passes)
    return ModeChooser(recent)


@pytest.mark.parametrize(
    ("made", "costs", "mode", "words"),
    [
        (chooser(0.2, 0.3), CHEAP, "ar", "verified 0.48×"),  # (1.2 + 1.3) / 1.2 tokens = 2.08 steps a token
        (chooser(4.0, 0.8), CHEAP, "verified", "verified 2.00×"),  # 2.5 / 5
        (chooser(4.0, 0.8), DEAR, "ar", "verified 0.28×"),
        (chooser(4.0, 0.99), CHEAP, "diffusion", "diffusion"),
        (chooser(15.0, 0.99, block_passes=8), CHEAP, "verified", "diffusion 1.47×"),  # 16 / (8·1.2 + 1.3)
        (chooser(4.0, 0.9799, block_passes=1), CHEAP, "verified", "too little for diffusion (98%)"),
    ],
)
def test_auto_chooses_the_fastest_mode(made: ModeChooser, costs: Costs, mode: str, words: str) -> None:
    choice = made.choose(costs, block_size=16)
    assert choice.mode == mode
    assert words in choice.reason
    assert f"costs {costs.draft:.2f} AR steps" in choice.reason


def test_drafts_are_measured_first_and_again() -> None:
    fresh = ModeChooser()
    assert fresh.choose(DEAR, 16).mode == "verified"
    assert "no draft has been measured" in ModeChooser().choose(DEAR, 16).reason
    settled = chooser(0.1, 0.1)
    modes = [settled.choose(DEAR, 16).mode for _ in range(2 * EXPLORE_EVERY)]
    assert modes.count("verified") == 2
    assert modes.count("ar") == 2 * EXPLORE_EVERY - 2


def output(mode: Any, tokens: int, **facts: int) -> Generation:
    zero = {"denoiser_passes": 0, "context_passes": 0}
    return Generation(
        mode=mode, tokens=[5] * tokens, text="", finish_reason="length", prompt_tokens=1, committed_at=[],
        confidence=[], prefill_seconds=0.0, decode_seconds=1.0, **(zero | facts),
    )  # fmt: skip


def test_averages_follow_outputs() -> None:
    recent = RecentStats()
    recent.add_outputs([output("ar", 9, context_passes=9)], 16)
    assert recent.kept.value is None
    assert recent.block_passes.value is None
    recent.add_outputs(
        [output("verified", 20, drafts=4, accepted=16, rejected=2, denoiser_passes=8, context_passes=4)], 16
    )
    assert (recent.kept.value, recent.passes.value) == (4.0, 2.0)
    assert recent.agreement.value == pytest.approx(16 / 18)
    recent.add_outputs([output("diffusion", 20, denoiser_passes=10), output("diffusion", 1, denoiser_passes=2)], 16)
    assert recent.block_passes.value == pytest.approx(12 / 3)
    recent.add_outputs([output("diffusion", 16, denoiser_passes=14)], 16)
    assert recent.block_passes.value == pytest.approx(4 + 0.3 * 10)


def test_a_request_gets_a_mode_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_random_model(dtype=torch.float64)
    measured: list[tuple[int, int]] = []
    monkeypatch.setattr(mode_choice, "measure", lambda _, rows, size: measured.append((rows, size)) or DEAR)
    params = GenerationParams.of(mode="auto", max_new_tokens=12, block_size=4, seed=1, temperature=0.7)
    want = generate(model, [[5, 6, 7], [8]], GenerationParams.of(mode="ar", max_new_tokens=12, seed=1, temperature=0.7))
    for expected in (
        "verified",
        "ar",
    ):  # verified first, to measure; then AR, because drafts of a random model are rejected
        found = generate(model, [[5, 6, 7], [8]], params)
        assert [one.mode for one in found] == [expected] * 2
        assert [one.tokens for one in found] == [one.tokens for one in want]
        assert all(one.mode_reason for one in found)
    assert measured == [(2, 4)]
    *_, last = stream(model, [[5, 6, 7]], mode="auto", max_new_tokens=5, block_size=4)
    assert last.result is not None
    assert last.result.mode == "ar"
    assert measured == [(2, 4), (1, 4)]
    assert want[0].mode_reason == ""
    assert (
        build_random_model("M").workspace.mode_chooser.recent.kept.value is None
    )  # another model has its own averages


def test_one_tower_leaves_one_choice() -> None:
    model = build_random_model("M")
    model.denoiser = None
    (found,) = generate(model, [[5]], GenerationParams.of(mode="auto", max_new_tokens=3))
    assert (found.mode, found.mode_reason) == ("ar", "only the context tower is loaded")


def test_costs_are_measured_and_leave_nothing_behind() -> None:
    model = build_random_model()
    for rows in (1, 3):
        costs = measure(model, rows, 8)
        assert min(costs.step, costs.draft, costs.check) > 0
    assert not model.training
    short = build_random_model("M", max_position_embeddings=10)
    assert measure(short, 1, 8).step > 0


def test_auto_errors() -> None:
    with pytest.raises(ArgumentError, match="mode is 'automatic'; choose one of"):
        GenerationParams.of(mode="automatic")
    with pytest.raises(ArgumentError, match="block_size"):
        GenerationParams.of(mode="auto", block_size=0)
    assert parse_setting("auto:block_size=8").mode == "auto"


def test_the_command_line_says_what_was_chosen(cli: Callable[..., Result]) -> None:
    result = cli("User: I need", "-m", "bundled/small", "--mode", "auto", "-n", "6", "--dtype", "float32")
    assert result.code == 0
    assert "verified · 6 tokens" in result.err
    assert "mode verified: no draft has been measured yet" in result.err
