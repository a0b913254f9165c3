"""The gated delta rule in chunks against its recurrence, token by token: values and gradients, in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from twotower.ops.reference.delta_rule import (
    DeltaInputs,
    delta_rule,
    delta_rule_sequential,
    packed_states,
    written_terms,
)
from twotower.ops.reference.mamba_block import MambaStepInputs, state_update

ROWS, HEADS, WIDTH, SIZE = 3, 4, 5, 6
STATE = (ROWS, HEADS, WIDTH, SIZE)
SCANS = pytest.mark.parametrize(
    ("length", "groups", "seeded", "padded"),
    [(1, 2, True, False), (2, 1, False, False), (7, 4, True, True), (33, 2, True, False), (33, 1, False, True)],
)


class Case(NamedTuple):
    """Inputs, and a state or None; all with gradients."""

    inputs: DeltaInputs
    state: Tensor | None

    @property
    def leaves(self) -> list[Tensor]:
        """Without dt, which the recurrence does not read."""
        return [*self.inputs[:-1], *([] if self.state is None else [self.state])]


def case(length: int, groups: int, seeded: bool = True, padded: bool = False) -> Case:
    """Random inputs with keys of length 1. padded: at the start of one row and at the end of another."""
    generator = torch.Generator().manual_seed(length + groups)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k = (normal(ROWS, length, groups, SIZE) for _ in range(2))
    k = k / k.norm(dim=-1, keepdim=True)
    beta, log_decay = normal(ROWS, length, HEADS).sigmoid(), -normal(ROWS, length, HEADS).exp()
    dt = torch.ones_like(beta)
    if padded:
        dt[0, : length // 2], dt[1, length // 2 :] = 0, 0
    inputs = DeltaInputs(q, k, normal(ROWS, length, HEADS, WIDTH), beta * dt, log_decay * dt, dt)
    made = Case(inputs, normal(*STATE) if seeded else None)
    for leaf in made.leaves:
        leaf.requires_grad_()
    return made


def check(given: Case, actual: Tensor, expected: Tensor) -> None:
    """Compares values, and gradients of all inputs for a random cotangent."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    leaves = given.leaves
    grads = [torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True) for out in (actual, expected)]
    for name, one, two in zip([*DeltaInputs._fields[:-1], "state"], *grads, strict=False):
        assert (one is None) == (two is None), name
        if one is not None and two is not None:
            if name == "beta":  # a constant at padding
                one, two = one * given.inputs.dt, two * given.inputs.dt
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10, msg=name)


@SCANS
@pytest.mark.parametrize("chunk", [1, 4, 11, 33, 64])
def test_chunks_of_any_size_give_the_recurrence(
    length: int, groups: int, seeded: bool, padded: bool, chunk: int
) -> None:
    given = case(length, groups, seeded, padded)
    check(given, delta_rule(*given, chunk)[0], delta_rule_sequential(*given)[0])


@SCANS
@pytest.mark.parametrize("chunk", [4, 64])
def test_step_inputs_give_the_state_after_any_prefix(
    length: int, groups: int, seeded: bool, padded: bool, chunk: int
) -> None:
    """The written values of a pass do not depend on later tokens, so a rollback reuses them."""
    inputs, state = case(length, groups, seeded, padded)
    state = torch.zeros(STATE, dtype=torch.float64) if state is None else state
    _, written = delta_rule(inputs, state, chunk)
    steps = MambaStepInputs(torch.zeros(ROWS, length, 1), written, inputs.dt, inputs.log_decay, inputs.k)
    for accepted in ([length] * ROWS, [0, length // 2, 1]):
        _, found = state_update(torch.zeros(ROWS, 1, 1), state, steps, torch.tensor(accepted))
        for row, count in enumerate(accepted):
            part = DeltaInputs(*(value[row : row + 1, :count] for value in inputs))
            expected = delta_rule_sequential(part, state[row : row + 1])[1] if count else state[row : row + 1]
            torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("fresh", ["none", "some", "all"])
@pytest.mark.parametrize("blocks", [1, 2, 9])
@pytest.mark.parametrize("chunk", [2, 7, 9, 64])
def test_the_state_before_each_block_of_packed_rows(blocks: int, fresh: str, chunk: int) -> None:
    """A fresh block starts from zeros, as the first one of every row does; chunks of one, of two and of many blocks."""
    given = case(3 * blocks, 2, seeded=False)
    starts = torch.full((ROWS, blocks), fresh == "all")
    if fresh == "some":
        starts[0, ::2], starts[1, 4:5], starts[2, -2:] = True, True, True
    cut = given.inputs.blocks(3)
    before, written = packed_states(cut, starts, chunk)
    expected = []
    for row in range(ROWS):
        state = torch.zeros(1, *STATE[1:], dtype=torch.float64)
        for block in range(blocks):
            state = torch.zeros_like(state) if starts[row, block] else state
            expected.append(state)
            part = DeltaInputs(*(value[row : row + 1, 3 * block : 3 * block + 3] for value in given.inputs))
            state = delta_rule_sequential(part, state)[1]
    wanted = torch.cat(expected)
    torch.testing.assert_close(written, written_terms(cut).after(wanted), rtol=1e-10, atol=1e-11)
    if fresh != "all" and blocks > 1:
        check(given, before, wanted)
    else:
        assert torch.equal(before, torch.zeros_like(wanted))


def test_padding_has_no_effect() -> None:
    """Values at padding, however large, change neither the outputs of other tokens nor what they write."""
    clean, state = case(12, 2, padded=True)
    padding = clean.dt[..., 0] == 0
    dirty = DeltaInputs(*(value.detach().clone() for value in clean))
    dirty.q[padding], dirty.v[padding] = 1e6, 1e6
    dirty.k[padding] = 1.0
    for one, two in zip(delta_rule(clean, state, 5), delta_rule(dirty, state, 5), strict=True):
        torch.testing.assert_close(one[~padding], two[~padding], rtol=1e-12, atol=1e-12)


def test_fp32_keeps_its_digits_for_equal_keys() -> None:
    """Equal keys with β = 1 and no decay give the worst triangular systems: a token replaces the value before it."""
    given = case(256, 1)
    inputs = given.inputs._replace(
        k=given.inputs.k[:1, :1].expand(ROWS, 256, 1, SIZE),
        beta=torch.ones_like(given.inputs.beta),
        log_decay=torch.zeros_like(given.inputs.log_decay),
    )
    assert given.state is not None
    exact = delta_rule_sequential(inputs, given.state)[0]
    found = delta_rule(DeltaInputs(*(value.float() for value in inputs)), given.state.float(), 64)[0]
    assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()
