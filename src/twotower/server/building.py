"""Builds the service of a loaded model by the options of a server."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from twotower.checkpoint.generation_config import FILE, GenerationDefaults
from twotower.decoding.params import GenerationParams
from twotower.engine import LLM, AsyncLLM
from twotower.engine.towers import denoiser_name
from twotower.errors import ArgumentError
from twotower.server.options import Door, ServiceOptions
from twotower.server.service import Service
from twotower.server.settings import ServerSettings
from twotower.tokenizer import require_tokenizer

if TYPE_CHECKING:
    from twotower.engine.towers import Towers

DEFAULT_LENGTH = 8192  # limit of the default length: the cache of a window of a million tokens is too large
NO_TOKENIZER = "the server cannot encode prompts; put that file into the directory"

Note = Callable[[str], object]


def build_service(
    options: ServiceOptions, door: Door, model: Towers, source: Path | str, note: Note, alias: str | None = None
) -> Service:
    """The service of a model. note: called with what the user should know. alias: a name that clients may use too.

    Raises:
        TwoTowerError: an option does not suit the model.
    """
    window = model.spec.max_position_embeddings
    engine = LLM(
        model,
        rows=options.rows,
        length=min(window, DEFAULT_LENGTH) if options.length is None else options.length,
        block_size=options.block_size,
        memory=None if options.memory is None else int(options.memory * 2**30),
    )
    use_chat_template(model, options.chat_template)
    if not getattr(model.tokenizer, "chat_template", None):
        note("Note: the model has no chat template, so a chat is written as lines of `Role: text`.")
    sampling = sampling_defaults(model, options.generation_config, note)
    names = options.name or (Path(source).name,)
    decoding = options.decoding("verified" if model.has_denoiser else "ar")
    denoiser_name(model, GenerationParams.from_mapping(decoding))  # raises if the setting names an unknown one
    settings = ServerSettings(
        name=names[0],
        decoding=decoding,
        sampling=sampling,
        limits=options.limits(),
        api_keys=door.keys,
        log_prompts=options.log_prompts,
        strict_fields=options.strict_fields,
        more_names=names[1:],
        aliases=(alias,) if alias else (),
        allowed_origins=door.origins,
        root_path=door.root_path,
        tool_parser=options.tool_parser,
        reasoning_parser=options.reasoning_parser,
    )
    return Service(AsyncLLM(engine), settings)


def sampling_defaults(model: Towers, given: str | None, note: Note) -> dict[str, object]:
    """The sampling defaults of `--generation-config`; its EOS tokens, if it has any, become those of the model.

    Raises:
        TwoTowerError: the file does not exist, or a value is not allowed.
    """
    if given == "none":
        return {}
    if given is not None:
        read = GenerationDefaults.read(Path(given), model.spec.vocab_size)
        if read.file is None:
            raise ArgumentError(f"--generation-config {given}: the directory has no {FILE}; give a file or none")
        model.generation_defaults = model.generation_defaults.override(read)
    defaults = model.generation_defaults
    sampling = defaults.sampling()
    GenerationParams.from_mapping({"mode": "ar"} | sampling)
    if sampling:
        values = ", ".join(f"{name} {value}" for name, value in sampling.items())
        note(f"Sampling defaults of requests: {values} ({defaults.file}).")
    if unused := defaults.unused():
        note(f"Note: {defaults.file}: {', '.join(unused)} has no effect here.")
    return sampling


def use_chat_template(model: Towers, file: Path | None) -> None:
    """Gives the model's tokenizer the chat template of `--chat-template`.

    Raises:
        ArgumentError: The file is not UTF-8 text, or not a Jinja template.
    """
    if file is None:
        return
    import jinja2

    tokenizer = require_tokenizer(model.tokenizer)
    try:
        tokenizer.chat_template = file.read_text(encoding="utf-8")
        with suppress(jinja2.UndefinedError, jinja2.TemplateRuntimeError):  # it may need more than this chat has
            tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except UnicodeDecodeError:
        raise ArgumentError(f"--chat-template {file} is not UTF-8 text; give a Jinja template") from None
    except jinja2.TemplateSyntaxError as error:
        reason = f"line {error.lineno}: {error.message}"
        raise ArgumentError(f"--chat-template {file} is not a Jinja template ({reason}); correct it") from None
