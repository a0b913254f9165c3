"""Rules that change logits by the tokens before a position: biases, penalties, and tokens that may not come yet.

This module is the one place of these rules: AR steps, checks of drafts, the denoiser's commits and mock-AR call it. The
definitions and their order are vLLM's: forbidden tokens, biases, then the penalties of repetition, frequency and
presence. Temperature and the filters (`sampling.py`) follow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from twotower.decoding.params import GenerationParams
from twotower.errors import ArgumentError
from twotower.tokenizer import Tokenizer

Words = tuple[tuple[int, ...], ...]


class LogitRules:
    """The rules of one text.

    prompt: its prompt. words: sequences of tokens that the text may not have. `output` below are the new tokens of the
    text, and grow from call to call.
    """

    def __init__(self, params: GenerationParams, prompt: Sequence[int], words: Words) -> None:
        self.params, self.words = params, words
        self.ends = list(params.end_tokens) if params.min_tokens else []
        self.penalised = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) != (1, 0, 0)
        self._prompt = frozenset(prompt) if params.repetition_penalty != 1 else frozenset()
        self._counts: Counter[int] = Counter()
        self._counted = 0  # tokens of the output

    @classmethod
    def of(cls, params: GenerationParams, prompt: Sequence[int], tokenizer: Tokenizer | None) -> LogitRules | None:
        """The rules of a request; None: it has none.

        Raises:
            ArgumentError: see `bad_word_tokens`.
        """
        rules = cls(params, prompt, bad_word_tokens(params.bad_words, tokenizer))
        return rules if rules.ends or rules._always else None

    @property
    def _always(self) -> bool:
        """Whether a rule holds at every position."""
        return bool(self.penalised or self.words or self.params.logit_bias)

    def active(self, count: int) -> bool:
        """Whether a rule can change the choice of a token after `count` new tokens."""
        return self._always or (bool(self.ends) and count < self.params.min_tokens)

    def after_each(self, logits: Tensor, output: Sequence[int], draft: Sequence[int]) -> None:
        """Changes logits (L, V) in place. Row i follows the output and the first i tokens of a draft.

        Rows beyond the draft follow all of it; the tokens between are not known.
        """
        count = len(logits)
        rows = range(min(len(draft) + 1, count)) if self.words else ()
        self._forbid(logits, len(output), [[*output, *draft[:row]] for row in rows])
        self._bias(logits)
        if self.penalised:
            columns = self._columns(output, draft)
            added = torch.zeros(count, len(columns), dtype=logits.dtype)
            for row, token in enumerate(draft[: count - 1], 1):
                added[row, columns[token]] += 1
            self._penalise(logits, columns, added.cumsum(0))

    def after_all(self, logits: Tensor, output: Sequence[int], first: int, committed: Sequence[int]) -> None:
        """Changes logits (L, V) of a block in place. Every row follows the output and the committed tokens.

        first: the number of new tokens before row 0. committed: tokens of the block that are final, in any order.
        """
        self._forbid(logits, first, [])
        self._bias(logits)
        if self.penalised:
            columns = self._columns(output, committed)
            added = torch.zeros(1, len(columns), dtype=logits.dtype)
            for token in committed:
                added[0, columns[token]] += 1
            self._penalise(logits, columns, added)

    def _columns(self, output: Sequence[int], added: Sequence[int]) -> dict[int, int]:
        """The tokens of the text, each with a column. Counts the output's new tokens."""
        self._counts.update(output[self._counted :])
        self._counted = len(output)
        tokens = dict.fromkeys([*self._counts, *added, *self._prompt])
        return {token: column for column, token in enumerate(tokens)}

    def _penalise(self, logits: Tensor, columns: Mapping[int, int], added: Tensor) -> None:
        """added (L or 1, K): how often the tokens of `columns` come beside the counted output."""
        params, device = self.params, logits.device
        ids = torch.tensor(list(columns), dtype=torch.long, device=device)
        counted = torch.tensor([self._counts[token] for token in columns], dtype=logits.dtype)
        counts = (counted + added).to(device)
        in_prompt = torch.tensor([token in self._prompt for token in columns], dtype=torch.bool, device=device)
        values = logits[:, ids]
        seen = (counts > 0) | in_prompt
        repeated = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        values = torch.where(seen, repeated, values)
        values -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
        logits[:, ids] = values

    def _bias(self, logits: Tensor) -> None:
        if self.params.logit_bias:
            tokens, values = zip(*self.params.logit_bias, strict=True)
            bias = torch.tensor(values, dtype=logits.dtype, device=logits.device)
            logits[:, list(tokens)] += bias

    def _forbid(self, logits: Tensor, first: int, texts: Sequence[Sequence[int]]) -> None:
        """Sets forbidden tokens to −∞, but not all that a grammar has left. texts: the new tokens before each row."""
        short = self.params.min_tokens - first if self.ends else 0
        for row in range(len(logits)):
            forbidden = list(self.ends) if row < short else []
            forbidden += _ends_of_words(self.words, texts[row]) if row < len(texts) else []
            if forbidden:
                left = logits[row].clone()
                left[forbidden] = -torch.inf
                if left.max() > -torch.inf:
                    logits[row] = left


def _ends_of_words(words: Words, text: Sequence[int]) -> list[int]:
    """The last tokens of the words whose other tokens end the text."""
    return [word[-1] for word in words if len(word) == 1 or tuple(text[len(text) - len(word) + 1 :]) == word[:-1]]


def bad_word_tokens(words: Sequence[str], tokenizer: Tokenizer | None) -> Words:
    """The tokens of words, each as at the beginning of a text and after a space.

    Raises:
        ArgumentError: there is no tokenizer, or a word has no tokens.
    """
    found: list[tuple[int, ...]] = []
    if words and tokenizer is None:
        raise ArgumentError("bad_words need a tokenizer; set model.tokenizer", param="bad_words")
    for word in words:
        assert tokenizer is not None
        plain, spaced = (
            tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
            for text in (word.lstrip(" "), " " + word.lstrip(" "))
        )
        if not plain:
            raise ArgumentError(f"bad_words has {word!r}, which has no tokens; remove it", param="bad_words")
        found += [plain, spaced]
    return tuple(dict.fromkeys(found))
