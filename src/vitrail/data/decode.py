"""`decode_image`: bytes from anywhere into an upright RGB image, or a reason why not.

`as_photograph`: the same of what a notebook has at hand, a picture or an array.
"""

import importlib
import importlib.util
import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    ImageOps,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from vitrail.data.channels import channels_of, image_of_channels, read_channels
from vitrail.data.dicom import is_dicom, read_dicom
from vitrail.data.files import file_bytes, sentence, too_many_bytes
from vitrail.errors import BadImage, UsageError

__all__ = [
    "BROKEN",
    "MAX_BYTES",
    "MAX_PIXELS",
    "Decoded",
    "PhotographLike",
    "as_photograph",
    "decode_content",
    "decode_image",
]

MAX_BYTES = 100_000_000
MAX_PIXELS = 80_000_000
"""Caps on one image: the file as it lies on disk, and rows x columns. An 80 megapixel image takes 240 MB as RGB."""

SAMPLE_BITS = (8, 10, 12, 14, 16)
"""Depths of the sensors and scanners whose values are stored in 16 bits."""

DARK_IN_16_BITS = 2**14 >> 8
"""Pillow keeps the upper 8 of 16 bits of a colour; a picture all below this one may hold values of 14 bits or fewer."""

STATED_BITS, STATED_WHITE = 258, 281
"""Numbers of the TIFF tags BitsPerSample and MaxSampleValue."""

WHITE_OF_16_BITS = 2**16 - 1

LARGE_PIXELS = 16_000_000
"""Larger images are decoded one at a time: a few together would take gigabytes."""

_LARGE_ONES = Lock()

BLOCK_BYTES = 2**26
"""glibc's malloc keeps freed blocks of up to 32 MB, for each thread its own: of pictures that are long gone."""

STRIP_ROWS = 256
"""Transparency is laid over white in strips: of the whole picture it would take five copies."""

ORIENTATION, QUARTER_TURNS = 0x0112, (5, 6, 7, 8)
"""The number of the EXIF tag, and those of its values that exchange rows and columns."""


def _open_heif(file: io.BytesIO) -> ImageFile.ImageFile:
    if importlib.util.find_spec("pillow_heif") is None:
        raise BadImage("a HEIC file, which needs the library that reads it: pip install 'vitrail[heic]'")
    opened: ImageFile.ImageFile = importlib.import_module("pillow_heif.as_plugin").HeifImageFile(file)
    return opened


FORMATS: tuple[tuple[re.Pattern[bytes], str, Callable[[io.BytesIO], ImageFile.ImageFile]], ...] = (
    (re.compile(rb"\xff\xd8\xff"), "JPEG", JpegImagePlugin.JpegImageFile),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "PNG", PngImagePlugin.PngImageFile),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "WebP", WebPImagePlugin.WebPImageFile),
    (re.compile(rb"GIF8[79]a"), "GIF", GifImagePlugin.GifImageFile),
    (re.compile(rb"BM"), "BMP", BmpImagePlugin.BmpImageFile),
    (re.compile(rb"II[*+]\x00|MM\x00[*+]"), "TIFF", TiffImagePlugin.TiffImageFile),
    (re.compile(rb"....ftyp(?:avi[fs]|.{4,60}?avif)", re.DOTALL), "AVIF", AvifImagePlugin.AvifImageFile),
    (re.compile(rb"....ftyp(?:hei|hev|mif1|msf1)", re.DOTALL), "HEIC", _open_heif),
    (
        re.compile(rb"\x00\x00\x00\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"),
        "JPEG 2000",
        Jpeg2KImagePlugin.Jpeg2KImageFile,
    ),
)
"""The formats that are opened, by their first bytes. Pillow's decoders are called by name instead of through
`Image.open`, which would try all of its formats, and warn of large images where ours is an error."""

BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Warning,
)
"""What Pillow's decoders raise on bytes that are not what they seem. They warn of damaged entries beside the picture,
which are errors only where a user has asked for that."""


class Decoded(NamedTuple):
    """An upright RGB image; the size of its file's picture; how its values were scaled, where a choice was made."""

    image: Image.Image
    sides: tuple[int, int]
    scaling: str | None


