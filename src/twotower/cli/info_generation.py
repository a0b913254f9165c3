"""The part of `twotower info` about generation: EOS tokens, sampling defaults and chat templates, with their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from twotower.checkpoint import generation_config, tokenizer_files
from twotower.checkpoint.generation_config import GenerationDefaults
from twotower.errors import CheckpointError

if TYPE_CHECKING:
    from twotower.cli.info_facts import GenerationFacts
    from twotower.config import TwoTowerConfig
    from twotower.tokenizer import Tokenizer


def read_tokenizer(directory: Path) -> tuple[Tokenizer | None, str | None]:
    """The tokenizer of a directory, and why it cannot be loaded."""
    try:
        return tokenizer_files.load_tokenizer(directory), None
    except CheckpointError as error:
        return None, str(error)


def generation_facts(directory: Path, config: TwoTowerConfig, tokenizer: Tokenizer | None) -> GenerationFacts:
    """The facts of a checkpoint directory.

    Raises:
        ConfigError: generation_config.json has a value that is not allowed.
    """
    defaults = GenerationDefaults.read(directory, config.vocab_size)
    candidates = (
        (generation_config.FILE, defaults.eos_token_id),
        ("config.json", config.eos_token_id),
        ("the tokenizer", getattr(tokenizer, "eos_token_id", None)),
    )
    source, eos = next(((name, found) for name, found in candidates if found is not None), (None, []))
    template, others = _templates(directory)
    return {
        "mask_token_id": config.mask_token,
        "mask_token": None if tokenizer is None else tokenizer.convert_ids_to_tokens(config.mask_token),
        "eos_token_id": list(eos) if isinstance(eos, list | tuple) else [eos],
        "eos_source": source,
        "sampling": defaults.sampling(),
        "unused": defaults.unused(),
        "chat_template": template,
        "chat_templates": others,
    }


def _templates(directory: Path) -> tuple[str | None, list[str]]:
    """The file with the chat template, and the names of additional templates."""
    others = sorted(file.stem for file in (directory / tokenizer_files.TEMPLATE_FOLDER).glob("*.jinja"))
    if (directory / tokenizer_files.TEMPLATE_FILE).exists():
        return tokenizer_files.TEMPLATE_FILE, others
    file = directory / "tokenizer_config.json"
    try:
        inside = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):  # `read_tokenizer` reports a damaged file
        inside = None
    return (file.name if inside else None), others
