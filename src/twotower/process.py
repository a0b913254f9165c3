"""What a program sets for its whole process: how malloc keeps memory, and the number of CPU threads.

Programs call `configure_process` once, before they compute: the command line, the recipes, the benchmarks. A library
leaves both to its caller, so no other module calls `mallopt` or `torch.set_num_threads`. In a process that never calls
`configure_process`, nothing in this module has an effect.
"""

from __future__ import annotations

from twotower import allocator, options

# Operations this small gain nothing from a second thread, and waiting for one on a busy machine is 3× slower.
ONE_THREAD_BELOW = 50_000_000

_fit_threads = False  # whether the program left the number of threads to `fit_threads_to_model`


def configure_process(threads: int | None = None) -> None:
    """Prepares this process for computing.

    threads: CPU threads of torch; None: one as soon as a small model is loaded, else torch's default.

    Raises:
        ArgumentError: an environment variable has a value that is not allowed.
    """
    global _fit_threads
    options.current()
    allocator.keep_large_blocks()
    _fit_threads = threads is None
    if threads is not None:
        _set_threads(threads)


def fit_threads_to_model(weights: int) -> None:
    """Sets one thread for a model of fewer than `ONE_THREAD_BELOW` weights, if the program named no number itself."""
    if _fit_threads and weights < ONE_THREAD_BELOW:
        _set_threads(1)


def _set_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)
