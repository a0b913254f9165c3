"""From text to batches: no document is lost or mixed with another, for any number of ranks and after resuming."""

from __future__ import annotations

import gzip
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from twotower import TwoTowerError
from twotower.errors import ArgumentError
from twotower.training.data import (
    BOS,
    EOS,
    MASK,
    PAD,
    Batch,
    Document,
    Encoder,
    Piece,
    Record,
    RowLoader,
    Source,
    collate,
    fill_row,
    held_out_batches,
    merge_states,
    parse_spec,
    to_piece,
    train_tokenizer,
)
from twotower.training.data.keyed_random import permutation
from twotower.training.data.readers import open_reader

BLOCK, LENGTH = 4, 16
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs", "run", "by", "in", "1984", "then", "slept"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([" ".join(WORDS)] * 3, vocab_size=300)


@pytest.fixture(scope="module")
def encoder(tokenizer: Tokenizer) -> Encoder:
    return encoder_of(tokenizer)


def encoder_of(tokenizer: Any, **options: Any) -> Encoder:
    ids = {"eos_token_id": EOS, "mask_token_id": MASK, "bos_token_id": BOS, "pad_token_id": PAD}
    return Encoder(tokenizer, **{"vocab_size": 300, **ids, **options})


def texts(count: int, seed: int = 0, name: str = "") -> list[str]:
    """Distinct texts of 1 to 12 words."""
    rng = np.random.default_rng(seed)
    return [f"{name}{i} " + " ".join(rng.choice(WORDS, rng.integers(0, 12))) for i in range(count)]


def write_jsonl(path: Path, lines: Sequence[Any]) -> str:
    """Writes one item a line: objects as JSON, strings as they are."""
    data = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def as_records(found: Sequence[str]) -> list[dict[str, str]]:
    return [{"text": text} for text in found]


def same(a: Batch, b: Batch) -> bool:
    return all(
        torch.equal(getattr(a, n), getattr(b, n)) for n in ("tokens", "document", "text", "denoised", "prompt", "index")
    )


def batches_of(rows: RowLoader, count: int) -> list[Batch]:
    return [rows.next() for _ in range(count)]


def documents_of(batches: Sequence[Batch]) -> list[list[int]]:
    """The tokens of each document, in the order of the batches."""
    found = []
    for batch in batches:
        for row in range(len(batch)):
            for number in range(int(batch.document[row].max()) + 1):
                mine = batch.text[row] & (batch.document[row] == number)
                found.append(batch.tokens[row][mine].tolist())
    return found


def decoded(tokenizer: Tokenizer, batches: Sequence[Batch]) -> list[str]:
    return [tokenizer.decode(ids) for ids in documents_of(batches)]


def until_the_end(rows: RowLoader) -> list[Batch]:
    found = []
    while not rows.exhausted():
        found.append(rows.next())
    return found


# --- tokenizer ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(text=st.text("ab in10984٣²½é🐈\n\t\x00", max_size=60))
def test_split_digits_lose_nothing(text: str) -> None:
    found = DIGITS.encode(text + " 1984, 20٣5")
    assert DIGITS.decode(found.ids) == text + " 1984, 20٣5"
    assert found.ids[0] == BOS
    assert all(sum(c.isdigit() for c in DIGITS.decode([i])) <= 1 for i in found.ids)


DIGITS = train_tokenizer(["in 1984 and 1985 there were 1984 cats", "1984 1984 1984"] * 5, 400, split_digits=True)


def test_digits_stay_together_unless_asked() -> None:
    tokenizer = train_tokenizer(["1984 1984 1984"] * 5, 300)
    assert len(tokenizer.encode("1984").ids) == 2
    assert len(DIGITS.encode("1984").ids) == 5


# --- documents ----------------------------------------------------------------------------------------------------


def test_a_text_begins_with_bos_and_ends_with_eos(encoder: Encoder, tokenizer: Tokenizer) -> None:
    document = encoder.encode(Record("the cat", None, "here"))
    assert document.tokens.tolist() == [*tokenizer.encode("the cat").ids, EOS]
    assert (document.context, document.prompted, document.ends) == (1, False, True)


def test_prompt_and_text_are_tokenised_apart_as_in_generation(encoder: Encoder, tokenizer: Tokenizer) -> None:
    document = encoder.encode(Record("at sat", "the c", "here"))
    prompt = tokenizer.encode("the c").ids
    rest = tokenizer.encode("at sat", add_special_tokens=False).ids
    assert document.tokens.tolist() == [*prompt, *rest, EOS]
    assert (document.context, document.prompted) == (len(prompt), True)
    assert not encoder.encode(Record("cat", "", "here")).prompted


def test_transformers_tokenizers_give_the_same(encoder: Encoder, tokenizer: Tokenizer) -> None:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
    record = Record("the cat sat", "two dogs", "here")
    assert encoder_of(wrapped).encode(record).tokens.tolist() == encoder.encode(record).tokens.tolist()


def test_a_tokenizer_file_that_truncates_or_pads_does_not(tokenizer: Tokenizer, encoder: Encoder) -> None:
    cut = Tokenizer.from_str(tokenizer.to_str())
    cut.enable_truncation(5)
    cut.enable_padding(length=8)
    record = Record(" ".join(WORDS), None, "here")
    assert encoder_of(cut).encode(record).tokens.tolist() == encoder.encode(record).tokens.tolist()


