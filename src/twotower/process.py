"""Settings of a whole process: malloc and the number of CPU threads.

Programs (the command line, the recipes, the benchmarks) call `configure_process` once, before they compute. A library
must not change a process, so no other module calls `mallopt` or `torch.set_num_threads`. Without a call of
`configure_process`, this module has no effect.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from twotower import options

# Smaller models gain nothing from a second thread. On a busy machine, waiting for the thread made them 3× slower.
ONE_THREAD_BELOW = 50_000_000

_fit_threads = False  # whether `fit_threads_to_model` may set the number of threads


def configure_process(threads: int | None = None) -> None:
    """Sets malloc's thresholds and the number of CPU threads of this process.

    threads: CPU threads of torch. None: torch's default, and one thread once a small model is loaded.

    Raises:
        ArgumentError: an environment variable has a value that is not allowed.
    """
    from twotower import allocator  # here, so that the command line starts fast

    global _fit_threads
    options.current()
    allocator.keep_large_blocks()
    _fit_threads = threads is None
    if threads is not None:
        _set_threads(threads)


def fit_threads_to_model(weights: int) -> None:
    """Sets one thread for a model of fewer than `ONE_THREAD_BELOW` weights, unless the program chose a number."""
    if _fit_threads and weights < ONE_THREAD_BELOW:
        _set_threads(1)


def _set_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


@contextmanager
def without_messages(logger: str) -> Iterator[None]:
    """Hides warnings, and what this logger says below an error, while the block runs.

    For parts of torch whose messages concern torch itself: its ONNX exporter, and checkpoints of a single process.
    """
    import logging  # here, because the start of the command line needs neither
    import warnings

    own = logging.getLogger(logger)
    before = own.level
    own.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        own.setLevel(before)
