"""`scan`: reads every image once; afterwards each is usable, or named with the reason why not. And reading again."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from vitrail.data.channels import channels_of, require_channels
from vitrail.data.decode import MAX_BYTES, MAX_PIXELS, decode_content
from vitrail.data.files import file_bytes
from vitrail.data.geometry import resized_sides
from vitrail.data.images import Content, ImageEntry, ImageSource, Item, Manifest, Skipped, first_reasons
from vitrail.data.sources import BUILT_IN, PHOTOS, open_images
from vitrail.errors import BadImage, DataError, NoImages

__all__ = ["EarlierScan", "image_digest", "load_image", "scan", "stored_image"]

WINDOW = 256
"""Images that are read together while scanning; bounds how far beyond a limit a scan reads."""

STRIP_ROWS = 256
"""Rows of a photograph whose bytes are made at a time: those of a large one at once would be two more of it."""

CLOCK_STEP_S = 2.0
"""Coarsest step of the times of files (FAT has 2 s): what was touched so shortly before a scan is read again."""


class EarlierScan(NamedTuple):
    """What an earlier scan found.

    Attributes:
        manifest: Its images.
        written_at: When they were written down, by the clock of that file, in seconds since 1970.
    """

    manifest: Manifest
    written_at: float


def scan(
    source: ImageSource,
    progress: Callable[[int, int], None] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    earlier: EarlierScan | None = None,
) -> Manifest:
    """Decodes each image once, in order, until `limit` of them proved usable, and hashes what was read.

    A file of the same path and size that is older than an earlier scan is not read again. Whoever computes with it
    finds it changed all the same (`load_image`).

    Args:
        source: From `open_images`.
        progress: Called with (done, total) as images are done.
        preprocessing: Settings of a model, as in a plan; images that are too large after resizing are then skipped.
        earlier: What an earlier scan of the same source with the same settings found.

    Returns:
        The usable images in order, and every file that was left out with its reason.

    Raises:
        NoImages: None can be used; the message has the first reasons.
    """
    images: list[ImageEntry] = []
    skipped = list(source.skipped)
    total = min(source.limit or len(source.items), len(source.items))
    for entry in _examine(source, preprocessing, earlier):
        if isinstance(entry, Skipped):
            skipped.append(entry)
        else:
            images.append(entry)
            if progress is not None:
                progress(len(images), total)
        if len(images) == source.limit:
            break
    if not images:
        raise NoImages(f"None of the {len(source.items)} images can be used." + first_reasons(skipped))
    return Manifest(source.name, source.labels_from, tuple(images), tuple(skipped), max_pixels=source.max_pixels)


def _examine(
    source: ImageSource, preprocessing: Mapping[str, Any] | None, earlier: EarlierScan | None
) -> Iterator[ImageEntry | Skipped]:
    known: dict[str, ImageEntry] = {}
    if earlier is not None and earlier.manifest.max_pixels == source.max_pixels:
        known = {entry.id: entry for entry in earlier.manifest.images}

    def examine(item: Item, label: int | None) -> ImageEntry | Skipped:
        entry = known.get(item.id)
        if earlier is not None and entry is not None and _is_as_it_was(item, entry, earlier.written_at):
            return replace(entry, label=label, mask=None, mask_digest=None)
        return _examine_one(item, label, max_pixels=source.max_pixels or MAX_PIXELS, preprocessing=preprocessing)

    pairs = zip(source.items, source.labels, strict=True)
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as threads:  # decoders release the GIL
        while window := list(islice(pairs, WINDOW)):
            yield from threads.map(examine, *zip(*window, strict=True))


def _is_as_it_was(item: Item, entry: ImageEntry, written_at: float) -> bool:
    """Whether a file has the path and size of an entry and has not been touched since."""
    if not isinstance(item.content, Path) or str(item.content) != entry.path:
        return False
    try:
        found = item.content.stat()
    except OSError:
        return False  # what is wrong with it is told when it is read
    touched_at = max(found.st_mtime, found.st_ctime)
    return found.st_size == entry.bytes and touched_at < written_at - CLOCK_STEP_S


def _examine_one(
    item: Item, label: int | None, *, max_pixels: int, preprocessing: Mapping[str, Any] | None
) -> ImageEntry | Skipped:
    try:
        content = _content(item)
        scaling = None
        if isinstance(content, bytes):
            # coarse, but every byte is read, which finds truncation
            image, sides, scaling = decode_content(content, max_pixels, draft_px=64)
        else:
            image, sides = content, content.size
        if preprocessing is not None:
            if "mean" in preprocessing:
                require_channels(image, len(preprocessing["mean"]))
            resized_sides(*sides, preprocessing)
    except BadImage as reason:
        return Skipped(item.id, str(reason))
    path = str(item.content) if isinstance(item.content, Path) else None
    return ImageEntry(item.id, path, label, _n_bytes(content), _digest(content), scaling=scaling, sides=sides)


def _content(item: Item) -> Content:
    return file_bytes(item.content, MAX_BYTES) if isinstance(item.content, Path) else item.content()


def _n_bytes(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else len(content.tobytes())


def _digest(content: Content) -> str:
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else image_digest(content)


def image_digest(image: Image.Image) -> str:
    """A name for what a decoded image shows: images that a model is shown alike have one, others have others.

    Args:
        image: A photograph of any mode, or a picture that carries values.

    Returns:
        SHA-256 over its mode, sides, pixels (of palettes the colours) and values, as hex.
    """
    digest = hashlib.sha256(f"{image.mode} {image.size} ".encode())
    for top in range(0, image.height, STRIP_ROWS):
        strip = image.crop((0, top, image.width, min(top + STRIP_ROWS, image.height)))
        digest.update((strip.convert("RGBA") if image.mode in ("P", "PA") else strip).tobytes())
    if (values := channels_of(image)) is not None:
        digest.update(values.tobytes())
    return digest.hexdigest()


def load_image(source: ImageSource, entry: ImageEntry) -> Image.Image:
    """The image of a scanned entry.

    Args:
        source: What was scanned.
        entry: From the manifest.

    Returns:
        The image as RGB.

    Raises:
        DataError: Its content is not what was scanned, or cannot be read any more.
    """
    content = entry.path if entry.path is not None else source.item(entry.id).content
    item = Item(entry.id, None, Path(content) if isinstance(content, str) else content)
    return _decode_unchanged(entry, item, source.max_pixels)


def stored_image(manifest: Manifest, entry: ImageEntry) -> Image.Image:
    """The image of an entry when only the manifest is left, as in a finished study opened again.

    Args:
        manifest: Of the study.
        entry: One of its images.

    Returns:
        The image as RGB.

    Raises:
        DataError: The file moved or changed, or the images only lived in memory.
    """
    if entry.path is not None:
        return _decode_unchanged(entry, Item(entry.id, None, Path(entry.path)), manifest.max_pixels)
    if manifest.source is None:
        raise DataError(f"Image {entry.id} came from an object in memory and cannot be read again from the study.")
    return load_image(_reopen(manifest.source, len(manifest.images), manifest.max_pixels), entry)


@lru_cache(maxsize=2)
def _reopen(name: str, n_images: int, max_pixels: int | None) -> ImageSource:
    """Cached, since a page asks for one image after the other and a data set takes a while to open."""
    return open_images(
        BUILT_IN if name == PHOTOS else name, labels=False, limit=n_images, max_pixels=max_pixels or MAX_PIXELS
    )


def _decode_unchanged(entry: ImageEntry, item: Item, max_pixels: int | None) -> Image.Image:
    try:
        content = _content(item)
    except BadImage as reason:
        raise DataError(
            f"Image {entry.id} could be read when the study began, and now cannot be: {reason}."
        ) from reason
    if _digest(content) != entry.digest:
        raise DataError(
            f"Image {entry.id} has changed since the study began; put the old file back, or begin a new study."
        )
    if isinstance(content, bytes):
        return decode_content(content, max_pixels or MAX_PIXELS).image
    return content.convert("RGB")
