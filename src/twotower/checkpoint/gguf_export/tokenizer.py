"""The tokenizer of a checkpoint as metadata of a GGUF file: vocabulary, merges, special tokens, chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from twotower.checkpoint.gguf_export import pre_tokenizers
from twotower.checkpoint.gguf_export.rotation import Value
from twotower.errors import CheckpointError
from twotower.json_text import JsonObject
from twotower.tokenizer import Tokenizer

_SPACE = "\u2581"  # "▁", which stands for a space in SentencePiece's tokens
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_ENDS = ("eos", "eot", "eom")  # roles of tokens that end a text, in this order
_REMEDY = "export with --to one-tower"


class TokenType(IntEnum):
    """Kinds of tokens in a GGUF file."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, kw_only=True)
class TokenizerKeys:
    """keys: the metadata of a tokenizer. ends: texts of the tokens that end a text. notes: for the user."""

    keys: dict[str, Value]
    ends: tuple[str, ...]
    notes: tuple[str, ...]


def tokenizer_keys(
    tokenizer: Tokenizer,
    vocab_size: int,
    *,
    bos: int | None,
    ends: Sequence[int],
    mask: int | None,
    pre_tokenizer: str | None,
) -> TokenizerKeys:
    """The metadata of a tokenizer. vocab_size: rows of the embedding; those beyond the tokenizer are unused tokens.

    bos, ends, mask: ids of the checkpoint's special tokens. pre_tokenizer: see `pre_tokenizers.name_of`.

    Raises:
        CheckpointError: a GGUF file cannot describe the tokenizer, or it has more tokens than the model.
    """
    whole: JsonObject = json.loads(tokenizer.backend_tokenizer.to_str())
    model: JsonObject = whole["model"]
    if model.get("type") != "BPE":
        raise CheckpointError(
            f"the tokenizer is of the kind {model.get('type')!r}, and a GGUF file can have a BPE only; {_REMEDY}"
        )
    tokens, kinds = _vocabulary(whole, vocab_size)
    notes: list[str] = []
    keys: dict[str, Value] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    if _is_byte_level(whole):
        keys |= _byte_level(tokenizer, whole, pre_tokenizer, notes)
    elif model.get("byte_fallback"):
        if pre_tokenizer is not None:
            raise CheckpointError(
                "--pre-tokenizer is for a byte-level BPE, and the tokenizer is SentencePiece's; leave the option out"
            )
        keys |= _sentencepiece(whole, tokens)
    else:
        raise CheckpointError(
            f"the tokenizer is a BPE of characters, and a GGUF file can have one of bytes only; {_REMEDY}"
        )
    before, after = _added(tokenizer)
    roles = {"bos": before if before is not None else bos, "padding": _id(tokenizer, "pad_token_id"), "mask": mask}
    roles |= {"unknown": _id(tokenizer, "unk_token_id")} | dict(zip(_ENDS, ends, strict=False))
    keys |= {f"tokenizer.ggml.{role}_token_id": token for role, token in roles.items() if token is not None}
    keys |= {"tokenizer.ggml.add_bos_token": before is not None, "tokenizer.ggml.add_eos_token": after is not None}
    if len(ends) > len(_ENDS):
        notes.append(f"a GGUF file names {len(_ENDS)} tokens that end a text; the model has {len(ends)}")
    return TokenizerKeys(
        keys=keys | _templates(tokenizer), ends=tuple(tokens[token] for token in ends), notes=tuple(notes)
    )


def _is_byte_level(whole: JsonObject) -> bool:
    return '"ByteLevel"' in json.dumps(whole.get("pre_tokenizer"))


def _vocabulary(whole: JsonObject, vocab_size: int) -> tuple[list[str], list[int]]:
    """The text and the kind of each token, as llama.cpp's converter gives them."""
    model: JsonObject = whole["model"]
    texts: dict[int, str] = {number: text for text, number in model["vocab"].items()}
    added: dict[int, JsonObject] = {entry["id"]: entry for entry in whole["added_tokens"]}
    largest = max([*texts, *added], default=0)
    if largest >= vocab_size:
        raise CheckpointError(
            f"the tokenizer has a token {largest}, but the model has {vocab_size}; use the model's own tokenizer"
        )
    tokens, kinds = [], []
    for number in range(vocab_size):
        text, kind = texts.get(number), TokenType.NORMAL
        if (entry := added.get(number)) is not None:
            text, kind = entry["content"], TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED
        elif text is None:
            text, kind = f"[PAD{number}]", TokenType.UNUSED
        elif model.get("byte_fallback") and _BYTE.fullmatch(text):
            kind = TokenType.BYTE
        if text == model.get("unk_token"):
            kind = TokenType.UNKNOWN
        tokens.append(text)
        kinds.append(int(kind))
    return tokens, kinds