def test_eos_is_not_doubled_and_can_be_left_out(tokenizer: Tokenizer) -> None:
    assert encoder_of(tokenizer).encode(Record("cat<eos>", None, "")).tokens.tolist().count(EOS) == 1
    fragment = encoder_of(tokenizer, add_eos=False).encode(Record("cat", None, ""))
    assert EOS not in fragment.tokens
    assert not fragment.ends


def test_the_mask_token_in_a_text_is_an_error(encoder: Encoder) -> None:
    with pytest.raises(ArgumentError, match=r"^wiki line 7: its text contains the mask token \(id 3\).*remove it"):
        encoder.encode(Record("a <mask> b", None, "wiki line 7"))
    with pytest.raises(ArgumentError, match="mask token"):
        encoder.encode(Record("a", "<mask> b", "wiki line 7"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 200}, r"the tokenizer has ids up to 299, but the model's vocabulary is 0 to 199; use the"),
        ({"mask_token_id": 300}, r"mask_token_id is 300, but the vocabulary is 0 to 299"),
        ({"eos_token_id": -1}, r"eos_token_id is -1"),
        ({"mask_token_id": EOS}, r"eos_token_id and mask_token_id are both 2; they must differ"),
        ({"mask_token_id": BOS}, r"bos_token_id and mask_token_id are both 1"),
    ],
)
def test_vocabulary_mismatches(tokenizer: Tokenizer, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        encoder_of(tokenizer, **options)


def test_an_id_outside_the_vocabulary_is_an_error() -> None:
    class Odd:
        """A tokenizer whose length is not its highest id + 1."""

        def __len__(self) -> int:
            return 10

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [4, 77]}

    with pytest.raises(ArgumentError, match="here: token id 77, but the vocabulary is 0 to 49"):
        encoder_of(Odd(), vocab_size=50).encode(Record("x", None, "here"))


# --- packing ------------------------------------------------------------------------------------------------------

lengths = st.integers(1, 3 * LENGTH + 5) | st.sampled_from([BLOCK - 1, BLOCK, LENGTH - 1, LENGTH, LENGTH + 1, 160])


@st.composite
def a_document(draw: Callable[..., Any]) -> Document:
    tokens = np.array(range(10, 10 + draw(lengths)), dtype=np.int32)
    prompted = draw(st.booleans())
    context = draw(st.integers(1, len(tokens))) if prompted else draw(st.integers(0, 1))
    return Document(tokens, context, prompted, draw(st.booleans()))


def pack(documents: Sequence[Document], offset: Any, look_ahead: int = 32) -> tuple[list[list[Piece]], Batch]:
    unread = list(enumerate(documents))
    waiting: list[Piece] = []

    def refill() -> None:
        while unread and len(waiting) < look_ahead:
            number, document = unread.pop(0)
            piece = to_piece(document, BLOCK, offset, 5, number)
            waiting.append(replace(piece, tokens=piece.tokens + 1000 * number))

    rows = []
    while row := fill_row(waiting, refill, LENGTH, BLOCK):
        rows.append(row)
    return rows, collate(rows, range(len(rows)), LENGTH, BLOCK, eos=EOS, pad=PAD)


