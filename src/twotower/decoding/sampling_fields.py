"""Parameters of sampling that other servers have too, with vLLM's names and definitions, and their checks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from twotower.decoding.checks import check_flag, check_number, check_whole
from twotower.errors import ArgumentError

LogitBias = tuple[tuple[int, float], ...]  # token ids, sorted, and what is added to their logits

# Parameter → the least and the largest value.
RANGES = {
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "frequency_penalty": (-2.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
}
LARGEST_BIAS = 100.0
MOST_BIASES, MOST_BAD_WORDS, LONGEST_BAD_WORD, MOST_STOP_TOKENS = 4096, 256, 256, 256
BAD_WORD_MODES = ("ar", "verified", "mock_ar")  # these choose token by token, so a word of several tokens can be seen


class SamplingFields(TypedDict, total=False):
    """Parameters that are the same for every row of a batch.

    min_p: sample only tokens with at least this share of the probability of the most probable token.
    repetition_penalty: the logits of tokens of the prompt and of the new text are divided by it if positive, else
    multiplied. frequency_penalty: subtracted from a token's logit for each time that the new text has it.
    presence_penalty: subtracted once from the logits of tokens that the new text has.
    min_tokens: new tokens before a token or a stop string may end the row. ignore_eos: EOS does not end a row.
    skip_special_tokens: the text lacks special tokens.
    """

    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    min_tokens: int
    ignore_eos: bool
    skip_special_tokens: bool


class SamplingLists(TypedDict, total=False):
    """Parameters that are the same for every row of a batch, and have several values.

    logit_bias: token id → a number from −100 to 100 that is added to its logit.
    bad_words: words that the new text does not have, as the tokens of each word at the beginning of a text or after a
    space; not in the modes diffusion and auto. stop_token_ids: tokens that end a row, beside EOS.
    """

    logit_bias: Mapping[int, float] | LogitBias | None
    bad_words: str | Sequence[str] | None
    stop_token_ids: int | Sequence[int] | None


def plain_bias(given: object) -> LogitBias:
    """Biases as sorted pairs. given: a mapping or pairs; the ids may be the text of numbers, as in JSON.

    Raises:
        ArgumentError: the biases have another form, an id is not a whole number, or a bias is out of range.
    """
    if isinstance(given, Mapping):
        items: Iterable[Sequence[object]] = given.items()
    elif given is None or isinstance(given, tuple | list):
        items = [pair for pair in given or () if isinstance(pair, tuple | list) and len(pair) == 2]
    if given is not None and (not isinstance(given, Mapping | tuple | list) or len(list(items)) != len(given)):
        words = f"logit_bias is {repr(given)[:40]}; give a mapping of token ids to numbers, such as {{42: -5}}"
        raise ArgumentError(words, param="logit_bias")
    out: dict[int, float] = {}
    for token, bias in items:
        if isinstance(token, str) and token.isascii() and token.isdecimal() and len(token) < 20:
            token = int(token)
        if not isinstance(token, int) or isinstance(token, bool):
            words = f"logit_bias has the key {str(token)[:40]!r}; the keys are token ids, which are whole numbers"
            raise ArgumentError(words, param="logit_bias")
        check_number("logit_bias", bias, -LARGEST_BIAS, LARGEST_BIAS, f" of token {token}")
        assert isinstance(bias, int | float)
        out[token] = float(bias)
    if len(out) > MOST_BIASES:
        words = f"logit_bias has {len(out)} tokens; at most {MOST_BIASES} are allowed, so remove some"
        raise ArgumentError(words, param="logit_bias")
    return tuple(sorted((token, bias) for token, bias in out.items() if bias))


class SamplingArguments(SamplingFields, SamplingLists, total=False):
    """Keyword arguments of the `generate_*` methods that all of them have."""


@dataclass(frozen=True, kw_only=True)
class SamplingValues:
    """The parameters of `SamplingFields` and `SamplingLists`; a part of `GenerationParams`."""

    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: LogitBias = ()
    bad_words: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    skip_special_tokens: bool = True

    def check_sampling(self, mode: str, max_new_tokens: int) -> None:
        """Raises ArgumentError where a value is wrong for any model."""
        for name, (low, high) in RANGES.items():
            check_number(name, getattr(self, name), low, high)
        check_flag("ignore_eos", self.ignore_eos)
        check_flag("skip_special_tokens", self.skip_special_tokens)
        check_whole("min_tokens", self.min_tokens, least=0)
        if self.min_tokens > max_new_tokens:
            words = f"min_tokens is {self.min_tokens} and max_new_tokens {max_new_tokens}; lower min_tokens"
            raise ArgumentError(words, param="min_tokens")
        for name, most in (("bad_words", MOST_BAD_WORDS), ("stop_token_ids", MOST_STOP_TOKENS)):
            if (count := len(getattr(self, name))) > most:
                raise ArgumentError(
                    f"{name} has {count} entries; at most {most} are allowed, so remove some", param=name
                )
        for word in self.bad_words:
            if not isinstance(word, str) or not word.strip():
                raise ArgumentError(f"bad_words has {word!r}; each must be a string with text", param="bad_words")
            if len(word) > LONGEST_BAD_WORD:
                words = f"bad_words has a word of {len(word)} characters; at most {LONGEST_BAD_WORD} are allowed"
                raise ArgumentError(words, param="bad_words")
        if self.bad_words and mode not in BAD_WORD_MODES:
            words = f"bad_words need mode {', '.join(BAD_WORD_MODES)}; mode is {mode}, so change one of them"
            raise ArgumentError(words, param="bad_words")

    def check_tokens(self, vocab: int) -> None:
        """Raises ArgumentError if a token id is not one of the `vocab` tokens of a model."""
        check_token_ids("stop_token_ids", self.stop_token_ids, vocab)
        check_token_ids("logit_bias", [token for token, _ in self.logit_bias], vocab)


def check_token_ids(name: str, tokens: Sequence[object], vocab: int) -> None:
    """Raises ArgumentError unless all tokens are ids below `vocab`."""
    for token in tokens:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab:
            words = f"{name} has {repr(token)[:40]}; it must be a token id from 0 to {vocab - 1}"
            raise ArgumentError(words, param=name)
