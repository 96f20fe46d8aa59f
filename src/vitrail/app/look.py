"""A live look at one image: every analysis of it, part by part, as a study holds them of many.

    POST /api/look                        a photograph; answers its name
    GET  /api/look/{image}/stream         arrays of some analyses, or some arrays, each part as soon as it is computed
    GET  /api/look/{image}                what an analysis has of the image, in words
    GET  /api/look/{image}/{name}         one array

Every part is a call of its own in the queue of the live model, so that a click elsewhere on the page is answered
between two parts, and nothing goes on once the page has left.
"""

import json
import struct
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from vitrail.analysis import BASE, analyses, declaration
from vitrail.app.answers import binary, json_answer, raw_numbers, read_body
from vitrail.app.live_queue import LiveModelProtocol
from vitrail.app.pictures import Upload
from vitrail.app.study_arrays import MAX_INDEX_DIGITS
from vitrail.data import decode_image
from vitrail.errors import UsageError, VitrailError

if TYPE_CHECKING:
    from vitrail.app.server import AppState

__all__ = ["MAX_PIXELS", "MAX_UPLOAD_BYTES", "frame", "routes"]

MAX_UPLOAD_BYTES = 32 * 2**20
MAX_PIXELS = 64_000_000
"""Caps on an upload. Tighter than for a study: a visitor is not the owner of the machine."""

TEXTS = ("title", "unit", "low", "high", "source", "limits")
ALIGNMENT = 8
"""Bytes: every array of a frame begins at a multiple, so that a page reads it in place, whatever its type."""


def routes(state: "AppState") -> list[Route]:
    """The routes of the live look.

    Args:
        state: What the server's routes share.

    Returns:
        Routes for the application.
    """

    async def upload(request: Request) -> Response:
        return await _upload(state, request)

    async def stream(request: Request) -> Response:
        return await _stream(state, request)

    async def describe(request: Request) -> Response:
        return await _describe(state, request)

    async def array(request: Request) -> Response:
        return await _array(state, request)

    return [
        Route("/api/look", upload, methods=["POST"]),
        Route("/api/look/{image}", describe),
        Route("/api/look/{image}/stream", stream),
        Route("/api/look/{image}/{name}", array),
    ]


async def _upload(state: "AppState", request: Request) -> Response:
    """Decodes a photograph and asks the model what it says of it; everything else comes when it is asked for."""
    state.live.refuse_without_model()
    async with state.receiving.slot():
        content = await read_body(request, MAX_UPLOAD_BYTES)

        def look(model: LiveModelProtocol) -> str:
            """On the model's own thread, one after the other: no decoded photograph waits for anybody."""
            photograph = decode_image(content, max_bytes=MAX_UPLOAD_BYTES, max_pixels=MAX_PIXELS)
            answer = model.look_part(photograph, BASE, model.parts(BASE).names[0], None, None)
            return state.uploads.add(Upload(photograph, _without_image(answer)))

        return json_answer({"image": await state.live.run(request, look)})


async def _stream(state: "AppState", request: Request) -> Response:
    image, choices = _parse(state, request)
    wanted = _listed(request, "measures")
    names = [_analysis_of(name) for name in wanted] or _listed(request, "analyses") or list(analyses())
    for name in names:
        _known(name)
    frames = _frames(state, request, image, list(dict.fromkeys(names)), frozenset(wanted), choices)
    first = await anext(frames)  # what is refused at once is refused with its status

    async def all_frames() -> AsyncIterator[bytes]:
        yield first
        try:
            async for each in frames:
                yield each
        except (HTTPException, VitrailError) as failure:
            yield frame({"error": failure.detail if isinstance(failure, HTTPException) else str(failure)}, xr.Dataset())

    return StreamingResponse(all_frames(), media_type="application/octet-stream", headers={"Cache-Control": "no-store"})


async def _frames(
    state: "AppState",
    request: Request,
    image: str,
    names: Sequence[str],
    wanted: frozenset[str],
    choices: dict[str, int],
) -> AsyncIterator[bytes]:
    """The parts of the analyses that hold something wanted, as they come, each with what is left out of it."""
    plans = await state.live.run(request, lambda model: {name: model.parts(name) for name in names})
    parts = {
        name: [part for part in plan.names if not wanted or wanted.intersection(part)] for name, plan in plans.items()
    }
    n_parts, done = sum(map(len, parts.values())), 0
    if not n_parts:
        reasons = [reason for plan in plans.values() for name, reason in plan.left_out.items() if name in wanted]
        nothing = f"{', '.join(sorted(wanted) or names)} has nothing of a single image with this model."
        raise HTTPException(404, reasons[0] if reasons else nothing)
    for name, plan in plans.items():
        left_out = dict(plan.left_out)  # said with the first part of the analysis
        for part in parts[name]:
            dataset = await _part(state, request, image, name, part, choices)
            done += 1
            about = {"analysis": name, "title": analyses()[name].title, "done": done, "of": n_parts}
            yield frame({**about, "left_out": {**left_out, **dataset.attrs["left_out"]}}, dataset)
            left_out = {}


async def _describe(state: "AppState", request: Request) -> Response:
    image, choices = _parse(state, request)
    name = _known(request.query_params.get("analysis", BASE))
    plan = await state.live.run(request, lambda model: model.parts(name))
    arrays: dict[str, Any] = {}
    left_out = dict(plan.left_out)
    for part in plan.names:
        dataset = await _part(state, request, image, name, part, choices)
        arrays |= {str(each): _words(dataset[each]) for each in dataset.data_vars}
        left_out |= dataset.attrs["left_out"]
    return json_answer({"arrays": arrays, "left_out": left_out})


