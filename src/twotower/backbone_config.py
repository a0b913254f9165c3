"""The config.json of an autoregressive model, read by transformers' own configuration class of its model_type."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PretrainedConfig
from transformers.utils import logging

from twotower.errors import ConfigError
from twotower.json_text import JsonObject

_SIZES = (
    "chunk_size",
    "conv_kernel",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "mamba_chunk_size",
    "mamba_d_conv",
    "mamba_d_state",
    "mamba_n_groups",
    "mamba_n_heads",
    "max_position_embeddings",
    "moe_intermediate_size",
    "n_groups",
    "num_attention_heads",
    "num_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "original_max_position_embeddings",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "state_size",
    "vocab_size",
)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No warnings of transformers in a `with` block: values that it only warns about are checked here."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def autoregressive_config(raw: JsonObject) -> PretrainedConfig:
    """transformers' configuration of an autoregressive model from its config.json, in any spelling.

    A multimodal file gives the configuration of its text model, tied as the whole model says.

    Raises:
        ConfigError: transformers does not know the model_type, or refuses a value, or a size is not positive.
    """
    from transformers import CONFIG_MAPPING

    nested = raw.get("text_config")
    if nested is None:
        return _construct(raw, raw)
    if not isinstance(nested, dict):
        raise ConfigError(f"config: text_config is {nested!r}; it must be the JSON object of a text model")
    _check_sizes(nested, "text_config.")
    tied = {name: raw[name] for name in ("tie_word_embeddings",) if name in raw}
    if "model_type" not in nested and raw.get("model_type") in CONFIG_MAPPING:
        text = _construct(raw, raw).get_text_config()  # the multimodal class knows the type of its text model
        if isinstance(text, PretrainedConfig):
            return _construct(nested | tied | {"model_type": text.model_type}, raw)
    return _construct(nested | tied, raw)


def plain_numbers(value: object) -> object:
    """A value of a config.json without the objects that transformers writes for infinity."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {name: plain_numbers(part) for name, part in value.items()}
    return [plain_numbers(part) for part in value] if isinstance(value, list | tuple) else value


def reason(error: Exception) -> str:
    """What an error of transformers says, in one line: the lines of a validation error after its heading."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    lines = [line.strip() for line in str(text).strip().splitlines()] or [type(error).__name__]
    said = " ".join(lines[1:] if "alidation error" in lines[0] and len(lines) > 1 else lines[:1])
    return said.partition("Error: ")[2] or said


def _construct(values: JsonObject, raw: JsonObject) -> PretrainedConfig:
    from transformers import CONFIG_MAPPING

    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        if "model_type" not in values:
            raise ConfigError(
                "config: model_type is absent, so the family of the model is not known; download config.json again, or "
                "add the model_type of the weights"
            )
        if "auto_map" in raw:
            raise ConfigError(
                f"config: model_type is {kind!r}, which needs Python code of the checkpoint (auto_map), and that code "
                "is not run; choose a model that transformers supports without trust_remote_code"
            )
        raise ConfigError(
            f"config: model_type is {kind!r}, which this version of transformers does not know; choose a model that "
            "transformers supports without trust_remote_code"
        )
    _check_sizes(values, "")
    arguments: JsonObject = {key: plain_numbers(value) for key, value in values.items() if key != "model_type"}
    try:
        with quiet_transformers():
            return CONFIG_MAPPING[kind](**arguments)
    except Exception as error:  # transformers checks its keys, and raises many types
        raise ConfigError(f"config: transformers cannot use a value ({reason(error)}); correct it") from None


def _check_sizes(values: JsonObject, prefix: str) -> None:
    """transformers accepts sizes of 0 and below, and fails later or computes nothing."""
    for name in _SIZES:
        value = values.get(name)
        if isinstance(value, int | float) and not (isinstance(value, int) and value > 0):
            raise ConfigError(f"config: {prefix}{name} is {value!r}; it must be a positive integer")
