"""The choice of the mask token of a new two-tower checkpoint. An ordinary token, which texts contain, is never guessed.

The order: the token that the user gives; the one that config.json names; the tokenizer's own; for Nemotron-H the
conventional id 3; a token whose name says that it is reserved; a row of the embedding beyond the tokenizer; a special
token without a use.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from twotower.checkpoint.generation_config import GenerationDefaults
from twotower.config import MASK_TOKEN_ID, GenericTwoTowerConfig, TwoTowerConfig
from twotower.errors import ArgumentError, CheckpointError
from twotower.tokenizer import Tokenizer

_ROLES = ("eos", "bos", "pad", "unk", "sep", "cls")
_FORBIDDEN = ("eos", "bos", "pad")  # a model writes or reads these tokens
_RESERVED = re.compile(r"reserved|unused|placeholder|place.holder|extra_id|special_\d|control_\d", re.IGNORECASE)
_SHOWN = 8  # candidates in an error


@dataclass(frozen=True, kw_only=True)
class MaskToken:
    """The mask token of a checkpoint.

    text: in the tokenizer; None without one. reason: why this token. known_rows: the rows of the embedding that the
    tokenizer uses, if the mask token is a row beyond them, which no training has touched; else None.
    """

    id: int
    text: str | None
    reason: str
    known_rows: int | None = None


def choose(
    given: int | str | None, config: TwoTowerConfig, defaults: GenerationDefaults, tokenizer: Tokenizer | None
) -> MaskToken:
    """The mask token of a conversion.

    given: an id, its digits, or the text of a token. defaults: the contents of `generation_config.json`, whose EOS
    tokens must differ from the mask token.

    Raises:
        CheckpointError: the tokenizer has ordinary tokens beyond the embedding.
        ArgumentError: no token can be chosen, the given token does not exist, or it is the EOS, BOS or padding token.
    """
    vocabulary = _Vocabulary(config, defaults, tokenizer)
    id, reason = vocabulary.given(given) if given is not None else vocabulary.chosen()
    if not 0 <= id < config.vocab_size:
        raise ArgumentError(
            f"the mask token id is {id}, but vocab_size is {config.vocab_size}; "
            f"choose an id from 0 to {config.vocab_size - 1}"
        )
    if (role := vocabulary.role(id)) in _FORBIDDEN:
        raise ArgumentError(
            f"the mask token id is {id}, which is the {role} token; give a token that no text contains with "
            f"--mask-token{vocabulary.candidates()}"
        )
    text = vocabulary.text_of.get(id)
    free = tokenizer is not None and id >= vocabulary.size
    return MaskToken(id=id, text=text, reason=reason, known_rows=vocabulary.size if free else None)


def is_ordinary_token(id: int, tokenizer: Tokenizer | None) -> bool:
    """Whether the tokenizer can encode ordinary text to this id."""
    return next(_ordinary([id], tokenizer), None) is not None


def _ordinary(ids: Iterable[int], tokenizer: Tokenizer | None) -> Iterator[int]:
    """Those of the ids to which the tokenizer can encode ordinary text."""
    if tokenizer is None:
        return
    known, special = set(tokenizer.get_vocab().values()), set(tokenizer.all_special_ids)
    added = tokenizer.added_tokens_decoder
    for id in ids:
        if id in known and id not in special:
            token = added.get(id)
            if token is None or not (token.special or _RESERVED.search(token.content)):
                yield id


class _Vocabulary:
    """The tokens of a checkpoint and their uses. size: one more than the tokenizer's largest id."""

    def __init__(self, config: TwoTowerConfig, defaults: GenerationDefaults, tokenizer: Tokenizer | None) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.sources = (config, defaults, tokenizer)
        self.ids: Mapping[str, int] = {} if tokenizer is None else tokenizer.get_vocab()
        self.text_of = {id: text for text, id in self.ids.items()}
        self.size = max(self.text_of, default=-1) + 1
        beyond = sorted(id for id in self.text_of if id >= config.vocab_size)
        ordinary = next(_ordinary(beyond, tokenizer), None)
        if ordinary is not None:
            raise CheckpointError(
                f"{getattr(tokenizer, 'name_or_path', '')}: the tokenizer has ids up to {self.size - 1}, but "
                f"vocab_size is {config.vocab_size}, so {self.text_of[ordinary]!r} has no embedding; use the "
                "tokenizer of this model"
            )

    def given(self, given: int | str) -> tuple[int, str]:
        """The token that the user gives, and the reason in words."""
        if isinstance(given, str) and not re.fullmatch(r"-?\d+", given):
            if (id := self._id_of(given)) is None:
                raise ArgumentError(
                    f"mask token {given!r} is not in the tokenizer; give an id, or the text of one token"
                    + self.candidates()
                )
            return id, "as given"
        return int(given), "as given"

    def _id_of(self, text: str) -> int | None:
        """The id of a text that is one token, as the tokenizer writes it (`Ġthe`) or as in texts (" the")."""
        if text in self.ids or self.tokenizer is None:
            return self.ids.get(text)
        encoded = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        same = len(encoded) == 1 and self.tokenizer.decode(encoded).strip() == text.strip()  # not an unknown token
        return encoded[0] if same else None

    def chosen(self) -> tuple[int, str]:
        """The first token of the order above, and the reason in words."""
        found = next(self._choices(), None)
        if found is None:
            raise ArgumentError(self._none())
        return found

    def _choices(self) -> Iterator[tuple[int, str]]:
        generic = isinstance(self.config, GenericTwoTowerConfig)
        named = self.config.backbone.get("mask_token_id") if generic else self.config.mask_token_id
        if isinstance(named, int):
            yield named, "mask_token_id of config.json"
        own = getattr(self.tokenizer, "mask_token_id", None)
        if own is not None:
            yield own, "the tokenizer's mask token"
        if not generic and not is_ordinary_token(MASK_TOKEN_ID, self.tokenizer):
            yield MASK_TOKEN_ID, "the convention of Nemotron-H two-tower models"
        if self.tokenizer is None:
            return
        unused = sorted(self._unused())
        for id, text in unused:
            if _RESERVED.search(text):
                yield id, "a reserved token of the tokenizer"
        if self.size < self.config.vocab_size:
            yield (
                self.size,
                f"a row of the embedding beyond the tokenizer, which has {self.size} of {self.config.vocab_size} ids",
            )
        for id, _ in reversed(unused):
            yield id, "a special token that neither the chat template nor a setting uses"

    def _unused(self) -> Iterator[tuple[int, str]]:
        """Added tokens that have no role and are not in the chat template: reserved ones, and special ones."""
        assert self.tokenizer is not None
        template = str(getattr(self.tokenizer, "chat_template", None) or "")
        for id, token in self.tokenizer.added_tokens_decoder.items():
            free = id < self.config.vocab_size and self.role(id) is None and token.content not in template
            if free and (token.special or _RESERVED.search(token.content)):
                yield id, token.content

    def role(self, id: int) -> str | None:
        """The role of a token in the model or in texts; None without one."""
        for role in _ROLES:
            for source in self.sources:
                ids = getattr(source, f"{role}_token_id", None)
                if id in (ids if isinstance(ids, Sequence) else [ids]):
                    return role
        return None

    def candidates(self) -> str:
        """Special tokens that the user can give, for the end of an error."""
        if self.tokenizer is None:
            return ""
        special = sorted(id for id, token in self.tokenizer.added_tokens_decoder.items() if token.special)
        free = [id for id in special if id < self.config.vocab_size and self.role(id) not in _FORBIDDEN]
        if self.size < self.config.vocab_size:
            free.append(self.size)
        named = [f"{id} ({self.text_of.get(id, 'a row without a token')})" for id in free]
        more = f", … ({len(named)} in all)" if len(named) > _SHOWN else ""
        return f"; candidates: {', '.join(named[:_SHOWN])}{more}" if named else "; the tokenizer has no candidate"

    def _none(self) -> str:
        if self.tokenizer is None:
            return (
                "the model has no tokenizer, so the mask token is unknown; give the id of a token that no text "
                "contains with --mask-token"
            )
        return (
            "the tokenizer has no mask token, no reserved or unused special token, and no free row of the embedding; "
            f"give a token that no text contains with --mask-token{self.candidates()}"
        )
