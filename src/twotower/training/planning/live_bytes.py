"""Counts the bytes of tensor storages from their creation until they are freed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence, ValuesView

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Tracks storages that are created in its `with` block: `live` bytes now, `peak` bytes since `restart`.

    Storages that existed before count as 0 bytes.
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        self._meet((args, kwargs.values()), new=False)
        out = func(*args, **kwargs)
        self._meet(out, new=True)
        return out

    def restart(self) -> None:
        self.peak = self.live

    def _meet(self, value: object, new: bool) -> None:
        """Tracks every tensor in an operation's arguments or results."""
        if isinstance(value, Tensor):
            self._follow(value, new)
        elif isinstance(value, list | tuple | ValuesView):
            for part in value:
                self._meet(part, new)

    def _follow(self, tensor: Tensor, new: bool) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) in self._known:
            return
        self._known.add(key)
        size = storage.nbytes() if new else 0
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
