"""The local server: the study as arrays, thumbnails and photographs, and the live model when there is one.

Every answer is an index looked up in the study; nothing from a request is joined to a path. No route writes: the live
look keeps the visitor's photograph in memory only.
"""

import json
import logging
import secrets
import socket
import threading
import webbrowser
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from vitrail.app.desk import Desk, Live
from vitrail.app.guard import LOOPBACK_HOSTS, Guard, is_loopback
from vitrail.app.pictures import Photographs, Thumbnails, Upload, Uploads, encoded, seen_by_model
from vitrail.app.reader import Reader, chosen_images
from vitrail.app.shelf import Shelf
from vitrail.app.static_files import NOT_BUILT, built_page
from vitrail.app.story import description
from vitrail.app.summary import STATISTICS
from vitrail.data import decode_image
from vitrail.errors import UsageError, VitrailError
from vitrail.study.store import open_study, read_manifest, read_plan

__all__ = ["create_app", "serve"]

MAX_BODY = 4 * 2**20
MAX_BYTES = 32 * 2**20
MAX_PIXELS = 64_000_000
"""Caps on an upload. Tighter than for a study: a visitor is not the owner of the machine."""

log = logging.getLogger(__name__)


class Page:
    """What the routes share: the study, its pictures, the uploads and the live model."""

    def __init__(self, study_path: Path, live: Live | None) -> None:
        self.folder = study_path
        self.dataset = open_study(study_path, partial=True)
        self.reader = Reader(self.dataset)
        self.plan = read_plan(study_path)
        self.ids = [str(name) for name in self.dataset["image"].values]
        self.manifest = read_manifest(study_path)
        self.thumbnails = Thumbnails(self.dataset)
        self.photographs = Photographs(self.manifest, self.ids)
        self.uploads = Uploads()
        self.desk = Desk(live)
        self.maps = Shelf(256 * 2**20)

    def photograph(self, text: str) -> Any:
        """The photograph that a request names: an index of the study or an upload."""
        if text.startswith("u"):
            return self.uploads.named(text).photograph
        return self.photographs.of(self.image(text))

    def image(self, text: str) -> int:
        """The index of an image of the study."""
        return self.reader.index("image", text, self.reader.known("label"))


Handler = Callable[[Page, Request], Awaitable[Response]]


def create_app(
    study_path: str | Path,
    live: Live | None = None,
    token: str | None = None,
    allowed_hosts: Iterable[str] = LOOPBACK_HOSTS,
) -> Starlette:
    """The application over one study folder.

    `live` is the model behind the page, or None: the stored study then opens alone. `token` must be held by every
    visitor if given. Requests for other hosts than `allowed_hosts` are refused. Raises `StudyError` for a folder that
    is no study.
    """
    page = Page(Path(study_path), live)

    def route(path: str, handler: Handler, methods: tuple[str, ...] = ("GET",)) -> Route:
        async def endpoint(request: Request) -> Response:
            return await handler(page, request)

        return Route(path, endpoint, methods=list(methods), name=handler.__name__)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        leaving = threading.Event()
        warming = threading.Thread(target=page.reader.warm, args=(leaving,), name="vitrail-warm")
        warming.start()
        yield
        page.desk.close()
        leaving.set()
        # Ending the interpreter under a thread that is inside a library's own code would abort the process.
        await run_in_threadpool(warming.join)

    return Starlette(
        routes=[
            route("/api/study", _study),
            route("/api/images", _images),
            route("/api/array/{name}", _array),
            route("/api/summary/{name}", _summary, ("GET", "POST")),
            route("/api/live/attention/{image}", _attention),
            route("/api/live/modes/{image}", _modes),
            route("/api/live/look", _look, ("POST",)),
            route("/thumb/{image}", _thumb),
            route("/photo/{image}", _photo),
            *_static_routes(),
        ],
        middleware=[Middleware(Guard, allowed_hosts=allowed_hosts, token=token)],
        exception_handlers={HTTPException: _http_error, VitrailError: _our_error, Exception: _bug},
        lifespan=lifespan,
    )


