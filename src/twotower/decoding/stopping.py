"""Where a row ends, and its text so far: EOS, stop strings, length; incremental detokenisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from twotower.decoding.output import FinishReason
from twotower.tokenizer import Tokenizer

REPLACEMENT_CHARACTER = "\ufffd"  # what decoders print for bytes that are not (yet) a character


class Detokenizer:
    """Tokens in, text out, never half a character: bytes wait until the character they belong to is whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.decode = decode_function(tokenizer)
        self.tokens: list[int] = []
        self.settled = 0  # tokens whose text is out for good and no longer needed as decoding context
        self.emitted = 0  # tokens whose text is out

    def push(self, token: int) -> str:
        self.tokens.append(token)
        old, new = self._decode(self.emitted), self._decode(len(self.tokens))
        if len(new) <= len(old) or new.endswith(REPLACEMENT_CHARACTER):
            return ""
        self.settled, self.emitted = self.emitted, len(self.tokens)
        return new[len(old) :]

    def flush(self) -> str:
        """What is left at the end; an unfinished character is dropped."""
        rest = self._decode(len(self.tokens))[len(self._decode(self.emitted)) :]
        self.settled = self.emitted = len(self.tokens)
        return rest.rstrip(REPLACEMENT_CHARACTER)

    def _decode(self, end: int) -> str:
        # Decoding starts a little before the new tokens: decoders treat the first token of a text specially.
        return str(self.decode(self.tokens[self.settled : end], skip_special_tokens=True))


def decode_function(tokenizer: Tokenizer) -> Callable[..., str]:
    """What `tokenizer.decode` comes to for a list of ids: where transformers adds nothing to it, the decoder of the
    tokenizers library, in a quarter of the time, which an engine spends twice a token."""
    own = [getattr(type(tokenizer), name, None) for name in ("decode", "_decode")]
    plain = own == [PreTrainedTokenizerBase.decode, PreTrainedTokenizerFast._decode]
    if plain and not tokenizer.clean_up_tokenization_spaces:
        return tokenizer.backend_tokenizer.decode
    return tokenizer.decode


class RowProgress:
    """One row's new tokens and text as they come; knows when the row has ended."""

    def __init__(self, limit: int, eos: Sequence[int], stop: Sequence[str], tokenizer: Tokenizer | None) -> None:
        self.limit = limit
        self.eos = frozenset(eos)
        self.stop = tuple(stop)
        self.detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self.tokens: list[int] = []
        self.text = ""  # final: no stop string can begin in it any more
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        self.finish_reason: FinishReason | None = "length" if limit == 0 else None

    def take(self, tokens: Sequence[int], complete: bool = False) -> tuple[int, str]:
        """Adds committed tokens until the row ends → how many counted, and the text that became final. complete: after
        the last of them it ends anyway."""
        before = len(self.text)
        for count, token in enumerate(tokens, start=1):
            self.tokens.append(token)
            self._add_text(self.detokenizer.push(token) if self.detokenizer and token not in self.eos else "")
            if self.finish_reason is None and token in self.eos:
                self.finish_reason = "eos"
            elif self.finish_reason is None and complete and count == len(tokens):
                self._finish_text()  # nothing of it is held back: no stop string has come
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
        """Makes the first `count` held characters final, but for broken ones at their end: no event ends in those."""
        count = len(self._held[:count].rstrip(REPLACEMENT_CHARACTER))
        self.text, self._held = self.text + self._held[:count], self._held[count:]

    def _finish_text(self) -> None:
        """What was held back is text after all, unless a stop string came."""
        if self.finish_reason != "stop" and self.detokenizer:
            self._add_text(self.detokenizer.flush())
        if self.finish_reason != "stop":
            self._release(len(self._held))
        self._held = ""


def _possible_start(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that could be the beginning of a stop string."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