@settings(max_examples=120, deadline=None)
@given(documents=st.lists(a_document(), min_size=1, max_size=12), offset=st.sampled_from(["random", "fixed"]))
def test_packing(documents: list[Document], offset: Any) -> None:
    _, batch = pack(documents, offset)
    assert batch.tokens.shape[1] == LENGTH
    tokens, number = batch.tokens, batch.document
    # every token once, in order
    found: dict[int, list[int]] = {}
    for token in tokens[batch.text].tolist():
        found.setdefault(token // 1000, []).append(token % 1000)
    assert found == {n: document.tokens.tolist() for n, document in enumerate(documents)}
    # outside documents: padding, or repeated EOS of a document that ends
    assert (tokens[number < 0] == PAD).all()
    assert (tokens[(number >= 0) & ~batch.text] == EOS).all()
    assert not (batch.text & (number < 0)).any()
    assert not (batch.denoised & (number < 0)).any()
    # no block spans two documents; a block is denoised as a whole
    blocks = number.reshape(len(batch), -1, BLOCK)
    assert all(len(set(block.tolist()) - {-1}) <= 1 for block in blocks.flatten(0, 1))
    trained = batch.denoised.reshape(len(batch), -1, BLOCK)
    assert torch.equal(trained.all(-1), trained.any(-1))
    # denoised: every full block without context-only tokens
    for row, columns in enumerate(blocks):
        for block, inside in enumerate(columns):
            own = tokens[row].reshape(-1, BLOCK)[block][batch.text[row].reshape(-1, BLOCK)[block]].tolist()
            context = any(token % 1000 - 10 < documents[token // 1000].context for token in own)
            assert bool(trained[row, block].any()) == (bool((inside >= 0).all()) and not context)


@settings(max_examples=100, deadline=None)
@given(document=a_document(), offset=st.sampled_from(["random", "fixed"]))
def test_one_document(document: Document, offset: Any) -> None:
    """A document's lead, its end and, if it is longer than a row, its pieces."""
    rows, batch = pack([document], offset)
    first = rows[0][0]
    if document.prompted:
        assert (first.lead + document.context) % BLOCK == 0
    assert first.lead == 0 or document.prompted or offset == "random"
    assert [len(row) for row in rows] == [1] * len(rows)
    columns = first.lead + len(document.tokens)
    assert len(rows) == math.ceil(columns / LENGTH)
    filled = (batch.document >= 0).sum().item()
    eos = -columns % BLOCK if document.ends else 0
    assert filled == len(document.tokens) + eos
    assert [piece.ends for row in rows for piece in row] == [False] * (len(rows) - 1) + [document.ends]
    if document.ends and columns > first.lead + document.context:  # the last block is denoised with its repeated EOS
        assert batch.denoised[-1, (columns - 1) % LENGTH // BLOCK * BLOCK] or columns <= BLOCK or document.context


def test_leads_are_uniform() -> None:
    document = Document(np.zeros(9, dtype=np.int32), 1)
    leads = Counter(to_piece(document, 8, "random", 0, n).lead for n in range(8000))
    assert sorted(leads) == list(range(8))
    assert all(abs(count - 1000) < 130 for count in leads.values())  # four standard deviations
    assert to_piece(document, 8, "random", 0, 7) == to_piece(document, 8, "random", 0, 7)


def test_the_first_block_after_bos_is_context_without_bos_it_is_not() -> None:
    with_bos, without = (Document(np.arange(10, 18, dtype=np.int32), context) for context in (1, 0))
    assert pack([with_bos], "fixed")[1].denoised[0].tolist() == [False] * 4 + [True] * 4 + [False] * 8
    assert pack([without], "fixed")[1].denoised[0].tolist() == [True] * 8 + [False] * 8


def test_the_oldest_goes_first_then_the_longest_that_fits() -> None:
    sizes = [6, 9, 3, 8, 4, 5]
    waiting = [Piece(np.zeros(n, dtype=np.int32), 0, 0, True) for n in sizes]
    packed = []
    while row := fill_row(waiting, lambda: None, LENGTH, BLOCK):
        packed.append([len(piece.tokens) for piece in row])
    assert packed == [[6, 8], [9, 3], [4, 5]]


def test_batches_can_be_cut_and_moved() -> None:
    _, batch = pack([Document(np.arange(10, 25, dtype=np.int32)) for _ in range(5)], "fixed")
    assert len(batch) == 5
    part = batch.rows(slice(1, 3))
    assert part.index.tolist() == [1, 2]
    assert torch.equal(part.tokens, batch.tokens[1:3])
    assert batch.to("meta").tokens.shape == batch.tokens.shape


def test_prompts_are_marked() -> None:
    tokens = np.arange(10, 20, dtype=np.int32)
    documents = [Document(tokens, 6, True), Document(tokens, 1), Document(np.arange(10, 40, dtype=np.int32), 21, True)]
    batch = pack(documents, "fixed")[1]
    found: dict[int, list[int]] = {}
    for token in batch.tokens[batch.prompt].tolist():
        found.setdefault(token // 1000, []).append(token % 1000)
    assert found == {0: list(range(10, 16)), 2: list(range(10, 31))}  # the third document is cut inside its prompt
    assert not (batch.prompt & batch.denoised).any()


# --- sources ------------------------------------------------------------------------------------------------------


def every_text(source: Source) -> list[str]:
    return [r.text for i in range(len(source.records)) if (r := source.parse(source.records[i])) is not None]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.txt", "a.txt.gz", "a.parquet"])
def test_local_files(tmp_path: Path, name: str) -> None:
    wanted = texts(20)
    path = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"id": list(range(20)), "text": wanted}), path)
    elif ".txt" in name:
        write_jsonl(path, wanted)
    else:
        write_jsonl(path, as_records(wanted))
    assert every_text(Source(path, cache_dir=tmp_path / "cache")) == wanted


def test_a_file_that_was_rewritten_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    for count in (3, 5):
        write_jsonl(path, as_records(texts(count)))
        assert every_text(Source(path)) == texts(count)


def test_lines_with_other_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\n\n  \nthrée".encode())
    source = Source(tmp_path / "a.txt")
    assert every_text(source) == ["one", "two", "thrée"]
    assert not source.bad


def test_folders(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", as_records(["b"]))
    write_jsonl(tmp_path / "a.txt", ["a1", "a2"])
    write_jsonl(tmp_path / "a2.jsonl.gz", as_records(["a3"]))
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / ".hidden.txt").write_text("no data")
    assert every_text(Source(tmp_path)) == ["a1", "a2", "a3", "b"]
    with pytest.raises(ArgumentError, match="no test files"):
        Source(f"{tmp_path}:test")


def test_splits_of_a_folder(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        write_jsonl(tmp_path / f"{split}-0001.jsonl", as_records([split]))
    assert every_text(Source(f"{tmp_path}:validation")) == ["valid"]
    with pytest.raises(ArgumentError, match=r"several splits; name one: .*:train"):
        Source(tmp_path)


@pytest.mark.parametrize("held_out", ["test", "valid"])
def test_a_folder_of_a_corpus_and_test_data_is_not_trained_on_as_a_whole(tmp_path: Path, held_out: str) -> None:
    """Files without the name of a split are the training split beside files of other splits."""
    write_jsonl(tmp_path / "corpus.jsonl", as_records(["a"]))
    write_jsonl(tmp_path / "more.jsonl", as_records(["b"]))
    write_jsonl(tmp_path / f"{held_out}.jsonl", as_records(["c"]))
    names = rf"{tmp_path}:train \(corpus.jsonl and 1 more\)"
    with pytest.raises(ArgumentError, match="contains several splits; name one: ") as caught:
        Source(tmp_path)
    assert re.search(names, str(caught.value))
    assert f"{tmp_path}:{held_out} ({held_out}.jsonl)" in str(caught.value)
    assert every_text(Source(f"{tmp_path}:train")) == ["a", "b"]
    assert every_text(Source(f"{tmp_path}:{held_out}")) == ["c"]


def test_train_files_beside_files_of_no_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", as_records(["a"]))
    write_jsonl(tmp_path / "train.jsonl", as_records(["b"]))
    assert every_text(Source(tmp_path)) == ["a", "b"]


def test_datasets_objects_and_saved_ones(tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict({"body": ["a", "b"], "other": [1, 2]})
    assert every_text(Source(made, text_field="body")) == ["a", "b"]
    made.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=made).save_to_disk(str(tmp_path / "dict"))
    assert every_text(Source(tmp_path / "one", text_field="body")) == ["a", "b"]
    assert every_text(Source(f"{tmp_path / 'dict'}:train=2", text_field="body")) == ["a", "b"]
    with pytest.raises(ArgumentError, match="no split 'test'; it has train"):
        Source(f"{tmp_path / 'dict'}:test")
    with pytest.raises(ArgumentError, match="no field 'text'; it has body, other"):
        Source(made)


def test_a_hub_name_goes_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        return datasets.Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert Source("owner/set:train[:10%]@en=0.5", streaming=True).weight == 0.5
    assert asked[0][0] == ("owner/set",)
    options = {"name": "en", "split": "train[:10%]", "streaming": True, "cache_dir": None}
    assert asked[0][1] == options

    def failing(*args: Any, **options: Any) -> Any:
        raise ConnectionError("offline\nmany lines")

    monkeypatch.setattr(datasets, "load_dataset", failing)
    with pytest.raises(ArgumentError, match=r"owner/set: cannot be loaded \(offline\); give a local path"):
        Source("owner/set")


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("owner/set", ("owner/set", None, None, 1.0)),
        ("owner/set=3", ("owner/set", None, None, 3.0)),
        ("owner/set:train@en=1e-1", ("owner/set", "train", "en", 0.1)),
        ("set@en", ("set", None, "en", 1.0)),
        ("/no/file.jsonl=0.25", ("/no/file.jsonl", None, None, 0.25)),
        ("/no/lang=en/x.jsonl", ("/no/lang=en/x.jsonl", None, None, 1.0)),
    ],
)
def test_the_grammar(item: str, expected: tuple[Any, ...]) -> None:
    spec = parse_spec(item)
    assert (spec.where, spec.split, spec.config, spec.weight) == expected


def test_a_path_that_exists_is_taken_whole(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a@b=2.jsonl", as_records(["x"]))
    assert parse_spec(path).where == path
    assert (parse_spec(f"{path}=3").where, parse_spec(f"{path}=3").weight) == (path, 3.0)


BAD_LINES = [
    ('{"text": "cut', "broken JSON"),
    ("[1]", "a JSON list, not an object"),
    ('{"body": "x", "id": 1}', r"no field 'text' \(it has body, id\)"),
    ('{"text": null}', "field 'text' is null, not text"),
    ('{"text": 5}', "field 'text' is a int, not text"),
    ('{"text": "  "}', "field 'text' is empty"),
    ('{"text": "\\ud800"}', "half a surrogate pair"),
    ('{"text": "x", "prompt": ["y"]}', "field 'prompt' is a list, not text"),
]


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_records_are_counted_named_and_skipped(tmp_path: Path, streaming: bool, encoder: Encoder) -> None:
    good = texts(8)
    lines = [x for g, (bad, _) in zip(as_records(good), BAD_LINES, strict=True) for x in (g, bad)]
    path = tmp_path / "a.jsonl"
    write_jsonl(path, lines)
    path.write_bytes(path.read_bytes() + b'{"text": "\xff"}\n\n')
    rows = RowLoader(
        [Source(path, streaming=streaming)], encoder, batch_size=1, row_length=64, block_size=BLOCK, max_epochs=2
    )
    batches = until_the_end(rows)
    assert len(documents_of(batches)) == 16
    found = rows.statistics()
    assert found.bad == {str(path): 9}  # each once, for any number of epochs
    for place_and_reason in found.first_bad:
        assert place_and_reason.startswith(f"{path} line ")
    reasons = rows.sources[0].bad
    for i, (_, reason) in enumerate(BAD_LINES):
        assert re.search(reason, reasons[f"{path} line {2 * i + 2}"])
    assert "not UTF-8" in reasons[f"{path} line 17"]


def test_one_bad_record_too_many(tmp_path: Path, encoder: Encoder) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, "{", "{", {"text": "b"}, "{", *as_records(texts(30))])
    rows = RowLoader([Source(path, max_bad_records=3)], encoder, batch_size=1, row_length=64, block_size=BLOCK)
    batches_of(rows, 20)
    with pytest.raises(
        TwoTowerError, match=r"3 bad records, 2 are allowed; the last is .* line \d: broken JSON .*correct the data"
    ):
        batches_of(
            RowLoader([Source(path, max_bad_records=2)], encoder, batch_size=1, row_length=64, block_size=BLOCK), 40
        )


