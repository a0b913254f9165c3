"""The end of a row and its text: complete characters only, and no part of a stop string."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from twotower import GenerationParams, TwoTowerForCausalLM, generate
from twotower.decoding.stopping import REPLACEMENT_CHARACTER, Detokenizer, RowProgress, decode_function
from twotower.server.tokenizer_adapter import BYTE_OF_CHARACTER

Factory = Callable[..., TwoTowerForCausalLM]
VOCABULARY = 320
SPECIAL = ["<pad>", "<s>", "</s>", "<mask>"]
EOS = 2
# Two, three and four bytes a character, combining marks and joiners.
TEXTS = [
    "Grüße aus Köln! Ça va? Žluťoučký kůň.",
    "世界、こんにちは。한국어 텍스트, ελληνικά, русский текст.",
    "👩‍👩‍👧 family 👍🏽 flags 🇨🇭🇯🇵 e\u0301 maths ∑∫√ “quotes” …",
    "plain words, again and again: the quick brown fox jumps over the lazy dog.",
]


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE. Any sequence of ids is possible; most are not valid text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


TOKENIZER = byte_level()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return TOKENIZER


def sentence_pieces() -> PreTrainedTokenizerFast:
    """As SentencePiece: ▁ for spaces, the first one dropped when decoding; bytes as <0xNN>."""
    pieces = ["<unk>", "<s>", "</s>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*"▁abcdefghijklmnopqrstuvwxyz.,", "▁the", "▁a", "he", "world"]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def spaced() -> PreTrainedTokenizerFast:
    return sentence_pieces()


def run(
    tokenizer: PreTrainedTokenizerFast,
    ids: Sequence[int],
    stop: Sequence[str] = (),
    blocks: int = 5,
    limit: int = 10_000,
) -> tuple[RowProgress, list[str]]:
    """Feeds tokens in blocks → the row's progress and the texts of its events."""
    progress = RowProgress(limit, [EOS], stop, tokenizer)
    pieces = []
    for start in range(0, len(ids), blocks):
        if progress.finish_reason is None:
            pieces.append(progress.take(ids[start : start + blocks])[1])
    return progress, pieces


def random_ids(seed: int, length: int) -> list[int]:
    """Random ids between pieces of real text, so that incomplete and complete characters are mixed."""
    rng = random.Random(seed)
    out: list[int] = []
    while len(out) < length:
        text = rng.choice(TEXTS)
        start = rng.randrange(len(text))
        out += TOKENIZER(text[start : start + rng.randrange(6)])["input_ids"]
        out += [rng.randrange(len(SPECIAL), VOCABULARY) for _ in range(rng.randrange(5))]
    return out[:length]


# --- detokenisation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("blocks", [1, 3, 16])
def test_multi_byte_text_comes_out_whole(tokenizer: PreTrainedTokenizerFast, text: str, blocks: int) -> None:
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > len(text) / 3
    progress, pieces = run(tokenizer, [*ids, EOS], blocks=blocks)
    assert "".join(pieces) == progress.text == text
    assert REPLACEMENT_CHARACTER not in progress.text
    assert progress.finish_reason == "eos"


def test_transformers_decodes_where_it_adds_anything(tokenizer: PreTrainedTokenizerFast) -> None:
    """Otherwise the tokenizers library decodes, with the same result."""
    ids = tokenizer("Héllo , world </s>", add_special_tokens=False)["input_ids"]
    assert decode_function(tokenizer)(ids, skip_special_tokens=True) == tokenizer.decode(ids, skip_special_tokens=True)
    assert decode_function(tokenizer).__self__ is tokenizer.backend_tokenizer

    class Loud(PreTrainedTokenizerFast):
        def _decode(self, *args: object, **options: object) -> str:
            return super()._decode(*args, **options).upper()

    loud = Loud(tokenizer_object=tokenizer.backend_tokenizer)
    tidy = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, clean_up_tokenization_spaces=True,
        clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True,
    )  # fmt: skip
    for other in (loud, tidy):
        found = decode_function(other)(ids, skip_special_tokens=True)
        assert found == other.decode(ids, skip_special_tokens=True) != tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("seed", range(30))
def test_random_tokens(tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    ids = random_ids(seed, 200)
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in ids]
    pieces.append(detokenizer.flush())
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("blocks", [1, 7, 16])
def test_events_join_to_the_text(tokenizer: PreTrainedTokenizerFast, seed: int, blocks: int) -> None:
    ids = random_ids(seed, 100)
    progress, pieces = run(tokenizer, ids, blocks=blocks, limit=100)
    assert progress.finish_reason == "length"
    assert "".join(pieces) == progress.text == tokenizer.decode(ids, skip_special_tokens=True)


