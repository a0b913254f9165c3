"""The configuration of a model: the released `config.json`, validated.

`TwoTowerConfig` is transformers' configuration class; it keeps all keys of the file, known or not. `BackboneConfig` is
the frozen, typed and validated configuration of the layers.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from transformers import PretrainedConfig

from twotower.errors import ConfigError

LayerKind = Literal["M", "*", "E", "-"]
KIND_NAMES: dict[str, str] = {"M": "Mamba-2", "*": "attention", "E": "MoE", "-": "MLP"}
_KIND_OF_LETTER: dict[str, LayerKind] = {kind: kind for kind in get_args(LayerKind)}
COUPLED_KINDS = frozenset("M*")  # denoiser layers of these kinds read the cache of their context layer
ARCHITECTURE = "NemotronHTwoTowerForCausalLM"
MODEL_TYPE = "nemotron_h"
MASK_TOKEN_ID = 3  # by convention: released configs carry no mask_token_id

# transformers 5 writes the pattern as a list, with names of two versions.
_KIND_OF_BLOCK_TYPE: dict[str, LayerKind] = {
    "mamba": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "moe": "E",
    "mlp": "-",
}


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The architecture of one tower, with the field names of the released `config.json`.

    The keys `norm_eps`, `expand`, `rope_theta`, `n_shared_experts` and `mamba_proj_bias` of the file have no effect on
    the released model, so they are not fields.
    """

    hybrid_override_pattern: str
    hidden_size: int
    vocab_size: int
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = False
    initializer_range: float = 0.02
    max_position_embeddings: int = 4096
    # attention
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    attention_bias: bool = False
    # Mamba-2
    mamba_num_heads: int = 128
    mamba_head_dim: int = 64
    ssm_state_size: int = 128
    n_groups: int = 8
    conv_kernel: int = 4
    use_conv_bias: bool = True
    use_bias: bool = False
    chunk_size: int = 128
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    # MLP
    intermediate_size: int = 21504
    mlp_bias: bool = False
    # mixture of experts
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 7688
    moe_shared_expert_intermediate_size: int = 7688
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            expected, good = _EXPECTED[str(field.type)]
            if not good(value):
                raise ConfigError(f"config: {field.name} is {value!r}; it must be {expected}")
        bad = sorted(set(self.hybrid_override_pattern) - set(get_args(LayerKind)))
        if bad or not self.hybrid_override_pattern:
            raise ConfigError(
                f"config: hybrid_override_pattern {self.hybrid_override_pattern!r} has {bad or 'no layers'}; "
                "each letter must be M (Mamba-2), * (attention), E (MoE) or - (MLP)"
            )
        self._divides("num_key_value_heads", "num_attention_heads")
        self._divides("n_groups", "mamba_num_heads")
        self._divides("n_group", "n_routed_experts")
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ConfigError(
                f"config: num_experts_per_tok is {self.num_experts_per_tok} but n_routed_experts only "
                f"{self.n_routed_experts}; set num_experts_per_tok to at most n_routed_experts"
            )
        if self.topk_group > self.n_group:
            raise ConfigError(f"config: topk_group is {self.topk_group}; it must be at most n_group, {self.n_group}")
        low, high = self.time_step_limit
        if not 0.0 <= low < high:
            raise ConfigError(f"config: time_step_limit is [{low}, {high}]; it must be 0 <= low < high")

    def _divides(self, small: str, large: str) -> None:
        if getattr(self, large) % getattr(self, small):
            raise ConfigError(
                f"config: {large} is {getattr(self, large)}; it must be a multiple of {small}, {getattr(self, small)}"
            )

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer, first to last."""
        return tuple(_KIND_OF_LETTER[letter] for letter in self.hybrid_override_pattern)

    @property
    def num_layers(self) -> int:
        return len(self.hybrid_override_pattern)

    @property
    def mamba_inner(self) -> int:
        """Inner width of the Mamba mixer: heads × head_dim."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: x | B | C."""
        return self.mamba_inner + 2 * self.n_groups * self.ssm_state_size


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0  # False for NaN


