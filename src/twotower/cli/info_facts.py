"""Types of the JSON that `twotower info --json` prints."""

from __future__ import annotations

from typing import TypedDict


class ParameterCounts(TypedDict):
    """Counts of parameters of one tower, the router's correction bias included.

    active: parameters that the pass of one token uses, without the routed experts that are not selected. The embedding
    table counts in full, as in the published figure; in active_without_embedding only the row that is read counts, and
    the whole table if it is the head too.
    """

    per_tower: int
    both_towers: int
    time_conditioning: int
    active: int
    active_without_embedding: int
    moe_share: float
    routed_expert_share: float


class StateSizes(TypedDict):
    """Bytes of the context tower's state of one sequence in `dtype`: per token, per row, and for a full context.

    windows: at most, of the layers with a window; per_token does not count these layers.
    """

    dtype: str
    per_token: int
    per_row: int
    windows: int
    full_context: int


class WeightFile(TypedDict):
    """A file of weights."""

    name: str
    bytes: int
    tensors: int


class StoredWeights(TypedDict):
    """Files of weights on disk. quantization: the plan of the tensors. problem: why they cannot be loaded."""

    present: bool
    files: list[WeightFile]
    dtypes: dict[str, int]
    quantization: str
    problem: str | None


class GenerationFacts(TypedDict):
    """What ends a text, and how the server samples by default.

    mask_token_id, mask_token: the mask token and its text. eos_token_id: the EOS tokens, and eos_source the file that
    has them. sampling: defaults of the server from generation_config.json. unused: keys of that file without effect.
    chat_template: the file with the template.
    """

    mask_token_id: int
    mask_token: str | None
    eos_token_id: list[int]
    eos_source: str | None
    sampling: dict[str, object]
    unused: list[str]
    chat_template: str | None
    chat_templates: list[str]


class BackboneFacts(TypedDict):
    """The autoregressive model of the towers. layers: of that model. options: of its layers, in words."""

    model_type: str
    layers: int
    tied_head: bool
    options: list[str]


class AdapterFacts(TypedDict):
    """Adapters on the context tower, which are the denoiser; bytes by dtype. gate: where they act.

    read_bytes: of the weights of the network and its adapters that a pass over one token reads. A pass over more tokens
    can read more experts, and each drafted token reads the draft head.
    """

    rank: int
    gate: str
    parameters: int
    bytes: dict[str, int]
    read_bytes: dict[str, int]


class DenoiserFacts(TypedDict):
    """A denoiser tower that lacks layers or has another feed-forward. layers: numbers of the backbone's layers."""

    pattern: str
    layers: list[int]
    feed_forward: str | None
    parameters: int


class BlockFacts(TypedDict):
    """What the denoiser's blocks are: fields of `DenoiserConfig`. draft_head_rank: None without a draft head."""

    prediction_shift: int
    block_attention: str
    first_from_ar: bool
    draft_head_rank: int | None


class NamedDenoiserFacts(TypedDict):
    """One denoiser of several. modes: those that use it if a request names none. block_size: of its training.

    adapters, denoiser, blocks: as in `AllDenoiserFacts`. parameters, bytes: of what the context tower lacks, in each
    dtype. read_bytes: of the weights that its pass over one token reads.
    """

    name: str
    modes: list[str]
    block_size: int | None
    adapters: AdapterFacts | None
    denoiser: DenoiserFacts | None
    blocks: BlockFacts
    parameters: int
    bytes: dict[str, int]
    read_bytes: dict[str, int]


class AllDenoiserFacts(TypedDict):
    """What the denoiser is. denoiser: None if it is a full tower, or adapters.

    denoisers: of a model with several, whose other fields are None; None if there is one.
    """

    adapters: AdapterFacts | None
    denoiser: DenoiserFacts | None
    blocks: BlockFacts | None
    denoisers: list[NamedDenoiserFacts] | None


class Facts(AllDenoiserFacts):
    """Facts about a checkpoint directory or config file; sizes in bytes. computes_in: the dtype of `--dtype auto` by
    device. layer_numbers: of the backbone's layers, by kind."""

    path: str
    layer_numbers: dict[str, list[int]]
    backbone: BackboneFacts
    architectures: list[str] | None
    dtype: str
    computes_in: dict[str, str]
    pattern: str
    layers: dict[str, int]
    shape: dict[str, int]
    parameters: ParameterCounts
    memory: dict[str, dict[str, int]]
    state: StateSizes
    backends: dict[str, list[dict[str, str]]]
    weights: StoredWeights
    tokenizer: list[str]
    tokenizer_problem: str | None
    generation: GenerationFacts