def test_held_out_records_are_chosen_by_their_text_alone(tmp_path: Path) -> None:
    wanted = texts(2000)
    path = write_jsonl(tmp_path / "a.jsonl", as_records(wanted))
    other = write_jsonl(tmp_path / "b.jsonl", as_records(wanted[::-1][:1500]))
    held, train = (set(every_text(Source(path, held_out_fraction=0.1, part=p))) for p in ("valid", "train"))
    assert held | train == set(wanted)
    assert not held & train
    assert 150 < len(held) < 250
    assert set(every_text(Source(other, held_out_fraction=0.1, part="valid"))) == held & set(wanted[500:])
    assert set(every_text(Source(path, held_out_fraction=0.2, part="valid"))) > held
    assert every_text(Source(path)) == wanted
    assert every_text(Source(path, part="valid")) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: Source(d / "none.jsonl"), r"none\.jsonl: no such file or folder; give a path"),
        (lambda d: Source("a b c"), "a b c: no such file or folder"),
        (
            lambda d: Source(write_jsonl(d / "e.jsonl", [])),
            r"e\.jsonl: contains no records; give a file that is not empty",
        ),
        (
            lambda d: Source(write_jsonl(d / "a.csv", ["x"])),
            r"a\.csv: unknown file type; give \.jsonl",
        ),
        (lambda d: Source(write_jsonl(d / "a.json", ["[", "{}]"])), "is one JSON array; give a .jsonl file with"),
        (lambda d: Source(d), "contains no data files; give a folder with"),
        (lambda d: Source(write_jsonl(d / "a.jsonl", ["x"]) + ":train"), "a file has no splits; leave out :train"),
        (lambda d: Source(write_jsonl(d / "a.jsonl", ["x"]) + "@en"), "no configurations; leave out @en"),
        (lambda d: Source("x=0"), "data 'x=0': the weight is 0; give a number above 0"),
        (lambda d: Source("x=1.2.3"), "the weight is 1.2.3; give a number above 0"),
        (lambda d: Source(""), "no path or hub id"),
        (lambda d: Source("x", held_out_fraction=1.0), r"held_out_fraction is 1\.0; give a number from 0 up to 1"),
        (lambda d: Source("x", part="dev"), "part is 'dev'; give 'train' or 'valid'"),  # type: ignore[arg-type]
        (lambda d: Source(broken_gzip(d)), r"a\.txt\.gz: cannot be read .*check that the file is complete"),
        (lambda d: Source(broken_parquet(d), cache_dir=d / "c"), r"a\.parquet: cannot be loaded"),
        (lambda d: Source(datasets.DatasetDict()), "give one of its splits"),
        (lambda d: Source(datasets.Dataset.from_dict({"text": []})), "contains no records"),
    ],
)
def test_bad_sources(tmp_path: Path, make: Callable[[Path], Source], message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        make(tmp_path)
    assert "\n" not in str(caught.value)


def broken_gzip(folder: Path) -> Path:
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"hello\n" * 1000)[:40])
    return folder / "a.txt.gz"


