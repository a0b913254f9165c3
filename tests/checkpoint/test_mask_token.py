"""`twotower init`: which token becomes the mask token, and the denoiser's embedding of one that nothing has trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Result, assert_one_line_error
from safetensors.torch import load_file
from tiny_backbones import BASE, SHAPES, VOCAB, hf_model, save, save_tokenizer
from transformers import PreTrainedTokenizerFast

from twotower import TwoTowerForCausalLM
from twotower.checkpoint.convert import ConversionResult, convert

FREE = 96  # the tokenizer of these tests has 96 tokens, the embedding has 160 rows


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save("qwen3", tmp_path / "source")
    return tmp_path / "source"


def tokenizer(source: Path, *special: str, full: bool = False, **roles: str) -> None:
    """A tokenizer that fills the embedding, or leaves rows from `FREE` on."""
    save_tokenizer(source, *special, **roles)
    if not full:
        file = source / "tokenizer.json"
        values = json.loads(file.read_text())
        values["model"]["vocab"] = {word: id for word, id in values["model"]["vocab"].items() if id < FREE}
        file.write_text(json.dumps(values))


def made(source: Path, tmp_path: Path, **arguments: Any) -> ConversionResult:
    result = convert(source, tmp_path / "made", overwrite=True, **arguments)
    config = json.loads((tmp_path / "made/config.json").read_text())
    assert config["mask_token_id"] == result.mask_token_id
    return result


def test_the_tokenizers_own(source: Path, tmp_path: Path) -> None:
    tokenizer(source, "<|reserved_0|>", "[MASK]", mask_token="[MASK]")
    result = made(source, tmp_path)
    assert (result.mask_token_id, result.mask_token) == (4, "[MASK]")
    assert result.mask_reason == "the tokenizer's mask token"


@pytest.mark.parametrize("name", ["<|reserved_special_token_7|>", "<unused12>", "<|extra_id_3|>", "<SPECIAL_20>"])
def test_a_reserved_token_comes_before_a_free_row(name: str, source: Path, tmp_path: Path) -> None:
    tokenizer(source, "<|im_start|>", name, "<unused99>")
    result = made(source, tmp_path)
    assert (result.mask_token_id, result.mask_token) == (4, name)
    assert result.mask_reason == "a reserved token of the tokenizer"


def test_a_reserved_token_with_a_role_is_in_use(source: Path, tmp_path: Path) -> None:
    tokenizer(source, "<|reserved_0|>", "<|reserved_1|>", "<|reserved_2|>", pad_token="<|reserved_0|>")
    (source / "chat_template.jinja").write_text("<|reserved_1|>{{ messages[0].content }}")
    assert made(source, tmp_path).mask_token_id == 5


def test_a_free_row_comes_before_a_special_token_with_a_purpose(source: Path, tmp_path: Path) -> None:
    tokenizer(source, "<|fim_prefix|>", "<repo_name>")
    result = made(source, tmp_path)
    assert (result.mask_token_id, result.mask_token) == (FREE, None)
    assert result.mask_reason == "a row of the embedding beyond the tokenizer, which has 96 of 160 ids"


def test_an_unused_special_token_is_the_last_choice(source: Path, tmp_path: Path) -> None:
    tokenizer(source, "<|im_start|>", "<file_sep>", "<empty_output>", full=True)
    (source / "chat_template.jinja").write_text("<|im_start|>{{ messages[0].content }}")
    result = made(source, tmp_path)
    assert (result.mask_token_id, result.mask_token) == (5, "<empty_output>")
    assert result.mask_reason == "a special token that neither the chat template nor a setting uses"


def test_an_ordinary_token_is_never_guessed(source: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    tokenizer(source, full=True)  # id 3 is "!"
    command = ["init", "--from", source, "-o", tmp_path / "made"]
    assert_one_line_error(cli(*command), "no mask token", "--mask-token", "no candidate")
    tokenizer(source, "<unk>", full=True, unk_token="<unk>")
    assert_one_line_error(cli(*command), "candidates: 3 (<unk>)")
    result = cli(*command, "--mask-token", "<unk>")
    assert result.out.splitlines()[-1] == "mask token id 3 '<unk>': as given"
    tokenizer(source, full=True)
    result = cli(*command, "--mask-token", "!", "--overwrite")
    assert result.code == 0
    assert "Note: the mask token id 3 is '!', an ordinary token that can occur in texts." in result.err


def test_a_text_that_is_one_token(source: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    """The vocabulary has " the" as `Ġthe`; a text of several tokens, or an unknown one, is refused."""
    tokenizer(source, "<unk>", full=True, unk_token="<unk>")
    file = source / "tokenizer.json"
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"]
    old = next(word for word, id in vocabulary.items() if id == 100)
    values["model"]["vocab"] = {"Ġthe" if word == old else word: id for word, id in vocabulary.items()}
    values["model"]["ignore_merges"] = True
    file.write_text(json.dumps(values))
    assert made(source, tmp_path, mask_token=" the").mask_token_id == 100
    assert made(source, tmp_path, mask_token="Ġthe").mask_token_id == 100
    command = ["init", "--from", source, "-o", tmp_path / "other"]
    assert_one_line_error(cli(*command, "--mask-token", " the the"), "is not in the tokenizer", "candidates")
    assert_one_line_error(cli(*command, "--mask-token", "☃"), "is not in the tokenizer", "candidates")


def test_without_a_tokenizer_it_must_be_given(source: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    command = ["init", "--from", source, "-o", tmp_path / "made"]
    assert_one_line_error(cli(*command), "the model has no tokenizer", "--mask-token")
    assert_one_line_error(cli(*command, "--mask-token", "x"), "'x' is not in the tokenizer")
    assert_one_line_error(cli(*command, "--mask-token", "160"), "160", "vocab_size is 160", "0 to 159")
    assert_one_line_error(cli(*command, "--mask-token", "1"), "the mask token id is 1, which is the bos token")
    assert cli(*command, "--mask-token-id", "7").code == 0


def test_the_one_that_config_json_names(source: Path, tmp_path: Path) -> None:
    tokenizer(source, "[MASK]", mask_token="[MASK]")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"mask_token_id": 60}))
    assert made(source, tmp_path).mask_reason == "mask_token_id of config.json"
    assert made(source, tmp_path).mask_token_id == 60


def test_a_special_token_beyond_the_embedding_is_no_error(
    source: Path, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    """As in Gemma 3 1B, whose tokenizer has a token for images."""
    tokenizer(source, full=True)
    file = source / "tokenizer.json"
    values = json.loads(file.read_text())
    image = values["added_tokens"][0] | {"id": VOCAB, "content": "<image>"}
    file.write_text(json.dumps(values | {"added_tokens": [*values["added_tokens"], image]}))
    assert made(source, tmp_path, mask_token=3).mask_token_id == 3
    command = ["init", "--from", source, "-o", tmp_path / "other"]
    assert_one_line_error(cli(*command), "no candidate")
    values["model"]["vocab"]["more"] = VOCAB
    file.write_text(json.dumps(values))
    assert_one_line_error(cli(*command), "ids up to 160", "vocab_size is 160", "'more' has no embedding")


def test_a_tokenizer_far_larger_than_the_embedding(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vocabulary is read a few times, not once for each token without an embedding."""
    tokenizer(source, full=True)
    file = source / "tokenizer.json"
    values = json.loads(file.read_text())
    special = values["added_tokens"][0]
    beyond = [special | {"id": VOCAB + i, "content": f"<image {i}>"} for i in range(200)]
    file.write_text(json.dumps(values | {"added_tokens": [*values["added_tokens"], *beyond]}))
    read, calls = PreTrainedTokenizerFast.get_vocab, []
    monkeypatch.setattr(PreTrainedTokenizerFast, "get_vocab", lambda self: calls.append(1) or read(self))
    assert made(source, tmp_path, mask_token=3).mask_token_id == 3
    assert 0 < len(calls) < 20


