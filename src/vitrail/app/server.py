"""The local server: the study as arrays, thumbnails and photographs, and the live model when there is one.

Every answer is an index looked up in the study; nothing from a request is joined to a path. No route writes: the live
look keeps the visitor's photograph in memory only.
"""

import errno
import logging
import secrets
import socket
import threading
import webbrowser
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from vitrail.app.answers import binary, jpeg, json_answer, parse_images, parse_index, read_body, refusal
from vitrail.app.compare import routes as compare_routes
from vitrail.app.curves import has_curves
from vitrail.app.curves import routes as curve_routes
from vitrail.app.description import describe_study
from vitrail.app.findings import routes as findings_routes
from vitrail.app.image_maps import ImageMaps
from vitrail.app.image_maps import routes as image_map_routes
from vitrail.app.limits import BoundedWork
from vitrail.app.live_queue import LiveModelProtocol, LiveQueue, OpenModel
from vitrail.app.look import MAX_PIXELS, MAX_UPLOAD_BYTES
from vitrail.app.look import routes as look_routes
from vitrail.app.lru_cache import LRUCache, Value
from vitrail.app.middleware import (
    ALL_ADDRESSES,
    HEADERS,
    LOOPBACK_HOSTS,
    AccessMiddleware,
    ChangedStudyMiddleware,
    is_loopback,
)
from vitrail.app.patterns import routes as pattern_routes
from vitrail.app.pictures import Photographs, Thumbnails, Uploads, encode_jpeg, model_view
from vitrail.app.static_files import NOT_BUILT, built_page
from vitrail.app.study_arrays import StudyArrays, parse_image_set
from vitrail.app.summary import STATISTICS, SetSummary
from vitrail.app.what_if import routes as what_if_routes
from vitrail.comparison.pairs import refuse_same_folder
from vitrail.errors import UsageError, VitrailError
from vitrail.study.store import PARTS, PLAN, open_study, read_manifest, read_plan

__all__ = ["create_app", "serve"]

MAX_LIST_BYTES = 4 * 2**20
"""Cap on a list of images: half a million indices."""

MAP_CACHE_BYTES = 256 * 2**20
"""Attention maps in memory: the twelve heads of thirty layers of a ViT at 224 pixels."""

LOOK_CACHE_BYTES = 128 * 2**20
"""Everything that is computed of single images: of a ViT-B about 20 MB an image."""

UPLOAD_THUMBNAIL_PX = 64
BACKLOG = 128
"""Connections that wait while the server starts; more than a browser opens."""

BROWSER_DELAY_S = 0.5
"""The server listens already; the browser is opened once it has begun to answer."""

SHUTDOWN_S = 2
"""How long requests may go on after the server was told to stop."""

PHOTOGRAPHS_AT_ONCE = 2
PHOTOGRAPHS_WAITING = 64
"""A decoded photograph may have a quarter of a gigabyte, so few are decoded together; many may wait for it."""

UPLOADS_AT_ONCE = 4
"""Bodies of uploads on their way or waiting for the model: at most 128 MB. They are decoded one at a time."""

SUMMARIES_AT_ONCE = 2
SUMMARIES_WAITING = 30
"""Several times what a page asks for together. Their threads are not those of the other routes, which go on."""

IDENTITY = ("weight_digest", "data_digest", "n_images")
"""Fields of a plan that differ where arrays of the study are not those that were opened."""

OPEN_AGAIN = "Start `vitrail open` again."

SLICED = ("image", "layer", "head", "token_channel")
"""Dimensions of arrays that a request may fix."""

log = logging.getLogger(__name__)


