"""`Workspace`: what all calls on one model share."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakSet

import torch

from twotower.cache.hybrid_cache import TowerState
from twotower.decoding.auto_mode import ModeChooser
from twotower.decoding.draft_controller import DEPTHS, DraftController, DraftControllers
from twotower.decoding.params import GenerationParams

MAX_CONTROLLERS = 64
MAX_IDLE_STATE_BYTES = 256 << 20  # on a CPU; larger states are not kept between calls
MAX_IDLE_STATES = 4  # on a GPU: CUDA graphs read the pools of a state in place, so a new state needs new graphs


class StateShape(NamedTuple):
    """The shape of a state: its rows, their shared KV slots, dtype, device, and longest pass (see `TowerState`)."""

    rows: int
    kv_slots: int
    dtype: torch.dtype
    device: torch.device
    longest_pass: int | None = None

    @classmethod
    def of(cls, state: TowerState) -> StateShape:
        return cls(state.rows, state.capacity, state.dtype, state.lengths.device, state.longest_pass)


def idle_limits(device: torch.device) -> tuple[int, int]:
    """How many states are kept between calls, and how many bytes they have together; a 16th of a GPU's memory."""
    if device.type != "cuda":
        return 1, MAX_IDLE_STATE_BYTES
    return MAX_IDLE_STATES, int(torch.cuda.get_device_properties(device).total_memory) // 16


class Workspace:
    """Draft controllers, measured costs of passes, and idle states, of one model: one on a CPU, several on a GPU.

    The model owns it. Its size is bounded, and `release` empties it; moving the model calls `release`. A copy or pickle
    of a model has an empty workspace. Calls from several threads may share it: one call at a time borrows the state.
    """

    def __init__(self) -> None:
        self.mode_chooser = ModeChooser()
        self._controllers: OrderedDict[tuple[int, int, bool], DraftControllers] = OrderedDict()
        self._idle: list[TowerState] = []  # the last returned is last
        self._lent: WeakSet[TowerState] = WeakSet()  # borrowed since the last release: only these come back
        self._lock = threading.RLock()  # re-entrant: garbage collection may close a stream at any allocation

    def draft_controller(
        self, params: GenerationParams, rows: int, longest: int, one_pass: bool = False
    ) -> DraftController:
        """The draft controller of a new sequence.

        A fixed draft depth has a new controller. Other sequences share the controllers of earlier sequences with a
        similar number of tokens (within a factor of 4), and if the denoiser is adapters (one_pass), with any number,
        because rows of both kinds would share passes. rows: sequences that run together; longest: tokens of the
        longest text so far.
        """
        if params.fixed_draft_depth is not None:
            return DraftController(params.fixed_draft_depth)
        depths = (0, 1) if one_pass else DEPTHS
        key = params.block_size, 0 if one_pass else longest.bit_length() // 2, one_pass
        with self._lock:
            group = self._controllers.setdefault(key, DraftControllers(depths))
            self._controllers.move_to_end(key)
            if len(self._controllers) > MAX_CONTROLLERS:
                self._controllers.popitem(last=False)
            return group.of_rows(rows).begin(rows)

    def borrow_state(self, shape: StateShape, make: Callable[[], TowerState]) -> TowerState:
        """Returns an idle state of this shape, else a new one. The caller owns it until `return_state`."""
        with self._lock:
            state = next((idle for idle in self._idle if StateShape.of(idle) == shape), None)
            self._idle = [idle for idle in self._idle if idle is not state]
            if state is None:
                self._make_room(shape.device, MAX_IDLE_STATE_BYTES)
        state = make() if state is None else state
        with self._lock:
            self._lent.add(state)
        return state

    def return_state(self, state: TowerState) -> None:
        """Keeps a state for the next call, if it is small enough and not made in inference mode.

        Tensors made in inference mode cannot be written outside of it.
        """
        state.free_all()
        with self._lock:
            if state in self._lent:
                self._lent.discard(state)
                _, most = idle_limits(state.lengths.device)
                if state.nbytes <= most and not state.is_inference:
                    self._make_room(state.lengths.device, state.nbytes)
                    self._idle.append(state)

    def _make_room(self, device: torch.device, nbytes: int) -> None:
        """Drops the oldest idle states until one more of this size is within the limits."""
        count, most = idle_limits(device)
        while self._idle and (len(self._idle) >= count or sum(idle.nbytes for idle in self._idle) + nbytes > most):
            del self._idle[0]

    def free_memory(self) -> None:
        """Frees the idle states and what the allocator of a GPU keeps, when memory is short."""
        with self._lock:
            self._idle.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def release(self) -> None:
        """Frees the state, the measured costs and the draft controllers."""
        with self._lock:
            self.mode_chooser = ModeChooser()
            self._controllers.clear()
            self._idle = []
            self._lent = WeakSet()

    def __reduce__(self) -> tuple[type[Workspace], tuple[()]]:
        return Workspace, ()
