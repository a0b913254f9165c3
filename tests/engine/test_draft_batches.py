"""The draft depth of verified decoding where several sequences share passes."""

from __future__ import annotations

import random
from unittest.mock import patch

import pytest
import torch
from test_one_pass import draft_from
from tiny_backbones import two_tower

from twotower.decoding.draft_controller import DraftController, DraftControllers
from twotower.decoding.params import GenerationParams
from twotower.engine.compiled import CompiledPasses
from twotower.engine.llm import LLM
from twotower.engine.rounds import Rounds
from twotower.engine.sequence import Request, RunningSequence
from twotower.engine.workspace import Workspace

ROWS = 6


def requests(**options: object) -> list[Request]:
    params = GenerationParams.of(mode="verified", max_new_tokens=24, block_size=6, **options)
    return [Request([5, 6, 7 + row], params) for row in range(ROWS)]


def test_controllers_are_those_of_the_sequences_that_run_together() -> None:
    params = GenerationParams.of(mode="verified", block_size=8)
    workspace = Workspace()
    many, few = workspace.draft_controller(params, 16, 40), workspace.draft_controller(params, 3, 40)
    assert many is not few
    assert many.of_rows(16) is many.of_rows(9) is few.of_rows(12) is many
    assert many.of_rows(4) is few
    assert few.of_rows(1) is not few
    long, adapters = workspace.draft_controller(params, 16, 4000), workspace.draft_controller(params, 16, 40, True)
    assert long is not many
    assert adapters is workspace.draft_controller(params, 16, 4000, True)
    fixed = DraftController(fixed_depth=1)
    assert fixed.of_rows(16) is fixed


def test_a_model_with_adapters_has_drafts_of_one_pass() -> None:
    controller = DraftControllers((0, 1)).of_rows(4)
    draw, chosen = random.Random(0), set()
    for _ in range(600):
        depth = controller.choose_depth()
        chosen.add(depth)
        tokens = draw.choice((1, 2, 5)) if depth else 1
        controller.record(depth, tokens, tokens - 1, draw.uniform(2, 4) if depth else 1.0)
    assert chosen == {0, 1}


def test_a_request_forgets_its_share_of_the_loss() -> None:
    controller = DraftController(loss=8.0)
    assert controller.begin(4).loss == 6.0
    assert controller.begin(1).loss == 0.0
    controller.loss = -3.0
    assert controller.begin(2).loss == -3.0


def test_sequences_that_share_a_controller_begin_rounds_of_one_kind() -> None:
    """A pass over AR steps beside drafts would take the time of the drafts."""
    model = two_tower("nemotron_h", torch.float64, rank=3)
    draw, kinds, begin = random.Random(3), set(), Rounds.begin

    def begun(self: Rounds, ready: list[RunningSequence]) -> None:
        begin(self, ready)
        together = {sequence.drafting for sequence in ready if sequence.output.running}
        assert len(together) <= 1
        kinds.update(together)

    with (
        patch.object(DraftController, "choose_depth", lambda self: draw.randrange(2)),
        patch.object(Rounds, "begin", begun),
    ):
        found = LLM(model, rows=ROWS, length=64).generate(requests())
    assert kinds == {True, False}
    ar = GenerationParams.of(mode="ar", max_new_tokens=24)
    wanted = LLM(model, rows=ROWS, length=64).generate([Request(one.prompt, ar) for one in requests()])
    assert [one.tokens for one in found] == [one.tokens for one in wanted]


@pytest.mark.parametrize("compiled", [True, False])
def test_controllers_learn_the_means_of_passes_of_one_kind(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass counts once, with the means of its rows; passes with prompts, or AR steps beside drafts, do not."""
    model = two_tower("nemotron_h", torch.float32 if compiled else torch.float64, rank=3)
    ar = GenerationParams.of(mode="ar", max_new_tokens=24)
    wanted = LLM(model, rows=ROWS, length=64).generate([Request(one.prompt, ar) for one in requests()])
    texts = [one.tokens for one in wanted]
    if not compiled:
        draft_from([text if row % 2 else [4] * 24 for row, text in enumerate(texts)], monkeypatch)
    seen: list[tuple[int, float]] = []
    real, draw = DraftController.record, random.Random(1)

    def record(self: DraftController, depth: int, tokens: float, accepted: int, seconds: float) -> None:
        seen.append((depth, tokens))
        real(self, depth, tokens, accepted, seconds)

    monkeypatch.setattr(DraftController, "choose_depth", lambda self: draw.randrange(2))
    monkeypatch.setattr(DraftController, "record", record)
    monkeypatch.setattr(CompiledPasses, "_most_passes", lambda self, kind, rows: 3)
    outputs = LLM(model, rows=ROWS, length=64).generate(requests())
    assert [one.tokens for one in outputs] == texts
    assert {depth for depth, _ in seen} == {0, 1}
    assert all(tokens == 1 for depth, tokens in seen if not depth)
    assert compiled or any(tokens % 1 for depth, tokens in seen if depth)  # a mean
    assert (
        max(one.context_passes for one in outputs) * 0.5 < len(seen) <= max(one.context_passes for one in outputs) * 1.5
    )


def test_steps_without_drafts_share_a_call() -> None:
    model = two_tower("nemotron_h", torch.float32, rank=3)
    with patch.object(DraftController, "choose_depth", lambda self: 0):
        llm = LLM(model, rows=ROWS, length=64)
        for request in requests():
            llm.add_request(request)
        calls, tokens = 0, 0
        while llm.has_work:
            events = llm.step(1.0)
            calls += 1
            tokens += sum(len(event.tokens) for event in events)
    assert tokens == sum(len(one.tokens) for one in LLM(model, rows=ROWS, length=64).generate(requests(draft_steps=0)))
    assert calls < 24 / 2
