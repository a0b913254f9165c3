"""The end of a row (EOS, stop strings, length) and its text, detokenised incrementally."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from twotower.decoding.output import FinishReason
from twotower.tokenizer import Tokenizer

REPLACEMENT_CHARACTER = "\ufffd"  # decoders give it for bytes that are not (yet) a character


class Detokenizer:
    """Converts tokens to text. The bytes of an incomplete character are held back until it is complete."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.decode = decode_function(tokenizer)
        self.tokens: list[int] = []
        self.settled = 0  # tokens whose text is emitted and that later decoding does not need
        self.emitted = 0  # tokens whose text is emitted

    def push(self, token: int) -> str:
        self.tokens.append(token)
        old, new = self._decode(self.emitted), self._decode(len(self.tokens))
        if len(new) <= len(old) or new.endswith(REPLACEMENT_CHARACTER):
            return ""
        self.settled, self.emitted = self.emitted, len(self.tokens)
        return new[len(old) :]

    def flush(self) -> str:
        """The remaining text at the end, without an incomplete character."""
        rest = self._decode(len(self.tokens))[len(self._decode(self.emitted)) :]
        self.settled = self.emitted = len(self.tokens)
        return rest.rstrip(REPLACEMENT_CHARACTER)

    def _decode(self, end: int) -> str:
        # Decoding starts a little before the new tokens: decoders treat the first token of a text specially.
        return str(self.decode(self.tokens[self.settled : end], skip_special_tokens=True))


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
    """New tokens and text of one row, and the reason why it ended."""

    def __init__(self, limit: int, eos: Sequence[int], stop: Sequence[str], tokenizer: Tokenizer | None) -> None:
        self.limit = limit
        self.eos = frozenset(eos)
        self.stop = tuple(stop)
        self.detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self.tokens: list[int] = []
        self.text = ""  # final: no stop string can begin in it
        self._held = ""  # decoded; may be the beginning of a stop string
        self.finish_reason: FinishReason | None = "length" if limit == 0 else None

    def take(self, tokens: Sequence[int], complete: bool = False) -> tuple[int, str]:
        """Adds committed tokens until the row ends → the number of tokens used, and the text that became final.

        complete: the row ends after the last token.
        """
        before = len(self.text)
        for count, token in enumerate(tokens, start=1):
            self.tokens.append(token)
            self._add_text(self.detokenizer.push(token) if self.detokenizer and token not in self.eos else "")
            if self.finish_reason is None and token in self.eos:
                self.finish_reason = "eos"
            elif self.finish_reason is None and complete and count == len(tokens):
                self._finish_text()  # no stop string has come: all text is final
                self.finish_reason = "stop"
                return count, self.text[before:]
            elif self.finish_reason is None and len(self.tokens) == self.limit:
                self.finish_reason = "length"
            if self.finish_reason:
                self._finish_text()
                return count, self.text[before:]
        return len(tokens), self.text[before:]

    def _add_text(self, piece: str) -> None:
        self._held += piece
        found = [at for at in (self._held.find(stop) for stop in self.stop) if at >= 0]
        if found:
            self.text += self._held[: min(found)]
            self.finish_reason = "stop"
        else:
            self._release(len(self._held) - _possible_start(self._held, self.stop))

    def _release(self, count: int) -> None:
        """Makes the first `count` held characters final, except for incomplete characters at their end."""
        count = len(self._held[:count].rstrip(REPLACEMENT_CHARACTER))
        self.text, self._held = self.text + self._held[:count], self._held[count:]

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
