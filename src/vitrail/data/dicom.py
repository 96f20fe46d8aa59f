"""DICOM, the format of medical scanners, through pydicom: one frame, as its window shows it."""

import importlib
import importlib.util
import io
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float64
from PIL import Image

from vitrail.data.files import sentence
from vitrail.errors import BadImage

__all__ = ["is_dicom", "read_dicom"]

PREAMBLE_BYTES = 128
"""Free bytes before the magic word."""


def is_dicom(content: bytes) -> bool:
    """Whether a file is DICOM, by its magic word.

    Args:
        content: The bytes of the file.

    Returns:
        True if it says so.
    """
    return content[PREAMBLE_BYTES : PREAMBLE_BYTES + 4] == b"DICM"


def read_dicom(
    content: bytes, refuse_size: Callable[[int, int], None], broken: tuple[type[Exception], ...]
) -> tuple[Image.Image, str | None]:
    """The picture in a DICOM file: greys as the file's window shows them, or over the range of its values.

    Args:
        content: The bytes of the file.
        refuse_size: Raises for a picture of too many (columns, rows), before it is decoded.
        broken: Exceptions that a decoder raises on damaged bytes.

    Returns:
        An image of 8 bits, grey or RGB, and how its values were scaled.

    Raises:
        BadImage: pydicom is not installed, or the file is broken or holds several frames or no picture.
    """
    if importlib.util.find_spec("pydicom") is None:
        raise BadImage("a DICOM file, which needs the library that reads it: pip install 'vitrail[dicom]'")
    try:
        dataset = importlib.import_module("pydicom").dcmread(io.BytesIO(content))
        if int(dataset.get("NumberOfFrames") or 1) > 1:
            raise BadImage("it holds several frames; save the one that is meant as a file of its own")
        if "Rows" not in dataset or "Columns" not in dataset:
            raise BadImage("a DICOM file without a picture")
        refuse_size(int(dataset.Columns), int(dataset.Rows))
        return _picture(dataset)
    except broken as error:  # among them RuntimeError, and so NotImplementedError
        raise BadImage(f"a DICOM file that cannot be decoded: {sentence(error)}") from error


def _picture(dataset: Any) -> tuple[Image.Image, str | None]:
    pixels = importlib.import_module("pydicom.pixels")
    values, colours = dataset.pixel_array, dataset.PhotometricInterpretation
    if colours == "PALETTE COLOR":
        values = pixels.apply_color_lut(values, dataset)[..., :3]  # without opacity
        return Image.fromarray(values if values.dtype == np.uint8 else (values / 257).round().astype(np.uint8)), None
    if dataset.SamplesPerPixel > 1:
        if values.dtype != np.uint8:
            raise BadImage("its colours have more than 8 bits; save it with 8 bits")
        if colours.startswith("YBR_PARTIAL"):  # the other colour spaces pydicom has turned into RGB
            raise BadImage(f"its colours are {colours}, which pydicom does not turn into RGB; save it as RGB")
        return Image.fromarray(values), None
    shades = np.asarray(pixels.apply_voi_lut(pixels.apply_modality_lut(values, dataset), dataset), np.float64)
    black, white, scaling = _range(pixels, dataset, shades)
    share = (shades - black) / (white - black) if white != black else np.zeros_like(shades)
    if colours == "MONOCHROME1":  # whose lowest value is white
        share = 1 - share
    return Image.fromarray((255 * share.clip(0, 1)).round().astype(np.uint8)), f"DICOM values by the file's {scaling}"


def _range(pixels: Any, dataset: Any, shades: Float64[np.ndarray, "row column"]) -> tuple[float, float, str]:
    """The lowest and highest shade that the file's own table or window gives, of whatever picture; and which it is."""
    table = (dataset.get("VOILUTSequence") or [{}])[0]
    if table.get("LUTDescriptor") is not None and table.get("LUTData") is not None:
        return 0.0, 2.0 ** table.LUTDescriptor[2] - 1, "table of shades"
    centre, width = (dataset.get(name) for name in ("WindowCenter", "WindowWidth"))
    if centre is None or width is None:
        black, white = float(shades.min()), float(shades.max())
        return black, white, f"own range: {black:g} is black and {white:g} white"
    black, white = pixels.apply_windowing(np.array([-np.inf, np.inf]), dataset).tolist()
    centre, width = (float(np.atleast_1d(each)[0]) for each in (centre, width))
    return black, white, f"window: centre {centre:g}, width {width:g}"
