"""The width of a pass of diffusion with adapters."""

from __future__ import annotations

import pytest

from twotower.decoding.pass_width import LEAST, pass_width


@pytest.mark.parametrize("size", [1, 2, 8, 16, 32])
def test_a_pass_has_the_masks_that_pay_and_at_least_one(size: int) -> None:
    seen = set()
    for tokens in range(0, 60, 3):
        for passes in range(1 if tokens else 0, tokens + 1, 2):
            share = (8 + tokens - passes) / (10 + tokens)
            paying = sum(share**i > LEAST for i in range(1, size + 1))
            for known in range(1, size + 1):
                width = pass_width(known, tokens, passes, size)
                assert width == min(known + max(paying, 1), size)
                seen.add(width)
    assert seen == set(range(min(size, 2), size + 1))
    assert pytest.approx(0.2) == LEAST


def test_texts_that_masks_write_have_wider_passes() -> None:
    assert pass_width(1, 0, 0, 16) == 8
    assert pass_width(1, 40, 40, 16) == 2
    assert pass_width(1, 40, 5, 16) > pass_width(1, 40, 20, 16) > 2
