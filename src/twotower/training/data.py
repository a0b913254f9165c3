"""Documents → batches. A batch is a pure function of (documents, seed, step), so a run resumes anywhere."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from twotower.errors import ArgumentError

SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>", "<mask>"]  # ids 0…3, as released
PAD, BOS, EOS, MASK = range(4)


def read_documents(path: Path) -> list[str]:
    """The `text` field of each line of a .jsonl or .jsonl.gz file."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for line in lines if line.strip()]
    except FileNotFoundError:
        raise ArgumentError(f"{path}: no such file; give a .jsonl or .jsonl.gz file with a `text` field") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArgumentError(f"{path}: not JSON lines with a `text` field ({error!r})") from None
    if not texts:
        raise ArgumentError(f"{path}: holds no documents")
    return texts


def cut_dialogue(text: str, rng: random.Random) -> str:
    """A prompt: the turns (lines) before a random one, and that one's speaker (`User:`)."""
    turns = text.split("\n")
    at = rng.randrange(1, len(turns))
    return "\n".join([*turns[:at], turns[at].split(":")[0] + ":"])


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE whose encodings begin with <bos>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """<bos> text <eos> for each document."""
    return [[*item.ids, EOS] for item in tokenizer.encode_batch(list(texts))]


@dataclass(frozen=True)
class Batch:
    """tokens (B, S); text (B, S), True at a document's own tokens, its EOS included; valid (B, S), True there and
    at the EOS repeats that fill its last block."""

    tokens: Tensor
    text: Tensor
    valid: Tensor


class Batches:
    """Every epoch visits the documents in a new order, in batches of documents of like length; the first visits each
    once, a later one may miss or repeat a few batches (epochs differ a little in length).

    Each row is one document: it starts from zero state and sees no other.
    """

    def __init__(self, documents: Sequence[Sequence[int]], tokens_per_batch: int, seed: int) -> None:
        self.documents = documents
        self.tokens_per_batch = tokens_per_batch
        self.seed = seed
        self._epoch = -1
        self._batches: list[list[int]] = []
        self.per_epoch = len(self._plan(0))

    def rows(self, step: int) -> list[Sequence[int]]:
        """The documents of batch number `step`."""
        return [self.documents[i] for i in self.indices(step)]

    def indices(self, step: int) -> list[int]:
        """Their places in `documents`."""
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._plan(epoch)
        # Epochs differ by a few batches; the surplus of a longer one is dropped, a shorter one wraps.
        return self._batches[index % len(self._batches)]

    def _plan(self, epoch: int) -> list[list[int]]:
        rng = random.Random(f"{self.seed}/{epoch}")
        order = list(range(len(self.documents)))
        rng.shuffle(order)
        batches: list[list[int]] = []
        for start in range(0, len(order), 256):  # sort inside windows: like lengths, yet a random order
            batch: list[int] = []
            for i in sorted(order[start : start + 256], key=lambda i: len(self.documents[i])):
                if batch and (len(batch) + 1) * len(self.documents[i]) > self.tokens_per_batch:
                    batches.append(batch)
                    batch = []
                batch.append(i)
            batches.append(batch)
        rng.shuffle(batches)
        return batches


def pad_rows(rows: Sequence[Sequence[int]], lead: Sequence[int], block_size: int) -> Batch:
    """Documents → a batch whose length is a multiple of block_size.

    Row i starts `lead[i]` < block_size columns late, so blocks fall at a random offset of the text; the tail of
    its last block is EOS; what follows is padding.
    """
    ends = [-(-(at + len(row)) // block_size) * block_size for row, at in zip(rows, lead, strict=True)]
    tokens = torch.full((len(rows), max(ends)), PAD)
    text, valid = torch.zeros(2, *tokens.shape, dtype=torch.bool)
    for i, (row, at, end) in enumerate(zip(rows, lead, ends, strict=True)):
        tokens[i, at : at + len(row)] = torch.tensor(row)
        tokens[i, at + len(row) : end] = EOS
        text[i, at : at + len(row)] = True
        valid[i, at:end] = True
    return Batch(tokens, text, valid)


def held_out(documents: Sequence[Sequence[int]], rows: int, block_size: int) -> Iterator[Batch]:
    """The documents once, `rows` at a time, longest last, without leading padding."""
    ordered = sorted(documents, key=len)
    for start in range(0, len(ordered), rows):
        part = ordered[start : start + rows]
        yield pad_rows(part, [0] * len(part), block_size)
