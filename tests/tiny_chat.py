"""Tiny chats: conversations, chat templates, and tiny models of transformers with a tokenizer that has a template."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import tiny_run
import torch
from tiny_backbones import SHAPES, hf_config
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from twotower.cli.main import run_cli

# ChatML without and with the markers of transformers, and a template that leaves out the thoughts of earlier turns.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last or m.role == 'user' %}{{ m.content }}{% else %}{{ m.content.split('.')[-1] }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = tiny_run.VOCABULARY + 2


def tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """The tokenizer of `tiny_run` with <|im_start|> and <|im_end|>, which is EOS."""
    own = tiny_run.tokenizer()
    own.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<|im_start|>", special=True)], "eos_token": "<|im_end|>"}
    )
    own.chat_template = template
    return own


def chats(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Different conversations of one to three answers, some with a system message."""
    rng = random.Random(seed)
    out = []
    for number in range(count):
        turns = [{"role": "system", "content": "Be brief."}] if number % 3 == 0 else []
        for turn in range(1 + number % 3):
            names = rng.sample(tiny_run.NAMES, rng.randint(1, 4))
            turns.append({"role": "user", "content": f"{number}.{turn} Sort {' '.join(names)}"})
            turns.append({"role": "assistant", "content": " ".join(sorted(names))})
        out.append({"messages": turns})
    return out


def backbone(name: str = "llama", template: str | None = CHATML) -> Path:
    """A tiny autoregressive checkpoint, saved by transformers, with a chat template."""
    return _backbone(name, template)


@functools.cache
def _backbone(name: str, template: str | None) -> Path:
    folder = tiny_run.folder() / f"chat-{name}-{abs(hash(template))}"
    torch.manual_seed(0)
    own = tokenizer(template)
    special = {"eos_token_id": own.eos_token_id, "bos_token_id": own.bos_token_id, "pad_token_id": own.pad_token_id}
    options = SHAPES[name] | special | {"vocab_size": VOCABULARY, "initializer_range": 0.3}
    AutoModelForCausalLM.from_config(hf_config(name, options)).save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


def two_towers(name: str = "llama", *options: str) -> Path:
    """What `twotower init` makes of `backbone`."""
    return _two_towers(name, *options)


@functools.cache
def _two_towers(name: str, *options: str) -> Path:
    source = backbone(name)
    target = source.with_name(f"{source.name}-two{''.join(options)}")
    kind = () if "--denoiser-lora" in options else ("--denoiser", "tower")
    assert run_cli(["init", "--from", str(source), "-o", str(target), "--mask-token", "<mask>", *kind, *options]) == 0
    return target
