"""LongRoPE: frequencies follow the length of each row's own text. Oracle: transformers' pass over one row, no cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny_backbones import SHAPES, VOCAB, hf_model, in_float64, save
from torch import Tensor

from twotower import TwoTowerForCausalLM
from twotower.cache.replica import DeviceTransfer
from twotower.checkpoint.convert import convert
from twotower.decoding.params import GenerationParams
from twotower.engine.engine_options import EngineOptions
from twotower.engine.llm import LLM
from twotower.engine.sequence import Request
from twotower.model.layer_io import AttentionMetadata
from twotower.model.packed_forward import context_pass, denoise_layer, read_layer
from twotower.model.packed_layout import Layout

NAME, LIMIT = "phi3:longrope", 64
TEXT = torch.randint(4, VOCAB, (90,), generator=torch.Generator().manual_seed(5)).tolist()
Oracle = Callable[[tuple[int, ...]], Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("longrope")
    save(NAME, root / "ar")
    convert(root / "ar", root / "two", mask_token=3)
    return root / "two"


@pytest.fixture
def model(saved: Path) -> TwoTowerForCausalLM:
    return TwoTowerForCausalLM.from_pretrained(saved, dtype=torch.float64)


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    """The logits after the last token of a text."""
    theirs = hf_model(NAME)

    @cache
    def last(text: tuple[int, ...]) -> Tensor:
        with in_float64(theirs), torch.inference_mode():
            return theirs(torch.tensor([text]), use_cache=False).logits[0, -1]

    return last


def greedy(oracle: Oracle, prompt: list[int], new: int) -> list[int]:
    text = list(prompt)
    for _ in range(new):
        text.append(int(oracle(tuple(text)).argmax()))
    return text[len(prompt) :]


def close(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= 1e-9 * theirs.abs().max())


def test_the_two_sets_of_frequencies_differ(oracle: Oracle, model: TwoTowerForCausalLM) -> None:
    """Otherwise no test of this file could fail."""
    assert model.spec.original_length == LIMIT == SHAPES[NAME]["original_max_position_embeddings"]
    whole = model.context.logits(model.context(torch.tensor([TEXT[:70]]), AttentionMetadata())[0])[0]
    assert close(whole[69], oracle(tuple(TEXT[:70])))
    assert not close(whole[60], oracle(tuple(TEXT[:61])))  # a part of a longer text


@pytest.mark.parametrize("mode", ["generate_ar", "generate_verified", "generate_mock_ar"])
@pytest.mark.parametrize("prompt", [1, 40, 62, 63, 64, 65, 80])
def test_texts_across_the_original_length(mode: str, prompt: int, oracle: Oracle, model: TwoTowerForCausalLM) -> None:
    """mock_ar too: the denoiser is a copy of the context tower, and a block of one token is that token alone."""
    new = max(LIMIT + 8 - prompt, 8)
    out = getattr(model, mode)(torch.tensor([TEXT[:prompt]]), max_new_tokens=new, eos_token_id=[])
    assert out[0, prompt:].tolist() == greedy(oracle, TEXT[:prompt], new)


@pytest.mark.parametrize("mode", ["generate_ar", "generate_verified"])
def test_ragged_batches(mode: str, oracle: Oracle, model: TwoTowerForCausalLM) -> None:
    prompts = [TEXT[:5], TEXT[10:70], TEXT[:66], TEXT[3:66], TEXT[:64]]
    padded = torch.zeros(len(prompts), 66, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for row, prompt in enumerate(prompts):
        padded[row, 66 - len(prompt) :], mask[row, 66 - len(prompt) :] = torch.tensor(prompt), 1
    out = getattr(model, mode)(padded, attention_mask=mask, max_new_tokens=12, eos_token_id=[])
    assert out[:, 66:].tolist() == [greedy(oracle, prompt, 12) for prompt in prompts]


@pytest.mark.proves("rollback", shape=NAME)
@torch.inference_mode()
@pytest.mark.parametrize("start", [50, 60, 63, 64, 65])
def test_extend_and_rollback_at_every_length(start: int, oracle: Oracle, model: TwoTowerForCausalLM) -> None:
    """Logits after every token of a pass across the original length, and after a rollback to every length."""
    width = 16
    for kept in range(width + 1):
        state = model.new_state(2, 100)  # the other row is far from the original length
        both = torch.tensor([TEXT[:start], TEXT[7 : 7 + start]])
        model.prefill(both, torch.tensor([start, 7]), state)
        pass_ = torch.tensor([TEXT[start : start + width], TEXT[14 : 14 + width]])
        logits = model.extend(pass_, state)
        assert logits is not None
        for i in range(width):
            assert close(logits[0, i], oracle(tuple(TEXT[: start + i + 1]))), (start, i)
        state.rollback(torch.tensor([start + kept, 7 + kept]))
        again = model.extend(torch.tensor([[9], [9]]), state)
        assert again is not None
        assert close(again[0, 0], oracle((*TEXT[: start + kept], 9))), (start, kept)
        assert close(again[1, 0], oracle((*TEXT[7 : 14 + kept], 9))), (start, kept)


@torch.inference_mode()
def test_a_row_is_read_again_once(model: TwoTowerForCausalLM) -> None:
    read = []
    forward = model.context.layer_by_layer

    def counted(tokens: Tensor, meta: AttentionMetadata, *rest: object) -> object:
        count = tokens.numel() if meta.token_mask is None else int(meta.token_mask.sum())
        read.append(count)
        return forward(tokens, meta, *rest)

    model.context.layer_by_layer = counted  # type: ignore[method-assign, assignment]
    model.generate_ar(torch.tensor([TEXT[:60]]), max_new_tokens=20, eos_token_id=[])
    assert sum(read) == 60 + 19 + LIMIT  # the last new token is not read
    read.clear()
    model.generate_verified(torch.tensor([TEXT[:60]]), max_new_tokens=20, eos_token_id=[])
    assert max(read) == LIMIT - 1  # of the second reading, before the pass over the token that reaches the length
    assert read.count(LIMIT - 1) == 1


@torch.inference_mode()
def test_a_block_of_one_gives_the_autoregressive_logits(oracle: Oracle, model: TwoTowerForCausalLM) -> None:
    state = model.new_state(1, 100)
    for length in range(60, 70):
        model.extend(torch.tensor([TEXT[:60]] if length == 60 else [[TEXT[length - 1]]]), state)
        view = model.reader(state).view()
        logits = model.denoise(torch.tensor([[TEXT[length]]]), None, view)
        assert close(logits[0, 0], oracle(tuple(TEXT[: length + 1]))), length


@pytest.mark.parametrize("mode", ["diffusion", "verified", "mock_ar"])
def test_a_replica_sees_rows_that_are_read_again(mode: str, model: TwoTowerForCausalLM) -> None:
    def texts() -> list[list[int]]:
        params = GenerationParams.of(mode=mode, max_new_tokens=30, block_size=8, eos_token_id=[], mask_token_id=3)
        requests = [Request(TEXT[:length], params) for length in (45, 58, 70)]
        return [result.tokens for result in LLM(model, rows=2, length=110, block_size=8).generate(requests)]

    alone = texts()
    model.transfer = DeviceTransfer()  # towers on two devices
    assert texts() == alone


def test_the_prefix_cache_holds_texts_with_short_frequencies(tmp_path: Path) -> None:
    """Prompts share 256 tokens; their texts cross 300 tokens, or begin beyond."""
    options = SHAPES[NAME] | {"original_max_position_embeddings": 300, "max_position_embeddings": 600}
    theirs = hf_model(NAME, options=options)
    theirs.save_pretrained(tmp_path / "ar")
    convert(tmp_path / "ar", tmp_path / "two", mask_token=3)
    model = TwoTowerForCausalLM.from_pretrained(tmp_path / "two", dtype=torch.float64)
    long = torch.randint(4, VOCAB, (520,), generator=torch.Generator().manual_seed(7)).tolist()
    prompts = [long[:290], [*long[:280], 5, 6], long, long, long[:320], long[:296], long[:270]]
    llm = LLM(model, rows=1, length=540, block_size=8, options=EngineOptions(prefix_cache=True))
    params = GenerationParams.of(mode="verified", max_new_tokens=12, block_size=8, eos_token_id=[], mask_token_id=3)
    found = llm.generate([Request(prompt, params) for prompt in prompts])
    assert [result.cached_tokens for result in found] == [0, *[256] * 6]
    assert llm.stats().prefix_tokens == 256  # not the chunk from 256 to 512
    with in_float64(theirs), torch.inference_mode():
        for prompt, result in zip(prompts, found, strict=True):
            text = list(prompt)
            for _ in range(12):
                text.append(int(theirs(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
            assert result.tokens == text[len(prompt) :]


@torch.inference_mode()
def test_an_exception_while_a_row_is_read_again(oracle: Oracle, model: TwoTowerForCausalLM) -> None:
    """The state keeps its length and its text, whichever pass failed."""
    forward = model.context.layer_by_layer
    for failing in range(1, 4):  # the pass itself, the second reading, the pass with long frequencies
        model.context.layer_by_layer = forward  # type: ignore[method-assign]
        state = model.new_state(1, 100)
        model.prefill(torch.tensor([TEXT[:60]]), torch.tensor([60]), state)
        passes = 0

        def fails(*inputs: object, failing: int = failing) -> object:
            nonlocal passes
            passes += 1
            if passes == failing:
                raise RuntimeError("out of memory")
            return forward(*inputs)  # type: ignore[arg-type]

        model.context.layer_by_layer = fails  # type: ignore[method-assign, assignment]
        with pytest.raises(RuntimeError, match="out of memory"):
            model.extend(torch.tensor([TEXT[60:70]]), state)
        assert passes == failing
        assert state.lengths.tolist() == [60]
        logits = model.extend(torch.tensor([TEXT[60:62]]), state)
        assert logits is not None
        assert close(logits[0, 1], oracle(tuple(TEXT[:62])))
        logits = model.extend(torch.tensor([TEXT[62:70]]), state)
        assert logits is not None
        assert close(logits[0, 7], oracle(tuple(TEXT[:70])))

    # The reading with short frequencies after a rollback below the original length.
    state.rollback(torch.tensor([63]))
    model.context.layer_by_layer, passes = fails, 0  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError, match="out of memory"):
        model.extend(torch.tensor([[9]]), state)
    logits = model.extend(torch.tensor([[9]]), state)
    assert logits is not None
    assert close(logits[0, 0], oracle((*TEXT[:63], 9)))


@pytest.mark.parametrize("mode", ["ar", "verified", "diffusion"])
def test_log_probabilities_across_the_original_length(mode: str, oracle: Oracle, model: TwoTowerForCausalLM) -> None:
    """Those of a prompt and of new tokens: each token after the text before it."""
    params = GenerationParams.of(mode=mode, max_new_tokens=12, block_size=8, eos_token_id=[], mask_token_id=3)
    prompts = [TEXT[:55], TEXT[:60], TEXT[5:75]]
    requests = [Request(prompt, params, logprobs=0, prompt_logprobs=True) for prompt in prompts]
    for prompt, result in zip(prompts, LLM(model, rows=2, length=110, block_size=8).generate(requests), strict=True):
        text = [*prompt, *result.tokens]
        scores = [*result.prompt_logprobs[1:], *result.logprobs]
        for end, score in enumerate(scores, start=1):
            assert score is not None
            expected = oracle(tuple(text[:end])).log_softmax(-1)[text[end]]
            assert abs(score.logprob - float(expected)) < 1e-9, (mode, len(prompt), end)


@torch.inference_mode()
def test_documents_of_a_row_have_the_frequencies_of_their_own_length(
    oracle: Oracle, model: TwoTowerForCausalLM
) -> None:
    lengths, block = (64, 80, 8), 8
    document = torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)])[None]
    tokens = torch.tensor([[*TEXT[:64], *TEXT[:80], *TEXT[:8]]])
    layout = Layout(document, block)
    logits = model.context.logits(context_pass(model.context, tokens, layout))[0]
    for end, length in zip((64, 144, 152), lengths, strict=True):
        assert close(logits[end - 1], oracle(tuple(TEXT[:length])))
    # The denoiser's blocks, at initialisation and with the clean text: a causal block would give the logits above.
    assert model.denoiser is not None
    x, y = model.context.embed(tokens), model.denoiser.embed(layout.to_blocks(tokens))
    for context, denoiser in zip(model.context.all_layers(), model.denoiser.all_layers(), strict=True):
        x, past = read_layer(context, x, layout)
        y = denoise_layer(denoiser, y, past, None, layout)
    blocks = model.denoiser.logits(model.denoiser.norm_f(y))
    state = model.new_state(1, 100)
    model.prefill(torch.tensor([TEXT[:72]]), torch.tensor([72]), state)
    expected = model.denoise(torch.tensor([TEXT[72:80]]), None, model.reader(state).view())
    assert close(blocks[(64 + 72) // block], expected[0])
