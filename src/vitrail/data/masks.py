"""Masks beside images: PNGs of instance ids, 0 for background, one per image and of its size.

manifest = with_masks(scan(source), "masks/")      images/a/b.jpg has its mask in masks/a/b.png or masks/b.png
ids = load_mask(manifest.images[0])                [row column], or None where there is no mask
"""

import hashlib
import io
import os
import re
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image, PngImagePlugin

from vitrail.data.decode import BROKEN, MAX_BYTES, MAX_PIXELS
from vitrail.data.files import file_bytes, sentence, some
from vitrail.data.images import ImageEntry, Manifest
from vitrail.errors import BadImage, DataError
from vitrail.outputs import is_address

__all__ = ["MAX_ID", "ids_of", "load_mask", "read_mask", "with_masks"]

MAX_ID = 65_535
"""Ids are as large as a PNG of 16 bits can hold."""

MAGIC = re.compile(rb"\x89PNG\r\n\x1a\n")


def with_masks(manifest: Manifest, folder: str | Path) -> Manifest:
    """The manifest whose entries know their masks.

    Args:
        manifest: From `scan`.
        folder: PNGs of instance ids, named like the images.

    Returns:
        The same images; `masks_from` says how many have a mask.

    Raises:
        DataError: The folder is not there, a mask cannot be read or is not as large as its image, or no image has one.
    """
    if is_address(folder):
        raise DataError(f"{folder} is an address, and masks are read from a local folder; copy them here.")
    folder = Path(os.path.expanduser(folder)).absolute()
    if not os.path.isdir(folder):
        raise DataError(f"There is no folder of masks {folder}.")
    entries = tuple(_with_mask(entry, folder) for entry in manifest.images)
    without = [entry.id for entry in entries if entry.mask is None]
    if len(without) == len(entries):
        first = PurePosixPath(entries[0].id).with_suffix(".png")
        raise DataError(f"No image has a mask in {folder}: {entries[0].id} should have {first} or {first.name}.")
    summary = f"{len(entries) - len(without)} of {len(entries)} images have a mask"
    return replace(manifest, images=entries, masks_from=summary + (f"; without: {some(without)}" if without else ""))


def _with_mask(entry: ImageEntry, folder: Path) -> ImageEntry:
    name = PurePosixPath(entry.id).with_suffix(".png")
    for path in (folder / name, folder / name.name):
        if os.path.isfile(path):
            content = _content(path)
            ids = _read_ids(content, path)
            if entry.sides is not None:
                ids_of(ids, entry.sides, f"The mask {path}")
            return replace(entry, mask=str(path), mask_digest=hashlib.sha256(content).hexdigest())
    return entry


def load_mask(entry: ImageEntry) -> Int[np.ndarray, "row column"] | None:
    """The mask of an image.

    Args:
        entry: From `with_masks`.

    Returns:
        Instance ids [row, column], or None where the image has no mask.

    Raises:
        DataError: The file is not what it was when the study began.
    """
    if entry.mask is None:
        return None
    content = _content(Path(entry.mask))
    if hashlib.sha256(content).hexdigest() != entry.mask_digest:
        raise DataError(
            f"The mask of {entry.id} has changed since the study began; put the old file back, or begin a new study."
        )
    return _read_ids(content, Path(entry.mask))


def read_mask(path: str | Path) -> Int[np.ndarray, "row column"]:
    """The mask in one file.

    Args:
        path: A PNG of instance ids.

    Returns:
        Instance ids [row, column].

    Raises:
        DataError: It cannot be read, or is no PNG of ids.
    """
    return _read_ids(_content(Path(path)), Path(path))


def ids_of(mask: Any, sides: tuple[int, int], name: str = "The mask") -> Int[np.ndarray, "row column"]:
    """Instance ids of a photograph's objects, from whatever holds them.

    Args:
        mask: An array or image [row, column] of whole numbers or truth values.
        sides: (columns, rows) of the upright photograph.
        name: What the mask is called in a message.

    Returns:
        Instance ids [row, column], 0 for background.

    Raises:
        DataError: It is no such mask, or another size than the image.
    """
    ids = np.asarray(mask)
    if ids.ndim != 2:
        raise DataError(
            f"{name} has shape {list(ids.shape)}; a mask is [row, column], one instance id per pixel, 0 for background."
        )
    if ids.shape[::-1] != tuple(sides):
        raise DataError(
            f"{name} has {ids.shape[1]} x {ids.shape[0]} pixels and its image {sides[0]} x {sides[1]}; a mask is as "
            "large as its image."
        )
    if ids.dtype.kind not in "biuf" or (ids.dtype.kind == "f" and not np.array_equal(ids, np.floor(ids))):
        raise DataError(f"{name} holds {ids.dtype} that are no whole numbers; give instance ids, 0 for background.")
    outside = ids[(ids < 0) | (ids > MAX_ID)]
    if outside.size:
        raise DataError(
            f"{name} has the id {outside[0]}; ids are 0 to {MAX_ID}. Set pixels to be ignored to 0, background."
        )
    return ids.astype(np.int64)


def _content(path: Path) -> bytes:
    try:
        return file_bytes(path, MAX_BYTES)
    except BadImage as reason:
        raise DataError(f"The mask {path} cannot be read: {reason}.") from reason


def _read_ids(content: bytes, path: Path) -> Int[np.ndarray, "row column"]:
    """Instance ids of a PNG with one channel of 8 or 16 bits (or palette numbers)."""
    if not MAGIC.match(content):
        raise DataError(f"A mask is a PNG of instance ids; {path} is no PNG.")
    try:
        image: Image.Image = PngImagePlugin.PngImageFile(io.BytesIO(content))
        if image.width * image.height > MAX_PIXELS:
            raise DataError(
                f"The mask {path} of {image.width} x {image.height} pixels is too large; {MAX_PIXELS:,} are read."
            )
        if image.mode not in ("L", "P", "1", "I;16", "I;16B", "I"):
            raise DataError(
                f"A mask holds one instance id per pixel (one channel of 8 or 16 bits); {path} has mode {image.mode}."
            )
        return np.asarray(image).astype(np.int64)
    except BROKEN as error:
        raise DataError(f"The mask {path} is broken or truncated: {sentence(error)}.") from error
