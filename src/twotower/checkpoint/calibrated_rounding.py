"""Rounds a weight to int4 so that its outputs change little for given inputs.

First GPTQ (Frantar et al., arXiv:2210.17323): columns are rounded one after the other. The error of a column is spread
over the columns that are not rounded yet, as the second moments of the inputs say: the least squared error of the
outputs. Then rounds of two steps, each of which lowers that error: the best scales for the integers, and for each
integer the best value beside the others (coordinate descent, as in QuantEase, Behdin et al., arXiv:2309.01885). The
result has the layout of `ops.reference.int4`: an integer in −8…7 for each weight, a scale in bf16 for each row and 32
inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.ops.reference.int4 import GROUP, HIGH, LOW

DAMPING = 0.05  # of the mean second moment, added to all: few inputs say little about their correlations
ROUNDS = 2  # of best scales and best integers
# Candidates for the scale of a group: m / divisor, m its value of largest magnitude.
NEGATIVE = (-6.5, -7.0, -7.25, -7.5, -7.75, -8.0, -8.25, -8.5, -8.75, -9.0, -9.5)
DIVISORS = (*NEGATIVE, 5.5, 6.0, 6.25, 6.5, 6.75, 7.0, 7.25, 7.5)
MOST = 2**25  # values of a temporary tensor


def round_int4(weight: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """weight (out, in), moments (in, in) = Σ x·xᵀ over inputs x → q (out, in) int8, scale (out, ⌈in / 32⌉) bf16.

    Inputs that never occur are rounded to nearest. Computes in float64, on the device of the weight.
    """
    wide, damped = weight.double(), with_damping(moments.double())
    q, scale = round_columns(wide, damped)
    for _ in range(ROUNDS):
        scale = best_scales(wide, damped, q, scale)
        q = best_integers(wide, damped, q, scale)
    return q.to(torch.int8), scale.to(torch.bfloat16)


def with_damping(moments: Tensor) -> Tensor:
    """The moments, with a part of their mean added to the diagonal. Inputs that never occur get the mean, or 1."""
    occurring = moments.diagonal() > 0
    mean = moments.diagonal().sum() / occurring.sum().clamp(min=1)
    return moments + torch.diag(torch.where(occurring, DAMPING * mean, mean.where(mean > 0, 1.0)))


def round_columns(weight: Tensor, damped: Tensor) -> tuple[Tensor, Tensor]:
    """GPTQ: weight (out, in), damped moments (in, in) → q (out, in), scale (out, groups); float64, as all here."""
    left, q, scales = weight.clone(), torch.empty_like(weight), []
    # Row i of the upper Cholesky factor of the inverse spreads the error of input i.
    spread = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    for start in range(0, left.shape[1], GROUP):
        end = min(start + GROUP, left.shape[1])
        own, group = left[:, start:end], spread[start:end, start:end]
        scale = _first_scale(own, 1 / group.diagonal().square())
        errors = torch.empty_like(own)
        for i in range(end - start):
            q[:, start + i] = _nearest(own[:, i], scale)
            errors[:, i] = (own[:, i] - q[:, start + i] * scale) / group[i, i]
            own[:, i + 1 :] -= errors[:, i, None] * group[i, i + 1 :]
        left[:, end:] -= errors @ spread[start:end, end:]
        scales.append(scale)
    return q, torch.stack(scales, 1)


def best_scales(weight: Tensor, damped: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """The scales (out, groups) of least error for given integers, as bf16 values; a group of zeros keeps its scale."""
    groups = scale.shape[1]
    pad = groups * GROUP - weight.shape[1]
    padded, found = F.pad(damped, (0, pad, 0, pad)), []
    rows = max(MOST // len(padded) ** 2, 1)
    for own, values, before in zip(weight.split(rows), F.pad(q, (0, pad)).split(rows), scale.split(rows), strict=True):
        products = values[:, :, None] * padded * values[:, None, :]
        matrix = products.unflatten(1, (groups, GROUP)).unflatten(3, (groups, GROUP)).sum((2, 4))
        wanted = (values * (F.pad(own, (0, pad)) @ padded)).unflatten(1, (groups, GROUP)).sum(2)
        empty = matrix.diagonal(dim1=1, dim2=2) == 0
        found.append(torch.where(empty, before, torch.linalg.solve(matrix + torch.diag_embed(empty.double()), wanted)))
    return _narrow(torch.cat(found))


def best_integers(weight: Tensor, damped: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """Sets each integer (out, in) to its best value for given scales, one column after the other."""
    q, wide = q.clone(), scale.repeat_interleave(GROUP, 1)
    pulls = (weight - q * wide[:, : q.shape[1]]) @ damped
    for i in range(q.shape[1]):
        own = wide[:, i]
        best = torch.where(own != 0, _nearest(q[:, i] * own + pulls[:, i] / damped[i, i], own), q[:, i])
        pulls -= ((best - q[:, i]) * own)[:, None] * damped[i]
        q[:, i] = best
    return q


def _first_scale(own: Tensor, importance: Tensor) -> Tensor:
    """own (out, n) of one group, importance (n,) of each squared error → the best of the candidates (out,)."""
    largest = own.gather(1, own.abs().argmax(1, keepdim=True))
    scales = torch.stack([_narrow(largest[:, 0] / divisor) for divisor in DIVISORS])
    errors = [(_nearest(own, each[:, None]) * each[:, None] - own).square() @ importance for each in scales]
    return scales.gather(0, torch.stack(errors).argmin(0)[None])[0]


def _nearest(values: Tensor, scale: Tensor) -> Tensor:
    return (values / torch.where(scale != 0, scale, 1.0)).round_().clamp_(LOW, HIGH)


def _narrow(scale: Tensor) -> Tensor:
    """Rounded to bf16, without a negative zero."""
    return scale.to(torch.bfloat16).double() + 0.0
