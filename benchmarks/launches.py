"""How many kernels does a pass on a GPU launch, and how many torch operations does the host call for it?

    python benchmarks/launches.py [--config FILE] [--rows 1] [--context 1024] [--experts grouped-gemm|triton] [--json]

Needs Triton, and no GPU: the backends of CUDA run on tensors of the meta device, which have shapes and no values. A
pass that read a value on the host would fail. The passes are those of the engine: an AR step, a denoiser pass over a
block, the commit of a block, and a round of adapters at masks (--rank) over as many tokens, which is compared with a
plain pass of the context tower. Their categories:

- settle: the update of the Mamba states with the accepted tokens of the pass before
- view: where the rows lie in the pools
- time: the time conditioning of the denoiser
- layers: embedding, layers, final norm; with CUDA graphs one launch and the copies of the inputs
- append: new keys and values, and lengths
- head: logits
- choice: tokens and confidences; in a denoiser pass also the commit policy, in a round also the check of the draft

With the option `graph_steps`, an AR step is one graph with three inputs, and lengths that the host adds to.

What it cannot see: kernels inside an operation of torch, which counts as one launch (a sort or a split GEMM has
several), and the time of a launch or a kernel. A copy of inputs counts once for each tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from common import roofline
from common.launch_counter import LaunchCounter, cuda_backends
from common.models import BLOCK, PUBLISHED, config_of
from common.program import CONFIG, JSON, QUICK, publish, start
from rich.table import Table

from twotower import TwoTowerForCausalLM
from twotower.cache.hybrid_cache import TowerState
from twotower.decoding.acceptance import accept
from twotower.decoding.sampling import argmax_with_confidence
from twotower.decoding.unmasking import Pass, decide
from twotower.model.adapters import LowRank
from twotower.model.layer_io import AttentionMetadata
from twotower.model.tower import PassInputs, Tower
from twotower.runners.graph_inputs import in_buckets, input_tensors

META = torch.device("meta")
CATEGORIES = ("settle", "view", "time", "layers", "append", "head", "choice")
STEP_INPUTS = 3  # tokens, slots and lengths of `CapturedStep`
EXPERTS = ("grouped-gemm", "triton")
RANK = 16  # of adapters


class Passes:
    """The passes of an engine with `rows` sequences in other slots than the first ones, all on the meta device."""

    def __init__(self, model: TwoTowerForCausalLM, rows: int, context: int) -> None:
        self.model, self.rows = model, rows
        self.slots = torch.zeros(rows, dtype=torch.long, device=META)
        self.state = new_state(model, rows, context)

    def ar_step(self, count: LaunchCounter) -> int:
        """An AR step after another one → the copies of inputs with CUDA graphs."""
        hidden, copies = self._extend(count, 1)
        self._choose(count, self.model.context, hidden)
        return copies

    def commit(self, count: LaunchCounter) -> int:
        """The context tower reads a block, without logits."""
        return self._extend(count, BLOCK)[1]

    def denoiser_pass(self, count: LaunchCounter) -> int:
        """A pass over a block, with the released commit policy."""
        model, denoiser = self.model, self.model.denoiser
        assert denoiser is not None
        assert model.time is not None
        self.state.drop_step_inputs()  # committed at the opening of the block
        block = torch.zeros(self.rows, BLOCK, dtype=torch.long, device=META)
        with count.of("view"):
            view = self.state.view(self.slots)
            past = list(view.past)
        with count.of("time"):
            modulation = model.time(torch.zeros(self.rows, device=META))
        meta = AttentionMetadata(causal=False, start=view.lengths)
        inputs = PassInputs(block, meta, past, modulation, keep_step_inputs=False)
        with count.of("layers"):
            hidden, _ = denoiser.layer_by_layer(*inputs)
        tokens, sure = self._choose(count, denoiser, hidden)
        step = torch.zeros(self.rows, 1, dtype=torch.long, device=META)
        masked = torch.zeros(self.rows, BLOCK, dtype=torch.bool, device=META)
        with count.of("choice"):
            decide("threshold", Pass(sure, tokens, sure, masked, step, step), sure[:, :1])
        return copies_of(inputs)

    def round(self, count: LaunchCounter) -> int:
        """A pass over a draft and masks, where adapters act: its logits check the draft and make the next."""
        prefix = torch.zeros(self.rows, dtype=torch.long, device=META)
        hidden, copies = self._extend(count, BLOCK, prefix)
        with count.of("head"):
            logits = self.model.context.logits(hidden, upcast_logits=False)
        with count.of("choice"):
            tokens, _ = argmax_with_confidence(logits)
            _, accepted = accept(tokens, tokens, logits, 1.0, prefix)
            kept = self.state.lengths[self.slots] - prefix + 1 + accepted
            self.state.rollback(self.state.lengths.index_copy(0, self.slots, kept))
        return copies

    def _extend(
        self, count: LaunchCounter, length: int, prefix: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, int]:
        state, tower = self.state, self.model.context
        tokens = torch.zeros(self.rows, length, dtype=torch.long, device=META)
        with count.of("settle"):
            state.commit_state()
        with count.of("view"):
            view = state.view(self.slots)
            past = list(view.past)
        inputs = PassInputs(tokens, AttentionMetadata(prefix=prefix, start=view.lengths), past)
        with count.of("layers"):
            hidden, updates = tower.layer_by_layer(*in_buckets(inputs)[0] if prefix is not None else inputs)
        with count.of("append"):
            appended = torch.full((self.rows,), length, device=META) if prefix is None else prefix.clone()
            state.append(updates, appended, length, self.slots)
        return hidden, copies_of(inputs)

    def _choose(self, count: LaunchCounter, tower: Tower, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with count.of("head"):
            logits = tower.logits(hidden, upcast_logits=False)
        with count.of("choice"):
            return argmax_with_confidence(logits)


PASSES: dict[str, Callable[[Passes, LaunchCounter], int]] = {
    "AR step": Passes.ar_step,
    "denoiser pass": Passes.denoiser_pass,
    "commit": Passes.commit,
    "round": Passes.round,
}


def new_state(model: TwoTowerForCausalLM, rows: int, context: int) -> TowerState:
    """A state of an engine with `rows` + 1 slots, in which each text has `context` tokens."""
    state = model.new_state(rows + 1, 0, (rows + 1) * (context + 4 * BLOCK))
    for row in range(rows + 1):
        state.allocate(row, context + 4 * BLOCK)
    state.max_seq_len = context
    return state


def copies_of(inputs: PassInputs) -> int:
    """The tensors that a CUDA graph of this pass copies; see `graph_inputs`."""
    return len(input_tensors(in_buckets(inputs)[0]))


def adapter_share(model: TwoTowerForCausalLM, rows: int, context: int) -> dict[str, float]:
    """Bytes and operations of the adapters of a round, and as percent of those of a plain pass with logits.

    The plain pass visits as many experts as a random choice. Inputs and outputs are not counted, nor is the cache.
    """
    weights = sum(part.numel() for own in model.modules() if isinstance(own, LowRank) for part in own.parameters())
    read, operations = weights * model.dtype.itemsize, 2.0 * weights * rows * BLOCK
    plain = roofline.work(model.config.layer_fields, model.dtype, rows=rows, width=BLOCK, context=context)
    shares = {"% of bytes": 100 * read / plain.bytes, "% of operations": 100 * operations / plain.operations}
    return {"bytes": float(read), "operations": operations} | shares


def measure(config: Path | None, *, rows: int, context: int, experts: str, rank: int = RANK) -> dict[str, Any]:
    """Launches and calls of each pass by category, the second time that it runs."""
    with torch.device("meta"):
        model = TwoTowerForCausalLM(config_of(config))
        model.context.add_adapters(rank, model.config.mask_token)
        model.to(torch.bfloat16).eval()
    found: dict[str, Any] = {}
    with torch.no_grad(), cuda_backends(experts) as count:
        for name, run in PASSES.items():
            passes = Passes(model, rows, context)
            passes.commit(count)
            for counter in (count.launches, count.calls, count.operations):
                counter.clear()
            copies = run(passes, count)
            with count.of("lengths"):
                passes.state.advance(passes.slots)
            launches, calls = ({own: counter[own] for own in CATEGORIES} for counter in (count.launches, count.calls))
            captured = launches | {"layers": 1 + copies}
            found[name] = {
                "launches": launches,
                "launches in all": sum(launches.values()),
                "torch calls in all": sum(calls.values()),
                "torch calls": calls,
                "with CUDA graphs": captured,
                "with CUDA graphs in all": sum(captured.values()),
                "as one graph": 1 + STEP_INPUTS + count.launches["lengths"] if name == "AR step" else None,
                "most launched": dict(Counter(count.operations).most_common(12)),
            }
    extra = found["round"]["launches"]["layers"] - found["commit"]["launches"]["layers"]
    found["round"]["adapters"] = {"rank": rank, "launches": extra} | adapter_share(model, rows, context)
    return found


@click.command()
@CONFIG
@click.option("--rows", default=1, show_default=True, help="Sequences of a pass.")
@click.option("--context", default=1024, show_default=True, help="Tokens before a pass.")
@click.option("--rank", default=RANK, show_default=True, help="Rank of the adapters of a round.")
@click.option("--experts", type=click.Choice(EXPERTS), default=EXPERTS[0], show_default=True)
@QUICK
@JSON
def main(config: Path | None, rows: int, context: int, rank: int, experts: str, quick: bool, as_json: bool) -> None:
    """Counts the launches of each pass of a shape (default: the published one)."""
    start()
    shape = None if quick and config is None else config or PUBLISHED
    found = measure(shape, rows=rows, context=context, experts=experts, rank=rank)
    table = Table("pass", *CATEGORIES, "launches", "torch calls", "with CUDA graphs", title=f"experts: {experts}")
    for name, one in found.items():
        each = (str(one["launches"][category]) for category in CATEGORIES)
        totals = (str(one[f"{what} in all"]) for what in ("launches", "torch calls", "with CUDA graphs"))
        table.add_row(name, *each, *totals)
    facts = {"shape": shape.name if shape else "tiny", "rows": rows, "context": context, "experts": experts}
    own = Table("adapters of a round: launches", "bytes", "%", "operations", "%")
    of_round = found["round"]["adapters"]
    shown = (f"{of_round['bytes']:.3g}", f"{of_round['% of bytes']:.3g}")
    shown += (f"{of_round['operations']:.3g}", f"{of_round['% of operations']:.3g}")
    own.add_row(str(of_round["launches"]), *shown)
    publish("launches", facts | {"passes": found}, [table, own], as_json)


if __name__ == "__main__":
    main()