def serve(
    study_path: str | Path,
    live: Live | None = None,
    host: str = "127.0.0.1",
    port: int = 8765,
    open_browser: bool = True,
    announce: Callable[[str], None] = print,
) -> None:
    """Serve the page until interrupted. `port` 0 takes a free one; a host off loopback gets a random token.

    `announce` is told the address once the server listens. Raises `UsageError` if the address is taken.
    """
    import uvicorn

    token = None if is_loopback(host) else secrets.token_urlsafe(24)
    app = create_app(study_path, live, token, (*LOOPBACK_HOSTS, host, *_own_names(host)))
    listening = _listen(host, port)
    shown = f"[{host}]" if ":" in host else socket.gethostname() if host == "0.0.0.0" else host  # noqa: S104
    address = f"http://{shown}:{listening.getsockname()[1]}/" + (f"?token={token}" if token else "")
    announce(address)
    if open_browser:
        threading.Timer(0.5, webbrowser.open, (address,)).start()
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=2
    )
    with listening:
        uvicorn.Server(config).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as failure:
        listening.close()
        raise UsageError(
            f"Cannot listen on {host} port {port}: {failure.strerror}. Choose another with --port (0 takes a free one)."
        ) from failure
    return listening


def _own_names(host: str) -> tuple[str, ...]:
    """When listening on every address, the names by which this machine may be called."""
    if host not in ("0.0.0.0", "::"):  # noqa: S104
        return ()
    name = socket.gethostname()
    try:
        return (name, *{str(entry[4][0]) for entry in socket.getaddrinfo(name, None)})
    except socket.gaierror:
        return (name,)


# --- the study ---


async def _study(page: Page, _request: Request) -> Response:
    told = await run_in_threadpool(description, page.reader, page.plan, page.manifest, page.folder.name)
    return _json(told | {"live": page.desk.open, "upload": {"bytes": MAX_BYTES, "pixels": MAX_PIXELS}})


async def _images(page: Page, _request: Request) -> Response:
    return _json({"ids": page.ids})


async def _array(page: Page, request: Request) -> Response:
    name = request.path_params["name"]
    chosen = {key: request.query_params[key] for key in ("image", "layer", "head") if key in request.query_params}
    if chosen.get("image", "").startswith("u"):
        held = page.uploads.named(chosen.pop("image")).arrays
        if name not in held:
            raise HTTPException(404, f"{name!r} was not computed for this photograph. There are: {', '.join(held)}.")
        return _raw(*page.reader.slice_of_one(name, held[name], chosen))
    dims, values = await run_in_threadpool(page.reader.piece, name, chosen)
    return _raw(dims, values)


async def _summary(page: Page, request: Request) -> Response:
    name, query, reader = request.path_params["name"], request.query_params, page.reader
    array = reader.known(name)
    fixed = {key: reader.index(key, query[key], array) for key in ("layer", "head") if key in query}
    images = None
    if request.method == "POST":
        images = chosen_images(_parsed(await _body(request, MAX_BODY)), reader.n_images)
    dims, made = await run_in_threadpool(reader.summary, name, images, query.get("over") == "head", fixed)
    told = {
        "X-Statistics": ",".join(STATISTICS),
        "X-Images": str(made.n_images),
        "X-Quantiles-Of": str(made.quantiles_of),
        "X-Interval": made.interval,
    }
    return _raw(("statistic", *dims), made.values, told)


# --- pictures ---


async def _thumb(page: Page, request: Request) -> Response:
    text = request.path_params["image"]
    if text.startswith("u"):
        small = page.uploads.named(text).photograph.copy()
        small.thumbnail((64, 64))
        return _jpeg(await run_in_threadpool(encoded, small))
    image = page.image(text)

    def made() -> bytes:
        from PIL import Image

        return encoded(Image.fromarray(page.thumbnails.of(image)))

    return _jpeg(await run_in_threadpool(made))


async def _photo(page: Page, request: Request) -> Response:
    text = request.path_params["image"]

    def made() -> bytes:
        return encoded(seen_by_model(page.photograph(text), page.plan.preprocessing))

    return _jpeg(await run_in_threadpool(made))


# --- the live model ---


async def _attention(page: Page, request: Request) -> Response:
    text, layer, head = _place(page, request)
    key = (text, layer)
    if page.maps.holds(key):
        maps = page.maps.take(key, _absent)
    else:
        photograph = await run_in_threadpool(page.photograph, text)
        maps = await page.desk.ask(
            request, lambda live: page.maps.take(key, lambda: np.asarray(live.attention(photograph, layer)))
        )
    return _raw(("query", "key"), maps[head])


async def _modes(page: Page, request: Request) -> Response:
    text, layer, head = _place(page, request)
    photograph = await run_in_threadpool(page.photograph, text)
    key = ("modes", text, layer, head)
    modes = await page.desk.ask(
        request, lambda live: page.maps.take(key, lambda: np.asarray(live.modes(photograph, layer, head)))
    )
    return _raw(("mode", "class"), modes)