def decode_image(
    source: bytes | bytearray | memoryview | str | Path,
    *,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """An upright RGB image from bytes or a file, whose sizes are checked before anything is decoded.

    EXIF rotation is applied; transparency is laid over white; CMYK, palettes and greys become RGB. Greys of more than
    8 bits are scaled by their own range: values below 4,096 in a 16-bit file count as 12-bit values. Animations and
    files of several pages are refused, as none of their frames is the image.

    Args:
        source: The encoded image, or where its file is.
        max_bytes: Largest encoded size.
        max_pixels: Largest number of rows x columns.

    Returns:
        An RGB image of 8 bits.

    Raises:
        BadImage: It is too large, of another format, truncated or broken; the message says which.

    Example:
        >>> from vitrail.data import decode_image
        >>> decode_image("photos/cat.jpg")  # doctest: +SKIP
        <PIL.Image.Image image mode=RGB size=451x300>
    """
    content = file_bytes(Path(source), max_bytes) if isinstance(source, (str, Path)) else bytes(source)
    if len(content) > max_bytes:
        raise BadImage(too_many_bytes(len(content), max_bytes))
    return decode_content(content, max_pixels).image


@runtime_checkable
class _ArrayLike(Protocol):
    """An array of NumPy, a tensor of torch."""

    @property
    def shape(self) -> Any: ...

    def __array__(self) -> Any: ...


PhotographLike = Image.Image | str | Path | bytes | bytearray | memoryview | _ArrayLike
"""What `as_photograph` takes."""


def as_photograph(image: object) -> Image.Image:
    """An upright RGB picture of what is at hand, as `decode_image` has it of the same photograph in a file.

    Args:
        image: A picture of Pillow in any mode, of one frame; a path or an encoded image; an array or tensor
            [row, column], [row, column, colour] or [colour, row, column] of bytes, or of floating-point numbers from 0
            to 1. Arrays of 2 or of 5 to 16 channels are taken as `vitrail.data.image_of_channels` takes them.

    Returns:
        The photograph; the picture itself where it is upright and RGB already, or carries channels.

    Raises:
        BadImage: It is broken, has several frames, or black and white of its values are not defined.
        UsageError: It is no photograph.
    """
    if isinstance(image, Image.Image):
        return image if channels_of(image) is not None else _upright_rgb(image)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return decode_image(image)
    if isinstance(image, (str, Path)):
        try:
            return decode_image(image)
        except BadImage as reason:
            raise BadImage(f"{image}: {reason}") from reason
    if isinstance(image, _ArrayLike):
        return _of_array(_as_array(image))
    raise UsageError(
        f"A {type(image).__name__} is no photograph; give one picture of Pillow, a path, the bytes of a file, or an "
        "array [row, column, colour]."
    )


def _upright_rgb(image: Image.Image) -> Image.Image:
    try:
        # further frames of a JPEG are its depth or its previews
        if getattr(image, "is_animated", False) and not isinstance(image, JpegImagePlugin.JpegImageFile):
            raise BadImage("it is animated or has several pages; give a copy of the frame that is meant, image.copy()")
        if 0 in image.size:
            raise BadImage(f"it has {image.width} columns and {image.height} rows, so no pixel")
        deep_colour = _has_deep_colour(image)
        image.load()
        if deep_colour:
            _refuse_dark(image)
        if image.getexif().get(ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        return _as_rgb(_as_8_bit(image, getattr(image, "tag_v2", {}))[0])
    except BROKEN as error:
        raise BadImage(f"broken or truncated: {sentence(error)}") from error


def _as_array(values: Any) -> np.ndarray:
    try:
        if hasattr(values, "detach"):  # a tensor, known by what it can do: no torch here
            values = values.detach().cpu()
            values = values.float() if values.is_floating_point() else values
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"A {type(values).__name__} could not be read as an array ({sentence(error)}); give an array of NumPy or a "
            "dense tensor that holds numbers."
        ) from error


def _of_array(values: np.ndarray) -> Image.Image:
    if values.dtype.kind not in "uif":
        raise UsageError(
            f"An array of {values.dtype} with shape {list(values.shape)} is no photograph; give bytes (uint8), or "
            "floating-point numbers from 0 to 1. Paths are given one by one, or in a list."
        )
    if values.ndim == 3 and values.shape[-1] not in _COLOURS and values.shape[0] in _COLOURS:
        values = np.moveaxis(values, 0, -1)
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if 0 in values.shape or (values.ndim != 2 and (values.ndim != 3 or values.shape[-1] not in _COLOURS)):
        return image_of_channels(values)  # or its refusal
    if values.dtype.kind == "f" and values.min() >= 0 and values.max() <= 1:
        values = (values * 255).round().astype(np.uint8)
    if values.dtype != np.uint8:
        raise UsageError(
            f"An array of {values.dtype} from {values.min():.3g} to {values.max():.3g} is no photograph; give bytes "
            "(uint8), or floating-point numbers from 0 to 1. What is prepared already goes to vit.logits and vit.tap()."
        )
    return _as_rgb(Image.fromarray(np.ascontiguousarray(values)))


_COLOURS = (1, 3, 4)
"""Channels of photographs: grey, colours, colours with transparency."""


def decode_content(content: bytes, max_pixels: int, draft_px: int | None = None) -> Decoded:
    """An upright RGB image from bytes, with what a manifest says of it.

    Args:
        content: The encoded image.
        max_pixels: Largest number of rows x columns.
        draft_px: Side in pixels down to which a JPEG may be decoded coarsely, which is faster and reads every byte.

    Returns:
        The image, its undrafted (columns, rows), and the scaling of its values.

    Raises:
        BadImage: It is too large, of another format, truncated or broken.
    """
    if is_dicom(content):
        image, scaling = read_dicom(content, lambda columns, rows: _refuse_too_many(columns, rows, max_pixels), BROKEN)
        return Decoded(_as_rgb(image), image.size, scaling)
    channels = read_channels(content, lambda columns, rows: _refuse_too_many(columns, rows, max_pixels))
    if channels is not None:
        return Decoded(channels, channels.size, None)
    file = _open_header(content)
    _refuse_too_many(*file.size, max_pixels)
    try:
        if getattr(file, "is_animated", False):
            raise BadImage("it is animated or has several pages; save the frame that is meant as a file of its own")
        sides = file.size
        if draft_px is not None and isinstance(file, JpegImagePlugin.JpegImageFile):
            file.draft(None, (draft_px, draft_px))
        if sides[0] * sides[1] <= LARGE_PIXELS:
            return _load(file, sides)
        with _LARGE_ONES, _large_blocks():
            return _load(file, sides)
    except BROKEN as error:
        raise BadImage(f"broken or truncated: {sentence(error)}") from error


@contextmanager
def _large_blocks() -> Iterator[None]:
    """Has Pillow ask for memory in blocks that go back to the system as soon as a picture is gone."""
    core: Any = Image.core  # type: ignore[attr-defined]  # what PILLOW_BLOCK_SIZE sets has no function but this
    before = core.get_block_size()
    core.set_block_size(BLOCK_BYTES)
    try:
        yield
    finally:
        core.set_block_size(before)


def _has_deep_colour(image: Image.Image) -> bool:
    """Whether a picture that is not decoded yet has colours of 16 bits."""
    return ";16" in str(getattr(image, "tile", "")) and len(image.getbands()) > 1


def _load(file: ImageFile.ImageFile, sides: tuple[int, int]) -> Decoded:
    deep_colour = _has_deep_colour(file)
    file.load()
    if deep_colour:
        _refuse_dark(file)
    turned = file.getexif().get(ORIENTATION, 1) in QUARTER_TURNS
    ImageOps.exif_transpose(file, in_place=True)  # otherwise a copy, also where nothing is turned
    image, scaling = _as_8_bit(file, getattr(file, "tag_v2", {}))
    return Decoded(_as_rgb(image), sides[::-1] if turned else sides, scaling)


def _refuse_too_many(columns: int, rows: int, max_pixels: int) -> None:
    if columns * rows > max_pixels:
        raise BadImage(
            f"{columns} x {rows} pixels, and at most {max_pixels:,} are decoded (a small file can unfold into a huge "
            "image); make it smaller"
        )


def _open_header(content: bytes) -> ImageFile.ImageFile:
    """The header only."""
    if not content:
        raise BadImage("the file is empty")
    for magic, name, open_format in FORMATS:
        if magic.match(content):
            try:
                return open_format(io.BytesIO(content))
            except BROKEN as error:
                raise BadImage(f"begins like a {name} file, and cannot be opened: {sentence(error)}") from error
    names = ", ".join([*(name for _, name, _ in FORMATS), "DICOM", "arrays as .npy"])
    raise BadImage(f"not an image in a format that is read here ({names})")


def _as_8_bit(image: Image.Image, tags: Mapping[int, Any]) -> tuple[Image.Image, str | None]:
    """An image of 8 bits, and how its values were scaled if the file does not say how many bits they have."""
    if image.mode in ("I", "F"):
        raise BadImage("its samples have 32 bits, whose black and white are not defined; save it with 8 or 16 bits")
    if not image.mode.startswith("I;16"):
        return image, None
    grey = np.asarray(image)
    highest = int(grey.max())
    bits = tags.get(STATED_BITS, (16,))[0]
    white = max(tags.get(STATED_WHITE, (2**bits - 1,)))
    scaling = None
    if white == WHITE_OF_16_BITS or highest > white:
        bits = next(each for each in SAMPLE_BITS if highest < 2**each) if highest else 16
        white = 2**bits - 1
        if bits < SAMPLE_BITS[-1]:
            scaling = f"{bits}-bit values in 16 bits: the largest is {highest:,}, and white is {white:,}"
    return _scale_to_8_bit(grey, white), scaling


def _scale_to_8_bit(grey: np.ndarray, white: int) -> Image.Image:
    """By a table of all values: in floating point a picture would take twenty times its own memory."""
    values = np.arange(WHITE_OF_16_BITS + 1, dtype=np.float64)
    return Image.fromarray((values * (255 / white)).round().clip(0, 255).astype(np.uint8)[grey])


def _refuse_dark(image: Image.Image) -> None:
    """Refuses colours of 16 bits of which Pillow has thrown away what they hold."""
    colours = np.asarray(image)[..., : len(image.getbands()) - ("A" in image.getbands())]
    highest = int(colours.max())
    if highest < DARK_IN_16_BITS:
        raise BadImage(
            "its colours have 16 bits and none is above a quarter of white, as where values of 10, 12 or 14 bits are "
            "stored in 16; scale them to the full range, or save it with 8 bits"
        )


def _as_rgb(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgb = Image.new("RGB", image.size)
    for top in range(0, image.height, STRIP_ROWS):
        strip = image.crop((0, top, image.width, min(top + STRIP_ROWS, image.height))).convert("RGBA")
        rgb.paste(Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip).convert("RGB"), (0, top))
    return rgb
