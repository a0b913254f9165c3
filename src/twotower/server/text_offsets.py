"""Where the tokens of a response lie in its text, and which of them are in the content of a chat."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable

from twotower.decoding.output import TokenLogprob
from twotower.decoding.stopping import Detokenizer
from twotower.server.tokenizer_adapter import TokenizerAdapter


class TextOffsets:
    """Computes where each token of a text lies in the text: the prompt's tokens first, then the new ones.

    A token without text, or with a part of a character, starts where the next token starts. echo: the prompt, if the
    text begins with it. eos: tokens that end a text without a text of their own. skip_special_tokens: whether the new
    text lacks special tokens.
    """

    def __init__(
        self,
        tokenizer: TokenizerAdapter,
        echo: str = "",
        eos: Collection[int] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer, self._echo, self._eos = tokenizer, echo, frozenset(eos)
        self._skip_special = skip_special_tokens
        self._detokenizer = Detokenizer(tokenizer.tokenizer)
        self._length = 0
        self._in_prompt = True

    def prompt_offset(self, token: int) -> int:
        """The offset of the next prompt token. Special tokens count if the prompt has their text."""
        before = self._length
        special = self._tokenizer.special_text(token)
        if special is None:
            self._length += len(self._detokenizer.push(token))
        elif self._echo.startswith(special, before):
            self._length += len(special)
        return min(before, len(self._echo))

    def span(self, token: int) -> tuple[int, int]:
        """Start and end of the next new token, in characters."""
        if self._in_prompt:
            self._in_prompt = False
            self._detokenizer = Detokenizer(self._tokenizer.tokenizer, self._skip_special)
            self._length = len(self._echo)
        before = self._length
        if token not in self._eos:
            self._length += len(self._detokenizer.push(token))
        return before, self._length


class ContentLogprobs:
    """Selects the log-probabilities of the tokens that are in the content of a reply.

    Left out are special tokens, tokens of a stop string, and white space before the content. A token waits until its
    text is final.
    """

    def __init__(
        self,
        tokenizer: TokenizerAdapter,
        eos: Collection[int],
        strip_leading_space: bool,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer, self._eos, self._skip_special = tokenizer, frozenset(eos), skip_special_tokens
        self._offsets = TextOffsets(tokenizer, "", eos, skip_special_tokens)
        self._waiting: deque[tuple[TokenLogprob, int, int]] = deque()
        self._stripping = strip_leading_space
        self._skipped = 0  # characters before the content
        self._final = 0  # characters that are final, those before the content included

    def take(self, scores: Iterable[TokenLogprob], text: str, last: bool) -> list[TokenLogprob]:
        """Adds new tokens and the text that became final with them → the tokens whose text is final.

        last: no token and no text follows.
        """
        self._waiting.extend((score, *self._span(score.token)) for score in scores)
        if self._stripping:
            blank = len(text) - len(text.lstrip())
            self._skipped += blank
            self._stripping = blank == len(text)
        self._final += len(text)
        ready = []
        while self._waiting and (last or self._is_final(*self._waiting[0][1:])):
            score, start, end = self._waiting.popleft()
            visible = end > self._skipped if end > start else start >= self._skipped
            if visible and start < self._final and not self._is_hidden(score.token):
                ready.append(score)
        return ready

    def _is_hidden(self, token: int) -> bool:
        skipped = self._skip_special and self._tokenizer.special_text(token) is not None
        return skipped or token in self._eos

    def _span(self, token: int) -> tuple[int, int]:
        """The place of a token, without the incomplete characters that the text has before the token."""
        start, end = self._offsets.span(token)
        own = len(self._tokenizer.token_bytes(token).decode(errors="replace"))
        return (max(start, end - own) if end > start else start), end

    def _is_final(self, start: int, end: int) -> bool:
        return start < self._final and end <= self._final
