"""The end of a row (EOS, stop strings, length) and its text, detokenised incrementally."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from twotower.decoding.output import FinishReason
from twotower.tokenizer import Tokenizer

REPLACEMENT_CHARACTER = "\ufffd"  # decoders give it for bytes that are not (yet) a character
CHARACTER_BYTES = 4  # of the longest UTF-8 character; a token with text has at least one
MOST_HELD = 16  # tokens that wait for the end of a character, if no boundary between characters is found


class Detokenizer:
    """Converts tokens to text. The bytes of an incomplete character are held back until it is complete.

    A character has at most four bytes. So at most a few tokens are decoded at a time, whatever the tokens are.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self.decode = decode_function(tokenizer)
        self._skip_special = skip_special_tokens
        self._window: list[int] = []  # the last emitted tokens, because decoders treat the first token of a text
        self._emitted = 0  # specially; and from this index on the tokens that are held back
        self._emitted_text = ""  # of the emitted tokens of the window
        self._text = ""  # of the window

    def push(self, token: int) -> str:
        """Adds a token → the text that became final."""
        text = self._decode([*self._window, token])
        if text == self._text and self._is_special(token):
            return ""
        self._window.append(token)
        if not text.startswith(self._emitted_text):  # the token changed the decoding of emitted bytes
            self._forget_emitted()
            text = self._decode(self._window)
        self._text = text
        if len(text) > len(self._emitted_text) and not text.endswith(REPLACEMENT_CHARACTER):
            return self._emit(len(self._window))
        held = len(self._window) - self._emitted
        if held < CHARACTER_BYTES:
            return ""
        if text == self._emitted_text:  # tokens without text
            del self._window[self._emitted :]
            return ""
        end = self._boundary()
        return self._emit(len(self._window) if end is None and held >= MOST_HELD else end or self._emitted)

    def flush(self) -> str:
        """The remaining text at the end. U+FFFD stands for an incomplete character."""
        return self._emit(len(self._window))

    def _emit(self, end: int) -> str:
        """Makes the tokens of the window before `end` final → their text. They become the next window's context."""
        if end <= self._emitted:
            return ""
        text = self._text if end == len(self._window) else self._decode(self._window[:end])
        piece = text[len(self._emitted_text) :]
        del self._window[: self._emitted]
        self._emitted = end - self._emitted
        self._text = self._emitted_text = self._decode(self._window)
        if self._emitted < len(self._window):
            self._emitted_text = self._decode(self._window[: self._emitted])
        return piece

    def _forget_emitted(self) -> None:
        del self._window[: self._emitted]
        self._emitted, self._emitted_text = 0, ""

    def _boundary(self) -> int | None:
        """The last index of the window at which no character is split, before the last token with text."""
        for end in range(len(self._window) - 1, max(len(self._window) - CHARACTER_BYTES, self._emitted), -1):
            rest = self._decode(self._window[end:])
            if rest and self._decode(self._window[:end]) + rest == self._text:
                return end
        return None

    def _is_special(self, token: int) -> bool:
        return (
            self._skip_special and not self._decode([token]) and bool(self.decode([token], skip_special_tokens=False))
        )

    def _decode(self, tokens: list[int]) -> str:
        return str(self.decode(tokens, skip_special_tokens=self._skip_special))


def decode_function(tokenizer: Tokenizer) -> Callable[..., str]:
    """The fastest function that decodes ids as `tokenizer.decode` does.

    If transformers adds nothing, that is the decoder of the tokenizers library, which takes a quarter of the time. The
    engine decodes twice a token.
    """
    own = [getattr(type(tokenizer), name, None) for name in ("decode", "_decode")]
    plain = own == [PreTrainedTokenizerBase.decode, PreTrainedTokenizerFast._decode]
    if plain and not tokenizer.clean_up_tokenization_spaces:
        return tokenizer.backend_tokenizer.decode
    return tokenizer.decode


