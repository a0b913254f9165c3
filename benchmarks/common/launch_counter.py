"""Counts what a pass on a GPU would launch, without a GPU: the backends of CUDA on tensors of the meta device."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from twotower.ops import registry

MODULES = (
    "activation", "argmax", "attention", "draft_sweep", "experts", "linear", "low_rank", "mamba_block", "norm", "rope",
    "routing", "state_update",
)  # fmt: skip
# Operations that allocate or describe memory, and launch nothing.
SILENT = frozenset(
    {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh", "_unsafe_view"}
)
ONE_BY_ONE = frozenset({"_foreach_copy_"})  # tensors of different shapes are copied one by one


class LaunchCounter(TorchDispatchMode):
    """Counts launches and calls of torch operations by category. category: of what runs now."""

    def __init__(self) -> None:
        super().__init__()
        self.category = ""
        self.launches: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        launched = 0 if name in SILENT or _is_view(func) else 1
        if name in ONE_BY_ONE:
            launched = len(args[0])
        self.note(name, launched)
        self.calls[self.category] += 1
        return func(*args, **(kwargs or {}))

    def note(self, name: str, launches: int = 1) -> None:
        """Adds launches of one name to the current category."""
        self.launches[self.category] += launches
        if launches:
            self.operations[name] += launches

    @contextmanager
    def of(self, category: str) -> Iterator[None]:
        """Counts a block as one category."""
        before, self.category = self.category, category
        try:
            yield
        finally:
            self.category = before


class CountedKernel:
    """Replaces a Triton kernel; a launch is counted, and computes nothing."""

    def __init__(self, name: str, counter: LaunchCounter) -> None:
        self.name, self.counter = name, counter

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *_, **__: self.counter.note(self.name)


def _is_view(func: Any) -> bool:
    """Whether an operation returns a view: its result aliases an argument that it does not write."""
    infos = [part.alias_info for part in func._schema.returns]
    return any(info is not None and not info.is_write for info in infos)


@contextmanager
def cuda_backends(experts: str = "grouped-gemm") -> Iterator[LaunchCounter]:
    """Counts launches while the backends of a GPU with bf16 are selected. experts: the backend of plain experts."""
    counter, real = LaunchCounter(), registry._select
    replaced: list[tuple[Any, str, Any]] = []

    def select(op: str, *_: object) -> registry.Backend:
        backends = [b for b in registry.REGISTRY[op] if b.name not in ("native", "sorted-loop") and not b.trains]
        return next((b for b in backends if op == "experts" and b.name == experts), backends[0])

    registry._select = select  # type: ignore[assignment]
    try:
        for name in MODULES:
            module = importlib.import_module(f"twotower.ops.triton.{name}")
            for kernel in [own for own in vars(module) if own.endswith("_kernel")]:
                replaced.append((module, kernel, getattr(module, kernel)))
                setattr(module, kernel, CountedKernel(f"{name}.{kernel}", counter))
        with counter:
            yield counter
    finally:
        registry._select = real
        for module, kernel, own in replaced:
            setattr(module, kernel, own)
