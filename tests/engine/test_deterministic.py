"""`deterministic`: a request's text repeats itself in bf16, because its passes depend on nothing but the request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from conftest import EVERY_KIND, build_random_model
from decoding_models import decoding_model

from twotower import LLM, TwoTowerForCausalLM
from twotower.decoding.params import GenerationParams
from twotower.decoding.presets import parse_setting
from twotower.engine import Request, context_step
from twotower.engine.denoiser_step import OpenBlocks
from twotower.engine.engine_options import EngineOptions
from twotower.engine.scheduled import ScheduledTokens
from twotower.engine.sequence import RunningSequence
from twotower.engine.towers import Towers
from twotower.errors import ArgumentError

MODES = ("verified", "diffusion", "ar", "mock_ar", "auto")
NEW = 40


@pytest.fixture(scope="module")
def model() -> TwoTowerForCausalLM:
    return build_random_model(EVERY_KIND, seed=5, dtype=torch.bfloat16)


def prompts(model: TwoTowerForCausalLM, count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    vocab = model.spec.vocab_size
    return [torch.randint(4, vocab, (3 + 41 * i % 97,), generator=generator).tolist() for i in range(count)]


def params(mode: str, deterministic: bool = True, **values: object) -> GenerationParams:
    shared: dict[str, object] = {"mode": mode, "max_new_tokens": NEW, "temperature": 1.0, "seed": 7, "block_size": 8}
    return GenerationParams.from_mapping(shared | {"deterministic": deterministic} | values)


Pass = tuple[str, tuple[int, ...], int]  # the tower, the numbers of the requests in a pass, and its positions


@contextmanager
def recorded(found: list[Pass]) -> Iterator[None]:
    """Records every pass that reads a context or fills blocks."""
    read, fill = context_step.launch, OpenBlocks.launch

    def launch_context(model: Towers, state: object, constants: object, works: Sequence[ScheduledTokens]) -> object:
        numbers = tuple(work.sequence.output.row for work in works)
        found.append(("context", numbers, max(len(work.tokens) for work in works)))
        return read(model, state, constants, works)  # type: ignore[arg-type]

    def launch_blocks(blocks: OpenBlocks, model: Towers, sequences: Sequence[RunningSequence], *rest: object) -> object:
        pending = fill(blocks, model, sequences, *rest)  # type: ignore[arg-type]
        found.append(
            ("denoiser", tuple(sequence.output.row for sequence in sequences), len(pending.blocks.wait()[0][0]))
        )
        return pending

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context_step, "launch", launch_context)
        patch.setattr(OpenBlocks, "launch", launch_blocks)
        yield


def passes_of(number: int, found: list[Pass]) -> list[tuple[str, int, int]]:
    """Tower, requests in the pass and positions, of the passes that hold a request."""
    return [(tower, len(numbers), width) for tower, numbers, width in found if number in numbers]


def alone(model: TwoTowerForCausalLM, prompt: list[int], mode: str) -> list[int]:
    engine = LLM(model, rows=1, length=200, block_size=8)
    tokens = engine.generate([Request(prompt, params(mode))])[0].tokens
    engine.close()
    return tokens


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=pytest.mark.code_path if mode == "verified" else ()) for mode in MODES]
)
def test_the_text_is_the_same_alone_and_beside_others(model: TwoTowerForCausalLM, mode: str) -> None:
    """In bf16: after other requests, in a batch, beside requests that are not deterministic, with longer blocks."""
    given = prompts(model, 9)
    expected = [alone(model, prompt, mode) for prompt in given]
    requests = [Request(prompt, params(mode)) for prompt in given]
    engine = LLM(model, rows=5, length=200, block_size=13)
    others = [Request(prompt, params("verified", deterministic=False, seed=i)) for i, prompt in enumerate(given)]
    assert [out.tokens for out in engine.generate(requests)] == expected
    mixed = engine.generate([request for pair in zip(others, requests, strict=True) for request in pair])
    assert [out.tokens for out in mixed[1::2]] == expected
    assert [out.tokens for out in engine.generate(requests[::-1])] == expected[::-1]
    if mode == "verified":
        rows = model.generate_verified(given, NEW, block_size=8, temperature=1.0, seed=7, deterministic=True)
        width = max(map(len, given))
        assert rows[:, width:].tolist() == expected


@pytest.mark.parametrize("mode", MODES)
def test_every_pass_has_the_same_shape_alone_and_beside_others(model: TwoTowerForCausalLM, mode: str) -> None:
    """Holds on every processor, whatever its rounding: the passes themselves do not depend on other requests."""
    prompt = list(range(4, 60)) * 10
    lone: list[Pass] = []
    engine = LLM(model, rows=1, length=900, block_size=8)
    with recorded(lone):
        engine.generate([Request(prompt, params(mode))])
    engine = LLM(model, rows=4, length=900, block_size=16, options=EngineOptions(prompt_budget=60))
    engine.generate([Request(prompt, params("ar", deterministic=False))])  # its beginning is in the prefix cache now
    found: list[Pass] = []
    with recorded(found):
        others = [Request(prompt[:50], params("verified", deterministic=False)), Request(prompt[:70], params(mode))]
        engine.generate([*others, Request(prompt, params(mode))])
    assert passes_of(3, found) == passes_of(0, lone)
    assert {rows for _, rows, _ in passes_of(3, found)} == {1}


def test_without_it_requests_share_passes(model: TwoTowerForCausalLM) -> None:
    found: list[Pass] = []
    engine = LLM(model, rows=4, length=200, block_size=8)
    with recorded(found):
        engine.generate([Request(prompt, params("ar", deterministic=False)) for prompt in prompts(model, 4)])
    assert max(len(numbers) for _, numbers, _ in found) == 4


def test_the_draft_depth_is_fixed_and_auto_measures_nothing(model: TwoTowerForCausalLM) -> None:
    assert params("verified").fixed_draft_depth == 1
    assert params("verified", draft_steps=3).fixed_draft_depth == 3
    assert not params("auto").depends_on_timing
    assert params("auto", deterministic=False).depends_on_timing
    out = LLM(model, rows=1, length=200).generate([Request([5, 6], params("auto"))])[0]
    assert out.mode == "verified"
    assert "deterministic" in out.mode_reason
    assert model.workspace.mode_chooser.costs == {}


def test_ar_and_verified_agree_in_fp32() -> None:
    model = decoding_model("agreeing", torch.float32)
    given = prompts(model, 4)
    texts = [
        model.generate_ar(given, NEW, temperature=1.0, seed=3, deterministic=True),
        model.generate_verified(given, NEW, temperature=1.0, seed=3, deterministic=True),
        model.generate_ar(given, NEW, temperature=1.0, seed=3),
    ]
    assert texts[0].tolist() == texts[1].tolist() == texts[2].tolist()


def test_the_callback_sees_one_prompt(model: TwoTowerForCausalLM) -> None:
    heard: list[int] = []

    def callback(step: int, *args: object, **kwargs: object) -> None:
        heard.append(step)

    arguments = {"max_new_tokens": 8, "block_size": 8, "deterministic": True, "step_callback": callback}
    with pytest.raises(ArgumentError, match="give one prompt a call"):
        model.generate_mask_diffusion([[5, 6], [7]], **arguments)  # type: ignore[arg-type]
    model.generate_mask_diffusion([[5, 6]], **arguments)  # type: ignore[arg-type]
    assert heard[0] == 0


def test_values() -> None:
    with pytest.raises(ArgumentError, match="deterministic is 1; it must be True or False"):
        params("ar", deterministic=1)  # type: ignore[arg-type]
    assert parse_setting("verified:deterministic=true").values == {"mode": "verified", "deterministic": True}
    with pytest.raises(ArgumentError, match="needs true or false"):
        parse_setting("verified:deterministic=1")