class RowProgress:
    """New tokens and text of one row, and the reason why it ended.

    eos: tokens that end the row, which have no text. stop_tokens: those of them that are not EOS. min_tokens: as many
    new tokens come before a stop string may end. skip_special_tokens: whether the text lacks special tokens.
    """

    def __init__(
        self,
        limit: int,
        eos: Sequence[int],
        stop: Sequence[str],
        tokenizer: Tokenizer | None,
        *,
        stop_tokens: Sequence[int] = (),
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        self.limit = limit
        self.eos = frozenset(eos)
        self.stop = tuple(stop)
        self.stop_tokens, self.min_tokens = frozenset(stop_tokens), min_tokens
        self.skip_special_tokens = skip_special_tokens
        self.tokenizer = tokenizer
        self.detokenizer = None if tokenizer is None else Detokenizer(tokenizer, skip_special_tokens)
        self.tokens: list[int] = []
        self._too_early = 0  # characters at the beginning of the held text in which no stop string may end
        self._final: list[str] = []  # pieces of text; no stop string can begin in them
        self._held = ""  # decoded; may be the beginning of a stop string
        self.finish_reason: FinishReason | None = "length" if limit == 0 else None
        self.stop_string = ""  # the stop string that ended the row

    @property
    def text(self) -> str:
        """The final text so far."""
        return "".join(self._final)

    def take(self, tokens: Sequence[int], complete: bool = False) -> tuple[int, str]:
        """Adds committed tokens until the row ends → the number of tokens used, and the text that became final.

        complete: the row ends after the last token.
        """
        before = len(self._final)
        for count, token in enumerate(tokens, start=1):
            self.tokens.append(token)
            self._add_text(self.detokenizer.push(token) if self.detokenizer and token not in self.eos else "")
            complete_now = token in self.stop_tokens or (complete and count == len(tokens))
            if self.finish_reason is None and token in self.eos - self.stop_tokens:
                self.finish_reason = "eos"
            elif self.finish_reason is None and complete_now:
                self._finish_text()  # no stop string has come: all text is final
                self.finish_reason = "stop"
                return count, "".join(self._final[before:])
            elif self.finish_reason is None and len(self.tokens) == self.limit:
                self.finish_reason = "length"
            if self.finish_reason:
                self._finish_text()
                return count, "".join(self._final[before:])
        return len(tokens), "".join(self._final[before:])

    def taken_again(self) -> RowProgress:
        """A new row that has taken the same tokens, which must not have ended the row."""
        again = RowProgress(
            self.limit,
            tuple(self.eos),
            self.stop,
            self.tokenizer,
            stop_tokens=tuple(self.stop_tokens),
            min_tokens=self.min_tokens,
            skip_special_tokens=self.skip_special_tokens,
        )
        again.take(self.tokens)
        return again

    def _add_text(self, piece: str) -> None:
        self._held += piece
        if not self.stop:
            self._release(len(self._held))
            return
        if len(self.tokens) <= self.min_tokens:
            self._too_early = len(self._held)
        places = ((self._held.find(stop, max(self._too_early - len(stop) + 1, 0)), stop) for stop in self.stop)
        found = [(at, stop) for at, stop in places if at >= 0]
        if found:
            at, self.stop_string = min(found)
            self._release(at)
            self.finish_reason = "stop"
        else:
            self._release(len(self._held) - _possible_start(self._held, self.stop))

    def _release(self, count: int) -> None:
        """Makes the first `count` held characters final."""
        if count:
            self._final.append(self._held[:count])
            self._held = self._held[count:]
            self._too_early = max(self._too_early - count, 0)

    def _finish_text(self) -> None:
        """Makes held text final, unless a stop string came."""
        if self.finish_reason != "stop" and self.detokenizer:
            self._add_text(self.detokenizer.flush())
        if self.finish_reason != "stop":
            self._release(len(self._held))
        self._held = ""


def _possible_start(text: str, stops: Sequence[str]) -> int:
    """Length of the longest suffix of `text` that could begin a stop string."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