def broken_parquet(folder: Path) -> Path:
    (folder / "a.parquet").write_bytes(b"PAR1 not really")
    return folder / "a.parquet"


def test_datasets_is_needed_for_more_than_lines_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    path = write_jsonl(tmp_path / "a.jsonl", as_records(["a"]))
    assert every_text(Source(path)) == ["a"]
    assert Source(path, streaming=True)
    with pytest.raises(TwoTowerError, match=r"needs the package `datasets`: pip install 'twotower\[train\]'"):
        Source("owner/set")


# --- rows ---------------------------------------------------------------------------------------------------------


Kind = str


def mixed(folder: Path, kind: Kind, **options: Any) -> list[Source]:
    """One source for each way of reading, with bad records among good ones."""
    if not folder.exists():
        folder.mkdir()
        lines: list[Any] = as_records(texts(300, 1, "j"))
        for i in range(5, 300, 37):
            lines[i] = "{broken"
        lines[20] = {"prompt": "the cat sat on", "text": " a mat and saw"}
        lines[30] = {"text": "long " * 60}
        write_jsonl(folder / "lines.jsonl", lines)
        pq.write_table(pa.table({"text": texts(70, 2, "p")}), folder / "t.parquet", row_group_size=16)
    cache = {"cache_dir": folder / "cache"}
    lines_of = Source(folder / "lines.jsonl", streaming=kind == "stream", weight=3.0, **options)
    table = Source(folder / "t.parquet", streaming=kind != "files", **cache, **options)
    return [lines_of, table]


