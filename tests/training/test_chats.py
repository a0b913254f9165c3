"""Conversations as training data: the assistant's tokens, blocks that begin with turns, and what a row keeps."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_chat
import torch
from packed import MASK, case
from test_objective import EXACT, gradients
from tiny_backbones import slow_but, two_tower
from tiny_chat import CHATML, FORGETFUL, MARKED, chats
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from twotower import TwoTowerForCausalLM
from twotower.errors import ArgumentError
from twotower.model.packed_forward import context_pass
from twotower.model.packed_layout import Layout
from twotower.training.columns import wanted_columns
from twotower.training.data import Batch, Document, Encoder, Piece, RowLoader, Source, collate, fill_row, to_piece
from twotower.training.data.documents import BadRecord, Record
from twotower.training.noise import Corruption, corrupt
from twotower.training.objective import AutoregressiveObjective, DenoisingObjective, DenoisingOptions

FAMILIES = ("nemotron_h", "mistral", "falcon_h1", "qwen3_next")
EOS_PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def encoder(tokenizer: PreTrainedTokenizerFast, **options: Any) -> Encoder:
    return Encoder(
        tokenizer,
        vocab_size=tiny_chat.VOCABULARY,
        eos_token_id=tokenizer.eos_token_id,
        mask_token_id=tokenizer.mask_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **options,
    )


def record(messages: list[dict[str, Any]], ends: bool = True) -> Record:
    return Record("", None, "data line 1", tuple(messages), ends)


def answers(messages: list[dict[str, str]]) -> list[str]:
    return [message["content"] + "<|im_end|>" for message in messages if message["role"] == "assistant"]


# --- tokens of the assistant ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_tokens_and_turns_are_those_of_transformers(template: str) -> None:
    """The tokens of `apply_chat_template`, up to the end of the last answer; turns from the generation prompt on."""
    tokenizer = tiny_chat.tokenizer(template)
    for chat in chats(7):
        messages = chat["messages"]
        document = encoder(tokenizer, align_turns=False).encode(record(messages))
        whole = tokenizer.apply_chat_template(messages)["input_ids"]
        assert document.tokens.tolist() == whole[: len(document.tokens)]
        assert tokenizer.decode(whole[len(document.tokens) :]) == "\n"
        places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        begins = [
            len(tokenizer.apply_chat_template(messages[:place], add_generation_prompt=True)["input_ids"])
            for place in places
        ]
        assert [begin for begin, _ in document.turns] == begins
        assert [tokenizer.decode(document.tokens[slice(*turn)].tolist()) for turn in document.turns] == answers(
            messages
        )
        assert (document.context, document.prompted, document.ends) == (begins[0], True, True)


def test_a_template_that_leaves_out_earlier_thoughts() -> None:
    """Without marks, a conversation of several answers is an error that names the record; one answer is not."""
    tokenizer, messages = tiny_chat.tokenizer(FORGETFUL), chats(3)[2]["messages"]
    messages[1]["content"] = "I think. Ada"
    with pytest.raises(ArgumentError, match="data line 1: the chat template renders messages 1 to 2 differently"):
        encoder(tokenizer).encode(record(messages))
    assert len(encoder(tokenizer).encode(record(messages[:2])).turns) == 1


def test_a_template_without_eos_gets_one_at_the_end() -> None:
    tokenizer, messages = tiny_chat.tokenizer(EOS_PLAIN), chats(3)[2]["messages"]
    document = encoder(tokenizer, align_turns=False).encode(record(messages))
    texts = [tokenizer.decode(document.tokens[slice(*turn)].tolist()) for turn in document.turns]
    spoken = [message["content"] for message in messages if message["role"] == "assistant"]
    assert texts == [*(f" {text}\n" for text in spoken[:-1]), f" {spoken[-1]}\n<|im_end|>"]


def test_an_answer_that_was_cut_off_has_no_end() -> None:
    tokenizer, messages = tiny_chat.tokenizer(), chats(2)[1]["messages"]
    whole, cut = (encoder(tokenizer).encode(record(messages, ends)) for ends in (True, False))
    assert cut.tokens.tolist() == whole.tokens[:-1].tolist()
    assert (whole.ends, cut.ends) == (True, False)
    assert cut.turns[-1][1] == len(cut.tokens)


def test_the_text_is_cut_where_a_token_would_span_the_edge_of_a_turn() -> None:
    """In generation a prompt is tokenised by itself."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = tiny_chat.tokenizer(template)
    merged = next(word for word in tokenizer.get_vocab() if re.fullmatch("[a-z]{3}", word))
    messages = [{"role": "user", "content": merged[:1]}, {"role": "assistant", "content": merged[1:]}]
    assert len(tokenizer(merged, add_special_tokens=False)["input_ids"]) == 1
    document = encoder(tokenizer, align_turns=False).encode(record(messages))
    assert document.turns[0][0] == 1
    assert tokenizer.decode(document.tokens[:1].tolist()) == merged[:1]
    assert tokenizer.decode(document.tokens[1:-1].tolist()) == merged[1:]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"role": "user", "content": "x"}], "messages have no assistant turn"),
        ([{"role": "assistant", "content": "x"}], "begin with an assistant turn"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "\ud800"}], "half a surrogate pair"),
    ],
)
def test_conversations_that_cannot_be_used(messages: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(BadRecord, match=said):
        encoder(tiny_chat.tokenizer()).encode(record(messages))


def test_a_template_that_rejects_the_messages() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BadRecord, match="the chat template rejects the messages: roles must alternate"):
        encoder(tiny_chat.tokenizer(template)).encode(record(chats(1)[0]["messages"]))


