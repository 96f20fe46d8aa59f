"""The live model's desk: one worker, a short queue, and no work for those who have left."""

import asyncio
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from threading import Lock
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Float32
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import Request

__all__ = ["Desk", "Live"]

Result = TypeVar("Result")

NO_MODEL = (
    "No model is open behind this page, so nothing can be computed live. "
    "Start it with the model: `vitrail open STUDY` without --no-live, where the model's weights are."
)
BUSY = "The model is busy with {n} other requests. Try again in a moment."


@runtime_checkable
class Live(Protocol):
    """What the server asks of the model; the command line hands one in, so that the server needs no torch."""

    def attention(self, image: Image.Image, layer: int) -> Float32[np.ndarray, "head token token"]: ...

    def modes(self, image: Image.Image, layer: int, head: int) -> Float32[np.ndarray, "mode class"]: ...

    def look(self, image: Image.Image) -> dict[str, np.ndarray]: ...


class Desk:
    """Runs work on the live model one piece at a time; at most `waiting` pieces queue."""

    def __init__(self, live: Live | None, waiting: int = 8) -> None:
        self._live = live
        self.waiting = waiting
        self._taken = 0
        self._counting = Lock()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="vitrail-live")

    @property
    def open(self) -> bool:
        """Whether there is a model."""
        return self._live is not None

    async def ask(self, request: Request, work: Callable[[Any], Result]) -> Result:
        """`work(live)` on the worker thread. Work that still queues when the client leaves is not done.

        Raises `HTTPException` 503 when there is no model or the queue is full.
        """
        live = self._live
        if live is None:
            raise HTTPException(503, NO_MODEL)
        if self._taken > self.waiting:
            raise HTTPException(503, BUSY.format(n=self._taken), headers={"Retry-After": "1"})
        with self._counting:
            self._taken += 1
        future = self._worker.submit(work, live)
        future.add_done_callback(self._done)
        waiting = asyncio.wrap_future(future)
        while not waiting.done():
            await asyncio.wait({waiting}, timeout=0.1)
            if not waiting.done() and await request.is_disconnected():
                future.cancel()
                raise HTTPException(499, "The page has left.")
        try:
            return waiting.result()
        except (CancelledError, asyncio.CancelledError) as cancelled:
            raise HTTPException(503, "The server is closing.") from cancelled

    def _done(self, _future: object) -> None:
        with self._counting:
            self._taken -= 1

    def close(self) -> None:
        """Drop what queues; a piece that runs finishes by itself."""
        self._worker.shutdown(wait=False, cancel_futures=True)
