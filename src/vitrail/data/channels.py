"""Images of other channels than red, green and blue: arrays (.npy) and TIFF files of several bands.

Such an image is an RGB picture to look at, made of its first channels, that carries its values beside it
(`channels_of`). What is resized and cropped for a model are the values.
"""

import importlib
import importlib.util
import io
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident

import numpy as np
from jaxtyping import Float, Shaped
from PIL import Image

from vitrail.errors import BadImage

__all__ = ["MAX_CHANNELS", "channels_of", "image_of_channels", "read_channels", "require_channels", "with_channels"]

MAX_CHANNELS = 16
"""Most channels of an image: an axis that is longer counts pixels."""

MAX_VALUES = 100_000_000
"""Most values of an image, over all channels: 400 MB as float32. A small TIFF file can unfold into more."""

_KEY = "vitrail_channels"
"""Where a picture carries its values. Pillow hands `info` on to whatever is made of a picture."""

_ARRAY, _TIFF = b"\x93NUMPY", (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")

_ALPHA = (1, 2)
"""Values of the TIFF tag ExtraSamples that say that a sample is transparency."""


def channels_of(image: Image.Image) -> Float[np.ndarray, "row column channel"] | None:
    """The values that a picture carries.

    Args:
        image: Any picture.

    Returns:
        float32 [row, column, channel]; None of a photograph.
    """
    values: np.ndarray | None = image.info.get(_KEY)
    return values


def require_channels(image: Image.Image, n_channels: int) -> None:
    """Refuses an image that a model cannot be shown for its channels; photographs go to models of one or three.

    Args:
        image: A photograph, or a picture that carries values.
        n_channels: That the model takes.

    Raises:
        BadImage: It has another number of channels.
    """
    values = channels_of(image)
    if n_channels not in (1, 3) if values is None else values.shape[-1] != n_channels:
        own = 3 if values is None else values.shape[-1]
        raise BadImage(f"it has {own} channel{'s' * (own != 1)} and the model takes {n_channels}")


def with_channels(picture: Image.Image, values: Float[np.ndarray, "row column channel"]) -> Image.Image:
    """A picture that carries values.

    Args:
        picture: The picture to look at.
        values: Of the same rows and columns.

    Returns:
        A copy of the picture.
    """
    copy = picture.copy()
    copy.info[_KEY] = values
    return copy


def read_channels(content: bytes, refuse_too_many: Callable[[int, int], None]) -> Image.Image | None:
    """Reads an array file or a TIFF file of several bands.

    Args:
        content: The encoded image.
        refuse_too_many: Called with (columns, rows) before anything is decoded; raises `BadImage` of too many.

    Returns:
        A picture that carries its values; None of content that is no such file.

    Raises:
        BadImage: It is broken, or no image.
    """
    if content.startswith(_ARRAY):
        try:
            _refuse_header(content)
            return image_of_channels(np.load(io.BytesIO(content), allow_pickle=False), refuse_too_many)
        except (ValueError, EOFError, OSError, SyntaxError, OverflowError, MemoryError) as error:
            raise BadImage(f"begins like an array file (.npy), and cannot be read: {error}") from error
    if content.startswith(_TIFF) and importlib.util.find_spec("tifffile") is not None:
        return _read_bands(content, refuse_too_many)
    return None


def _refuse_header(content: bytes) -> None:
    """Refuses an array file of too many values, or of fewer than its header says: numpy makes room for all of them."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError("it is of a version for records, and an image holds numbers")
    n_values = math.prod(shape)
    _refuse_too_many_values(n_values)
    if not dtype.hasobject and len(content) - file.tell() < n_values * dtype.itemsize:
        raise ValueError(f"it ends before its {n_values:,} values do")


def _read_bands(content: bytes, refuse_too_many: Callable[[int, int], None]) -> Image.Image | None:
    """None of a photograph: grey or RGB, with or without transparency, CMYK."""
    tifffile = importlib.import_module("tifffile")
    try:
        with _unlogged("tifffile"), tifffile.TiffFile(io.BytesIO(content)) as file:
            if len(file.pages) != 1:
                return None
            page = file.pages[0]
            n_colours = {0: 1, 1: 1, 2: 3}.get(int(page.photometric))
            extra = [int(kind) for kind in page.extrasamples]
            if n_colours is None or page.samplesperpixel in (1, 3) or (len(extra) == 1 and extra[0] in _ALPHA):
                return None
            refuse_too_many(page.imagewidth, page.imagelength)
            _refuse_too_many_values(page.imagewidth * page.imagelength * page.samplesperpixel)
            values = page.asarray()
    except BadImage:
        raise
    except Exception:  # noqa: BLE001 - whatever is broken in it, Pillow's reader says in our words
        return None
    return image_of_channels(values, refuse_too_many)


@contextmanager
def _unlogged(name: str) -> Iterator[None]:
    """Keeps a library from logging each broken tag of a file, which is refused in one sentence."""
    logger, thread = logging.getLogger(name), get_ident()

    def is_of_another_thread(record: logging.LogRecord) -> bool:
        return record.thread != thread

    logger.addFilter(is_of_another_thread)
    try:
        yield
    finally:
        logger.removeFilter(is_of_another_thread)


def _refuse_too_many_values(n_values: int) -> None:
    if n_values > MAX_VALUES:
        raise BadImage(f"{n_values:,} values in all its channels, and at most {MAX_VALUES:,} are read; make it smaller")


def image_of_channels(
    values: Shaped[np.ndarray, "..."], refuse_too_many: Callable[[int, int], None] | None = None
) -> Image.Image:
    """A picture that carries an array's values.

    Args:
        values: [row, column], [row, column, channel] or [channel, row, column], of at most 16 channels: bytes, 16-bit
            whole numbers (both scaled to 0..1), or floating-point numbers, which stay as they are.
        refuse_too_many: Called with (columns, rows); raises `BadImage` of too many.

    Returns:
        An RGB picture of the first three channels, each from its smallest value to its largest.

    Raises:
        BadImage: The array is no image.
    """
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim == 3 and values.shape[-1] > MAX_CHANNELS >= values.shape[0]:
        values = np.moveaxis(values, 0, -1)
    if values.ndim != 3 or not 1 <= values.shape[-1] <= MAX_CHANNELS or 0 in values.shape:
        raise BadImage(
            f"an array of shape {list(values.shape)}; an image is [row, column, channel], 1 to {MAX_CHANNELS} channels"
        )
    if refuse_too_many is not None:
        refuse_too_many(values.shape[1], values.shape[0])
    if values.dtype.newbyteorder("=") in (np.uint8, np.uint16):
        scaled = values.astype(np.float32) / np.iinfo(values.dtype).max
    elif np.issubdtype(values.dtype, np.floating):
        scaled = values.astype(np.float32)
    else:
        raise BadImage(
            f"its values are {values.dtype}, whose black and white are not defined; save it as uint8 or float32"
        )
    if not np.isfinite(scaled).all():
        raise BadImage("it has values that are not finite (NaN or infinite)")
    preview = scaled[..., [0, min(1, scaled.shape[-1] - 1), min(2, scaled.shape[-1] - 1)]]
    low, high = preview.min((0, 1)), preview.max((0, 1))
    stretched = (preview - low) / np.where(high > low, high - low, 1)
    return with_channels(Image.fromarray((stretched * 255).round().astype(np.uint8)), scaled)
