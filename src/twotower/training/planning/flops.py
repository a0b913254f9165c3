"""FLOPs of a training step: the matrix products, computed from their shapes.

A multiply-add counts as two; elementwise operations are left out. The triangular systems of DeltaNet layers count too.
Figures are for one packed row. Attention counts all keys of a tile, masked or not, because the kernels multiply them;
with a window, a tile has no keys before the window.
As usual, the scores that a fused attention recomputes in its backward pass (half a forward pass) are not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from twotower.model.conditioning import SINUSOID_SIZE
from twotower.model.linear import Linear
from twotower.model.packed_layout import tile_bounds
from twotower.model.tower import build_mixer
from twotower.specs import (
    COUPLED_KINDS,
    AttentionSpec,
    DeltaNetSpec,
    LayerSpec,
    Mamba2Spec,
    MLPSpec,
    MoESpec,
    ParallelSpec,
    TowerSpec,
)
from twotower.training.logits import positions_at_once

MASKED_SHARE = 0.5  # of the positions, on average, because t is uniform


@dataclass(frozen=True)
class LayerWork:
    """FLOPs of one layer over one row.

    last: of the last product, which activation checkpointing does not recompute at the end of a unit. cache_backward:
    backward FLOPs of the keys, values and states that the denoiser reads; a last context layer has no other ones.
    dense: forward FLOPs of the products with weights.
    """

    forward: float
    backward: float
    last: float
    cache_backward: float
    dense: float


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """FLOPs of one row, forward and backward, by part. recomputed: additional FLOPs of activation checkpointing."""

    context: float
    denoiser: float
    head: float
    time: float
    recomputed: float

    @property
    def total(self) -> float:
        return self.context + self.denoiser + self.head + self.time + self.recomputed


def two_tower_step(
    spec: TowerSpec,
    row_length: int,
    block_size: int,
    *,
    activation_checkpointing: bool,
    train_context: bool = False,
    teacher: bool = False,
    denoiser: TowerSpec | None = None,
    draft_head: int | None = None,
) -> StepFlops:
    """FLOPs of the denoising objective: the context layers that are run, the denoiser, the head at masked positions.

    teacher: all context layers are run, and the context's head at masked positions. denoiser: its layers, if they are
    not those of the context tower. draft_head: its rank.
    """
    own = denoiser or spec
    coupled = [i for i, layer in zip(own.context_layers, own.layers, strict=True) if layer.kind in COUPLED_KINDS]
    last = spec.num_layers - 1 if teacher else max(coupled, default=-1)
    reading = [layer_work(layer, spec, row_length, block_size, "context") for layer in spec.layers[: last + 1]]
    role = "coupled denoiser" if train_context else "denoiser"
    denoising = [layer_work(layer, own, row_length, block_size, role) for layer in own.layers]
    # A frozen context layer without a counterpart has no gradients, so it is not computed again.
    again = [work for i, work in enumerate(reading) if train_context or i in own.context_layers]
    forward = sum(work.forward for work in [*again, *denoising])
    return StepFlops(
        context=sum(work.forward for work in reading) + (_context_backward(reading) if train_context else 0.0),
        denoiser=sum(work.forward + work.backward for work in denoising),
        head=_head(spec, row_length * MASKED_SHARE, teacher=teacher)
        + _draft_head(spec, row_length * MASKED_SHARE, draft_head),
        time=_time(spec.hidden_size, row_length // block_size),
        recomputed=forward if activation_checkpointing else 0.0,
    )


def adapter_step(
    spec: TowerSpec,
    rank: int,
    row_length: int,
    block_size: int,
    *,
    activation_checkpointing: bool,
    draft_head: int | None = None,
    teacher: bool = True,
    trained_share: float | None = None,
) -> StepFlops:
    """FLOPs of the objective of adapters, which act everywhere in a block. Frozen weights have no gradient.

    trained_share: of the columns; None: of the patterns that adapters are trained with by default.
    """
    share = adapter_columns(block_size) if trained_share is None else trained_share
    forward = backward = reading = 0.0
    for layer in spec.layers:
        reading += layer_work(layer, spec, row_length, block_size, "context").forward
        work = layer_work(layer, spec, row_length, block_size, "denoiser")
        added = 2.0 * row_length * rank * adapted_width(layer, spec)
        forward += work.forward + added
        backward += work.backward - work.dense + 2 * added
    return StepFlops(
        context=reading,
        denoiser=forward + backward,
        head=_head(spec, row_length * share, teacher=teacher, frozen=True)
        + _draft_head(spec, row_length * share, draft_head),
        time=0.0,
        recomputed=reading + forward if activation_checkpointing else 0.0,
    )


def adapter_columns(block_size: int) -> float:
    """The share of columns that adapters are trained at, with the patterns draft 0.4 and prefix 0.6."""
    return 0.4 * (block_size - 1) / block_size + 0.6 / 2


def adapted_width(layer: LayerSpec, tower: TowerSpec) -> int:
    """The sum of inputs and outputs of the linear layers of a layer that have adapters."""
    with torch.device("meta"):
        mixer = build_mixer(layer, tower)
    return sum(m.in_features + m.out_features for m in mixer.modules() if isinstance(m, Linear) and m.out_features > 1)


def _context_backward(reading: list[LayerWork]) -> float:
    """Backward FLOPs of a context tower that ends at the last layer that a denoiser layer reads."""
    return sum(work.backward for work in reading[:-1]) + sum(work.cache_backward for work in reading[-1:])


def autoregressive_step(
    spec: TowerSpec, row_length: int, block_size: int, *, activation_checkpointing: bool
) -> StepFlops:
    """FLOPs of next-token prediction with one tower of the same backbone, for comparison."""
    layers = [layer_work(layer, spec, row_length, block_size, "context") for layer in spec.layers]
    return StepFlops(
        context=sum(work.forward + work.backward for work in layers),
        denoiser=0.0,
        head=_head(spec, row_length - 1),
        time=0.0,
        recomputed=sum(work.forward - work.last for work in layers) if activation_checkpointing else 0.0,
    )


def layer_work(layer: LayerSpec, tower: TowerSpec, row_length: int, block_size: int, role: str) -> LayerWork:
    """FLOPs of one layer over one row. role: "context", "denoiser", or "coupled denoiser" (its cache has gradients)."""
    hidden, tokens, past = tower.hidden_size, row_length, 0.0
    mixer = layer.mixer
    match mixer:
        case Mamba2Spec():
            return _mamba(mixer, hidden, tokens, block_size, role)
        case DeltaNetSpec():
            return _delta_net(mixer, hidden, tokens, block_size, role)
        case ParallelSpec():
            parts = (replace(layer, mixer=part) for part in layer.parts)
            attention, mamba = (layer_work(part, tower, row_length, block_size, role) for part in parts)
            return LayerWork(
                attention.forward + mamba.forward,
                attention.backward + mamba.backward,
                mamba.last,
                attention.cache_backward + mamba.cache_backward,
                attention.dense + mamba.dense,
            )
        case AttentionSpec():
            queries, keys = (heads * mixer.head_dim for heads in (mixer.num_heads, mixer.num_kv_heads))
            seen = _attended(tokens, block_size, mixer.window, own=role != "context")
            out = 2.0 * tokens * hidden * queries
            projected = queries * (2 if mixer.output_gate else 1) + 2 * keys
            dense = out + 2.0 * tokens * hidden * projected
            forward = dense + 4.0 * queries * seen
            past = 2 * 2.0 * tokens * hidden * 2 * keys
        case MoESpec():
            out, forward = _moe(mixer, hidden, tokens)
            dense = forward - 2.0 * tokens * mixer.top_k * (mixer.latent or hidden)  # without the weighted sum
        case MLPSpec():
            out, forward = _mlp(mixer, hidden, tokens)
            dense = forward
    return LayerWork(forward, 2 * forward, out, past, dense)


def _mlp(spec: MLPSpec, hidden: int, tokens: int) -> tuple[float, float]:
    """FLOPs of the last product, and of all."""
    out = 2.0 * tokens * hidden * spec.width
    return out, (3 if spec.gated else 2) * out


def _moe(spec: MoESpec, hidden: int, tokens: int) -> tuple[float, float]:
    """FLOPs of the last product, and of all: router, experts, their weighted sum, shared expert."""
    chosen, width = tokens * spec.top_k, spec.latent or hidden
    out, forward = _mlp(spec.expert, width, chosen)
    forward += 2.0 * tokens * hidden * spec.experts + 2.0 * chosen * width
    if spec.latent is not None:
        out = 2.0 * tokens * hidden * width
        forward += 2 * out
    if spec.shared is not None:
        out, shared = _mlp(spec.shared, hidden, tokens)
        forward += shared + (2.0 * tokens * hidden if spec.shared_gate else 0.0)
    return out, forward


def _mamba(spec: Mamba2Spec, hidden: int, tokens: int, block_size: int, role: str) -> LayerWork:
    inner, state = spec.inner, spec.state_size
    out = 2.0 * tokens * inner * hidden
    dense = out + 2.0 * tokens * hidden * (inner + spec.conv_dim + spec.num_heads)
    chunk = block_size if role == "context" else min(block_size, spec.chunk_size)
    inside = 2.0 * tokens * chunk * (spec.num_groups * state + inner)
    seeded = 2.0 * tokens * inner * state  # the contribution of the state before a chunk to the chunk's outputs
    carried = 0.0  # states at the ends of chunks, passed from chunk to chunk
    if role == "context":
        carried = 2.0 * tokens * inner * state + _states(tokens // chunk, inner * state)
    elif chunk < block_size:
        per_block = _states(math.ceil(block_size / chunk), inner * state)
        carried = 2.0 * tokens * inner * state + per_block * tokens / block_size
    forward = dense + inside + seeded + carried
    # A frozen state has no gradient, so the backward pass of `seeded` has one product instead of two.
    spared = seeded if role == "denoiser" and not carried else 0.0
    return LayerWork(forward, 2 * forward - spared, out, 2 * (dense - out + carried), dense)


def _delta_net(spec: DeltaNetSpec, hidden: int, tokens: int, block_size: int, role: str) -> LayerWork:
    """FLOPs of `ops.reference.delta_rule` between the projections. A triangular system of n has n² a column."""
    inner, state, keys = spec.inner, spec.state_size, spec.num_groups * spec.state_size
    out = gate = 2.0 * tokens * inner * hidden
    dense = out + gate + 2.0 * tokens * hidden * (spec.conv_dim + 2 * spec.num_heads)
    sequences, parts = tokens // block_size, math.ceil(block_size / spec.chunk_size)  # parts: chunks of a sequence
    chunk = part = min(block_size, spec.chunk_size)
    within = 0  # further blocks of a chunk
    if role == "context":  # one sequence, whose chunks have whole blocks
        blocks = max(spec.chunk_size // block_size, 1)
        sequences, parts, within = 1, math.ceil(sequences / blocks), blocks - 1
        chunk, part = blocks * block_size, block_size
    padded = sequences * parts * chunk
    read = tokens if role == "context" else padded
    overlaps = 2.0 * padded * chunk * keys if chunk > 1 else 0.0
    solved = 1.0 * padded * chunk * (inner + spec.num_heads * state) if chunk > 1 else 0.0
    one = 2.0 * sequences * chunk * inner * state  # the state of each sequence times the tokens of a chunk
    states = (parts - 1) * one + within * 2.0 * parts * block_size * inner * state
    outputs = 2.0 * read * part * (keys + inner) + 2.0 * read * inner * state
    forward = dense + overlaps + solved + parts * one + states + outputs
    # The state before a sequence has no gradient, unless it is the context's that is trained.
    spared = 0.0 if role == "coupled denoiser" else one if role == "context" or parts > 1 else 2 * one
    for_states = parts if within else parts - 1  # chunks whose written values are part of a state
    through_states = 2 * overlaps + 3 * solved + 2 * states + max(2 * for_states - 1, 0) * one
    unread = 0.0 if spec.grouped_projections else 2 * gate  # a projection of its own
    read_states = 2 * (dense - out) - unread + through_states
    return LayerWork(forward, 2 * forward + solved - spared, out, read_states, dense)


def _states(chunks: int, size: int) -> float:
    """FLOPs of `ssd.pass_states` over a number of chunks, in groups of about √n."""
    if chunks <= 64:
        return 2.0 * chunks * chunks * size
    group = math.isqrt(chunks - 1) + 1
    groups = math.ceil(chunks / group)
    return 2.0 * groups * group * group * size + _states(groups, size)


def _attended(tokens: int, block_size: int, window: int | None, own: bool) -> float:
    """Query–key pairs of one row, tile by tile. own: with the denoiser's own keys of the tile."""
    tiles = tile_bounds(tokens, block_size, window)
    return float(sum((hi - lo) * (hi - first + (hi - lo if own else 0)) for lo, hi, first in tiles))


def _head(spec: TowerSpec, positions: float, *, teacher: bool = False, frozen: bool = False) -> float:
    """FLOPs of the head, forward and backward. Logits in chunks are recomputed in the backward pass.

    teacher: the logits of the AR model too, without a backward pass. frozen: the head has no gradient.
    """
    forward = 1 + teacher
    products = forward + (1 if frozen else 2) + (forward if positions > positions_at_once(spec.vocab_size) else 0)
    return products * 2.0 * spec.hidden_size * spec.vocab_size * positions


def _draft_head(spec: TowerSpec, positions: float, rank: int | None) -> float:
    """FLOPs of a draft head of this rank, forward and backward; None: there is none."""
    return 6.0 * (rank or 0) * spec.vocab_size * positions


def _time(hidden: int, levels: int) -> float:
    """FLOPs of the time conditioning of one row. The first input has no gradient."""
    return 2.0 * levels * hidden * (2 * SINUSOID_SIZE + 3 * hidden + 9 * hidden)
