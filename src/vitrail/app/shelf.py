"""A bounded, thread-safe store of arrays that are dear to make: each is made once, however many ask at once."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Lock

import numpy as np

__all__ = ["Shelf"]


class Shelf:
    """Keeps the arrays last asked for, up to `max_bytes` together; the one asked for longest ago goes first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, Future[np.ndarray]] = OrderedDict()
        self._lock = Lock()

    def take(self, key: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The array under `key`, made by `make()` if it is not there; what `make` raises reaches everyone waiting."""
        with self._lock:
            entry = self._entries.get(key)
            mine = entry is None
            if entry is None:
                entry = self._entries[key] = Future()
            self._entries.move_to_end(key)
        if mine:
            self._fill(key, entry, make)
        return entry.result()

    def holds(self, key: Hashable) -> bool:
        """Whether `take` would answer at once."""
        with self._lock:
            entry = self._entries.get(key)
            return entry is not None and entry.done()

    def _fill(self, key: Hashable, entry: "Future[np.ndarray]", make: Callable[[], np.ndarray]) -> None:
        try:
            entry.set_result(make())
        except BaseException as failure:  # noqa: BLE001  (handed to everyone who waits, below)
            with self._lock:
                self._entries.pop(key, None)
            entry.set_exception(failure)
            return
        self._trim()

    def _trim(self) -> None:
        with self._lock:
            sizes = {key: entry.result().nbytes for key, entry in self._entries.items() if entry.done()}
            total = sum(sizes.values())
            for key in list(sizes)[:-1]:
                if total <= self.max_bytes:
                    return
                total -= sizes[key]
                del self._entries[key]
