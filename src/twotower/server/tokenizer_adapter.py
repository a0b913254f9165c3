"""Converts between text and tokens: prompts, chats, and the text of single tokens."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Sequence
from functools import cached_property

from twotower.server.chat_prompts import check_template_fields, plain_prompt, template_text, templated_prompt
from twotower.server.conversation import ChatPrompt, Conversation
from twotower.server.parsers.thinking import opening_of
from twotower.server.request_errors import RequestError
from twotower.tokenizer import Tokenizer, longest_token


class TokenizerAdapter:
    """A tokenizer that several threads of a server may use while the engine's thread decodes.

    A fast tokenizer stores the settings of its last call (truncation, padding). If two threads encode with one
    tokenizer, a thread can get the settings of the other, and its prompt is truncated without an error. So a copy of
    the tokenizer encodes, one thread at a time. The original only decodes, which changes no setting.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._encoder = copy.deepcopy(tokenizer)
        self._encoder_lock = threading.Lock()
        self._bytes: dict[int, bytes] = {}  # cache of `token_bytes`
        self._special_markers: dict[tuple[str, ...], dict[int, str]] = {}  # cache of `special_markers`

    def encode_prompt(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt, which is a text or token ids.

        Raises:
            RequestError: The text has a lone surrogate.
        """
        return self._encode(prompt, True, "prompt") if isinstance(prompt, str) else list(prompt)

    def encode_text(self, text: str, special: bool) -> list[int]:
        """Token ids of a text. special: whether the special tokens of the tokenizer are added, such as BOS.

        Raises:
            RequestError: The text has a lone surrogate.
        """
        return self._encode(text, special, "prompt")

    def encode_chat(self, conversation: Conversation) -> ChatPrompt:
        """The prompt of a chat up to the assistant's reply.

        Uses the chat template of the tokenizer, or else a plain format. See `chat_prompts`.

        Raises:
            RequestError: The template rejects the messages, or a text has a lone surrogate.
        """
        field = conversation.request_field
        if template_text(self.tokenizer):
            text = templated_prompt(self.tokenizer, conversation)
            return ChatPrompt(self._encode(text, False, field), (), opening_of(text))
        check_template_fields(conversation, "")
        text, stops = plain_prompt(conversation.messages, conversation.ending)
        return ChatPrompt(self._encode(text, True, field), stops)

    def longest_text(self, tokens: int) -> int:
        """An upper limit of the characters of a text with so many tokens. Longer texts need not be encoded."""
        return tokens * self._longest_token

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, with special tokens."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False))

    def special_text(self, token: int) -> str | None:
        """The text of a special token, which texts of responses leave out; None: the token is not special."""
        if self.tokenizer.decode([token], skip_special_tokens=True):
            return None
        return self.tokenizer.decode([token], skip_special_tokens=False) or None

    def special_markers(self, texts: tuple[str, ...]) -> dict[int, str]:
        """Those of the texts that are special tokens, by token. Texts of responses leave special tokens out."""
        if texts not in self._special_markers:
            vocabulary = self.tokenizer.get_vocab() if texts else {}
            tokens = {vocabulary[text]: text for text in texts if text in vocabulary}
            self._special_markers[texts] = {
                token: text for token, text in tokens.items() if self.special_text(token) is not None
            }
        return self._special_markers[texts]

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of one token."""
        if token not in self._bytes:
            self._bytes[token] = self._find_token_bytes(token)
        return self._bytes[token]

    def _find_token_bytes(self, token: int) -> bytes:
        name = self.tokenizer.convert_ids_to_tokens(token)
        if name is None:
            return b""
        if self._byte_level and all(letter in BYTE_OF_CHARACTER for letter in name):
            return bytes(BYTE_OF_CHARACTER[letter] for letter in name)
        return str(self.tokenizer.decode([token], skip_special_tokens=False)).encode()

    def token_text(self, token: int) -> str:
        """The text of one token; a part of a character as `bytes:` and its bytes, as in the OpenAI API."""
        raw = self.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _encode(self, text: str, special: bool, field: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RequestError(
                f"{field} has a lone surrogate, which is not a character; remove it", param=field
            ) from None
        with self._encoder_lock:
            return list(self._encoder(text, add_special_tokens=special)["input_ids"])

    @cached_property
    def _longest_token(self) -> int:
        return longest_token(self.tokenizer)

    @cached_property
    def _byte_level(self) -> bool:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        decoder = json.loads(backend.to_str()).get("decoder") if backend is not None else None
        steps = (decoder or {}).get("decoders", [decoder or {}])
        return any(step.get("type") == "ByteLevel" for step in steps)


def _byte_level_alphabet() -> dict[str, int]:
    """Character → byte in byte-level vocabularies (GPT-2): 188 characters stand for their own byte, and the characters
    from U+0100 on for the other bytes."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + place): byte for place, byte in enumerate(moved)}


BYTE_OF_CHARACTER = _byte_level_alphabet()
