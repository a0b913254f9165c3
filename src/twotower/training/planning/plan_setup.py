"""The training run that a plan is made for, and the assumptions of the plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from twotower.errors import ArgumentError

ContextRole = Literal["frozen", "trained", "tied"]
PlanDtype = Literal["bfloat16", "float32"]
GIB = 2**30
RECIPE_TOKENS = 2.1e12  # of the released denoiser


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The run to be planned.

    batch_size: rows of one step over all GPUs (None: one micro-batch each). micro_batch_size: rows of one pass on
    one GPU. peak_tflops: of one GPU, dense, in dtype. adapters: their rank, if the denoiser is adapters;
    draft_head: that of a draft head. teacher: the targets are the AR model's distribution. Assumed:
    utilisation (a share of the peak, recomputation counted as work); bandwidth_gb (GB/s at which one GPU gathers:
    NCCL's bus bandwidth); reserve_gib (CUDA's own memory, NCCL's buffers, fragmentation).
    """

    gpus: int = 8
    gpu_memory_gib: float = 80.0
    row_length: int = 8192
    batch_size: int | None = None
    micro_batch_size: int = 1
    block_size: int = 16
    dtype: PlanDtype = "bfloat16"
    activation_checkpointing: bool = True
    context: ContextRole = "frozen"
    adapters: int | None = None
    draft_head: int | None = None
    teacher: bool = False
    tokens: float = RECIPE_TOKENS
    peak_tflops: float = 989.0
    utilisation: float = 0.35
    bandwidth_gb: float = 300.0
    reserve_gib: float = 4.0

    def __post_init__(self) -> None:
        positive = ("gpus", "gpu_memory_gib", "row_length", "micro_batch_size", "block_size", "tokens", "peak_tflops")
        for name in (*positive, "utilisation", "bandwidth_gb"):
            if not getattr(self, name) > 0:
                raise ArgumentError(f"{name} is {getattr(self, name)}; give a number above 0")
        if self.reserve_gib < 0:
            raise ArgumentError(f"reserve_gib is {self.reserve_gib}; give 0 or more")
        if self.utilisation > 1:
            raise ArgumentError(f"utilisation is {self.utilisation}; give a fraction of the peak, like 0.35")
        if self.adapters is not None and (self.adapters < 1 or self.context != "frozen"):
            raise ArgumentError(
                f"adapters is {self.adapters} and context is {self.context!r}; adapters have a rank of 1 or more, on a "
                "frozen context tower"
            )
        if self.row_length % self.block_size:
            raise ArgumentError(f"row_length is {self.row_length}; give a multiple of the block size {self.block_size}")
        if self.batch_size is not None and self.batch_size < self.gpus:
            raise ArgumentError(
                f"batch_size is {self.batch_size}, fewer than {self.gpus} GPUs; give at least one row a GPU"
            )
        for name, choices in (("dtype", get_args(PlanDtype)), ("context", get_args(ContextRole))):
            if getattr(self, name) not in choices:
                raise ArgumentError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")

    @property
    def step_rows(self) -> int:
        """Rows of one step over all GPUs."""
        return self.batch_size or self.gpus * self.micro_batch_size

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one GPU in one step."""
        rows = -(-self.step_rows // self.gpus)
        return -(-rows // self.micro_batch_size)

    def on(self, gpus: int) -> Setup:
        """The same run on another number of GPUs. The batch size grows to one row a GPU where needed."""
        batch_size = None if self.batch_size is None else max(self.batch_size, gpus)
        return replace(self, gpus=gpus, batch_size=batch_size)
