"""The plan of a pass with adapters: drafted tokens to check and width, by expected tokens a second."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from twotower.decoding.draft_planner import (
    COST,
    DEFAULT_SLOPE,
    EXPECTED,
    KEPT,
    LISTS,
    SHARE,
    TOKENS,
    DraftPlanner,
    PassCosts,
)

SIZE = 9


def naive_plan(planner: DraftPlanner, sure: Sequence[float], room: int, slope: float) -> tuple[int, int]:
    """The best of all plans, each valued by the formula of the module."""
    state = planner.state
    share, rate = state[KEPT] / state[EXPECTED], state[TOKENS] / state[COST]
    survival = [min(state[LISTS : LISTS + i + 1]) for i in range(SIZE - 1)]
    plans = []
    for width in range(1 + (min(room, SIZE) > 1), min(room, SIZE) + 1):
        for checked in range(min(len(sure), width - 1) + 1):
            reach = [1.0]
            for confidence in sure[:checked]:
                reach.append(reach[-1] * min(share * confidence, 1.0))
            later = SHARE * sum(survival[: width - 1 - checked])
            plans.append((sum(reach) + reach[-1] * later - rate * slope * (width - 1), -checked, -width))
    best = max(plans)[0]
    _, checked, width = max((plan for plan in plans if plan[0] > best - 1e-9), key=lambda plan: plan[1:])
    return -checked, -width


@pytest.mark.parametrize("slope", [0.01, DEFAULT_SLOPE, 0.3])
def test_a_plan_has_the_largest_value(slope: float) -> None:
    draw, seen = random.Random(1), set()
    planner = DraftPlanner(SIZE)
    for _ in range(300):
        sure = [draw.random() ** draw.choice((0.05, 0.3, 1)) for _ in range(draw.randrange(SIZE))]
        room = draw.choice((1, 2, 5, 100))
        expected = naive_plan(planner, sure, room, slope)
        plan = planner.plan(sure, room, slope)
        assert plan == expected
        checked, width = plan
        assert checked < width <= min(room, SIZE)
        assert width > 1 or room == 1
        seen.add(plan)
        planner.learn(checked, draw.randrange(checked + 1), [draw.random() ** 0.1 for _ in range(width - 1 - checked)])
    assert len(seen) > 5


def test_drafts_that_are_kept_make_wide_passes_and_refused_ones_narrow_passes() -> None:
    good, bad = DraftPlanner(SIZE), DraftPlanner(SIZE)
    for planner, confidence in ((good, 0.99), (bad, 0.2)):
        checked, width = planner.plan([], 100, DEFAULT_SLOPE)
        for _ in range(40):
            sure = [confidence] * (width - 1 - checked)
            planner.learn(checked, checked if planner is good else 0, sure)
            checked, width = planner.plan(sure, 100, DEFAULT_SLOPE)
    assert (good.plan([0.99] * 8, 100, DEFAULT_SLOPE)[1], bad.plan([0.2] * 8, 100, DEFAULT_SLOPE)[1]) == (SIZE, 2)


def test_confidences_are_calibrated_by_what_was_kept() -> None:
    planner, sure = DraftPlanner(SIZE), [0.9] * 4
    plans = [planner.plan(sure, 100, 0.02)[0]]
    for _ in range(40):
        planner.learn(plans[-1], 0, sure)
        plans.append(planner.plan(sure, 100, 0.02)[0])
    assert plans[0] == 4
    assert planner.state[KEPT] / planner.state[EXPECTED] < 0.7
    assert 1 <= max(plans[-10:]) < 4  # tokens are still checked, so a better draft is noticed


def test_a_sequence_of_one_position_has_no_draft() -> None:
    planner = DraftPlanner(1)
    planner.learn(0, 0, [])
    assert planner.plan([], 100, DEFAULT_SLOPE) == (0, 1)


def test_the_cost_of_a_position_is_that_of_measured_passes() -> None:
    costs = PassCosts()
    assert costs.slope == DEFAULT_SLOPE
    for seconds in (9.0, 2.0, 2.0):  # the first is a warm-up
        costs.add(1, seconds)
        costs.add(9, 3 * seconds)
    assert costs.slope == pytest.approx((3 - 1) / 8)
    costs.add(5, 100.0)
    assert costs.slope == 1.0
