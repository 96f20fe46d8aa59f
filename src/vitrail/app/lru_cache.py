"""A bounded, thread-safe cache of arrays that are costly to make: each is made once, however many threads ask."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Lock
from typing import Generic, Protocol, TypeVar, runtime_checkable

__all__ = ["LRUCache", "Value"]


@runtime_checkable
class _Sized(Protocol):
    """An array, or a dataset of arrays."""

    @property
    def nbytes(self) -> int: ...


Value = TypeVar("Value", bound=_Sized)


class LRUCache(Generic[Value]):
    """Keeps the arrays used last, up to `max_bytes` together; the least recently used goes first."""

    def __init__(self, max_bytes: int) -> None:
        """Start empty.

        Args:
            max_bytes: Limit for all arrays together. The array used last stays even if it is larger.
        """
        self.max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, Future[Value]] = OrderedDict()
        self._lock = Lock()

    def get_or_create(self, key: Hashable, create: Callable[[], Value]) -> Value:
        """The array under a key, created if it is missing.

        Args:
            key: Names the array.
            create: Makes the array; called by one thread while the others wait for its result.

        Returns:
            The array, the same object for every caller.

        Raises:
            BaseException: Whatever `create` raises, to every thread that waits; the key stays free.
        """
        with self._lock:
            entry = self._entries.get(key)
            is_missing = entry is None
            if entry is None:
                entry = self._entries[key] = Future()
            self._entries.move_to_end(key)
        if is_missing:
            self._fill(key, entry, create)
        return entry.result()

    def get(self, key: Hashable) -> Value | None:
        """The array under a key, without waiting.

        Args:
            key: Names the array.

        Returns:
            The array, or None if it is missing or still being made.
        """
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or not entry.done():
                return None
            self._entries.move_to_end(key)
        return entry.result()

    def __contains__(self, key: Hashable) -> bool:
        """Whether `get_or_create` would return at once."""
        with self._lock:
            entry = self._entries.get(key)
            return entry is not None and entry.done()

    def _fill(self, key: Hashable, entry: "Future[Value]", create: Callable[[], Value]) -> None:
        try:
            entry.set_result(create())
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