async def _look(page: Page, request: Request) -> Response:
    content = await _body(request, MAX_BYTES)
    photograph = await run_in_threadpool(decode_image, content, max_bytes=MAX_BYTES, max_pixels=MAX_PIXELS)
    looked = await page.desk.ask(request, lambda live: live.look(photograph))
    arrays = {name: np.asarray(values) for name, values in looked.items()}
    xy = await run_in_threadpool(page.reader.place, arrays)
    placed = arrays if xy is None else {**arrays, "image_xy": xy}
    return _json({"image": page.uploads.add(Upload(photograph, placed))})


def _place(page: Page, request: Request) -> tuple[str, int, int]:
    """The image, layer and head that a live request names, checked against the study."""
    text = request.path_params["image"]
    if text.startswith("u"):
        page.uploads.named(text)
    else:
        page.image(text)
    counts = page.plan.n_heads
    layer = _number(request, "layer", len(counts))
    return text, layer, _number(request, "head", counts[layer])


def _number(request: Request, name: str, size: int) -> int:
    text = request.query_params.get(name, "")
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) >= size:
        raise HTTPException(404, f"There is no {name} {text[:20]!r} here. Valid: 0 to {size - 1}.")
    return int(text)


def _absent() -> np.ndarray:
    raise HTTPException(503, "That map was just let go. Ask again.")


# --- answers ---


async def _body(request: Request, at_most: int) -> bytes:
    """The body, refused as soon as it passes `at_most` bytes."""
    too_large = HTTPException(413, f"That is too large: at most {at_most // 2**20} MB are read.")
    stated = request.headers.get("content-length", "0")
    if not stated.isdigit() or int(stated) > at_most:
        raise too_large
    held = bytearray()
    async for piece in request.stream():
        held += piece
        if len(held) > at_most:
            raise too_large
    return bytes(held)


def _parsed(body: bytes) -> Any:
    try:
        asked = json.loads(body)
    except ValueError as failure:
        raise HTTPException(422, 'The body is not JSON. Send the images as {"images": [0, 5, 17]}.') from failure
    return asked.get("images") if isinstance(asked, dict) else None


def _json(told: dict[str, Any]) -> Response:
    return Response(
        json.dumps(told, allow_nan=False), media_type="application/json", headers={"Cache-Control": "no-store"}
    )


def _jpeg(content: bytes) -> Response:
    return Response(content, media_type="image/jpeg", headers={"Cache-Control": "no-cache"})


def _raw(dims: tuple[str, ...], values: np.ndarray, told: dict[str, str] | None = None) -> Response:
    """Values as little-endian bytes, with what they are in the headers."""
    kind = {"b": "uint8", "u": "uint8", "i": "int32", "f": "float32"}[values.dtype.kind]
    shape = ",".join(str(size) for size in values.shape)
    headers = {"X-Dims": ",".join(dims), "X-Shape": shape, "X-Dtype": kind, "Cache-Control": "no-store"}
    content = np.ascontiguousarray(values, dtype=np.dtype(kind).newbyteorder("<")).tobytes()
    return Response(content, media_type="application/octet-stream", headers=headers | (told or {}))


async def _http_error(_request: Request, failure: Exception) -> Response:
    assert isinstance(failure, HTTPException)
    return JSONResponse({"error": failure.detail}, failure.status_code, headers=failure.headers)


async def _our_error(_request: Request, failure: Exception) -> Response:
    return JSONResponse({"error": str(failure)}, 422)


async def _bug(request: Request, failure: Exception) -> Response:
    log.exception("%s failed", request.url.path, exc_info=failure)
    return JSONResponse({"error": f"The server failed at this ({type(failure).__name__}); its log says where."}, 500)


def _static_routes() -> list[Route]:
    files = built_page()

    def route(path: str, name: str) -> Route:
        file = files[name]
        caching = "private, max-age=31536000, immutable" if file.lasting else "no-cache"

        async def endpoint(_request: Request) -> Response:
            return Response(file.content, media_type=file.media_type, headers={"Cache-Control": caching})

        return Route(path, endpoint)

    if "/index.html" not in files:

        async def not_built(_request: Request) -> Response:
            return HTMLResponse(f"<!doctype html><title>Vitrail</title><p>{NOT_BUILT}", 503)

        return [Route("/", not_built)]
    return [route("/", "/index.html"), *(route(name, name) for name in files)]