# The allowed values of a field of each type, in words and as a function.
_EXPECTED: dict[str, tuple[str, Callable[[object], bool]]] = {
    "int": ("a positive integer", lambda v: isinstance(v, int) and not isinstance(v, bool) and v > 0),
    "float": ("a number of at least 0", _is_number),
    "bool": ("true or false", lambda v: isinstance(v, bool)),
    "str": ("a string", lambda v: isinstance(v, str)),
    "tuple[float, float]": (
        "two numbers of at least 0",
        lambda v: isinstance(v, tuple) and len(v) == 2 and all(map(_is_number, v)),
    ),
}
_BACKBONE_FIELDS = {field.name for field in dataclasses.fields(BackboneConfig)}
_DTYPES = ("bfloat16", "float16", "float32", "float64")
# Other values mean an architecture that this package does not implement.
_ONLY_SUPPORTED: dict[str, tuple[object, ...]] = {
    "mamba_hidden_act": ("silu",),
    "mlp_hidden_act": ("relu2",),
    "sliding_window": (None,),
    "moe_latent_size": (None,),
    "tie_word_embeddings": (False,),
    "rope_scaling": (None,),  # the attention has no position embedding
}


def read_object(file: Path, remedy: str) -> dict[str, Any]:
    """The object of a config.json, unchanged.

    remedy: what to do if the file does not exist, for the message.

    Raises:
        ConfigError: the file does not exist, or is not a JSON object.
    """
    try:
        raw = json.loads(
            file.read_text(encoding="utf-8")
        )  # Python's parser accepts the `Infinity` of the released file
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; {remedy}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: contains a {type(raw).__name__}; it must be a JSON object")
    return raw


class TwoTowerConfig(PretrainedConfig):
    """The configuration of a two-tower checkpoint, with the released `model_type`, `nemotron_h`.

    Keyword arguments are the keys of `config.json`. Unknown keys are kept and written back.

    Raises:
        ConfigError: a value is not allowed; the message names field, value and remedy.
    """

    model_type = MODEL_TYPE

    def __init__(self, **kwargs: Any) -> None:
        own = {name: kwargs.pop(name) for name in list(kwargs) if name in _BACKBONE_FIELDS}
        own |= _layer_kinds(own, kwargs)
        own.setdefault("hidden_size", 4096)  # transformers constructs configurations without arguments
        own.setdefault("vocab_size", 131072)
        own["time_step_limit"] = _limits(own.get("time_step_limit", (0.0, math.inf)))
        if own.get("num_key_value_heads", 0) is None:
            own["num_key_value_heads"] = own.get("num_attention_heads", BackboneConfig.num_attention_heads)
        for name, allowed in _ONLY_SUPPORTED.items():
            if kwargs.get(name, allowed[0]) not in allowed:
                raise ConfigError(f"config: {name} is {kwargs[name]!r}; only {allowed[0]!r} is supported")
        for name, value in dataclasses.asdict(BackboneConfig(**own)).items():
            setattr(self, name, value)
        self.mask_token_id: int | None = _mask_token(kwargs.pop("mask_token_id", None), own["vocab_size"])
        older_name = kwargs.pop("torch_dtype", None)
        kwargs["dtype"] = kwargs.get("dtype") or older_name
        if isinstance(kwargs.get("dtype"), str) and kwargs["dtype"] not in _DTYPES:
            raise ConfigError(f"config: torch_dtype is {kwargs['dtype']!r}; it must be one of {', '.join(_DTYPES)}")
        kwargs.setdefault("tie_word_embeddings", False)
        kwargs.setdefault("architectures", [ARCHITECTURE])
        _check_kinds(kwargs)
        try:
            super().__init__(**kwargs)
        except Exception as error:  # transformers checks its own keys, and raises many types
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"config: transformers cannot use a value ({first}); correct or remove it") from None
        # transformers drops keys that are also generation settings (`use_cache`); here they are kept.
        self._kept = {k: v for k, v in kwargs.items() if not (hasattr(self, k) or hasattr(self, f"_{k}"))}

    @property
    def backbone(self) -> BackboneConfig:
        """The validated configuration of the layers."""
        values = {name: getattr(self, name) for name in _BACKBONE_FIELDS}
        values["time_step_limit"] = _limits(self.time_step_limit)
        return BackboneConfig(**values)

    @property
    def num_hidden_layers(self) -> int:
        """The number of layers, which is the length of the pattern."""
        return len(self.hybrid_override_pattern)

    @property
    def mask_token(self) -> int:
        """The id of the mask token: `mask_token_id` of the file, else 3 by convention."""
        return MASK_TOKEN_ID if self.mask_token_id is None else self.mask_token_id

    def to_dict(self) -> dict[str, Any]:
        """The keys of `config.json`."""
        out = super().to_dict()
        out |= out.pop("_kept", {})
        out |= {"num_hidden_layers": self.num_hidden_layers, "time_step_limit": list(self.time_step_limit)}
        if out.get("mask_token_id") is None:
            out.pop("mask_token_id", None)
        return out

    @classmethod
    def of(cls, config: PretrainedConfig) -> TwoTowerConfig:
        """The configuration itself, or a conversion of transformers' class."""
        if isinstance(config, cls):
            return config
        return cls(**{name: value for name, value in config.to_dict().items() if name != "model_type"})

    @classmethod
    def read(cls, path: str | Path) -> TwoTowerConfig:
        """Reads a `config.json`, or that of a directory.

        Raises:
            ConfigError: the file does not exist, is not JSON, or has a value that is not allowed.
        """
        file = Path(path)
        file = file / "config.json" if file.is_dir() else file
        raw = read_object(file, "give a checkpoint directory or its config.json")
        if raw.get("model_type", MODEL_TYPE) != MODEL_TYPE:
            raise ConfigError(f"{file}: model_type is {raw['model_type']!r}; a two-tower model has {MODEL_TYPE!r}")
        if not (raw.keys() & {"hybrid_override_pattern", "layers_block_type", "layer_types"}):
            raise ConfigError(f"{file}: has no hybrid_override_pattern, so the kinds of its layers are unknown")
        raw.pop("model_type", None)
        try:
            return cls(**raw)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None