def test_there_must_be_a_template() -> None:
    with pytest.raises(ArgumentError, match="the tokenizer has no chat template"):
        encoder(tiny_chat.tokenizer(None)).encode(record(chats(1)[0]["messages"]))


# --- rows ----------------------------------------------------------------------------------------------------------


def chat_document(*turns: int, ends: bool = True, seed: int = 0) -> Document:
    """Random words: contexts and turns of these lengths in turn."""
    edges = np.cumsum(turns).tolist()
    tokens = np.random.default_rng([seed, *turns]).integers(4, 60, edges[-1]).astype(np.int32)
    spans = tuple(zip(edges[::2], edges[1::2], strict=True))
    return Document(tokens, edges[0], True, ends, spans)


def text_document(length: int, context: int) -> Document:
    tokens = np.random.default_rng(length).integers(4, 60, length).astype(np.int32)
    return Document(tokens, context, True)


def chat_batch(size: int) -> Batch:
    """Two rows: conversations of one to three answers, and a text; shorter and longer than blocks and windows."""
    rows = [
        [chat_document(3, 5, 2, 1, 6, 9), text_document(9, 3)],
        [chat_document(1, 2, 1, 2, 1, 2), chat_document(7, 6, ends=False), chat_document(2, 4, 5, 3)],
    ]
    pieces = [[to_piece(document, size, "random", 0) for document in row] for row in rows]
    length = max(sum(piece.columns(size) for piece in row) for row in pieces)
    return collate(pieces, [0, 1], length, size, eos=2, pad=0)