def rows_of(sources: list[Source], encoder: Encoder, **options: Any) -> RowLoader:
    return RowLoader(sources, encoder, **{"batch_size": 4, "row_length": 48, "block_size": BLOCK, "seed": 1, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpus") / "data"


@pytest.mark.parametrize("kind", ["files", "mixed", "stream"])
def test_batches_do_not_depend_on_the_number_of_ranks(folder: Path, encoder: Encoder, kind: Kind) -> None:
    alone = batches_of(rows_of(mixed(folder, kind), encoder), 40)
    assert [b.index.tolist() for b in alone[:2]] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for world in (2, 4):
        ranks = [batches_of(rows_of(mixed(folder, kind), encoder, rank=rank, world=world), 40) for rank in range(world)]
        for step, batch in enumerate(alone):
            for rank in range(world):
                assert same(ranks[rank][step], batch.rows(slice(rank, None, world)))


@pytest.mark.parametrize("kind", ["files", "mixed", "stream"])
@pytest.mark.parametrize("after", [1, 60])
def test_resuming_changes_nothing(folder: Path, encoder: Encoder, kind: Kind, after: int) -> None:
    whole = rows_of(mixed(folder, kind, held_out_fraction=0.1), encoder)
    batches_of(whole, after)
    kept = io.BytesIO()
    torch.save(whole.state_dict(), kept)
    wanted = batches_of(whole, 40)
    kept.seek(0)
    again = rows_of(mixed(folder, kind, held_out_fraction=0.1), encoder)
    again.load_state_dict(torch.load(kept, weights_only=True))
    assert all(same(a, b) for a, b in zip(batches_of(again, 40), wanted, strict=True))
    assert again.statistics() == whole.statistics()
    used = rows_of(mixed(folder, kind, held_out_fraction=0.1), encoder)  # a state can replace another state
    batches_of(used, 11)
    kept.seek(0)
    used.load_state_dict(torch.load(kept, weights_only=True))
    assert all(same(a, b) for a, b in zip(batches_of(used, 40), wanted, strict=True))


@pytest.mark.parametrize("kind", ["files", "stream"])
def test_resuming_with_another_number_of_ranks(folder: Path, encoder: Encoder, kind: Kind) -> None:
    ranks = [rows_of(mixed(folder, kind), encoder, rank=rank, world=2) for rank in range(2)]
    for rank in ranks:
        batches_of(rank, 40)
    alone = rows_of(mixed(folder, kind), encoder)
    with pytest.raises(ArgumentError, match=r"no row 1: .*combine all ranks' states with merge_states"):
        alone.load_state_dict(ranks[0].state_dict())
    merged = merge_states([rank.state_dict() for rank in ranks])
    alone.load_state_dict(merged)
    four = [rows_of(mixed(folder, kind), encoder, rank=rank, world=4) for rank in range(4)]
    for rank in four:
        rank.load_state_dict(merged)
    assert sum(rank.statistics().tokens for rank in four) == sum(rank.statistics().tokens for rank in ranks)
    for _ in range(20):
        wanted = [rank.next() for rank in ranks]
        batch = alone.next()
        assert same(batch.rows(slice(0, None, 2)), wanted[0])
        assert same(batch.rows(slice(1, None, 2)), wanted[1])
        assert all(same(rank.next(), batch.rows(slice(i, i + 1))) for i, rank in enumerate(four))


@pytest.mark.parametrize(("before", "size"), [(8, 4), (4, 8)])
def test_block_sizes_change_between_stages(tmp_path: Path, encoder: Encoder, before: int, size: int) -> None:
    """Like a trainer: `set_block_size` before each batch, a state between any two batches."""
    records = [{"text": text, "prompt": "the cat"} if i % 3 else {"text": text} for i, text in enumerate(texts(90))]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    whole, states, batches = rows_of([Source(path)], encoder, block_size=before), [], []
    for step in range(20):
        states.append(whole.state_dict())
        whole.set_block_size(before if step < 10 else size)
        batches.append(whole.next())
    for batch in batches[10:]:
        blocks = batch.document.reshape(4, -1, size)
        assert all(len(set(block.tolist()) - {-1}) <= 1 for block in blocks.flatten(0, 1))
        ends = batch.prompt & ~torch.nn.functional.pad(batch.prompt, (0, 1))[:, 1:]
        assert ((ends.nonzero()[:, 1] + 1) % size == 0).all()
        assert ends.any()
    for after in (3, 10, 14):
        for block_size in (before, size):
            again = rows_of([Source(path)], encoder, block_size=block_size)
            again.load_state_dict(states[after])
            for step in range(after, 20):
                again.set_block_size(before if step < 10 else size)
                assert same(again.next(), batches[step])
    with pytest.raises(ArgumentError, match="row_length is 48; give a multiple of the block size, 5"):
        whole.set_block_size(5)


def test_seeds_and_offsets(folder: Path, encoder: Encoder) -> None:
    first, again, other, fixed = (
        batches_of(rows_of(mixed(folder, "files"), encoder, **options), 5)
        for options in ({}, {}, {"seed": 2}, {"offset": "fixed"})
    )
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a.tokens, b.tokens) for a, b in zip(first, other, strict=True))
    assert (first[0].document[:, 0] < 0).any()
    assert (fixed[0].document[:, 0] == 0).all()


@pytest.mark.parametrize("streaming", [False, True])
def test_each_epoch_has_every_document_once(
    tmp_path: Path, encoder: Encoder, tokenizer: Tokenizer, streaming: bool
) -> None:
    wanted = texts(101)
    path = write_jsonl(tmp_path / "a.jsonl", as_records(wanted))

    def read(epochs: int, world: int = 1) -> list[Batch]:
        options = {"max_epochs": epochs, "row_length": 128, "world": world}
        ranks = [rows_of([Source(path, streaming=streaming)], encoder, rank=r, **options) for r in range(world)]
        return [batch for rank in ranks for batch in until_the_end(rank)]

    once, twice = (decoded(tokenizer, read(epochs)) for epochs in (1, 2))
    assert sorted(once) == sorted(wanted)
    assert sorted(twice) == sorted(wanted * 2)
    assert sorted(decoded(tokenizer, read(2, world=4))) == sorted(twice)
    assert streaming or once != wanted  # shuffled


def test_after_the_end_come_rows_of_padding(tmp_path: Path, encoder: Encoder) -> None:
    rows = rows_of([Source(write_jsonl(tmp_path / "a.jsonl", as_records(texts(9))))], encoder, max_epochs=1)
    batches = until_the_end(rows)
    assert not rows_of(rows.sources, encoder).exhausted()
    after = rows.next()
    assert (after.tokens == PAD).all()
    assert not after.text.any()
    assert after.index.tolist() == [4 * len(batches) + i for i in range(4)]
    again = rows_of(rows.sources, encoder, max_epochs=1)
    again.load_state_dict(rows.state_dict())
    assert again.exhausted()


