"""Bounds on what requests hold at the same time: decoded photographs, bodies on their way, summaries."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import anyio
from anyio import CapacityLimiter
from starlette.exceptions import HTTPException

__all__ = ["BoundedWork"]

Result = TypeVar("Result")


class BoundedWork:
    """Work of one kind: `at_once` calls run at the same time, `max_waiting` more wait, and further ones are refused."""

    def __init__(self, name: str, at_once: int, max_waiting: int) -> None:
        """Start idle.

        Args:
            name: The work, in the plural, for the refusal.
            at_once: Calls that run at the same time.
            max_waiting: Calls that wait behind them.
        """
        self.name = name
        self.at_once = at_once
        self.max_waiting = max_waiting
        self._limiter = CapacityLimiter(at_once)
        self._n_pending = 0

    async def run(self, work: Callable[[], Result]) -> Result:
        """Run `work` on a thread once it is its turn.

        Args:
            work: Called without arguments.

        Returns:
            What `work` returns.

        Raises:
            HTTPException: 503 if too many calls wait already.
        """
        async with self.slot():
            return await anyio.to_thread.run_sync(work, limiter=self._limiter)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """A place among the calls that run or wait, held inside the block.

        Raises:
            HTTPException: 503 if there is none.

        Yields:
            Nothing; the slot is free again after the block.
        """
        if self._n_pending >= self.at_once + self.max_waiting:
            sentence = f"The server is busy with {self._n_pending} other {self.name}. Try again in a moment."
            raise HTTPException(503, sentence, headers={"Retry-After": "1"})
        self._n_pending += 1
        try:
            yield
        finally:
            self._n_pending -= 1