def _byte_level(
    tokenizer: Tokenizer, whole: JsonObject, pre_tokenizer: str | None, notes: list[str]
) -> dict[str, Value]:
    """A BPE of bytes: the merges, and the name of its pre-tokenizer."""
    model: JsonObject = whole["model"]
    normalizers = [part for part in _kinds(whole.get("normalizer")) if part not in ("NFC", "Sequence")]
    if normalizers:
        raise CheckpointError(
            f"the tokenizer changes texts by {normalizers[0]!r}, which llama.cpp does not do; {_REMEDY}"
        )
    if not model["merges"]:
        raise CheckpointError(f"the tokenizer has no merges, and llama.cpp reads no BPE without them; {_REMEDY}")
    if whole.get("normalizer") is not None:
        notes.append("the tokenizer brings texts into the form NFC first, and llama.cpp does not")
    name = pre_tokenizers.name_of(
        pre_tokenizer,
        lambda text: tokenizer(text)["input_ids"],
        whole.get("pre_tokenizer"),
        bool(model.get("ignore_merges")),
    )
    if pre_tokenizers.splits_marks_otherwise(whole.get("pre_tokenizer")):
        notes.append("llama.cpp splits words with combining marks, as of Hindi, in other places than the tokenizer")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in _merges(model)],
    }


def _merges(model: JsonObject) -> Iterator[tuple[str, str]]:
    for merge in model["merges"]:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        yield first, second


def _kinds(part: object) -> Iterator[str]:
    """The types of a component of a tokenizer.json, and of those inside it."""
    if isinstance(part, dict):
        if isinstance(part.get("type"), str):
            yield part["type"]
        for inner in part.values():
            yield from _kinds(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from _kinds(inner)


# --- SentencePiece's BPE --------------------------------------------------------------------------------------------


def _sentencepiece(whole: JsonObject, tokens: Sequence[str]) -> dict[str, Value]:
    """A BPE of characters with bytes for unknown ones, as SentencePiece writes it: a score a token.

    llama.cpp merges the pair whose whole has the best score, so the rank of the merges becomes the score.

    Raises:
        CheckpointError: the merges or the spaces are not SentencePiece's.
    """
    scores = dict.fromkeys(tokens, -1e6)
    scores |= _scores([*_merges(whole["model"])], whole["model"]["vocab"])
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [scores[token] for token in tokens],
        "tokenizer.ggml.add_space_prefix": _space_before(whole),
    }


def _scores(merges: Sequence[tuple[str, str]], vocabulary: Mapping[str, int]) -> dict[str, float]:
    """The score of each token that is merged."""
    pairs = set(merges)
    ranks: dict[str, float] = {}
    previous = None
    for rank, (first, second) in enumerate(merges):
        merged = first + second
        if merged != previous and merged in ranks:
            raise _not_sentencepiece(merged)
        ranks.setdefault(merged, float(-rank))
        previous = merged
    for token in ranks:
        for cut in range(1, len(token)):
            first, second = token[:cut], token[cut:]
            if first in vocabulary and second in vocabulary and (first, second) not in pairs:
                raise _not_sentencepiece(token)
    return ranks


def _not_sentencepiece(token: str) -> CheckpointError:
    return CheckpointError(
        f"the tokenizer merges to {token!r} by rules that scores of tokens cannot express, as a GGUF file has them; "
        f"{_REMEDY}"
    )


def _space_before(whole: JsonObject) -> bool:
    """Whether a space comes before the first word."""
    described = json.dumps([whole.get("normalizer"), whole.get("pre_tokenizer")], ensure_ascii=False)
    kinds = set(_kinds(whole.get("normalizer"))) | set(_kinds(whole.get("pre_tokenizer")))
    splits = "Metaspace" in kinds and '"split": true' in described
    if splits or _SPACE not in described or kinds - {"Sequence", "Prepend", "Replace", "Metaspace", "Split"}:
        raise CheckpointError(
            f"the tokenizer changes texts by {', '.join(sorted(kinds)) or 'nothing'}, which is not SentencePiece's way "
            f"with spaces, as a GGUF file has it; {_REMEDY}"
        )
    prefix = re.search(r'"prepend_scheme": "(\w+)"', described)
    return "Prepend" in kinds or (prefix is not None and prefix[1] in ("first", "always"))


# --- special tokens -------------------------------------------------------------------------------------------------


def _added(tokenizer: Tokenizer) -> tuple[int | None, int | None]:
    """The tokens that the tokenizer puts before and behind a text; None: no token.

    Raises:
        CheckpointError: it adds several tokens.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    before, after = whole[:start], whole[start + len(plain) :]
    if len(before) > 1 or len(after) > 1:
        raise CheckpointError(f"the tokenizer adds several tokens to a text, and a GGUF file can add one; {_REMEDY}")
    return next(iter(before), None), next(iter(after), None)


def _id(tokenizer: Tokenizer, attribute: str) -> int | None:
    value = getattr(tokenizer, attribute, None)
    return value if isinstance(value, int) else None


def _templates(tokenizer: Tokenizer) -> dict[str, Value]:
    """The chat template, or several of them with names."""
    given = getattr(tokenizer, "chat_template", None)
    if isinstance(given, str) and given:
        return {"tokenizer.chat_template": given}
    if not isinstance(given, dict):
        return {}
    keys: dict[str, Value] = {}
    for name, text in given.items():
        keys["tokenizer.chat_template" if name == "default" else f"tokenizer.chat_template.{name}"] = str(text)
    if names := sorted(name for name in given if name != "default"):
        keys["tokenizer.chat_templates"] = names
    return keys