def test_half_a_character_at_the_end_is_a_replacement_character(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = tokenizer("ab")["input_ids"]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("世")[0][0]  # one byte a letter
    broken = [tokenizer.convert_tokens_to_ids(letter) for letter in letters]
    assert len(broken) == 3
    for kept in (1, 2):
        progress, _ = run(tokenizer, [*whole, *broken[:kept]], limit=len(whole) + kept)
        assert progress.text == f"ab{REPLACEMENT_CHARACTER}"
    progress, pieces = run(tokenizer, [*whole, *broken, *whole], blocks=1, limit=2 * len(whole) + 3)
    assert progress.text == "ab世ab"
    assert "世" in pieces  # the whole character, with its last byte


def test_special_tokens_are_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    a, b = tokenizer("a")["input_ids"], tokenizer("b")["input_ids"]
    progress, _ = run(tokenizer, [*a, 3, 0, 1, *b, EOS, *a])
    assert progress.text == "ab"
    assert progress.tokens == [*a, 3, 0, 1, *b, EOS]


@pytest.mark.parametrize("text", ["the world", "a ,b . the  he", "the 世界 world", "é", " the"])
def test_tokenizers_that_drop_the_first_space(spaced: PreTrainedTokenizerFast, text: str) -> None:
    ids = spaced(text, add_special_tokens=False)["input_ids"]
    progress, pieces = run(spaced, ids, blocks=1, limit=len(ids))
    assert progress.text == "".join(pieces) == spaced.decode(ids)


@pytest.mark.parametrize("seed", range(10))
def test_random_tokens_of_such_a_tokenizer(spaced: PreTrainedTokenizerFast, seed: int) -> None:
    rng = random.Random(seed)
    ids = [rng.randrange(4, len(spaced)) for _ in range(60)]
    progress, pieces = run(spaced, ids, blocks=4, limit=60)
    assert progress.text == "".join(pieces)


class CountingTokenizer:
    """Counts the calls of `decode` and the tokens in them."""

    clean_up_tokenization_spaces = False

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.inner, self.calls, self.decoded = tokenizer, 0, 0

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        self.calls += 1
        self.decoded += len(ids)
        return self.inner.decode(ids, skip_special_tokens=skip_special_tokens)


def byte_ids(tokenizer: PreTrainedTokenizerFast, data: bytes) -> list[int]:
    """One token a byte."""
    if "<0x00>" in tokenizer.get_vocab():
        return [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in data]
    letters = {value: letter for letter, value in BYTE_OF_CHARACTER.items()}
    return [tokenizer.convert_tokens_to_ids(letters[byte]) for byte in data]


RUNS = {
    "invalid": b"\xff",
    "continuation": b"\x80",
    "beginnings": b"\xf0\x9f\x98",
    "mixed": b"\xe2\x82x\xff\xf0\x9f\x98\x80\xc3",
    "complete": "世😀é".encode(),
}


@pytest.mark.parametrize("make", [byte_level, sentence_pieces])
@pytest.mark.parametrize("name", [*RUNS, "special", "unknown ids", "special in a character"])
def test_detokenizing_is_linear(make: Callable[[], PreTrainedTokenizerFast], name: str) -> None:
    """16,000 byte tokens took 14 s, in the engine's step, and lost the U+FFFD at their end."""
    tokenizer, length = make(), 4000
    if name == "special":
        ids = [1] * length
    elif name == "unknown ids":
        ids = [5000] * length
    elif name == "special in a character":
        ids = [each for byte in byte_ids(tokenizer, "世".encode() * 300) for each in (byte, 1, 1, 1)]
    else:
        ids = byte_ids(tokenizer, (RUNS[name] * length)[:length])
    ids += tokenizer("ab", add_special_tokens=False)["input_ids"] + byte_ids(tokenizer, b"\xe2\x82")
    counting = CountingTokenizer(tokenizer)
    progress, pieces = run(counting, ids, blocks=16, limit=len(ids))
    assert counting.decoded <= 64 * len(ids)
    assert counting.calls <= 8 * len(ids)
    assert "".join(pieces) == progress.text
    assert progress.text.endswith(REPLACEMENT_CHARACTER)
    if make is byte_level:
        assert progress.text == tokenizer.decode(ids, skip_special_tokens=True)
    elif name in ("special", "unknown ids"):
        assert progress.text == tokenizer.decode(ids[length:], skip_special_tokens=True)


@pytest.mark.parametrize("text", ["世😀é", "a世 b", "😀😀"])
def test_bytes_that_are_characters_after_bytes_that_are_none(spaced: PreTrainedTokenizerFast, text: str) -> None:
    """A decoder with byte fallback decodes a run of bytes as a whole; text that is emitted stays."""
    ids = byte_ids(spaced, text.encode()) + byte_ids(spaced, b"\xff")
    progress, pieces = run(spaced, ids, blocks=1, limit=len(ids))
    assert progress.text == "".join(pieces) == text + REPLACEMENT_CHARACTER


# --- stop strings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 4, 16])
@pytest.mark.parametrize("stop", ["fox", "k brow", "o", " over the ", "dog.", "the quick"])
def test_stop_across_tokens_and_blocks(tokenizer: PreTrainedTokenizerFast, stop: str, blocks: int) -> None:
    text = "the quick brown fox jumps over the lazy dog."
    ids = tokenizer(text)["input_ids"]
    progress, pieces = run(tokenizer, [*ids, *ids], [stop], blocks)
    assert progress.finish_reason == "stop"
    assert "".join(pieces) == progress.text == text[: text.index(stop)]
    assert stop in tokenizer.decode(progress.tokens)
    assert stop not in tokenizer.decode(progress.tokens[:-1])


@pytest.mark.parametrize("seed", range(20))
def test_no_part_of_a_stop_string_ever_leaks(tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Compared with a slow reference: decode everything, then cut at the first stop string."""
    rng = random.Random(seed)
    text = "".join(rng.choice(["ab", "a", "b", "世", "ba", " ", "é"]) for _ in range(60))
    stop = ["".join(rng.choice("ab世é ") for _ in range(rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))]
    ids = tokenizer(text)["input_ids"]
    progress, pieces = run(tokenizer, ids, stop, blocks=rng.randrange(1, 9), limit=len(ids))
    ends = [text.find(s) for s in stop if s in text]
    assert "".join(pieces) == progress.text
    assert not any(s in progress.text for s in stop)
    if not ends:
        assert progress.text == text
        assert progress.finish_reason == "length"
        return
    assert progress.finish_reason == "stop"
    # A token may complete two stop strings at once; then the leftmost counts. One completed earlier counts before.
    first = min((tokenizer_end(tokenizer, ids, s), text.find(s)) for s in stop if s in text)
    assert progress.text == text[: first[1]]
    assert len(progress.tokens) == first[0]


def tokenizer_end(tokenizer: PreTrainedTokenizerFast, ids: list[int], stop: str) -> int:
    """The number of tokens until the text contains `stop`."""
    return next(n for n in range(1, len(ids) + 1) if stop in tokenizer.decode(ids[:n]))


def test_what_could_begin_a_stop_string_waits(tokenizer: PreTrainedTokenizerFast) -> None:
    progress = RowProgress(100, [EOS], ["abc"], tokenizer)
    taken = [progress.take([tokenizer.convert_tokens_to_ids(letter)])[1] for letter in "xabab"]
    assert taken == ["x", "", "", "ab", ""]
    assert progress.take([tokenizer.convert_tokens_to_ids("d")])[1] == "abd"
    for letter in "ab":
        assert progress.take([tokenizer.convert_tokens_to_ids(letter)]) == (1, "")
    assert progress.take([EOS])[1] == "ab"  # the row ended for another reason, so held text is final
    assert progress.text == "xababdab"


def test_broken_characters_wait_for_what_follows(tokenizer: PreTrainedTokenizerFast) -> None:
    """Bytes that cannot become a character any more are final text."""
    broken = tokenizer.convert_tokens_to_ids(pre_tokenizers.ByteLevel(False).pre_tokenize_str("世")[0][0][0])
    x, a, b, c = (tokenizer.convert_tokens_to_ids(letter) for letter in "xabc")
    for ids, expected in [
        ([x, broken, a, b], ["x", "", REPLACEMENT_CHARACTER, ""]),
        ([x, broken, a, c, EOS], ["x", "", REPLACEMENT_CHARACTER, "ac", ""]),
        ([x, broken, a, EOS], ["x", "", REPLACEMENT_CHARACTER, "a"]),
        ([x, broken, EOS], ["x", "", REPLACEMENT_CHARACTER]),
    ]:
        progress, pieces = run(tokenizer, ids, ["ab"], blocks=1)
        assert pieces == expected
        assert progress.text == "".join(pieces)


def test_stop_at_the_very_limit(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = [tokenizer.convert_tokens_to_ids(letter) for letter in "xyab"]
    progress, _ = run(tokenizer, ids, ["ab"], limit=4)
    assert (progress.text, progress.finish_reason) == ("xy", "stop")
    progress, _ = run(tokenizer, ids, ["abc"], limit=4)
    assert (progress.text, progress.finish_reason) == ("xyab", "length")


def test_first_reason_counts(tokenizer: PreTrainedTokenizerFast) -> None:
    a, b = (tokenizer.convert_tokens_to_ids(letter) for letter in "ab")
    for ids, limit, tokens, reason in [
        ([a, b, EOS, a], 10, [a, b, EOS], "eos"),
        ([a, b, EOS, a], 2, [a, b], "length"),
        ([a, b, EOS, a], 3, [a, b, EOS], "eos"),
        ([a, a, b, b], 4, [a, a, b], "stop"),
    ]:
        progress = RowProgress(limit, [EOS], ["aab"], tokenizer)
        count, _ = progress.take(ids)
        assert (progress.tokens, progress.finish_reason, count) == (tokens, reason, len(tokens))


def test_without_a_tokenizer() -> None:
    progress = RowProgress(3, [EOS], [], None)
    assert progress.take([5, 6, 7, 8]) == (3, "")
    assert (progress.tokens, progress.finish_reason) == ([5, 6, 7], "length")
    assert RowProgress(0, [], [], None).finish_reason == "length"


# --- in the model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(random_model: Factory, tokenizer: PreTrainedTokenizerFast) -> TwoTowerForCausalLM:
    out = random_model(seed=11, dtype=torch.float64, vocab_size=VOCABULARY, pad_token_id=0)
    out.tokenizer = tokenizer
    return out


@pytest.mark.parametrize("mode", ["diffusion", "ar", "mock_ar"])
def test_stop_strings_end_a_row_and_only_that_row(model: TwoTowerForCausalLM, mode: str) -> None:
    prompts = ["the quick", "世界", "Köln"]
    values = {"mode": mode, "max_new_tokens": 60, "temperature": 1.0, "seed": [1, 2, 3], "block_size": 8}
    free = generate(model, prompts, GenerationParams.of(**values))
    pieces = (free[0].text[n : n + 3] for n in range(20, 60))
    whole = next(text for text in pieces if text.isprintable() and REPLACEMENT_CHARACTER not in text)
    stopped = generate(model, prompts, GenerationParams.of(**values, stop=whole))
    for before, after in zip(free, stopped, strict=True):
        assert whole not in after.text
        assert after.text == before.text.split(whole)[0]
        assert after.finish_reason == ("stop" if whole in before.text else "length")
        assert before.tokens[: len(after.tokens)] == after.tokens
        assert len(after.committed_at) == len(after.confidence) == len(after.tokens)
        if after.finish_reason == "stop":
            assert whole in model.tokenizer.decode(after.tokens)
            assert whole not in model.tokenizer.decode(after.tokens[:-1])
    assert stopped[0].finish_reason == "stop"


@pytest.mark.parametrize("mode", ["diffusion", "ar", "mock_ar"])
def test_streamed_text_is_the_text(model: TwoTowerForCausalLM, mode: str) -> None:
    values = {"max_new_tokens": 50, "temperature": 1.5, "seed": [4, 5], "block_size": 8, "stop": ["a", "e"]}
    texts = {0: "", 1: ""}
    for event in model.stream(["the quick", "世界"], mode, **values):
        texts[event.row] += event.text
        if event.result:
            assert texts[event.row] == event.result.text
            assert not set("ae") & set(event.result.text)
    assert list(texts.values()) == [
        r.text for r in generate(model, ["the quick", "世界"], GenerationParams.of(mode=mode, **values))
    ]


def test_nothing_but_padding_after_a_stop(model: TwoTowerForCausalLM) -> None:
    free = generate(model, ["the quick"], GenerationParams.of(max_new_tokens=60, temperature=1.0, seed=1))[0]
    stop = next(letter for letter in free.text[10:] if letter.isprintable() and letter != REPLACEMENT_CHARACTER)
    out = model.generate_mask_diffusion(
        ["the quick", "世界"], 60, temperature=1.0, seed=[1, 2], stop=[stop], eos_token_id=None
    )
    results = generate(
        model,
        ["the quick", "世界"],
        GenerationParams.of(max_new_tokens=60, temperature=1.0, seed=[1, 2], stop=[stop]),
    )
    width = max(len(r.tokens) for r in results)
    for row, result in zip(out.tolist(), results, strict=True):
        new = row[len(row) - width :]
        assert new == result.tokens + [0] * (width - len(result.tokens))
