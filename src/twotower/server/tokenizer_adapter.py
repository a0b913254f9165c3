"""Converts between text and tokens: prompts, chats, and the text of single tokens."""

from __future__ import annotations

import copy
import json
import re
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache

from twotower.server.message_schemas import Message
from twotower.server.request_errors import RequestError
from twotower.tokenizer import Tokenizer, longest_token

MAX_FIELD_NAME = 64
ROLE_NAMES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}


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

    def encode_prompt(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt, which is a text or token ids.

        Raises:
            RequestError: The text has a lone surrogate.
        """
        return self._encode(prompt, True, "prompt") if isinstance(prompt, str) else list(prompt)

    def encode_chat(self, messages: Sequence[Message]) -> tuple[list[int], tuple[str, ...]]:
        """Token ids of a chat up to the assistant's reply, and the stop strings that end the reply.

        Uses the chat template of the tokenizer. Without a template, a turn is written as `Role: text`, and the role
        names are the stop strings.

        Raises:
            RequestError: The template rejects the messages, or a text has a lone surrogate.
        """
        template = _template_text(getattr(self.tokenizer, "chat_template", None))
        check_template_fields(messages, template)
        if template:
            turns = [message.template_fields for message in messages]
            try:
                text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            except Exception as error:  # a template can raise any error
                reason = " ".join(f"{error}".split())
                raise RequestError(
                    f"the chat template of the model rejects these messages: {reason}", param="messages"
                ) from None
            return self._encode(text, False, "messages"), ()
        lines = [f"{ROLE_NAMES[message.role]}: {message.text.strip()}".rstrip() for message in messages]
        ends = tuple(f"\n{speaker}:" for speaker in dict.fromkeys(ROLE_NAMES.values()))
        return self._encode("\n".join([*lines, "Assistant:"]), True, "messages"), ends

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


def check_template_fields(messages: Sequence[Message], template: str) -> None:
    """Raises RequestError if a message has a role or a field whose meaning is lost without a template that reads it."""
    for number, message in enumerate(messages):
        if message.role == "tool" and not _reads(template, "tool"):
            raise RequestError(
                f'messages.{number}.role is "tool", which the chat template of this model does not read; omit the turn',
                param="messages",
                code="unsupported",
            )
        for name in message.fields_for_templates_only:
            if not _reads(template, name):
                raise RequestError(
                    f"messages.{number}.{name} is a field that the chat template of this model does not read; omit it",
                    param="messages",
                    code="unsupported",
                )


@lru_cache(maxsize=256)
def _reads(template: str, name: str) -> bool:
    """Whether a chat template contains the name of a field or role."""
    return len(name) <= MAX_FIELD_NAME and re.search(rf"\b{re.escape(name)}\b", template) is not None


def _template_text(template: object) -> str:
    """The text of a tokenizer's chat template, or of all its templates."""
    if isinstance(template, Mapping):
        return "\n".join(map(str, template.values()))
    return str(template or "")


def _byte_level_alphabet() -> dict[str, int]:
    """Character → byte in byte-level vocabularies (GPT-2): 188 characters stand for their own byte, and the characters
    from U+0100 on for the other bytes."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + place): byte for place, byte in enumerate(moved)}


BYTE_OF_CHARACTER = _byte_level_alphabet()