class AppState:
    """State that the routes share: the study, its pictures, the uploads and the live model.

    Attributes:
        in_commands: How commands on the page call the study's folder: as its user did, who can run them as they are. A
            page that goes to other machines has the name alone.
    """

    def __init__(
        self, study_path: Path, model: LiveModelProtocol | OpenModel | None, others: Sequence[Path] = ()
    ) -> None:
        """Open the study.

        Args:
            study_path: Its folder.
            model: The live model, a function that opens it, or None.
            others: Folders of studies of the same images, to compare with.

        Raises:
            StudyError: For a folder that is no study.
            UsageError: The study is to be compared with itself.
            WeightsMismatch: The live model has other weights than the study's.
        """
        for other in others:
            refuse_same_folder(study_path, other)
        self.folder = study_path
        self.in_commands = str(study_path)
        self.others = tuple(others)
        self._plan_version, self._what_changed = _version(study_path / PLAN), ""
        self._versions = self._versions_on_disk()
        self.plan = read_plan(study_path)
        self.dataset = open_study(study_path, partial=True)
        self.arrays = StudyArrays(self.dataset)
        self.image_maps = ImageMaps(self.arrays, self.plan)
        self.ids: list[str] = self.dataset["image"].values.tolist()
        self.manifest = read_manifest(study_path)
        self.thumbnails = Thumbnails(self.dataset)
        self.photographs = Photographs(self.manifest, self.ids)
        self.uploads = Uploads()
        self.live = LiveQueue(model, lambda opened: self.plan.require_model(opened.identity))
        self.live_arrays: LRUCache[np.ndarray] = LRUCache(MAP_CACHE_BYTES)
        self.looks: LRUCache[xr.Dataset] = LRUCache(LOOK_CACHE_BYTES)
        self.decoding = BoundedWork("photographs", PHOTOGRAPHS_AT_ONCE, PHOTOGRAPHS_WAITING)
        self.receiving = BoundedWork("uploads", UPLOADS_AT_ONCE, 0)
        self.summaries = BoundedWork("summaries", SUMMARIES_AT_ONCE, SUMMARIES_WAITING)

    def what_changed(self) -> str:
        """Whether the folder holds another study by now: of more images, which rewrites its arrays, or one begun anew.

        Returns:
            A sentence; empty while it is the study that was opened. Measures that were added change nothing here.
        """
        version = _version(self.folder / PLAN)
        if version != self._plan_version:
            self._plan_version, self._what_changed = version, self._compare_plan()
        return self._what_changed

    def on_disk(self) -> xr.Dataset:
        """The study as it opens now: images and measures that `vitrail study` adds meanwhile are in it.

        Returns:
            The dataset that was opened while nothing was added.

        Raises:
            StudyError: The folder can no longer be opened.
        """
        return self.dataset if self._versions_on_disk() == self._versions else open_study(self.folder, partial=True)

    def _versions_on_disk(self) -> tuple[tuple[int, ...], ...]:
        """What changes as parts are written, one after the other, and as a plan asks for more."""
        return _version(self.folder / PLAN), _version(self.folder / PARTS)

    def _compare_plan(self) -> str:
        try:
            plan = read_plan(self.folder)
        except VitrailError as error:
            return f"{error} {OPEN_AGAIN}"
        is_same = all(getattr(plan, name) == getattr(self.plan, name) for name in IDENTITY)
        return "" if is_same else f"The study has changed since it was opened. {OPEN_AGAIN}"

    def photograph(self, image: str) -> Image.Image:
        """The photograph that a request names.

        Args:
            image: An index of the study, or an upload's name.

        Returns:
            The decoded photograph.

        Raises:
            HTTPException: 404 if there is none.
        """
        if image.startswith("u"):
            return self.uploads.get(image).photograph
        return self.photographs.read(self.image_index(image))

    def mask(self, image: str) -> np.ndarray | None:
        """The mask of the objects of a photograph, as the study was given it.

        Args:
            image: An index of the study, or an upload's name.

        Returns:
            Instance ids [row, column], 0 for background; None without a mask, and of an upload.

        Raises:
            HTTPException: 404 if there is no such image, or its mask cannot be read again.
        """
        return None if image.startswith("u") else self.photographs.mask(self.image_index(image))

    def image_index(self, image: str) -> int:
        """The index of an image of the study, from a request's text."""
        return self.arrays.index("image", image, self.arrays.array("label"))

    def require_image(self, image: str) -> None:
        """Refuses a name that is neither an image of the study nor an upload.

        Args:
            image: An index of the study, or an upload's name.

        Raises:
            HTTPException: 404 if there is none.
        """
        if image.startswith("u"):
            self.uploads.get(image)
        else:
            self.image_index(image)

    async def ask_model(
        self, request: Request, cache: LRUCache[Value], key: Hashable, compute: Callable[[LiveModelProtocol], Value]
    ) -> Value:
        """What the live model answers, from memory if the same was asked before.

        Args:
            request: Whose answer it is; the model is not asked once its page has left.
            cache: Where the answer is remembered.
            key: Names the answer.
            compute: Asks the model.

        Returns:
            The answer.

        Raises:
            HTTPException: Without a live model, or if its queue is full.
        """
        remembered = cache.get(key)
        if remembered is not None:
            return remembered
        return await self.live.run(request, lambda model: cache.get_or_create(key, lambda: compute(model)))


