"""What `twotower info --json` prints."""

from __future__ import annotations

from typing import TypedDict


class ParameterCounts(TypedDict):
    """Counts of one tower: every tensor of the checkpoint, the router's correction bias included.

    active: what one token's pass uses: all but the routed experts it does not choose. The embedding table
    counts in full, as published; active_without_embedding counts the one row that is read.
    """

    per_tower: int
    both_towers: int
    time_conditioning: int
    active: int
    active_without_embedding: int
    moe_share: float
    routed_expert_share: float


class StateSizes(TypedDict):
    """Bytes of the context's memory of one text, in `dtype`: what each token adds, and what is there from the start."""

    dtype: str
    per_token: int
    per_row: int
    full_context: int


class WeightFile(TypedDict):
    """A file of weights."""

    name: str
    bytes: int
    tensors: int


class StoredWeights(TypedDict):
    """What lies on disk. problem: why the weights cannot be loaded."""

    present: bool
    files: list[WeightFile]
    dtypes: dict[str, int]
    problem: str | None


class Facts(TypedDict):
    """All facts about a checkpoint or a config file; sizes in bytes. computes_in: by device, what `--dtype auto`
    computes in."""

    path: str
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
