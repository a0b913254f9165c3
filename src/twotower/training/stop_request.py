"""SIGTERM and Ctrl-C during training: the run finishes its step, writes a checkpoint, and ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

from twotower.training.fsdp import World

EXIT_CODE = 128  # plus the number of the signal


class StopRequest:
    """Notes SIGTERM and SIGINT in a `with` block of the main thread. A second signal acts as it did before the block.

    A signal that the parent process has switched off stays off.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._number = 0  # of the signal that came
        self._before: dict[int, signal.Handlers | int | Callable[[int, FrameType | None], object] | None] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._restore()

    def came(self) -> bool:
        """Whether a signal came to any process; the same result on every process."""
        return bool(self._world.total(self._number > 0)) if self._world.size > 1 else self._number > 0

    def end(self) -> None:
        """Ends the program as after the signal, if one came to this process.

        Raises:
            KeyboardInterrupt: after SIGINT.
            SystemExit: after SIGTERM, or if the signal came to another process.
        """
        if self._number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(EXIT_CODE + signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
