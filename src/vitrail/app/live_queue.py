"""The queue in front of the live model: one worker, a bounded number of waiting calls, none for clients who left."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from threading import Lock
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import xarray as xr
from jaxtyping import Float32, Int
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import Request

from vitrail.errors import VitrailError
from vitrail.study.plan import ModelIdentity

__all__ = ["LiveModelProtocol", "LiveQueue"]

Result = TypeVar("Result")

DISCONNECT_POLL_S = 0.1
"""How often a waiting request looks whether its client is still there: below what a person notices."""

NO_MODEL = (
    "No model is open behind this page, so nothing can be computed live. "
    "Start it with the model: `vitrail open STUDY` without --no-live, where the model's weights are."
)
LOADING = "The model is being opened; what is stored is here already. Try again in a moment."
CLOSING = "The server is closing."
BUSY = "The model is busy with {n} other requests. Try again in a moment."


@runtime_checkable
class AnalysisPartsProtocol(Protocol):
    """What an analysis computes of one image, as `vitrail.live.AnalysisParts`."""

    @property
    def names(self) -> tuple[tuple[str, ...], ...]:
        """Names of the arrays of each part."""
        ...

    @property
    def left_out(self) -> Mapping[str, str]:
        """Reasons by the name of each measure that the model does not have."""
        ...


@runtime_checkable
class LiveModelProtocol(Protocol):
    """The calls that the server makes on a model; `vitrail.live.LiveModel` has them, and the server needs no torch."""

    @property
    def identity(self) -> ModelIdentity:
        """What tells the model from others, as `vitrail.live.LiveModel.identity`."""
        ...

    def attention(self, image: Image.Image, layer: int) -> Float32[np.ndarray, "head token token"]:
        """Attention of every head of a layer, as `vitrail.live.LiveModel.attention`.

        Args:
            image: A photograph.
            layer: Index of the layer.

        Returns:
            Attention weights, 0 to 1.
        """
        ...

    def head_maps(self, image: Image.Image) -> Float32[np.ndarray, "layer head patch"]:
        """What every head gives each patch, as `vitrail.live.LiveModel.head_maps`.

        Args:
            image: A photograph.

        Returns:
            Attention weights; NaN for heads that a layer does not have.
        """
        ...

    def modes(self, image: Image.Image, layer: int, head: int) -> Float32[np.ndarray, "mode class"]:
        """Class probabilities in each region mode of a head, as `vitrail.live.LiveModel.modes`.

        Args:
            image: A photograph.
            layer: Index of the layer.
            head: Index of the head.

        Returns:
            0 to 1; NaN for modes that the layer does not have.
        """
        ...

    def parts(self, analysis: str) -> AnalysisPartsProtocol:
        """What an analysis computes of one image, in parts, as `vitrail.live.LiveModel.parts`.

        Args:
            analysis: Name of the analysis.

        Returns:
            The names of the arrays that are computed together.
        """
        ...

    def look_part(
        self,
        image: Image.Image,
        analysis: str,
        part: Sequence[str],
        patch: int | None,
        channel: int | None,
        mask: Int[np.ndarray, "row column"] | None = None,
    ) -> xr.Dataset:
        """Some arrays of one image, as `vitrail.live.LiveModel.look_part`.

        Args:
            image: A photograph.
            analysis: Name of the analysis.
            part: Names of the arrays.
            patch: The patch to look at; None: the model's choice.
            channel: The channel to look at; None: the model's choice.
            mask: Instance ids of the photograph's objects; None without any.

        Returns:
            The arrays, with their declarations as attributes.
        """
        ...

    def what_if(self, image: Image.Image, **changes: Any) -> xr.Dataset:
        """What the answer becomes if something is changed, as `vitrail.live.LiveModel.what_if`.

        Args:
            image: A photograph.
            changes: The keyword arguments of `vitrail.what_if.what_if`.

        Returns:
            Answer, drift of tokens and attention, step by step.
        """
        ...


OpenModel = Callable[[], LiveModelProtocol]
"""Opens the model behind the page; raises `VitrailError` where it cannot be opened."""

log = logging.getLogger(__name__)


class LiveQueue:
    """Runs calls on the live model one at a time; further calls wait, up to a limit."""

    def __init__(
        self,
        model: "LiveModelProtocol | OpenModel | None",
        check: Callable[[LiveModelProtocol], None] = lambda _model: None,
        max_waiting: int = 8,
    ) -> None:
        """Start the worker.

        Args:
            model: The model to call; a function that opens one, called by `open_model`; or None for a study that is
                open without one.
            check: Called with the open model before it is used; raises `VitrailError` to refuse it.
            max_waiting: How many calls may wait behind the one that runs.

        Raises:
            VitrailError: An open model was handed over, and `check` refuses it.
        """
        self._model = model if isinstance(model, LiveModelProtocol) else None
        self._open = None if isinstance(model, LiveModelProtocol) else model
        self._check = check
        if self._model is not None:
            check(self._model)
        self._opening = False
        self._failure = ""
        self.max_waiting = max_waiting
        self._n_pending = 0
        self._is_closing = False
        self._count_lock = Lock()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="vitrail-live")

    def open_model(self) -> None:
        """Open the model that was handed over as a function; a second call does nothing. Called on its own thread.

        A model that cannot be opened leaves the page without one: `status` says why.
        """
        open_model = self._open
        if open_model is None or self._opening:
            return
        self._opening = True
        try:
            model = open_model()
            self._check(model)
            self._model = model
        except VitrailError as failure:
            self._failure = str(failure)
        except Exception as failure:  # a model's own code may raise anything, and the stored study goes on without it
            log.exception("the model behind the page could not be opened")
            self._failure = f"The model could not be opened ({type(failure).__name__}); the server's log says where."
        finally:
            self._open = None

    def status(self) -> dict[str, str]:
        """Where the model stands.

        Returns:
            `state`: "none", "loading", "ready" or "failed"; `reason`: why it failed, or what to do where there is none.
        """
        if self._model is not None:
            return {"state": "ready", "reason": ""}
        if self._open is not None:
            return {"state": "loading", "reason": LOADING}
        if self._failure:
            return {"state": "failed", "reason": self._failure}
        return {"state": "none", "reason": NO_MODEL}

    def refuse_without_model(self) -> None:
        """Refuse before a body is read.

        Raises:
            HTTPException: 503 without a model, or while it is opened.
        """
        if self._model is None:
            status = self.status()
            headers = {"Retry-After": "1"} if status["state"] == "loading" else None
            raise HTTPException(503, status["reason"], headers=headers)

    async def run(self, request: Request, work: Callable[[Any], Result]) -> Result:
        """Run `work` on the worker thread; work that still waits when its client leaves is dropped.

        Args:
            request: The request that asks, watched for a client who leaves.
            work: Called with the model.

        Returns:
            What `work` returns.

        Raises:
            HTTPException: 503 without a model, with a full queue or while the server closes; 499 when the client left.
        """
        self.refuse_without_model()
        if self._is_closing:
            raise HTTPException(503, CLOSING)
        model = self._model
        with self._count_lock:
            if self._n_pending > self.max_waiting:
                raise HTTPException(503, BUSY.format(n=self._n_pending), headers={"Retry-After": "1"})
            self._n_pending += 1
        try:
            future = self._worker.submit(work, model)
        except RuntimeError as closed:  # the executor refuses work once it is shut down
            self._finish_one(None)
            raise HTTPException(503, CLOSING) from closed
        future.add_done_callback(self._finish_one)
        pending = asyncio.wrap_future(future)
        try:
            while not pending.done():
                if self._is_closing:
                    raise HTTPException(503, CLOSING)
                await asyncio.wait({pending}, timeout=DISCONNECT_POLL_S)
                if not pending.done() and await request.is_disconnected():
                    raise HTTPException(499, "The page has left.")
        finally:  # also where the request itself is cancelled, as a stream is when its page leaves
            future.cancel()
        try:
            return pending.result()
        except (CancelledError, asyncio.CancelledError) as cancelled:
            raise HTTPException(503, CLOSING) from cancelled

    def _finish_one(self, _future: object) -> None:
        with self._count_lock:
            self._n_pending -= 1

    def refuse_more(self) -> None:
        """Answer every call with 503 from now on. Takes no lock, so that a handler of signals may call it."""
        self._is_closing = True

    def close(self) -> None:
        """Drop the calls that wait; the one that runs ends by itself."""
        self.refuse_more()
        self._worker.shutdown(wait=False, cancel_futures=True)