def _layer_kinds(own: dict[str, object], kwargs: dict[str, object]) -> dict[str, object]:
    """The pattern, from any of its spellings, which are removed from kwargs. All given spellings must agree."""
    pattern = own.get("hybrid_override_pattern")
    for key in ("layers_block_type", "layer_types"):
        if (types := kwargs.pop(key, None)) is None:
            continue
        spelled = _pattern_of(key, types)
        if pattern not in (None, spelled):
            raise ConfigError(
                f"config: {key} means {spelled!r}, but hybrid_override_pattern is {pattern!r}; remove one of them"
            )
        pattern = spelled
    pattern = "M*E-" if pattern is None else pattern
    declared = kwargs.pop("num_hidden_layers", None)
    if declared is not None and isinstance(pattern, str) and declared != len(pattern):
        raise ConfigError(
            f"config: num_hidden_layers is {declared!r} but hybrid_override_pattern {pattern!r} has {len(pattern)} "
            "letters; remove num_hidden_layers"
        )
    return {"hybrid_override_pattern": pattern}


def _pattern_of(key: str, types: object) -> str:
    if not isinstance(types, list | tuple):
        raise ConfigError(f"config: {key} is {types!r}; it must be a list of layer kinds")
    unknown = [name for name in types if name not in _KIND_OF_BLOCK_TYPE]
    if unknown:
        raise ConfigError(f"config: {key} has {unknown[0]!r}; choose from {sorted(_KIND_OF_BLOCK_TYPE)}")
    return "".join(_KIND_OF_BLOCK_TYPE[name] for name in types)


def _check_kinds(kwargs: dict[str, object]) -> None:
    """Checks keys of transformers whose values this package reads."""
    if not isinstance(kwargs["architectures"], list | tuple | None):
        raise ConfigError(f"config: architectures is {kwargs['architectures']!r}; it must be a list of names")
    rope = kwargs.get("rope_parameters")
    if rope and (not isinstance(rope, dict) or rope.get("rope_type", "default") != "default"):
        raise ConfigError(
            f"config: rope_parameters is {rope!r}; the attention has no position embedding, so remove the key"
        )


def _limits(value: object) -> object:
    """time_step_limit from JSON, where infinity is `Infinity` or an object of transformers."""
    if not isinstance(value, list | tuple):
        return value
    plain = [x.get("__float__") if isinstance(x, dict) else x for x in value]
    return tuple(float(x) if isinstance(x, int | float) or x == "Infinity" else x for x in plain)


def _mask_token(value: object, vocab_size: int) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
        raise ConfigError(f"config: mask_token_id is {value!r}; it must be a token id from 0 to {vocab_size - 1}")
    return value