def _version(file: Path) -> tuple[int, ...]:
    """What tells a file from one that was put in its place."""
    try:
        stat = file.stat()
    except OSError:
        return ()
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


Handler = Callable[[AppState, Request], Awaitable[Response]]


def create_app(
    study_path: str | Path,
    live: LiveModelProtocol | OpenModel | None = None,
    token: str | None = None,
    allowed_hosts: Iterable[str] = LOOPBACK_HOSTS,
    others: Sequence[str | Path] = (),
) -> Starlette:
    """Build the application over one study folder.

    Args:
        study_path: The study.
        live: The model behind the page, or a function that opens it once the server runs; without one the stored
            study opens alone.
        token: A secret that every visitor must have; None asks for none.
        allowed_hosts: Host headers that are answered.
        others: Studies of the same images, to compare with.

    Returns:
        The ASGI application.

    Raises:
        StudyError: For a folder that is no study.
        UsageError: The study is to be compared with itself.
        WeightsMismatch: The open model has other weights than the study's. One that a function opens is refused on the
            page.
    """
    state = AppState(Path(study_path), live, [Path(other) for other in others])

    def route(path: str, handler: Handler, methods: tuple[str, ...] = ("GET",)) -> Route:
        async def endpoint(request: Request) -> Response:
            return await handler(state, request)

        return Route(path, endpoint, methods=list(methods), name=handler.__name__)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        stop = threading.Event()
        warm_up = threading.Thread(target=state.arrays.warm_up, args=(stop,), name="vitrail-warm-up")
        opening = threading.Thread(target=state.live.open_model, name="vitrail-open-model")
        warm_up.start()
        opening.start()
        yield
        state.live.close()
        stop.set()
        # Ending the interpreter under a thread that is inside a library's own code would abort the process.
        await run_in_threadpool(warm_up.join)
        await run_in_threadpool(opening.join)

    app = Starlette(
        routes=[
            route("/api/study", _study),
            route("/api/images", _images),
            route("/api/array/{name}", _array),
            route("/api/summary/{name}", _summary, ("GET", "POST")),
            route("/api/live", _live),
            route("/api/live/attention/{image}", _attention),
            route("/api/live/maps/{image}", _head_maps),
            route("/api/live/modes/{image}", _modes),
            *findings_routes(state),
            *curve_routes(state),
            *look_routes(state),
            *pattern_routes(state),
            *image_map_routes(state),
            *what_if_routes(state),
            *compare_routes(state),
            route("/thumb/{image}", _thumb),
            route("/photo/{image}", _photo),
            *_static_routes(),
        ],
        middleware=[
            Middleware(AccessMiddleware, allowed_hosts=allowed_hosts, token=token),
            Middleware(ChangedStudyMiddleware, reason=state.what_changed),
        ],
        exception_handlers={HTTPException: _http_error, VitrailError: _vitrail_error, Exception: _internal_error},
        lifespan=lifespan,
    )
    app.state.live, app.state.shared = state.live, state
    return app