@pytest.mark.parametrize("size", [1, 2, 4, 7, 16])
def test_blocks_begin_where_turns_begin(size: int) -> None:
    """Every token is there once, in order; EOS fills the last block of each turn; nothing else is denoised."""
    document = chat_document(3, 5, 2, 1, 6, 9)
    piece = to_piece(document, size, "random", 0)
    batch = collate([[piece]], [0], piece.columns(size), size, eos=2, pad=0)
    assert batch.filler is not None
    assert batch.target is not None
    assert batch.tokens[batch.text].tolist() == document.tokens.tolist()
    place = torch.full_like(batch.tokens, -1)
    place[batch.text] = torch.arange(len(document.tokens))
    starts = [int((place[0] == begin).nonzero()[0, 0]) for begin, _ in document.turns]
    assert all(start % size == 0 for start in starts)
    for start, (begin, end) in zip(starts, document.turns, strict=True):
        stop = start + -(-(end - begin) // size) * size
        assert batch.denoised[0, start:stop].all()
        assert batch.target[0, start:stop].all()
        assert (batch.tokens[0, start + end - begin : stop] == 2).all()
        last = end == len(document.tokens)
        assert batch.filler[0, start + end - begin : stop].tolist() == [not last] * (stop - start - end + begin)
    assert batch.denoised.sum() == batch.target.sum() == sum(-(-(e - b) // size) * size for b, e in document.turns)
    assert not (batch.prompt & batch.target).any()
    assert int(batch.prompt.sum()) == document.turns[0][0]


def test_whole_turns_are_kept() -> None:
    """A conversation longer than a row loses its last turns; a first turn that does not fit is cut."""
    piece = to_piece(chat_document(3, 5, 2, 4, 6, 9), 4, "random", 0)  # blocks: 4 + 8, 4 + 4, 8 + 12
    assert piece.columns(4) == 40
    for columns, turns, length in ((40, 3, 29), (36, 2, 14), (20, 2, 14), (16, 1, 8), (12, 1, 8)):
        kept = piece.whole_turns(columns, 4)
        assert kept is not None
        assert (len(kept.turns), len(kept.tokens), kept.ends) == (turns, length, True)
    cut = piece.whole_turns(8, 4)
    assert cut is not None
    assert (cut.turns, len(cut.tokens), cut.ends) == (((3, 7),), 7, False)
    assert piece.whole_turns(4, 4) is None
    waiting = [piece, to_piece(text_document(5, 2), 4, "random", 0)]
    assert [len(part.tokens) for part in fill_row(waiting, lambda: None, 20, 4)] == [14]
    assert [len(part.tokens) for part in fill_row(waiting, lambda: None, 20, 4)] == [5]


# --- one pass over the row equals generation turn by turn -----------------------------------------------------------


def before_block(batch: Batch, row: int, column: int) -> Tensor:
    """The tokens of the document of a column that are before it, without filler."""
    assert batch.filler is not None
    owner = batch.document[row]
    seen = (owner == owner[column]) & (torch.arange(len(owner)) < column) & ~batch.filler[row]
    return batch.tokens[row][seen]


def naive(model: TwoTowerForCausalLM, batch: Batch, noise: Corruption, size: int) -> Tensor:
    """−ln p of masked tokens, block by block, with the verbs of generation."""
    out = []
    for row in range(len(batch)):
        for lo in range(0, batch.tokens.shape[1], size):
            masked = noise.masked[row, lo : lo + size]
            if not masked.any():
                continue
            context, state = before_block(batch, row, lo), model.new_state(1, 128)
            if len(context):
                model.extend(context[None], state)
            block = batch.tokens[row, lo : lo + size].masked_fill(masked, MASK)
            logits = model.denoise(block[None], noise.t[row, lo // size, None], state.view())[0]
            out.append(-logits.log_softmax(-1)[torch.arange(size), batch.tokens[row, lo : lo + size]][masked])
    return torch.cat(out)


@pytest.mark.parametrize("size", [2, 4, pytest.param(7, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", slow_but(("nemotron_h", "mistral"), ("nemotron_h", "mistral", "falcon_h1", "qwen3_next"))
)
def test_one_pass_equals_generation_turn_by_turn(name: str, size: int) -> None:
    """Losses and gradients, through K/V, windows of attention and convolution, Mamba and DeltaNet states."""
    options = {"sliding_window": 8} if name == "mistral" else {}
    model, batch = two_tower(name, torch.float64, seed=8, **options), chat_batch(size)
    assert model.denoiser is not None
    assert model.time is not None
    noise = corrupt(batch, size, 4, "block")
    settings = DenoisingOptions(mask_token_id=MASK, train_context=True)
    objective = DenoisingObjective(model.context, model.denoiser, model.time, settings)
    loss = objective(batch, noise, size)
    expected = naive(model, batch, noise, size).sum()
    torch.testing.assert_close(loss, expected, rtol=EXACT, atol=EXACT)
    own, wanted = gradients(loss, model), gradients(expected, model)
    for key, gradient in wanted.items():
        torch.testing.assert_close(own[key], gradient, rtol=1e-7, atol=1e-8, msg=key)


@pytest.mark.parametrize("name", ["nemotron_h", "llama"])
def test_the_next_turn_does_not_read_what_fills_a_block(name: str) -> None:
    """The context tower computes each turn as it does without blocks; other rows with other fillers give the same."""
    model, batch = two_tower(name, torch.float64, seed=8), chat_batch(4)
    assert batch.filler is not None
    found = context_pass(model.context, batch.tokens, Layout(batch.document, 4, filler=batch.filler))
    other = batch.tokens.masked_fill(batch.filler, 7)
    again = context_pass(model.context, other, Layout(batch.document, 4, filler=batch.filler))
    torch.testing.assert_close(again[batch.text], found[batch.text], rtol=1e-12, atol=1e-12)
    for row in range(len(batch)):
        for number in range(int(batch.document[row].max()) + 1):
            own = batch.text[row] & (batch.document[row] == number)
            tokens = batch.tokens[row][own]
            alone = context_pass(model.context, tokens[None], Layout(torch.zeros(1, len(tokens)).long(), len(tokens)))
            torch.testing.assert_close(found[row][own], alone[0], rtol=1e-9, atol=1e-9)


def test_adapters_predict_the_turn_from_the_token_before_it() -> None:
    """Masks are in turns, the first column of a block of a turn is never one, and no prediction leaves the turn."""
    tokenizer = tiny_chat.tokenizer()
    own = encoder(tokenizer)
    own.place_blocks(1)
    messages = chats(9)[8]["messages"]
    document = own.encode(record(messages))
    texts = [tokenizer.decode(document.tokens[begin + 1 : end].tolist()) for begin, end in document.turns]
    assert texts == answers(messages)
    piece = to_piece(document, 8, "random", 0)
    batch = collate([[piece]], [0], piece.columns(8), 8, eos=tokenizer.eos_token_id, pad=0)
    noise = Corruption(
        torch.ones(1, batch.tokens.shape[1] // 8), batch.denoised & (torch.arange(batch.tokens.shape[1]) % 8 > 0)
    )
    assert batch.target is not None
    columns = wanted_columns(batch, noise, 8, 1, gated=True)[0].nonzero()[:, 0]
    assert batch.target[0, columns + 1].all()
    predicted = batch.tokens[0, columns + 1][batch.text[0, columns + 1]]
    kept = [token for begin, end in document.turns for token in document.tokens[begin + 1 : end].tolist()]
    assert set(predicted.tolist()) <= set(kept)


def test_next_token_prediction_scores_the_assistant_alone() -> None:
    tokenizer = tiny_chat.tokenizer()
    own = encoder(tokenizer, align_turns=False)
    documents = [own.encode(record(chat["messages"])) for chat in chats(4)]
    pieces = [to_piece(document, 4, "fixed") for document in documents]
    batch = collate([pieces], [0], sum(piece.columns(4) for piece in pieces), 4, eos=tokenizer.eos_token_id, pad=0)
    model = two_tower("llama", torch.float64, seed=8, vocab_size=tiny_chat.VOCABULARY)
    objective = AutoregressiveObjective(model.context)
    expected = torch.zeros((), dtype=torch.float64)
    for document in documents:
        tokens = torch.from_numpy(document.tokens).long()[None]
        found = model(tokens).logits[0].log_softmax(-1)
        for begin, end in document.turns:
            expected -= found[torch.arange(begin - 1, end - 1), tokens[0, begin:end]].sum()
    torch.testing.assert_close(objective(batch, None, 4), expected, rtol=1e-9, atol=1e-9)
    assert objective.targets(batch) == sum(end - begin for document in documents for begin, end in document.turns)


# --- sources and the loader ----------------------------------------------------------------------------------------


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_held_out_conversations_are_split_by_their_text(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", chats(60) + chats(10))
    parts = {part: Source(path, part=part, held_out_fraction=0.3) for part in ("train", "valid")}
    found = {
        part: [json.dumps(r.messages) for n in range(70) if (r := source.parse(source.records[n])) is not None]
        for part, source in parts.items()
    }
    assert sum(map(len, found.values())) == 70
    assert len(found["valid"]) > 8
    assert not set(found["train"]) & set(found["valid"])


def test_a_text_takes_precedence_and_columns_of_tables_are_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    both = {"text": "a text", "prompt": None, "messages": chats(1)[0]["messages"]}
    texts = Source(write(tmp_path / "a.jsonl", [both]))
    first = texts.parse(texts.records[0])
    assert first is not None
    assert (first.text, first.messages) == ("a text", None)
    source = Source(datasets.Dataset.from_list(chats(3)))
    record = source.parse(source.records[2])
    assert record is not None
    assert record.messages is not None
    assert [message["role"] for message in record.messages] == ["user", "assistant"] * 3
    with pytest.raises(ArgumentError, match="no field 'text'"):
        Source(datasets.Dataset.from_list([{"prompt": "x"}]))


def test_batches_continue_between_any_two(tmp_path: Path) -> None:
    """The state holds conversations that wait for a row; two processes have the rows of one."""
    path = write(tmp_path / "data.jsonl", chats(40) + [{"text": f"{i}. Ada went home."} for i in range(10)])

    def loader(rank: int = 0, world: int = 1) -> RowLoader:
        own = encoder(tiny_chat.tokenizer())
        return RowLoader(
            [Source(path)], own, batch_size=4, row_length=128, block_size=8, seed=3, rank=rank, world=world
        )

    whole, pair = loader(), [loader(rank, 2) for rank in (0, 1)]
    resumed = loader()
    for _ in range(8):
        batch = whole.next()
        assert batch.filler is not None
        for rank, part in enumerate(one.next() for one in pair):
            for name, tensor in vars(part).items():
                assert tensor.equal(vars(batch)[name][rank::2]), name
        resumed.next()
        state, resumed = resumed.state_dict(), loader()
        resumed.load_state_dict(state)
    again = resumed.next()
    for name, tensor in vars(whole.next()).items():
        assert tensor.equal(vars(again)[name]), name


def test_a_conversation_whose_first_turn_is_beyond_the_row_is_a_bad_record(tmp_path: Path) -> None:
    long = [{"role": "user", "content": "Ada " * 200}, {"role": "assistant", "content": "Bo"}]
    path = write(tmp_path / "data.jsonl", [{"messages": long}, *chats(12)])
    source = Source(path)
    loader = RowLoader(
        [source], encoder(tiny_chat.tokenizer()), batch_size=1, row_length=96, block_size=8, max_epochs=1
    )
    while not loader.exhausted():
        loader.next()
    ((place, reason),) = source.bad.items()
    assert place.endswith("data.jsonl line 1")
    assert "its first assistant turn begins after" in reason


def piece_of(tokens: int) -> Piece:
    return Piece(np.zeros(tokens, dtype=np.int32), 0, 0, True)


def test_batches_without_conversations_have_no_further_tensors() -> None:
    batch = collate([[piece_of(8)]], [0], 8, 4, eos=2, pad=0)
    assert (batch.filler, batch.target) == (None, None)
    assert case().batch.filler is None
