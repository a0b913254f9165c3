"""The objective: one pass over all blocks of packed rows equals generation block by block, with gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import EVERY_KIND, build_random_model
from packed import (
    ROWS,
    Verb,
    blocks_of,
    case,
    deviation,
    naive_next_token_nll,
    naive_nll,
    objective,
    packed,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from twotower.cache.layer_cache import KeyValue, LayerCache, MambaCache
from twotower.model.mamba2 import Mamba2
from twotower.model.packed_forward import read_layer, read_mamba
from twotower.model.packed_layout import Layout
from twotower.ops.reference.attention import CachedKV
from twotower.training import logits as logits_module
from twotower.training.noise import Corruption, NoiseScope
from twotower.training.objective import AutoregressiveObjective

EXACT, SINGLE = 1e-9, 1e-5  # largest deviation in float64 and fp32, relative to a tensor's largest element
KINDS = ["M", "*", "E", "-", EVERY_KIND]


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Gradients of every parameter that the loss reaches, by name in the model; the graph is kept."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    needed = [p for p in parameters if p.requires_grad]
    found = iter(torch.autograd.grad(loss, needed, allow_unused=True, retain_graph=True))
    return {n: g for n, p in zip(names, parameters, strict=True) if p.requires_grad and (g := next(found)) is not None}


def same(loss: Tensor, naive: Tensor, model: nn.Module, tolerance: float, label: str = "") -> None:
    """Compares losses, and gradients of all trained parameters.

    Gradients that are 0 but for rounding (of the bias of keys without position embedding) count as 0.
    """
    assert deviation(loss, naive) < tolerance
    fast, slow = gradients(loss, model), gradients(naive, model)
    rounding = 1e-6 * tolerance * max((float(g.abs().max()) for g in slow.values()), default=0.0)
    felt, wanted = ({n for n, g in found.items() if g.abs().max() > rounding} for found in (fast, slow))
    assert felt == wanted
    apart = {name: deviation(fast[name], slow[name]) for name in wanted}
    worst = max(apart, key=lambda name: apart[name])
    print(f"{label:<40} loss {deviation(loss, naive):.1e}  gradients {apart[worst]:.1e} ({worst})")
    assert apart[worst] < tolerance, worst


# --- equality -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "block_size"), [*((p, 4) for p in KINDS), *((EVERY_KIND, size) for size in (1, 2, 7, 20))]
)
def test_one_pass_over_all_blocks_equals_generation_block_by_block(pattern: str, block_size: int) -> None:
    """All losses and gradients of both towers; blocks from one token to more than a chunk."""
    step = case(pattern, block_size)
    training = objective(step.model, train_context=True)
    nll, _ = training.denoise(step.batch, step.noise, block_size)
    by: tuple[Verb, ...] = (
        ("extend",) if block_size < 4 else ("prefill", "extend") if pattern == EVERY_KIND else ("prefill",)
    )
    for verb in by:
        naive = naive_nll(*step, by=verb)
        assert deviation(nll, naive) < EXACT
        same(nll.sum(), naive.sum(), step.model, EXACT, f"float64 {pattern} blocks of {block_size}, {verb}")
    assert deviation(training(step.batch, step.noise, block_size), naive.sum()) < EXACT


def test_the_denoiser_reads_the_blocks_that_have_masks() -> None:
    """The denoiser runs no other blocks; without any mask, loss and gradients are 0."""
    step = case()
    training = objective(step.model)
    read: list[Tensor] = []
    hook = training.embeddings.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    training(step.batch, step.noise, 4)
    corrupted = step.batch.tokens.masked_fill(step.noise.masked, training.options.mask_token_id)
    masked = step.noise.masked.unflatten(1, (-1, 4)).any(-1)
    assert 0 < masked.sum() < masked.numel()
    assert torch.equal(read[0], corrupted.unflatten(1, (-1, 4))[masked])
    nothing = Corruption(step.noise.t, torch.zeros_like(step.noise.masked))
    loss = training(step.batch, nothing, 4)
    hook.remove()
    assert len(read[1]) == 0
    assert loss == 0
    loss.backward()
    trained = [p for p in training.parameters() if p.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in trained)


def test_the_batch_has_what_it_should() -> None:
    """Documents begin anywhere in a block; there are context-only blocks, and masks on repeated EOS."""
    step = case()
    leads = [b.lo % 4 for b in blocks_of(step.batch, 4) if b.lo == b.first]
    assert len(set(leads)) > 2
    assert (step.batch.document.amax(1) > 0).all()
    trained = step.batch.denoised.unflatten(1, (-1, 4)).any(-1)
    partial = (step.batch.document >= 0).unflatten(1, (-1, 4))
    assert not trained[partial.any(-1) & ~partial.all(-1)].any()
    filled = step.batch.denoised & ~step.batch.text
    assert (step.noise.masked & filled).any()


@pytest.mark.parametrize(("pattern", "block_size"), [*((p, 4) for p in KINDS), (EVERY_KIND, 7)])
def test_one_pass_equals_generation_in_fp32(pattern: str, block_size: int) -> None:
    step = case(pattern, block_size, dtype=torch.float32)
    nll, _ = objective(step.model, train_context=True).denoise(step.batch, step.noise, block_size)
    naive = naive_nll(step.model, step.batch, step.noise, block_size)
    assert deviation(nll, naive) < SINGLE
    same(nll.sum(), naive.sum(), step.model, SINGLE, f"fp32 {pattern} blocks of {block_size}")


@pytest.mark.parametrize(
    ("pattern", "block_size", "overrides"),
    [
        ("MM", 7, {"chunk_size": 4}),  # blocks longer than a chunk, in both towers
        ("M", 3, {"conv_kernel": 5, "use_conv_bias": False}),  # windows over two blocks
        ("M*", 4, {"conv_kernel": 2, "n_groups": 4, "use_bias": True, "attention_bias": True, "mlp_bias": True}),
        ("M*", 4, {"n_groups": 1, "num_key_value_heads": 4, "time_step_limit": [0.05, 0.2]}),
        ("ME*", 4, {"n_group": 4, "topk_group": 2, "norm_topk_prob": False, "mlp_bias": True}),
        ("*E*", 4, {"n_group": 1, "num_key_value_heads": 1, "residual_in_fp32": True}),
    ],
)
def test_one_pass_equals_generation_for_other_shapes(pattern: str, block_size: int, overrides: dict[str, Any]) -> None:
    step = case(pattern, block_size, **overrides)
    nll, _ = objective(step.model, train_context=True).denoise(step.batch, step.noise, block_size)
    naive = naive_nll(step.model, step.batch, step.noise, block_size, by="extend")
    assert deviation(nll, naive) < EXACT
    same(nll.sum(), naive.sum(), step.model, EXACT, f"float64 {pattern} {overrides}")


LONG = ((((262, "bos"), (9, "plain")),), "block")
LONGER = ((((1300, "bos"), (700, "prompted")), ((5, "plain"), (1100, "bos"), (600, "fragment"))), "document")


@pytest.mark.parametrize(("rows", "scope"), [LONG, pytest.param(*LONGER, marks=pytest.mark.slow)])
def test_one_pass_equals_generation_over_many_blocks(rows: Any, scope: str) -> None:
    """More blocks than one group of the scan and one tile of attention."""
    step = case("M*M", 4, scope, rows=rows)
    assert step.batch.tokens.shape[1] > 256
    nll, _ = objective(step.model, train_context=True).denoise(step.batch, step.noise, 4)
    naive = naive_nll(step.model, step.batch, step.noise, 4, by="extend")
    assert deviation(nll, naive) < EXACT
    same(nll.sum(), naive.sum(), step.model, EXACT, f"float64 M*M, {step.batch.tokens.shape[1]} columns")


FROZEN: list[dict[str, Any]] = [{}, {"elbo": True, "activation_checkpointing": True}]
UNFROZEN: list[dict[str, Any]] = [
    {"train_context": True, "activation_checkpointing": True},
    {"train_context": True, "ar_weight": 0.3},
    {"train_context": True, "ar_weight": 0.3, "elbo": True, "activation_checkpointing": True},
]


@pytest.mark.parametrize(("scope", "tied"), [("row", False), ("document", False), ("block", False), ("block", True)])
def test_every_option_equals_generation(scope: NoiseScope, tied: bool) -> None:
    step = case(EVERY_KIND, 4, scope)
    model, batch, noise, _ = step
    if tied:
        model.denoiser = model.context
    nll, next_nll = naive_nll(*step), naive_next_token_nll(model, batch)
    levels = noise.t.repeat_interleave(4, 1)[noise.masked]
    for options in UNFROZEN if tied else FROZEN + UNFROZEN:
        elbo, ar_weight = options.get("elbo", False), options.get("ar_weight", 0.0)
        training = objective(model, tied=tied, scope=scope, **options)
        naive = (nll / levels if elbo else nll).sum()
        targets = (batch.denoised if elbo else noise.masked).sum()
        assert training.targets(batch, noise) == targets
        if ar_weight:
            naive = naive + ar_weight * next_nll.mean() * targets
        same(training(batch, noise, 4), naive, model, EXACT, f"{scope} {options}")


def test_one_pass_without_time() -> None:
    step = case()
    nll, _ = objective(step.model, time=False).denoise(step.batch, step.noise, 4)
    naive = naive_nll(step.model, step.batch, step.noise, 4, time=False)
    same(nll.sum(), naive.sum(), step.model, EXACT, "no time")
    told = naive_nll(step.model, step.batch, step.noise, 4)
    assert deviation(told, naive) > 0.01


@pytest.mark.parametrize("residual_in_fp32", [False, True])
def test_one_pass_equals_generation_in_bf16(residual_in_fp32: bool) -> None:
    """Up to the rounding of bf16: both are equally far from the exact result."""
    overrides = {"residual_in_fp32": residual_in_fp32}
    step = case("M*-M", 4, dtype=torch.bfloat16, **overrides)
    exact = case("M*-M", 4, **overrides)
    exact.model.load_state_dict(step.model.state_dict())  # the rounded weights
    results = []
    for one, naive in ((step, False), (step, True), (exact, False)):
        training = objective(one.model, train_context=True)
        nll = naive_nll(*one) if naive else training.denoise(one.batch, one.noise, 4)[0]
        assert nll.dtype == (torch.float64 if one is exact else torch.float32)
        found = gradients(nll.sum(), one.model)
        results.append((nll.detach().double(), torch.cat([g.flatten().double() for g in found.values()])))
    fast, slow, true = results
    for mine, theirs, truth in zip(fast, slow, true, strict=True):
        wrong, wrong_naively = ((v - truth).norm() / truth.norm() for v in (mine, theirs))
        print(f"bf16: {wrong:.1e}, naively {wrong_naively:.1e}")
        assert wrong < 0.05
        assert wrong < 2 * wrong_naively


def test_the_head_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    step = case("M")
    training = objective(step.model)
    whole = training(step.batch, step.noise, 4)
    monkeypatch.setattr(logits_module, "MAX_LOGITS", 5 * step.model.config.vocab_size)
    assert step.noise.masked.sum() > 10
    same(training(step.batch, step.noise, 4), whole, step.model, 1e-12)


def test_rows_of_padding_and_batches_without_masks_are_harmless() -> None:
    step = case()
    rows = [*ROWS, ()]
    batch = packed(rows, 4, seed=1)
    assert (batch.document[-1] == -1).all()
    noise = Corruption(
        *(torch.cat([v, v[:1] & False if v.dtype == torch.bool else v[:1]]) for v in (step.noise.t, step.noise.masked))
    )
    training = objective(step.model, train_context=True, ar_weight=0.3)
    same(training(batch, noise, 4), training(step.batch, step.noise, 4), step.model, 1e-11)
    only = slice(len(ROWS), None)
    loss = training(batch.rows(only), noise.rows(only), 4)
    assert loss == 0
    assert all((g == 0).all() for g in gradients(loss, step.model).values())


@pytest.mark.parametrize("options", [{}, {"elbo": True}, {"train_context": True, "ar_weight": 0.3}])
def test_a_batch_is_the_sum_of_its_rows(options: dict[str, Any]) -> None:
    """Micro-batches and processes change nothing; the next-token loss needs the ratio of the whole batch."""
    step = case()
    training = objective(step.model, **options)
    parts = [(step.batch.rows(slice(r, r + 1)), step.noise.rows(slice(r, r + 1))) for r in range(len(ROWS))]
    targets = training.targets(step.batch, step.noise)
    assert targets == (step.batch.denoised if options.get("elbo") else step.noise.masked).sum()
    assert targets == sum(training.targets(*part) for part in parts)
    further = training.ar_targets(step.batch)
    assert further == sum(training.ar_targets(batch) for batch, _ in parts)
    ratio = targets / max(further, 1)
    losses = torch.stack([training(*part, 4, ratio) for part in parts])
    same(losses.sum(), training(step.batch, step.noise, 4), step.model, 1e-11)


# --- one pass, no loop --------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts tensor operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_the_number_of_operations_does_not_grow_with_the_blocks() -> None:
    """Forward and backward, up to one tile of attention and one group of the scan."""
    counts = []
    for length in (30, 118):
        step = case("M*-M", 4, rows=(((length, "bos"),),))
        for options in ({}, {"train_context": True, "activation_checkpointing": True}):
            training = objective(step.model, **options)
            with Operations() as operations:
                training(step.batch, step.noise, 4).backward()
            counts.append(operations.count)
    assert counts[:2] == counts[2:]


def test_each_layer_runs_once_the_context_without_gradients() -> None:
    step = case()
    training = objective(step.model)
    calls = []

    def note(module: nn.Module, inputs: object, output: Tensor) -> None:
        calls.append((id(module), output.requires_grad))

    layers = [(tower, layer.norm) for tower in (step.model.context, step.model.denoiser) for layer in tower.layers]
    for _, norm in layers:
        norm.register_forward_hook(note)
    training(step.batch, step.noise, 4)
    assert sorted(calls) == sorted((id(norm), tower is step.model.denoiser) for tower, norm in layers)


# --- gradients against finite differences -------------------------------------------------------------------------

TWO = (((5, "bos"), (4, "plain")),)  # −∞ decays, where the second document starts from zero
TINY = {"hidden_size": 4, "vocab_size": 64, "mamba_num_heads": 2, "mamba_head_dim": 2, "ssm_state_size": 2,
        "n_groups": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2, "conv_kernel": 3}  # fmt: skip


@pytest.mark.parametrize("many", [False, True], ids=["few blocks", "groups of blocks"])
def test_boundary_states_are_differentiable(many: bool) -> None:
    """Outputs, windows and states of a packed Mamba layer, by its inputs and each parameter."""
    mixer = build_random_model("M", dtype=torch.float64, **TINY).context.layers[0].mixer
    assert isinstance(mixer, Mamba2)
    rows = (((50, "bos"), (18, "plain")),) if many else TWO
    size = 1 if many else 2
    layout = Layout(packed(rows, size, seed=1).document, size)
    assert (layout.blocks > 64) == many
    torch.manual_seed(0)
    hidden = torch.randn(*layout.document.shape, 4, dtype=torch.float64, requires_grad=True)
    names, values = zip(*mixer.named_parameters(), strict=True)

    def run(hidden: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        given = {f"mixer.{name}": value for name, value in zip(names, parameters, strict=True)}
        return torch.func.functional_call(_Reading(mixer), given, (hidden, layout))

    assert torch.autograd.gradcheck(run, (hidden, *values), fast_mode=many)


class _Reading(nn.Module):
    """`read_mamba` as a module, so that a test can replace its parameters."""

    def __init__(self, mixer: Mamba2) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, hidden: Tensor, layout: Layout) -> tuple[Tensor, ...]:
        out, past = read_mamba(self.mixer, hidden, layout)
        return out, *past.gathered()


@pytest.mark.parametrize(("tied", "activation_checkpointing"), [(False, False), (False, True), (True, True)])
def test_the_whole_objective_is_differentiable(tied: bool, activation_checkpointing: bool) -> None:
    """In one random direction of each layer of both towers, the embeddings, heads and time network."""
    step = case("M*EM", 2, rows=TWO, **TINY)
    training = objective(
        step.model, tied=tied, train_context=True, ar_weight=0.5, activation_checkpointing=activation_checkpointing
    )
    parameters = dict(training.named_parameters())
    torch.manual_seed(0)
    directions = {name: torch.randn_like(value) for name, value in parameters.items()}
    groups = sorted({_part(name) for name in parameters})

    def loss(along: Tensor) -> Tensor:
        moved = {n: p + along[groups.index(_part(n))] * directions[n] for n, p in parameters.items()}
        return torch.func.functional_call(training, moved, (step.batch, step.noise, 2))

    assert torch.autograd.gradcheck(loss, torch.zeros(len(groups), dtype=torch.float64, requires_grad=True))


def _part(name: str) -> str:
    """units.3.context.norm.weight → units.3.context; time.t_block.1.bias → time."""
    return ".".join(name.split(".")[: 3 if name.startswith("units") else 1])


@pytest.mark.parametrize("name", ["A_log", "dt_bias", "conv1d.bias"])
def test_what_shapes_the_context_states_has_the_right_gradient(name: str) -> None:
    """The denoising loss by each element of a context parameter that acts only through boundary states."""
    step = case("M", 2, rows=TWO, **TINY)
    training = objective(step.model, train_context=True)
    key = f"units.0.context.mixer.{name}"

    def loss(value: Tensor) -> Tensor:
        return torch.func.functional_call(training, {key: value}, (step.batch, step.noise, 2))

    value = dict(training.named_parameters())[key]
    assert torch.autograd.gradcheck(loss, value)
    assert torch.autograd.grad(loss(value), value)[0].any()


def test_second_documents_leave_no_nan() -> None:
    """In fp32, with decays so fast that they become exact zeros."""
    step = case(EVERY_KIND, 4, dtype=torch.float32)
    with torch.no_grad():
        for module in step.model.modules():
            if isinstance(module, Mamba2):
                module.A_log.copy_(torch.tensor([12.0, 6.0, 0.0, -12.0]))
                module.dt_bias.fill_(3.0)
    loss = objective(step.model, train_context=True, ar_weight=1.0)(step.batch, step.noise, 4)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients(loss, step.model).values())


# --- the context pass and next-token prediction -------------------------------------------------------------------


@torch.no_grad()
def test_the_context_pass_gives_what_generation_keeps() -> None:
    """Keys, values, and the window and state before each block equal a `TowerState` that grows by blocks."""
    step = case()
    model, batch = step.model, step.batch
    layout = Layout(batch.document, 4)
    x = model.context.embed(batch.tokens)
    coupling: list[LayerCache] = []
    for layer in model.context.all_layers():
        x, past = read_layer(layer, x, layout)
        coupling.append(past)
    state = model.new_state(1, 0)
    for block in blocks_of(batch, 4):
        if block.lo == block.first:
            state = model.new_state(1, 64)
        seen = block.lo - block.first
        place = block.row * (batch.tokens.shape[1] // 4) + block.lo // 4
        for past, kept in zip(coupling, model.reader(state).view().past, strict=True):
            if isinstance(past, MambaCache):
                assert isinstance(kept, MambaCache)
                for mine, theirs in zip(past.gathered(), kept.gathered(), strict=True):
                    torch.testing.assert_close(mine[place], theirs[0], rtol=EXACT, atol=EXACT)
            elif isinstance(past, KeyValue) and seen:
                assert isinstance(kept, CachedKV)
                for mine, theirs in zip(past, kept.dense(past.k.shape[1])[:2], strict=True):
                    own = mine[block.row, :, block.first : block.lo]
                    torch.testing.assert_close(own, theirs[0, :, :seen], rtol=EXACT, atol=EXACT)
        model.extend(batch.tokens[block.row, None, block.lo : block.hi], state, logits=False)


@pytest.mark.parametrize("prompts", [True, False])
@pytest.mark.parametrize("block_size", [4, 7])
def test_next_token_prediction_is_that_of_each_document_alone(block_size: int, prompts: bool) -> None:
    step = case(block_size=block_size)
    naive = naive_next_token_nll(step.model, step.batch, prompts)
    for activation_checkpointing in (False, True):
        training = AutoregressiveObjective(
            step.model.context, activation_checkpointing=activation_checkpointing, prompt_loss=prompts
        )
        assert training.draw_noise(step.batch, block_size) is None
        assert training.targets(step.batch) == len(naive)
        same(training(step.batch, None, block_size), naive.sum(), step.model.context, EXACT)
    assert len(naive) == sum(max(n - 1 - (max(n // 3, 1) - 1) * (kind == "prompted" and not prompts), 0)
                             for row in ROWS for n, kind in row)  # fmt: skip
