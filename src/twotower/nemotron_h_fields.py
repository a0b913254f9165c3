"""The fields of a Nemotron-H config.json that describe the layers, validated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from twotower.errors import ConfigError
from twotower.json_text import JsonObject
from twotower.specs import KIND_OF_LETTER, LayerKind

# transformers 5 writes the pattern as a list, with names of two versions.
_KIND_OF_BLOCK_TYPE: dict[str, LayerKind] = {
    "mamba": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "moe": "E",
    "mlp": "-",
}
KINDS: tuple[LayerKind, ...] = ("M", "*", "E", "-")  # of layers of the family


@dataclass(frozen=True, kw_only=True)
class NemotronHFields:
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
    moe_latent_size: int | None = None
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
        bad = sorted(set(self.hybrid_override_pattern) - set(KINDS))
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
        return tuple(KIND_OF_LETTER[letter] for letter in self.hybrid_override_pattern)

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
    "int | None": ("a positive integer, or absent", lambda v: v is None or _EXPECTED["int"][1](v)),
    "float": ("a number of at least 0", _is_number),
    "bool": ("true or false", lambda v: isinstance(v, bool)),
    "str": ("a string", lambda v: isinstance(v, str)),
    "tuple[float, float]": (
        "two numbers of at least 0",
        lambda v: isinstance(v, tuple) and len(v) == 2 and all(map(_is_number, v)),
    ),
}


def layer_kinds(own: JsonObject, kwargs: JsonObject) -> JsonObject:
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
