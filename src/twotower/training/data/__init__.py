"""Text data → batches of packed documents: deterministic, sharded by rank, resumable between any two batches.

source (records) → encoder (documents) → row streams (pieces, packed) → rows → Batch
"""

from twotower.training.data.batch import Batch
from twotower.training.data.documents import Document, Encoder, Record
from twotower.training.data.held_out import held_out_batches
from twotower.training.data.loader import RowLoader, Statistics, merge_states
from twotower.training.data.packing import Offset, Piece, collate, fill_row, to_piece
from twotower.training.data.sources import Source, Spec, parse_spec
from twotower.training.data.tokenizer import BOS, EOS, MASK, PAD, SPECIAL_TOKENS, train_tokenizer

__all__ = [
    "BOS",
    "EOS",
    "MASK",
    "PAD",
    "SPECIAL_TOKENS",
    "Batch",
    "Document",
    "Encoder",
    "Offset",
    "Piece",
    "Record",
    "RowLoader",
    "Source",
    "Spec",
    "Statistics",
    "collate",
    "fill_row",
    "held_out_batches",
    "merge_states",
    "parse_spec",
    "to_piece",
    "train_tokenizer",
]
