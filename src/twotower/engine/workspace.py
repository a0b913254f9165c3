"""What the calls on one model share and what outlives each call."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from twotower.cache.hybrid_cache import TowerState
from twotower.decoding.auto_mode import ModeChooser
from twotower.decoding.draft_controller import DraftController, bucket
from twotower.decoding.params import GenerationParams

MOST_CONTROLLERS = 64
STATE_BYTES = 256 << 20  # a larger state is not kept between calls

Key = tuple[int, ...]
Item = TypeVar("Item")


class Workspace:
    """Draft controllers, measured costs of passes, and one idle state, of one model.

    Owned by the model, bounded, and emptied by `release`, which moving the model calls too. Copying or pickling a model
    gives the copy an empty workspace. Calls from several threads may share it: a state is lent to one call at a time.
    """

    def __init__(self) -> None:
        self.mode_chooser = ModeChooser()
        self._controllers: OrderedDict[Key, DraftController] = OrderedDict()
        self._idle: tuple[Key, TowerState] | None = None
        self._lock = threading.Lock()

    def draft_controller(self, params: GenerationParams, rows: int, longest: int) -> DraftController:
        """The controller for a sequence that begins: a new one where the draft depth is fixed, else the one of earlier
        sequences with a like number of neighbours and of tokens (each within a factor of 2 and 4).

        rows: sequences that run together; longest: tokens of the longest text so far.
        """
        if params.fixed_draft is not None:
            return DraftController(params.fixed_draft)
        key = bucket(rows), params.block_size, longest.bit_length() // 2
        with self._lock:
            controller = self._controllers.setdefault(key, DraftController())
            self._controllers.move_to_end(key)
            if len(self._controllers) > MOST_CONTROLLERS:
                self._controllers.popitem(last=False)
            return controller.begin()

    def borrow_state(self, rows: int, columns: int, make: Callable[[], TowerState]) -> TowerState:
        """The idle state, if it has this shape, else a new one. The borrower owns the state until `return_state`."""
        with self._lock:
            idle, self._idle = self._idle, None
        return idle[1] if idle is not None and idle[0] == (rows, columns) else make()

    def return_state(self, state: TowerState) -> None:
        """Keeps a state without sequences for the next call, if the state is small enough."""
        if state.nbytes <= STATE_BYTES:
            with self._lock:
                self._idle = (state.rows, state.capacity), state

    def release(self) -> None:
        """Frees everything: memory, measurements, and what was learned."""
        with self._lock:
            self.mode_chooser = ModeChooser()
            self._controllers.clear()
            self._idle = None

    def __reduce__(self) -> tuple[type[Workspace], tuple[()]]:
        return Workspace, ()
