"""Tokenizers in GGUF files: names of pre-tokenizers, special tokens, and what a file cannot describe.

`tests/llamacpp` compares 1,000 texts with llama.cpp.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf_models import save_merging_tokenizer, sentencepiece_tokenizer
from tiny_backbones import VOCAB, save_tokenizer
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from twotower import TwoTowerForCausalLM, bundled_model
from twotower.checkpoint.gguf_export import pre_tokenizers as known
from twotower.checkpoint.gguf_export.tokenizer import TokenizerKeys, tokenizer_keys
from twotower.errors import CheckpointError


def keys_of(tokenizer: Any, vocab: int = VOCAB, name: str | None = None) -> TokenizerKeys:
    return tokenizer_keys(tokenizer, vocab, bos=1, ends=[2], mask=3, pre_tokenizer=name)


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., PreTrainedTokenizerFast]:
    def make(**parts: Any) -> PreTrainedTokenizerFast:
        return save_merging_tokenizer(tmp_path, **parts)

    return make


def test_the_table_of_hashes() -> None:
    assert len(known.OF_HASHES) > 90
    assert {*known.OF_HASHES.values(), *known.OF_STEPS.values()} <= known.NAMES
    assert known.TEST_TEXT.startswith("\n \n\n \n\n\n \t \t\t \t\n")
    assert known.TEST_TEXT.endswith("We'Ve a'lL")
    assert len(known.TEST_TEXT) == 350


def test_a_tokenizer_that_the_converter_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TwoTowerForCausalLM.from_pretrained(bundled_model("small")).tokenizer
    assert tokenizer is not None
    tokens = tokenizer(known.TEST_TEXT)["input_ids"]
    monkeypatch.setitem(known.OF_HASHES, hashlib.sha256(str(tokens).encode()).hexdigest(), "tekken")
    assert keys_of(tokenizer, 1024).keys["tokenizer.ggml.pre"] == "tekken"
    assert keys_of(tokenizer, 1024, "qwen2").keys["tokenizer.ggml.pre"] == "qwen2"


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(pattern: str, behaviour: str = "isolated") -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behaviour), BYTES])


@pytest.mark.parametrize(
    ("parts", "whole", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), False, "gpt-2"),
        (split(LLAMA3), True, "llama-bpe"),
        (split(LLAMA3), False, "smaug-bpe"),
        (split(LLAMA3.replace("{1,3}", "")), False, "qwen2"),
        (split(TEKKEN), True, "tekken"),
    ],
)
def test_names_by_steps(made: Callable[..., PreTrainedTokenizerFast], parts: Any, whole: bool, name: str) -> None:
    tokenizer = made(pre_tokenizer=parts)
    tokenizer.backend_tokenizer.model.ignore_merges = whole
    found = keys_of(tokenizer)
    assert found.keys["tokenizer.ggml.pre"] == name
    assert any("combining marks" in note for note in found.notes) == (name == "tekken")


@pytest.mark.parametrize(
    "parts",
    [
        split(LLAMA3, "removed"),
        split(r"\d+"),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), BYTES]),
    ],
)
def test_steps_without_a_name(made: Callable[..., PreTrainedTokenizerFast], parts: Any) -> None:
    tokenizer = made(pre_tokenizer=parts)
    with pytest.raises(CheckpointError, match="has no name for; give its name with --pre-tokenizer, or"):
        keys_of(tokenizer)
    assert keys_of(tokenizer, name="starcoder").keys["tokenizer.ggml.pre"] == "starcoder"
    with pytest.raises(CheckpointError, match="--pre-tokenizer is 'star', which"):
        keys_of(tokenizer, name="star")


def test_normalizers(made: Callable[..., PreTrainedTokenizerFast]) -> None:
    assert keys_of(made()).notes == ()
    assert "NFC" in keys_of(made(normalizer=normalizers.NFC())).notes[0]
    with pytest.raises(CheckpointError, match="changes texts by 'Lowercase', which"):
        keys_of(made(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])))


def test_other_kinds_of_tokenizers() -> None:
    vocabulary = {"<unk>": 0, "a": 1}
    for model, kind in ((models.WordPiece(vocabulary, unk_token="<unk>"), "WordPiece"), (models.Unigram(), "Unigram")):
        with pytest.raises(CheckpointError, match=f"of the kind '{kind}', and a GGUF file can have a BPE only"):
            keys_of(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)))
    characters = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    with pytest.raises(CheckpointError, match="a BPE of characters"):
        keys_of(characters)


def test_a_tokenizer_without_merges(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no merges"):
        keys_of(save_tokenizer(tmp_path, "<mask>"))


def test_tokens(made: Callable[..., PreTrainedTokenizerFast]) -> None:
    tokenizer = made()
    tokenizer.add_tokens(["[user]"])
    keys = keys_of(tokenizer, VOCAB + 3).keys
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(kinds, list)
    size = len(tokenizer)
    assert tokens[size - 1 : size + 1] == ["[user]", f"[PAD{size}]"]
    assert kinds[size - 1 : size + 1] == [4, 5]
    assert keys["tokenizer.ggml.merges"] == ["a b", "c ab", "e r"]
    with pytest.raises(CheckpointError, match=f"has a token {size - 1}, but the model has 20"):
        keys_of(tokenizer, 20)


def test_tokens_around_a_text(made: Callable[..., PreTrainedTokenizerFast]) -> None:
    def found(template: str) -> tuple[object, ...]:
        special = [("<s>", 1), ("</s>", 2)]
        keys = keys_of(made(post_processor=processors.TemplateProcessing(single=template, special_tokens=special))).keys
        return tuple(keys[f"tokenizer.ggml.{key}"] for key in ("add_bos_token", "add_eos_token", "bos_token_id"))

    assert found("$A") == (False, False, 1)
    assert found("<s> $A") == (True, False, 1)
    assert found("<s> $A </s>") == (True, True, 1)
    assert found("</s> $A") == (True, False, 2)
    with pytest.raises(CheckpointError, match="adds several tokens"):
        found("<s> </s> $A")


def test_several_chat_templates(made: Callable[..., PreTrainedTokenizerFast]) -> None:
    tokenizer = made()
    tokenizer.chat_template = {"default": "{{ a }}", "tool_use": "{{ b }}"}
    keys = keys_of(tokenizer).keys
    assert keys["tokenizer.chat_template"] == "{{ a }}"
    assert keys["tokenizer.chat_template.tool_use"] == "{{ b }}"
    assert keys["tokenizer.chat_templates"] == ["tool_use"]


def test_sentencepiece(tmp_path: Path) -> None:
    texts = ["hello world", "hello there", "the other world", "wonderful worlds"] * 3
    tokenizer = sentencepiece_tokenizer(texts, tmp_path)
    keys = keys_of(tokenizer, len(tokenizer)).keys
    tokens, scores, kinds = (keys[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    assert isinstance(tokens, list)
    assert isinstance(scores, list)
    assert isinstance(kinds, list)
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.add_space_prefix"]) == ("llama", True)
    assert kinds[:5] == [2, 3, 3, 3, 6]  # unknown, three special tokens, a byte
    merged = [score for token, score in zip(tokens, scores, strict=True) if len(str(token)) > 1 and float(score) > -1e6]
    assert merged == sorted(merged, reverse=True)
    assert merged[0] == 0
    assert keys_of(sentencepiece_tokenizer(texts, tmp_path, prefix=False), len(tokens)).keys[
        "tokenizer.ggml.add_space_prefix"
    ] is False  # fmt: skip
    with pytest.raises(CheckpointError, match="--pre-tokenizer is for a byte-level BPE"):
        keys_of(tokenizer, len(tokenizer), "qwen2")


def test_merges_that_scores_cannot_express() -> None:
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<0x41>", "a", "b", "c", "ab", "bc", "abc"])}
    merges = [("a", "b"), ("ab", "c"), ("b", "c")]  # a + bc is missing
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    with pytest.raises(CheckpointError, match="merges to 'abc' by rules that scores"):
        keys_of(PreTrainedTokenizerFast(tokenizer_object=backend))
