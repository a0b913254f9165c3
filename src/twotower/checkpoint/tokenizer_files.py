"""The tokenizer of a checkpoint directory: loads it, and copies its files and those that describe generation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import cast

from transformers import AutoTokenizer

from twotower.checkpoint import generation_config
from twotower.errors import CheckpointError
from twotower.file_writes import os_errors
from twotower.tokenizer import Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"  # one .jinja file a template, with the template's name
# Files without weights that transformers reads from a checkpoint directory; patterns of `Path.glob`.
PATTERNS = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "*vocab*.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "bpe.codes",
    "normalizer.json",
    "byte_maps.json",
    "tekken.json",
    TEMPLATE_FILE,
    f"{TEMPLATE_FOLDER}/*.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    generation_config.FILE,
)


def load_tokenizer(directory: Path | None, trust_remote_code: bool = False) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory; None if it has none. Code of the checkpoint runs only if trusted.

    Raises:
        CheckpointError: a file is damaged, or the tokenizer needs code of the checkpoint.
    """
    if directory is None or not any((directory / name).exists() for name in TOKENIZER_FILES):
        return None
    for name in TOKENIZER_FILES:
        _check_object(directory / name)
    try:
        # The declared types of transformers are wider than those of `Tokenizer`.
        return cast(Tokenizer, AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code))
    except Exception as error:  # tokenizers raise many types; the user needs one line
        if not trust_remote_code and _needs_code(directory):
            raise CheckpointError(
                f"{directory / 'tokenizer_config.json'}: the tokenizer needs Python code of the checkpoint (auto_map), "
                "which is not run; put a tokenizer.json into the directory, or load it with trust_remote_code=True"
            ) from None
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{directory}: the tokenizer cannot be read ({first}); download tokenizer.json and tokenizer_config.json "
            "again"
        ) from None


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes the files of a tokenizer.

    Raises:
        OSError: a file cannot be written.
    """
    with os_errors():
        tokenizer.save_pretrained(directory)


def copy_model_files(source: Path, target: Path) -> None:
    """Copies the files of `PATTERNS` unchanged: tokenizer, chat templates and generation config."""
    for pattern in PATTERNS:
        for file in source.glob(pattern):
            (target / file.relative_to(source)).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target / file.relative_to(source))


def _check_object(file: Path) -> None:
    """Raises CheckpointError if a file exists and is not a JSON object."""
    if not file.exists():
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error}); download it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: contains a {type(found).__name__}, not a JSON object; download it again")


def _needs_code(directory: Path) -> bool:
    file = directory / "tokenizer_config.json"
    return file.exists() and "AutoTokenizer" in (json.loads(file.read_text(encoding="utf-8")).get("auto_map") or {})