def serve(
    study_path: str | Path,
    live: LiveModelProtocol | OpenModel | None = None,
    host: str = "127.0.0.1",
    port: int = 8765,
    open_browser: bool = True,
    announce: Callable[[str], None] = print,
    others: Sequence[str | Path] = (),
) -> None:
    """Serve the page until interrupted; a host off loopback gets a random token.

    Args:
        study_path: The study.
        live: The model behind the page, a function that opens it behind the running server, or None.
        host: Name or address to listen on.
        port: 0 takes a free one.
        open_browser: Open the page in the browser.
        announce: Called with the page's address once the server listens.
        others: Studies of the same images, to compare with.

    Raises:
        StudyError: For a folder that is no study.
        WeightsMismatch: The open model has other weights than the study's.
        UsageError: If the address is in use, or none of this machine.
    """
    import uvicorn

    token = None if is_loopback(host) else secrets.token_urlsafe(24)
    machine = socket.gethostname() if host in ALL_ADDRESSES else host
    app = create_app(study_path, live, token, (*LOOPBACK_HOSTS, host, machine), others)
    listener = _open_socket(host, port)
    host_name = f"[{machine}]" if ":" in machine else machine
    address = f"http://{host_name}:{listener.getsockname()[1]}/" + (f"?token={token}" if token else "")
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=SHUTDOWN_S
    )
    with listener:
        announce(address)
        if open_browser:
            threading.Timer(BROWSER_DELAY_S, webbrowser.open, (address,)).start()
        server = uvicorn.Server(config)
        stop = server.handle_exit

        def handle_exit(number: int, frame: Any) -> None:
            app.state.live.refuse_more()  # or a live request would be cut off in the middle, with a traceback
            stop(number, frame)

        server.handle_exit = handle_exit  # type: ignore[method-assign, assignment]
        server.run(sockets=[listener])


def _open_socket(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)  # before the address is announced: whoever reads it may ask at once
    except OSError as failure:
        listener.close()
        is_of_port = failure.errno in (errno.EADDRINUSE, errno.EACCES)
        choose = (
            "Choose another with --port (0 takes a free one)."
            if is_of_port
            else "Give a name or an address of this machine with --host (0.0.0.0 takes all of them)."
        )
        raise UsageError(f"Cannot listen on {host} port {port}: {failure.strerror}. {choose}") from failure
    return listener


# --- the study ---


async def _study(state: AppState, _request: Request) -> Response:
    name = state.folder.resolve().name
    study = await run_in_threadpool(
        lambda: describe_study(
            state.arrays, state.plan, state.manifest, name, state.in_commands, on_disk=state.on_disk()
        )
    )
    upload = {"bytes": MAX_UPLOAD_BYTES, "pixels": MAX_PIXELS}
    others = [folder.resolve().name for folder in state.others]
    more = {"upload": upload, "others": others, "has_curves": await run_in_threadpool(has_curves, state.folder)}
    maps = [{"name": each.name, "title": each.title, "table": each.table} for each in state.image_maps.maps]
    return json_answer(study | {"live": state.live.status(), "maps": maps} | more)


async def _images(state: AppState, _request: Request) -> Response:
    return json_answer({"ids": state.ids})


async def _array(state: AppState, request: Request) -> Response:
    name = request.path_params["name"]
    indices = {key: request.query_params[key] for key in SLICED if key in request.query_params}
    if indices.get("image", "").startswith("u"):
        arrays = state.uploads.get(indices.pop("image")).arrays
        if name not in arrays:
            raise HTTPException(404, f"{name!r} was not computed for this photograph. There are: {', '.join(arrays)}.")
        return binary(*state.arrays.slice_upload(name, arrays[name], indices))
    dims, values = await run_in_threadpool(state.arrays.read_slice, name, indices)
    return binary(dims, values)


async def _summary(state: AppState, request: Request) -> Response:
    name, query, arrays = request.path_params["name"], request.query_params, state.arrays
    array = arrays.array(name)
    fixed = {key: arrays.index(key, query[key], array) for key in ("layer", "head") if key in query}
    body = await read_body(request, MAX_LIST_BYTES) if request.method == "POST" else None

    def summarise() -> tuple[tuple[str, ...], SetSummary]:
        images = None if body is None else parse_image_set(parse_images(body), arrays.n_images)
        return arrays.summary(name, images, query.get("over") == "head", fixed, is_cost=query.get("cost") == "1")

    dims, summary = await state.summaries.run(summarise)
    headers = {
        "X-Statistics": ",".join(STATISTICS),
        "X-Images": str(summary.n_images),
        "X-Quantiles-Of": str(summary.quantiles_of),
        "X-Interval": summary.interval,
    }
    return binary(("statistic", *dims), summary.values, headers)


