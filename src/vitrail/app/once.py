"""What takes seconds to make: made by the first who asks, while the others wait, and kept."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock
from typing import Any

__all__ = ["Once"]


class Once:
    """Values by name, each made once; any thread may ask. A failure goes to all who wait, and is not kept."""

    def __init__(self) -> None:
        """Start empty."""
        self._lock = Lock()
        self._values: dict[str, Future[Any]] = {}

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """The value of a name.

        Args:
            key: Its name.
            make: Makes it.

        Returns:
            What `make` returned, now or earlier.
        """
        with self._lock:
            value = self._values.get(key)
            is_missing = value is None
            if value is None:
                value = self._values[key] = Future()
        if is_missing:
            try:
                value.set_result(make())
            except BaseException as failure:  # noqa: BLE001  (handed to everyone who waits)
                with self._lock:
                    del self._values[key]
                value.set_exception(failure)
        return value.result()