async def _array(state: "AppState", request: Request) -> Response:
    image, choices = _parse(state, request)
    name = request.path_params["name"]
    analysis = _analysis_of(name)
    plan = await state.live.run(request, lambda model: model.parts(analysis))
    part = next((part for part in plan.names if name in part), None)
    if part is None:
        raise HTTPException(404, plan.left_out.get(name, f"{name} is computed over many images, not of one."))
    dataset = await _part(state, request, image, analysis, part, choices)
    if name not in dataset:
        raise HTTPException(404, dataset.attrs["left_out"].get(name, f"This model does not have {name}."))
    values = _without_image_dimension(dataset[name])
    fixed = {
        dimension: _index(request.query_params[dimension], dimension, values.sizes[dimension])
        for dimension in ("layer", "head")
        if dimension in request.query_params and dimension in values.dims
    }
    values = values.isel(fixed)
    return binary([str(dimension) for dimension in values.dims], values.to_numpy())


async def _part(
    state: "AppState", request: Request, image: str, analysis: str, part: tuple[str, ...], choices: dict[str, int]
) -> xr.Dataset:
    """One part, from memory if it was computed for the same patch and channel."""
    depends = {choice for name in part for choice in declaration(name).depends_on or ()}
    arguments = {choice: number for choice, number in choices.items() if choice in depends}
    key = ("look", image, analysis, part, *sorted(arguments.items()))
    upload = state.uploads.get(image) if image.startswith("u") else None

    def compute(model: LiveModelProtocol) -> xr.Dataset:
        photograph, mask = state.photograph(image), state.mask(image) if "masks" in depends else None
        objects = {} if mask is None else {"mask": mask}
        dataset = model.look_part(
            photograph, analysis, part, arguments.get("patch"), arguments.get("channel"), **objects
        )
        if upload is not None:  # here, for the page may have left by the time that this ends
            upload.arrays.update(_without_image(dataset))
        return dataset

    return await state.ask_model(request, state.looks, key, compute)


def _without_image(dataset: xr.Dataset) -> dict[str, np.ndarray]:
    """The study's measures among the arrays, without the image dimension."""
    return {
        str(name): np.asarray(values.to_numpy()[0])
        for name, values in dataset.data_vars.items()
        if "image" in values.dims
    }


def _without_image_dimension(values: xr.DataArray) -> xr.DataArray:
    return values.isel(image=0, drop=True) if "image" in values.dims else values


# --- what a request names --------------------------------------------------------------------------------------------


def _parse(state: "AppState", request: Request) -> tuple[str, dict[str, int]]:
    """The image that a request names, looked up, and the patch and channel that it chooses, as numbers."""
    image = request.path_params["image"]
    state.require_image(image)
    query = request.query_params
    return image, {name: _number(query[name], name) for name in ("patch", "channel") if name in query}


def _number(text: str, name: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > MAX_INDEX_DIGITS:
        raise HTTPException(422, f"The {name} {text[:20]!r} is no index: send a number from 0.")
    return int(text)


def _index(text: str, name: str, size: int) -> int:
    number = _number(text, name)
    if number >= size:
        raise HTTPException(404, f"There is no {name} {number} here. Valid: 0 to {size - 1}.")
    return number


def _listed(request: Request, key: str) -> list[str]:
    return [name for name in request.query_params.get(key, "").split(",") if name]


def _analysis_of(array: str) -> str:
    try:
        return declaration(array).analysis
    except UsageError as unknown:
        raise HTTPException(404, f"Nothing computes an array called {array[:40]!r} of an image.") from unknown


def _known(analysis: str) -> str:
    if analysis not in analyses():
        raise HTTPException(404, f"There is no analysis {analysis[:40]!r}. There are: {', '.join(analyses())}.")
    return analysis


# --- what is answered ------------------------------------------------------------------------------------------------


def frame(header: dict[str, Any], dataset: xr.Dataset) -> bytes:
    """Arrays with their words in one block of bytes, several of which make a stream.

    Args:
        header: Values that JSON can hold.
        dataset: Arrays; a dimension `image` of size 1 is dropped.

    Returns:
        The length of the header as a little-endian uint32; the header as JSON, with `arrays` added: dims, shape, dtype,
        coords, texts, and `offset` and `bytes` in what follows; spaces, so that the arrays begin at a multiple of 8
        bytes of the frame; the arrays, each filled up to a multiple of 8.
    """
    arrays, blocks, offset = {}, [], 0
    for name, values in dataset.data_vars.items():
        one = _without_image_dimension(values)
        dtype, content = raw_numbers(one.to_numpy())
        arrays[str(name)] = {**_words(values), "dtype": dtype, "offset": offset, "bytes": len(content)}
        blocks.append(content + bytes(-len(content) % ALIGNMENT))
        offset += len(blocks[-1])
    text = json.dumps({**header, "arrays": arrays}, allow_nan=False).encode()
    text += b" " * (-(len(text) + 4) % ALIGNMENT)
    return struct.pack("<I", len(text)) + text + b"".join(blocks)


def _words(values: xr.DataArray) -> dict[str, Any]:
    one = _without_image_dimension(values)
    return {
        "dims": [str(dimension) for dimension in one.dims],
        "shape": list(one.shape),
        "coords": {str(name): each.to_numpy().tolist() for name, each in one.coords.items()},
        **{key: str(values.attrs.get(key, "")) for key in TEXTS},
    }
