"""Bodies of requests, read within bounds, and answers: JSON, pictures, and arrays as raw numbers."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, SupportsFloat

import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from vitrail.app.study_arrays import MAX_INDEX_DIGITS

__all__ = [
    "binary",
    "jpeg",
    "json_answer",
    "json_body",
    "number_or_none",
    "parse_images",
    "parse_index",
    "raw_numbers",
    "read_body",
    "refusal",
]

BODY_S = 60
"""A body that has not come by then is refused: 32 MB in a minute is a slow network, less is a sender that stalls."""


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body of a request.

    Args:
        request: The request.
        max_bytes: Largest body that is read.

    Returns:
        All of it.

    Raises:
        HTTPException: 413 as soon as it passes `max_bytes`, 408 if it has not come within `BODY_S`.
    """
    too_large = HTTPException(413, f"That is too large: at most {max_bytes / 2**20:.3g} MB are read.")
    content_length = request.headers.get("content-length", "0")
    if not (content_length.isascii() and content_length.isdigit() and len(content_length) <= MAX_INDEX_DIGITS):
        raise too_large
    if int(content_length) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError as slow:
        sentence = f"Only {len(body)} bytes came within {BODY_S} s. Send it again over a faster connection."
        raise HTTPException(408, sentence, headers={"Connection": "close"}) from slow
    return bytes(body)


def json_body(body: bytes, example: str) -> dict[str, Any]:
    """The object that a body holds.

    Args:
        body: JSON.
        example: What to send, for the refusal.

    Returns:
        The object; empty for JSON that is no object.

    Raises:
        HTTPException: 422 for a body that is not JSON.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as failure:  # the latter for brackets within brackets
        raise HTTPException(422, f"The body is not JSON. Send {example}.") from failure
    return content if isinstance(content, dict) else {}


def parse_images(body: bytes) -> Any:
    """What a body lists under "images", not checked yet.

    Args:
        body: JSON.

    Returns:
        The value, or None.

    Raises:
        HTTPException: 422 for a body that is not JSON.
    """
    return json_body(body, 'the images as {"images": [0, 5, 17]}').get("images")


def parse_index(request: Request, name: str, size: int) -> int:
    """An index in the query of a request.

    Args:
        request: The request.
        name: Of the parameter.
        size: How many there are.

    Returns:
        The index, 0 to size - 1.

    Raises:
        HTTPException: 404 with the valid range.
    """
    text = request.query_params.get(name, "")
    if not text.isascii() or not text.isdigit() or len(text) > MAX_INDEX_DIGITS or int(text) >= size:
        raise HTTPException(404, f"There is no {name} {text[:20]!r} here. Valid: 0 to {size - 1}.")
    return int(text)


def json_answer(content: Mapping[str, Any]) -> Response:
    """JSON that no cache keeps.

    Args:
        content: Values that JSON can hold, NaN not among them.

    Returns:
        The response.
    """
    return Response(
        json.dumps(content, allow_nan=False), media_type="application/json", headers={"Cache-Control": "no-store"}
    )


def number_or_none(value: SupportsFloat) -> float | None:
    """A number as JSON can hold it.

    Args:
        value: Any number.

    Returns:
        The number; None, JSON's null, where there is none: NaN and infinity.
    """
    number = float(value)
    return number if isfinite(number) else None


def refusal(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> Response:
    """A refusal with its reason.

    Args:
        status: 4xx or 5xx.
        sentence: What was asked, what is there, what to do. It may repeat any text of a request: JSON escapes also the
            halves of characters that have no bytes of their own.
        headers: Further headers.

    Returns:
        The response.
    """
    return Response(json.dumps({"error": sentence}), status, headers, media_type="application/json")


def jpeg(content: bytes) -> Response:
    """A picture.

    Args:
        content: The bytes of a JPEG file.

    Returns:
        The response.
    """
    return Response(content, media_type="image/jpeg", headers={"Cache-Control": "no-cache"})


def binary(dims: Sequence[str], values: np.ndarray, headers: Mapping[str, str] | None = None) -> Response:
    """An array as raw numbers; dimensions, shape and type are in the headers.

    Args:
        dims: The name of each dimension.
        values: Numbers.
        headers: Further headers.

    Returns:
        The response.

    Raises:
        HTTPException: 422 for integers of more than 32 bits.
    """
    dtype, content = raw_numbers(values)
    description = {
        "X-Dims": ",".join(dims),
        "X-Shape": ",".join(str(size) for size in values.shape),
        "X-Dtype": dtype,
        "Cache-Control": "no-store",
    }
    return Response(content, media_type="application/octet-stream", headers={**description, **(headers or {})})


def raw_numbers(values: np.ndarray) -> tuple[str, bytes]:
    """Numbers in one of the three types that a page reads: float32, int32, uint8.

    Args:
        values: Booleans, integers or floating numbers.

    Returns:
        The type's name and the little-endian bytes, last dimension fastest.

    Raises:
        HTTPException: 422 for integers of more than 32 bits.
    """
    dtype = {"b": "uint8", "u": "uint8", "i": "int32", "f": "float32"}[values.dtype.kind]
    if values.dtype.kind == "u" and values.dtype.itemsize > 1:
        dtype = "int32"
    if dtype == "int32" and values.size and not -(2**31) <= int(values.min()) <= int(values.max()) < 2**31:
        raise HTTPException(
            422, "Some of these numbers need more than 32 bits, which a page cannot hold. Open the store."
        )
    return dtype, np.ascontiguousarray(values, dtype=np.dtype(dtype).newbyteorder("<")).tobytes()
