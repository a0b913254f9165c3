"""On out-of-memory, repeats a pass with half the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed on an accelerator or on the host (there torch raises a plain RuntimeError)."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def split_on_oom(
    run: Callable[[Sequence[Item]], list[Result]],
    items: Sequence[Item],
    free_memory: Callable[[], object],
    fail: Callable[[Item, Exception], Sequence[Result]],
) -> list[Result]:
    """Returns run(items); on out-of-memory, runs each half. An item that does not fit alone is given to `fail`.

    `free_memory` runs before each further attempt. A run that raises must have changed nothing.
    """
    problem: Exception
    try:
        return run(items)
    except Exception as error:
        if not out_of_memory(error):
            raise
        problem = error.with_traceback(None)  # the frames hold the tensors of the pass
    free_memory()
    if len(items) == 1:
        return list(fail(items[0], problem))
    half = len(items) // 2
    return [result for part in (items[:half], items[half:]) for result in split_on_oom(run, part, free_memory, fail)]