@pytest.mark.parametrize("name", ["qwen3", "llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_denoisers_row_of_a_free_id_is_the_mean(name: str, dtype: str, tmp_path: Path) -> None:
    """Without and with a tied head; all other tensors are copies."""
    hf = hf_model(name).to(getattr(torch, dtype))
    hf.save_pretrained(tmp_path / "source")
    tokenizer(tmp_path / "source")
    result = made(tmp_path / "source", tmp_path)
    assert result.mask_token_id == FREE
    assert "row 96 of the denoiser's embedding is the mean of the 96 rows" in " ".join(result.notes)
    stored = load_file(tmp_path / "made/model.safetensors")
    original = load_file(tmp_path / "source/model.safetensors")
    table = original["model.embed_tokens.weight"]
    mean = table[:FREE].double().mean(0).to(table.dtype)
    assert not torch.equal(table[FREE], mean)
    expected = table.clone()
    expected[FREE] = mean
    for part, tensor in original.items():
        mine = part.replace("model.", "", 1) if part != "lm_head.weight" else part
        context = "context_lm_head.weight" if part == "lm_head.weight" else f"context_tower.{mine}"
        assert torch.equal(stored[context], tensor)
        denoiser = part if part == "lm_head.weight" else f"denoiser_tower.{mine}"
        assert torch.equal(stored[denoiser], expected if part == "model.embed_tokens.weight" else tensor)
    assert ("lm_head.weight" in original) != (SHAPES[name].get("tie_word_embeddings", False))


def test_rows_of_known_tokens_are_copies(source: Path, tmp_path: Path) -> None:
    tokenizer(source, "<|reserved_0|>")
    result = made(source, tmp_path)
    assert not any("mean" in note for note in result.notes)
    stored = load_file(tmp_path / "made/model.safetensors")
    assert torch.equal(stored["denoiser_tower.embed_tokens.weight"], stored["context_tower.embed_tokens.weight"])


def test_generation_masks_with_the_models_token(source: Path, tmp_path: Path) -> None:
    """The published default of the methods, 3, stands for the model's own mask token."""
    tokenizer(source)
    made(source, tmp_path)
    model = TwoTowerForCausalLM.from_pretrained(tmp_path / "made")
    seen: list[list[int]] = []
    model.generate_mask_diffusion(
        torch.tensor([[5, 6, 7]]),
        max_new_tokens=4,
        block_size=4,
        step_callback=lambda step, steps, block, **kwargs: seen.append(block[0].tolist()),
    )
    assert seen[0] == [FREE] * 4
    assert BASE["vocab_size"] == VOCAB
