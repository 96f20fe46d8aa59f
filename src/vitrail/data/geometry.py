"""Resizing and cropping a photograph to a model's input, as timm, torchvision, transformers and open_clip do it.

No torch here: the page shows what the model saw from the plan of a study alone. The settings are those of
`vitrail.models.preprocessing.Preprocessing.as_dict`, which a plan holds; plans of earlier versions lack the later ones.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from vitrail.data.channels import channels_of, with_channels
from vitrail.errors import BadImage

__all__ = [
    "CROP_MODES",
    "INTERPOLATIONS",
    "crop_center",
    "crop_corner",
    "resize_and_crop",
    "resize_target",
    "resized_sides",
]

MAX_RESIZED_PIXELS = 80_000_000
"""Cap on rows x columns after resizing: 240 MB as RGB. A strip of 60000 x 1 pixels grows to 256 times its length."""

CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


def resize_target(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Sides that a photograph is resized towards, before the crop.

    Args:
        settings: `size` and either `resize` or `crop_pct`, by which the sides of the crop are divided as timm does.

    Returns:
        (rows, columns) in pixels.
    """
    if settings.get("resize"):
        rows, columns = settings["resize"]
        return int(rows), int(columns)
    rows, columns = settings["size"]
    return math.floor(rows / settings["crop_pct"]), math.floor(columns / settings["crop_pct"])


def resized_sides(width: int, height: int, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Sides of a photograph after resizing, before the crop.

    Args:
        width: of the photograph, in pixels.
        height: of the photograph, in pixels.
        settings: as in a plan.

    Returns:
        (columns, rows) in pixels, each 1 or more.

    Raises:
        BadImage: The photograph is so narrow that it would have too many pixels.
    """
    columns, rows = (max(1, side) for side in _scaled_sides(width, height, settings))
    if columns * rows > MAX_RESIZED_PIXELS:
        raise BadImage(
            f"{width} x {height} pixels become {columns} x {rows} when the short side is resized for the model, and at "
            f"most {MAX_RESIZED_PIXELS:,} are made; crop it"
        )
    return columns, rows


def _scaled_sides(width: int, height: int, settings: Mapping[str, Any]) -> tuple[int, int]:
    rows, columns = resize_target(settings)
    mode = settings["crop_mode"]
    if mode == "squash":
        return columns, rows
    if mode == "center" and rows == columns:  # torchvision's Resize(n): the short side is n, the long one rounded down
        short, long = sorted((width, height))
        stretched = int(rows * long / short)
        return (rows, stretched) if width <= height else (stretched, rows)
    ratios = (height / rows, width / columns)  # timm's ResizeKeepRatio rounds both sides to the nearest pixel
    ratio = max(ratios) if mode == "border" else min(ratios)
    return round(width / ratio), round(height / ratio)


def crop_corner(sides: tuple[int, int], settings: Mapping[str, Any]) -> tuple[int, int]:
    """Upper left corner of the central crop; negative where the picture is smaller than the crop and gets a border.

    Args:
        sides: (columns, rows) of the resized photograph.
        settings: as in a plan.

    Returns:
        (left, top) in pixels.
    """
    rows, columns = settings["size"]
    down = settings.get("crop_rounding", "even") == "down"
    left, top = (_offset(side, crop, down) for side, crop in zip(sides, (columns, rows), strict=True))
    return left, top


def _offset(side: int, crop: int, down: bool) -> int:
    if side < crop:
        return -((crop - side) // 2)
    return (side - crop) // 2 if down else round((side - crop) / 2)


def resize_and_crop(image: Image.Image, settings: Mapping[str, Any]) -> Image.Image:
    """The part of a photograph that reaches the model, not normalised, resized by Pillow.

    Args:
        image: the photograph, upright and RGB.
        settings: as in a plan.

    Returns:
        An RGB image of `size`.

    Raises:
        BadImage: The photograph is so narrow that it would have too many pixels after resizing.
    """
    sides = resized_sides(image.width, image.height, settings)
    method = Image.Resampling[settings["interpolation"].upper()]
    view = crop_center(image.resize(sides, method), settings)
    values = channels_of(image)
    return view if values is None else with_channels(view, _resize_and_crop_channels(values, sides, method, settings))


def _resize_and_crop_channels(
    values: np.ndarray, sides: tuple[int, int], method: Image.Resampling, settings: Mapping[str, Any]
) -> np.ndarray:
    """Each channel as a picture of floating-point numbers; a border is 0."""
    rows, columns = settings["size"]
    left, top = crop_corner(sides, settings)
    box = (left, top, left + columns, top + rows)
    channels = [Image.fromarray(each).resize(sides, method).crop(box) for each in np.moveaxis(values, -1, 0)]
    return np.stack([np.asarray(each, dtype=np.float32) for each in channels], axis=-1)


def crop_center(resized: Image.Image, settings: Mapping[str, Any]) -> Image.Image:
    """The central crop of a resized photograph, on a border of the colour `fill` where it is smaller than the crop.

    Args:
        resized: The photograph after resizing.
        settings: As in a plan.

    Returns:
        An RGB image of `size`.
    """
    rows, columns = settings["size"]
    left, top = crop_corner(resized.size, settings)
    if resized.width >= columns and resized.height >= rows:
        return resized.crop((left, top, left + columns, top + rows))
    canvas = Image.new("RGB", (columns, rows), tuple(settings.get("fill", (0, 0, 0))))
    canvas.paste(resized, (-left, -top))
    return canvas
