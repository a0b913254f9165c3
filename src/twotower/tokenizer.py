"""The type of a checkpoint's tokenizer: the methods of transformers' fast tokenizers that this package calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from twotower.errors import ArgumentError

if TYPE_CHECKING:
    import tokenizers


MIN_LONGEST_TOKEN = 64  # characters; tokenizers may drop characters, so that a token stands for more than its own


class Tokenizer(Protocol):
    """Encodes and decodes text. Special tokens (`eos_token_id`, …) and a chat template are optional attributes."""

    name_or_path: str
    chat_template: object
    clean_up_tokenization_spaces: bool

    @property
    def all_special_ids(self) -> list[int]: ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, tokenizers.AddedToken]: ...

    @property
    def backend_tokenizer(self) -> tokenizers.Tokenizer: ...

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Mapping[str, list[int]]: ...

    def __len__(self) -> int: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str: ...

    def convert_ids_to_tokens(self, ids: int) -> str | None: ...

    def get_vocab(self) -> dict[str, int]: ...

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] | None = None,
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        **template_arguments: object,
    ) -> str: ...

    def save_pretrained(self, save_directory: Path) -> object: ...


def require_tokenizer(tokenizer: Tokenizer | None) -> Tokenizer:
    """The tokenizer of a model, for calls that need one.

    Raises:
        ArgumentError: the model has no tokenizer.
    """
    if tokenizer is None:
        raise ArgumentError("the model has no tokenizer; set model.tokenizer or give token ids", param="tokenizer")
    return tokenizer


def longest_token(tokenizer: Tokenizer) -> int:
    """An upper limit of the characters of a token. A text that is longer than its tokens allow need not be encoded."""
    return max(MIN_LONGEST_TOKEN, *map(len, tokenizer.get_vocab()))