@pytest.mark.parametrize("max_epochs", [None, 1])
def test_weights_are_shares_of_documents(
    tmp_path: Path, encoder: Encoder, tokenizer: Tokenizer, max_epochs: int | None
) -> None:
    names = {"a": 1.0, "b": 3.0}
    sources = [
        Source(f"{write_jsonl(tmp_path / f'{name}.jsonl', as_records(texts(800, 3, name)))}={weight}")
        for name, weight in names.items()
    ]
    rows = rows_of(sources, encoder, max_epochs=max_epochs, row_length=128)
    found = Counter(text[0] for text in decoded(tokenizer, batches_of(rows, 15)))
    assert abs(found["b"] / found.total() - 0.75) < 4 * math.sqrt(0.19 / found.total())
    if max_epochs:  # when one source is exhausted, the other's documents follow
        rest = Counter(text[0] for text in decoded(tokenizer, until_the_end(rows)))
        assert found + rest == {"a": 800, "b": 800}


def test_documents_of_any_length(tmp_path: Path, encoder: Encoder) -> None:
    """Documents longer than many rows, and very short ones."""
    path = write_jsonl(tmp_path / "a.jsonl", as_records([" ".join(WORDS * 40), "a", "b", " ".join(WORDS)]))
    rows = rows_of([Source(path)], encoder, batch_size=2, row_length=LENGTH, max_epochs=1)
    total = sum(int(batch.text.sum()) for batch in until_the_end(rows))
    assert total == rows.statistics().tokens
    assert rows.statistics().documents == 4


def test_statistics(folder: Path, encoder: Encoder) -> None:
    rows = rows_of(mixed(folder, "files"), encoder)
    batches = batches_of(rows, 50)
    found = rows.statistics()
    assert found.efficiency == sum(int(b.text.sum()) for b in batches) / (50 * 4 * 48)
    assert 0.5 < found.efficiency < 1
    assert found.documents > 100
    assert sum(found.bad.values()) > 0


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (["a b"] * 3, {}, r"a\.txt: 3 documents for the 4 rows of a batch \(at least one a rank\); give more data or"),
        ([" "], {}, r"a\.txt: contains no usable document; give data that is not empty"),
        (["a b"] * 9, {"held_out_fraction": 0.999999}, "contains no usable document"),
        (["a"] * 4, {"block_size": 48}, "12 tokens in all, less than a block of 48; give more data or smaller blocks"),
        (
            ["a"] * 9,
            {"batch_size": 5, "world": 2},
            "a batch of 5 rows cannot be shared by 2 ranks; give a multiple of 2",
        ),
        (["a"] * 9, {"row_length": 50}, "row_length is 50; give a multiple of the block size, 4"),
        (["a"] * 9, {"block_size": 0}, "block_size is 0"),
        (["a"] * 9, {"rank": 2, "world": 2}, "rank is 2 of 2 ranks; give 0 to 1"),
        (["a"] * 9, {"max_epochs": 0}, "max_epochs is 0"),
        (["a"] * 9, {"offset": "none"}, "offset is 'none'; give 'random' or 'fixed'"),
        (["a <mask>"] * 9, {}, r"a\.txt line 1: its text contains the mask token"),
    ],
)
def test_bad_runs(tmp_path: Path, encoder: Encoder, lines: list[str], options: dict[str, Any], message: str) -> None:
    held = options.pop("held_out_fraction", 0.0) if "held_out_fraction" in options else 0.0
    source = Source(write_jsonl(tmp_path / "a.txt", lines), held_out_fraction=held)
    with pytest.raises(ArgumentError, match=message) as caught:
        rows_of([source], encoder, **options)
    assert "\n" not in str(caught.value)


def test_no_sources(encoder: Encoder) -> None:
    with pytest.raises(ArgumentError, match="no data; give at least one source"):
        rows_of([], encoder)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (as_records(["a", "b"]), "2 documents for the 4 rows of a batch"),
        ([], "contains no usable document"),
        (["{"] * 8, "no usable document in two epochs .*bad records"),
    ],
)
def test_streams_with_too_little(tmp_path: Path, encoder: Encoder, lines: list[Any], message: str) -> None:
    source = Source(write_jsonl(tmp_path / "a.jsonl", lines), streaming=True)
    with pytest.raises(TwoTowerError, match=message):
        rows_of([source], encoder).next()


def test_a_state_of_another_run_is_refused(tmp_path: Path, encoder: Encoder) -> None:
    def source(count: int) -> list[Source]:
        return [Source(write_jsonl(tmp_path / "a.jsonl", as_records(texts(count))))]

    state = rows_of(source(20), encoder).state_dict()
    with pytest.raises(ArgumentError, match="seed is 9, but the run to be resumed had 1; give that value, or start"):
        rows_of(source(20), encoder, seed=9).load_state_dict(state)
    with pytest.raises(ArgumentError, match="has 21 records, but the run to be resumed had 20"):
        rows_of(source(21), encoder).load_state_dict(state)
    later = rows_of(source(20), encoder)
    later.next()
    with pytest.raises(ArgumentError, match=r"states of steps \[0, 1\] cannot be merged"):
        merge_states([state, later.state_dict()])


def test_a_failing_stream_is_one_line(encoder: Encoder) -> None:
    def failing() -> Any:
        yield {"text": "a"}
        raise ConnectionError("the line\nbroke")

    source = Source(datasets.IterableDataset.from_generator(failing), name="far")
    with pytest.raises(TwoTowerError, match=r"^far: reading failed \(.*\)$"):
        rows_of([source], encoder).next()


