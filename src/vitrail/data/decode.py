"""`decode_image`: bytes from anywhere into an upright RGB image, or a reason why not."""

import io
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from vitrail.data.files import file_bytes, sentence, too_many_bytes
from vitrail.errors import BadImage

__all__ = ["MAX_BYTES", "MAX_PIXELS", "decode_image", "decoded"]

MAX_BYTES = 100_000_000
MAX_PIXELS = 80_000_000
"""Caps on one image: the file as it lies on disk, and rows x columns. An 80 megapixel image takes 240 MB as RGB."""

FORMATS: tuple[tuple[re.Pattern[bytes], str, Callable[[io.BytesIO], ImageFile.ImageFile]], ...] = (
    (re.compile(rb"\xff\xd8\xff"), "JPEG", JpegImagePlugin.JpegImageFile),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "PNG", PngImagePlugin.PngImageFile),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "WebP", WebPImagePlugin.WebPImageFile),
    (re.compile(rb"GIF8[79]a"), "GIF", GifImagePlugin.GifImageFile),
    (re.compile(rb"BM"), "BMP", BmpImagePlugin.BmpImageFile),
    (re.compile(rb"II[*+]\x00|MM\x00[*+]"), "TIFF", TiffImagePlugin.TiffImageFile),
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
)
"""What Pillow's decoders raise on bytes that are not what they seem."""


def decode_image(
    source: bytes | str | Path, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """The image as RGB, upright. Sizes are checked before anything is decoded.

    EXIF rotation is applied; transparency is laid over white; CMYK, palettes and greys become RGB; 16-bit greys are
    scaled, not clipped. Animations and files of several pages are refused, as none of their frames is the image.

    Raises `BadImage` with the reason: too large, of another format, truncated, broken.
    """
    content = source if isinstance(source, bytes) else file_bytes(Path(source), max_bytes)
    if len(content) > max_bytes:
        raise BadImage(too_many_bytes(len(content), max_bytes))
    return decoded(content, max_pixels)


def decoded(content: bytes, max_pixels: int, draft_px: int | None = None) -> Image.Image:
    image = _opened(content)
    columns, rows = image.size
    if columns * rows > max_pixels:
        raise BadImage(
            f"{columns} x {rows} pixels, and at most {max_pixels:,} are decoded (a small file can unfold into a huge "
            "image); make it smaller"
        )
    try:
        if getattr(image, "is_animated", False):
            raise BadImage("it is animated or has several pages; save the frame that is meant as a file of its own")
        if draft_px is not None:
            image.draft(None, (draft_px, draft_px))
        image.load()
        return _as_rgb(_as_8_bit(ImageOps.exif_transpose(image)))
    except BROKEN as error:
        raise BadImage(f"broken or truncated: {sentence(error)}") from error


def _opened(content: bytes) -> ImageFile.ImageFile:
    """The header only."""
    if not content:
        raise BadImage("the file is empty")
    for magic, name, open_format in FORMATS:
        if magic.match(content):
            try:
                return open_format(io.BytesIO(content))
            except BROKEN as error:
                raise BadImage(f"begins like a {name} file, and cannot be opened: {sentence(error)}") from error
    raise BadImage(f"not an image in a format that is read here ({', '.join(name for _, name, _ in FORMATS)})")


def _as_8_bit(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # TIFF has 12-bit greys in this mode too
        return _scaled(image, 2**bits - 1)
    if image.mode in ("I", "F"):
        raise BadImage("its samples have 32 bits, whose black and white are not defined; save it with 8 or 16 bits")
    return image


def _scaled(image: Image.Image, white: int) -> Image.Image:
    grey = np.asarray(image).astype(np.float64)
    return Image.fromarray((grey * (255 / white)).round().clip(0, 255).astype(np.uint8))


def _as_rgb(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    shown = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")
