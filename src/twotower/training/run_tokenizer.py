"""The tokenizer of a training run, loaded or trained on the run's data, and its special tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from tokenizers import Tokenizer

from twotower.checkpoint import tokenizer_files
from twotower.checkpoint.generation_config import GenerationDefaults
from twotower.config import TwoTowerConfig
from twotower.errors import ArgumentError
from twotower.file_writes import os_errors, replaced_file
from twotower.training.data import BOS, EOS, MASK, PAD, Encoder, Source, train_tokenizer
from twotower.training.data.readers import one_epoch
from twotower.training.fsdp import World
from twotower.training.run_settings import PretrainSettings, RunSettings
from twotower.training.trainer import TOKENIZER_FILE

if TYPE_CHECKING:
    from twotower.tokenizer import Tokenizer as ModelTokenizer

TOKENIZER_TEXTS = 50_000  # at most so many documents train a new tokenizer


def tokenizer_of_run(
    settings: PretrainSettings, config: TwoTowerConfig, sources: list[Source], directory: Path, world: World
) -> ModelTokenizer:
    """The given tokenizer, or a new one that is trained on the data and stored in the run directory."""
    if settings.tokenizer is not None:
        return with_template(load_tokenizer(settings.tokenizer), settings)
    file = directory / TOKENIZER_FILE
    if world.is_main and not file.exists():
        size = config.vocab_size if settings.vocab_size is None else settings.vocab_size
        if size > config.vocab_size:
            raise ArgumentError(f"vocab_size is {size}, above the backbone's {config.vocab_size}; give at most that")
        trained = train_tokenizer(_texts(sources), size, split_digits=settings.split_digits)
        with replaced_file(file) as partial, os_errors():
            trained.save(str(partial))
    world.barrier()
    return with_template(load_tokenizer(file), settings)


def with_template(tokenizer: ModelTokenizer, settings: RunSettings) -> ModelTokenizer:
    """The tokenizer, with the chat template of the settings if they have one."""
    if settings.chat_template is not None:
        try:
            template = settings.chat_template.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ArgumentError(
                f"{settings.chat_template}: not UTF-8 ({error.reason}); give a Jinja template"
            ) from None
        tokenizer.chat_template = template
    return tokenizer


def load_tokenizer(path: Path) -> ModelTokenizer:
    """Loads a tokenizer.json, or a directory from which transformers can load a tokenizer."""
    if path.is_dir():
        tokenizer = tokenizer_files.load_tokenizer(path)
        if tokenizer is None:
            raise ArgumentError(f"{path}: contains no tokenizer; give a tokenizer.json or a directory with one")
        return tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise ArgumentError(f"{path}: not a tokenizer.json ({error}); give such a file or its directory") from None
    names = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "mask")}
    known = {key: token for key, token in names.items() if backend.token_to_id(token) is not None}
    return cast("ModelTokenizer", PreTrainedTokenizerFast(tokenizer_object=backend, **known))


def _texts(sources: list[Source]) -> list[str]:
    """Texts of all sources, in proportion to the sources' weights."""
    total = sum(source.weight for source in sources)
    texts = []
    for source in sources:
        wanted = int(TOKENIZER_TEXTS * source.weight / total)
        for _, record in zip(range(wanted), one_epoch(source), strict=False):
            texts.append(record.content)
    return texts


def encoder_for(
    tokenizer: ModelTokenizer,
    config: TwoTowerConfig,
    defaults: GenerationDefaults | None = None,
    *,
    align_turns: bool = True,
) -> Encoder:
    """The encoder from text to documents of this model.

    A document ends with the first EOS token of config.json, else of `defaults` (generation_config.json), else of the
    tokenizer. A turn of a conversation ends with any of them. align_turns: see `Encoder`.

    Raises:
        ArgumentError: the tokenizer does not fit the model, or there is no EOS token.
    """
    recommended = None if defaults is None else defaults.eos_token_id
    candidates = (config.eos_token_id, recommended, getattr(tokenizer, "eos_token_id", None))
    given = [list(ids) if isinstance(ids, list | tuple) else [ids] for ids in candidates if ids is not None]
    if not given:
        raise ArgumentError("neither config.json nor the tokenizer has an EOS token; set eos_token_id in config.json")
    return Encoder(
        tokenizer,
        vocab_size=config.vocab_size,
        eos_token_id=given[0][0],
        mask_token_id=config.mask_token,
        bos_token_id=config.bos_token_id,
        pad_token_id=max(config.pad_token_id or 0, 0),  # some configurations say -1; padding is never read
        eos_token_ids=[token for ids in given for token in ids],
        align_turns=align_turns,
    )


def set_special_token_ids(config: TwoTowerConfig, tokenizer: ModelTokenizer) -> None:
    """Writes the tokenizer's special token ids into the config of a new model."""
    ours = {"bos": BOS, "eos": EOS, "pad": PAD, "mask": MASK}
    for name, default in ours.items():
        value = getattr(tokenizer, f"{name}_token_id", None)
        setattr(config, f"{name}_token_id", default if value is None and name == "mask" else value)