def test_a_line_stream_that_breaks_off_is_one_line(tmp_path: Path, encoder: Encoder) -> None:
    rows = rows_of([Source(broken_gzip(tmp_path), streaming=True)], encoder)
    with pytest.raises(TwoTowerError, match=r"a\.txt\.gz: reading failed \(.*\); check that the file is complete"):
        batches_of(rows, 300)


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_a_stream_of_several_files_resumes_in_any(tmp_path: Path, encoder: Encoder, suffix: str) -> None:
    for name in "abc":
        write_jsonl(tmp_path / (name + suffix), texts(200, 4, name))
    whole = rows_of([Source(tmp_path, streaming=True)], encoder)
    marks = set()
    for _ in range(12):
        state = whole.state_dict()
        marks.add(state["readers"][0]["stream"])
        again = rows_of([Source(tmp_path, streaming=True)], encoder)
        again.load_state_dict(state)
        assert same(again.next(), whole.next())
        batches_of(whole, 6)
    assert len(marks) > 3


def test_two_readers_of_one_stream_do_not_disturb_each_other(encoder: Encoder) -> None:
    made = datasets.Dataset.from_dict({"text": texts(600)}).to_iterable_dataset(num_shards=3)
    alone = batches_of(rows_of([Source(made)], encoder), 40)
    train = rows_of([Source(made)], encoder)
    other = Source(made)
    for step in range(40):
        assert same(train.next(), alone[step])
        if step % 10 == 3:
            list(held_out_batches([other], encoder, batch_size=2, row_length=64, block_size=BLOCK, documents=9))
            train.state_dict()


# --- held-out documents -------------------------------------------------------------------------------------------


def held_out(sources: list[Source], encoder: Encoder, **options: Any) -> list[Batch]:
    return list(
        held_out_batches(sources, encoder, **{"batch_size": 4, "row_length": 64, "block_size": BLOCK, **options})
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_held_out_documents_come_once(tmp_path: Path, encoder: Encoder, tokenizer: Tokenizer, streaming: bool) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", as_records(texts(400)))
    valid = Source(path, part="valid", held_out_fraction=0.2, streaming=streaming)
    wanted = every_text(Source(path, part="valid", held_out_fraction=0.2))
    batches = held_out([valid], encoder)
    assert sorted(decoded(tokenizer, batches)) == sorted(wanted)
    assert torch.cat([b.index for b in batches]).tolist() == list(range(4 * len(batches)))
    assert all(len(b) == 4 for b in batches)
    first = torch.cat([b.document for b in batches])
    starts = (first >= 0) & (first != torch.nn.functional.pad(first, (1, 0), value=-1)[:, :-1])
    assert (starts.nonzero()[:, 1] % BLOCK == 0).all()
    assert all(same(a, b) for a, b in zip(held_out([valid], encoder), batches, strict=True))
    few = decoded(tokenizer, held_out([valid], encoder, documents=7))
    assert sorted(few) == sorted(wanted[:7])


def test_held_out_batches_are_shared_by_ranks(tmp_path: Path, encoder: Encoder, tokenizer: Tokenizer) -> None:
    sources = [
        Source(write_jsonl(tmp_path / f"{name}.jsonl", as_records(texts(count, 1, name))))
        for name, count in (("a", 30), ("b", 5))
    ]
    alone = held_out(sources, encoder)
    assert Counter(t[0] for t in decoded(tokenizer, held_out(sources, encoder, documents=12))) == {"a": 7, "b": 5}
    ranks = [held_out(sources, encoder, rank=rank, world=2) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == len(alone)
    for step, batch in enumerate(alone):
        assert all(same(ranks[r][step], batch.rows(slice(r, None, 2))) for r in range(2))


def test_no_held_out_documents(tmp_path: Path, encoder: Encoder) -> None:
    source = Source(write_jsonl(tmp_path / "a.jsonl", as_records(texts(5))), part="valid")
    with pytest.raises(ArgumentError, match=r"a\.jsonl: no held-out documents; give .* \(--held-out 0\)$"):
        held_out([source], encoder)


# --- keyed random numbers --------------------------------------------------------------------------------------


def test_permutations_are_of_their_key_for_ever() -> None:
    assert permutation(8, "order", 1, 2, 3).tolist() == [4, 5, 0, 7, 2, 6, 3, 1]
    assert sorted(permutation(1000, 1)) == list(range(1000))
    assert permutation(1000, 1).tolist() != permutation(1000, 2).tolist()


def test_local_data_needs_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: Encoder) -> None:
    for name in ("HF_DATASETS_CACHE", "HF_CACHE_HOME"):
        monkeypatch.setattr(datasets.config, name, Path("/proc/none"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    pq.write_table(pa.table({"text": texts(20)}), tmp_path / "t.parquet")
    write_jsonl(tmp_path / "l.jsonl", as_records(texts(20)))
    for name, streaming in (("t.parquet", False), ("t.parquet", True), ("l.jsonl", True), ("l.jsonl", False)):
        batches_of(rows_of([Source(tmp_path / name, streaming=streaming)], encoder), 2)


def test_every_epoch_has_its_own_order(tmp_path: Path) -> None:
    source = Source(write_jsonl(tmp_path / "a.jsonl", as_records(texts(50))))
    reader = open_reader(source, 1, [0], None, 7)
    first, second = ([getattr(reader.next(0), "text", None) for _ in range(50)] for _ in range(2))
    assert first != second
    assert sorted(first) == sorted(second) == sorted(texts(50))
