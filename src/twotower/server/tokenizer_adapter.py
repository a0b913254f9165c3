"""Between clients' texts and the model's tokens: prompts, chats, and the text of single tokens."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Sequence
from functools import cached_property

from twotower.decoding.stopping import Detokenizer
from twotower.server.request_errors import RequestError
from twotower.server.request_schemas import Message
from twotower.tokenizer import Tokenizer

ROLE_NAMES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}


class TokenizerAdapter:
    """A tokenizer for a server's threads, beside the engine's thread.

    A fast tokenizer keeps the settings of its last call (truncation, padding), so two threads that encode with one
    tokenizer can get each other's settings: a prompt is cut without an error. Here a copy encodes, one thread at a
    time. The tokenizer itself, which the engine's thread decodes with, only decodes; that changes no setting.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._encoder = copy.deepcopy(tokenizer)
        self._encoder_lock = threading.Lock()
        self._bytes: dict[int, bytes] = {}  # of the tokens that were asked about: looking one up takes a while

    def encode_prompt(self, prompt: str | Sequence[int]) -> list[int]:
        """A prompt's tokens.

        Raises:
            RequestError: it is not text.
        """
        return self._encode(prompt, True, "prompt") if isinstance(prompt, str) else list(prompt)

    def encode_chat(self, messages: Sequence[Message]) -> tuple[list[int], tuple[str, ...]]:
        """A chat's tokens up to where the assistant speaks, by the tokenizer's template or a plain one; and the stop
        strings that end its turn in the plain one."""
        if getattr(self.tokenizer, "chat_template", None):
            turns = [{"role": message.role, "content": message.text} for message in messages]
            try:
                text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            except Exception as error:  # templates refuse what they do not know, each in its own way
                raise RequestError(f"the chat template refuses these messages: {error}", param="messages") from None
            return self._encode(text, False, "messages"), ()
        lines = [f"{ROLE_NAMES[message.role]}: {message.text.strip()}" for message in messages]
        ends = tuple(f"\n{speaker}:" for speaker in dict.fromkeys(ROLE_NAMES.values()))
        return self._encode("\n".join([*lines, "Assistant:"]), True, "messages"), ends

    def decode(self, tokens: Sequence[int]) -> str:
        """Of a prompt that is given back."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def token_bytes(self, token: int) -> bytes:
        """What one token stands for."""
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
        """One token as text; a part of a character by its bytes, as the published API writes it."""
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
                f"{field} has half a surrogate pair in it, which is no character; remove it", param=field
            ) from None
        with self._encoder_lock:
            return list(self._encoder(text, add_special_tokens=special)["input_ids"])

    @cached_property
    def _byte_level(self) -> bool:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        decoder = json.loads(backend.to_str()).get("decoder") if backend is not None else None
        steps = (decoder or {}).get("decoders", [decoder or {}])
        return any(step.get("type") == "ByteLevel" for step in steps)


class TextOffsets:
    """Where the tokens of a text begin in it; one that is no text, or part of a character, where the next does."""

    def __init__(self, tokenizer: TokenizerAdapter) -> None:
        self._detokenizer = Detokenizer(tokenizer.tokenizer)
        self._length = 0

    def offset(self, token: int) -> int:
        """Of the next token."""
        before = self._length
        self._length += len(self._detokenizer.push(token))
        return before


def _byte_level_alphabet() -> dict[str, int]:
    """The letters by which byte-level vocabularies write bytes: printable ones stand for themselves, the others are
    moved behind the first 256 (GPT-2)."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + place): byte for place, byte in enumerate(moved)}


BYTE_OF_CHARACTER = _byte_level_alphabet()