# --- pictures ---


async def _thumb(state: AppState, request: Request) -> Response:
    image = request.path_params["image"]

    def encode() -> bytes:
        if image.startswith("u"):
            photograph = state.uploads.get(image).photograph
            small = photograph.reduce(max(1, max(photograph.size) // (4 * UPLOAD_THUMBNAIL_PX)))  # no copy of it whole
            small.thumbnail((UPLOAD_THUMBNAIL_PX, UPLOAD_THUMBNAIL_PX))
            return encode_jpeg(small)
        return encode_jpeg(Image.fromarray(state.thumbnails.read(state.image_index(image))))

    return jpeg(await run_in_threadpool(encode))


async def _photo(state: AppState, request: Request) -> Response:
    image = request.path_params["image"]

    def encode() -> bytes:
        return encode_jpeg(model_view(state.photograph(image), state.plan.preprocessing))

    return jpeg(await state.decoding.run(encode))


# --- the live model ---


async def _live(state: AppState, _request: Request) -> Response:
    return json_answer(state.live.status())


async def _attention(state: AppState, request: Request) -> Response:
    image, layer, head = _parse_head(state, request)
    maps = await state.ask_model(
        request,
        state.live_arrays,
        (image, layer),
        lambda model: np.asarray(model.attention(state.photograph(image), layer)),
    )
    return binary(("query", "key"), maps[head])


async def _head_maps(state: AppState, request: Request) -> Response:
    image = _parse_image(state, request)
    maps = await state.ask_model(
        request,
        state.live_arrays,
        ("head_maps", image),
        lambda model: np.asarray(model.head_maps(state.photograph(image))),
    )
    return binary(("layer", "head", "patch"), maps)


async def _modes(state: AppState, request: Request) -> Response:
    image, layer, head = _parse_head(state, request)
    modes = await state.ask_model(
        request,
        state.live_arrays,
        ("modes", image, layer, head),
        lambda model: np.asarray(model.modes(state.photograph(image), layer, head)),
    )
    return binary(("mode", "class"), modes)


def _parse_image(state: AppState, request: Request) -> str:
    """The image that a live request names, checked against the study and the uploads."""
    image = str(request.path_params["image"])
    state.require_image(image)
    return image


def _parse_head(state: AppState, request: Request) -> tuple[str, int, int]:
    """The image, layer and head that a live request names, checked against the study."""
    image = _parse_image(state, request)
    n_heads = state.plan.n_heads
    layer = parse_index(request, "layer", len(n_heads))
    return image, layer, parse_index(request, "head", n_heads[layer])


# --- errors ---


async def _http_error(_request: Request, failure: Exception) -> Response:
    assert isinstance(failure, HTTPException)
    return refusal(failure.status_code, failure.detail, failure.headers)


async def _vitrail_error(_request: Request, failure: Exception) -> Response:
    return refusal(422, str(failure))


async def _internal_error(request: Request, failure: Exception) -> Response:
    log.exception("%s failed", request.url.path, exc_info=failure)
    sentence = f"The server failed at this ({type(failure).__name__}); its log says where."
    return refusal(500, sentence, HEADERS)  # answered outside of the access middleware


def _static_routes() -> list[Route]:
    files = built_page()

    def route(path: str, name: str) -> Route:
        file = files[name]
        caching = "private, max-age=31536000, immutable" if file.immutable else "no-cache"

        async def endpoint(_request: Request) -> Response:
            return Response(file.content, media_type=file.media_type, headers={"Cache-Control": caching})

        return Route(path, endpoint)

    if "/index.html" not in files:

        async def not_built(_request: Request) -> Response:
            return HTMLResponse(f"<!doctype html><title>Vitrail</title><p>{NOT_BUILT}", 503)

        return [Route("/", not_built)]
    return [route("/", "/index.html"), *(route(name, name) for name in files)]
