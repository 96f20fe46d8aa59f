"""`scan`: look at every image once; afterwards each is usable, or named with the reason why not. And reading again."""

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from pathlib import Path

from PIL import Image

from vitrail.data.decode import MAX_BYTES, MAX_PIXELS, decoded
from vitrail.data.files import file_bytes
from vitrail.data.images import Content, ImageEntry, ImageSource, Item, Manifest, Skipped, first_reasons
from vitrail.data.sources import open_images
from vitrail.errors import BadImage, DataError, NoImages

__all__ = ["load_image", "scan", "stored_image"]

WINDOW = 256
"""Images looked at together while scanning; bounds how far beyond a limit a scan reads."""


def scan(source: ImageSource, progress: Callable[[int, int], None] | None = None) -> Manifest:
    """Decodes each image once, in order, until `limit` of them proved usable; hashes what was read.

    `progress(done, total)` is called as images are done. Raises `NoImages` if none can be used, with reasons.
    """
    images: list[ImageEntry] = []
    skipped = list(source.skipped)
    wanted = min(source.limit or len(source.items), len(source.items))
    for entry in _looked_at(source):
        if isinstance(entry, Skipped):
            skipped.append(entry)
        else:
            images.append(entry)
            if progress is not None:
                progress(len(images), wanted)
        if len(images) == source.limit:
            break
    if not images:
        raise NoImages(f"None of the {len(source.items)} images can be used." + first_reasons(skipped))
    return Manifest(source.name, source.labels_from, tuple(images), tuple(skipped))


def _looked_at(source: ImageSource) -> Iterator[ImageEntry | Skipped]:
    pairs = zip(source.items, source.labels, strict=True)
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as threads:  # decoders release the GIL
        while window := list(islice(pairs, WINDOW)):
            yield from threads.map(_looked_at_one, *zip(*window, strict=True))


def _looked_at_one(item: Item, label: int | None) -> ImageEntry | Skipped:
    try:
        content = _content(item)
        if isinstance(content, bytes):
            decoded(content, MAX_PIXELS, draft_px=64)  # coarse, but every byte is gone through: truncation is found
    except BadImage as reason:
        return Skipped(item.id, str(reason))
    path = str(item.content) if isinstance(item.content, Path) else None
    return ImageEntry(item.id, path, label, _n_bytes(content), _digest(content))


def _content(item: Item) -> Content:
    return file_bytes(item.content, MAX_BYTES) if isinstance(item.content, Path) else item.content()


def _n_bytes(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else len(content.tobytes())


def _digest(content: Content) -> str:
    raw = content if isinstance(content, bytes) else f"{content.mode} {content.size} ".encode() + content.tobytes()
    return hashlib.sha256(raw).hexdigest()


def load_image(source: ImageSource, entry: ImageEntry) -> Image.Image:
    """The image of a scanned entry, as RGB. Raises `DataError` if its content is not what was scanned."""
    content = entry.path if entry.path is not None else source.item(entry.id).content
    return _checked(entry, Item(entry.id, None, Path(content) if isinstance(content, str) else content))


def stored_image(manifest: Manifest, entry: ImageEntry) -> Image.Image:
    """The image of an entry when only the manifest is left, as in a finished study opened again.

    Raises `DataError` if the file moved or changed, or if the images only lived in memory.
    """
    if entry.path is not None:
        return _checked(entry, Item(entry.id, None, Path(entry.path)))
    if manifest.source is None:
        raise DataError(f"Image {entry.id} came from an object in memory and cannot be read again from the study.")
    return load_image(_reopened(manifest.source, len(manifest.images)), entry)


@lru_cache(maxsize=2)
def _reopened(name: str, n_images: int) -> ImageSource:
    """Kept, since a page asks for one image after the other and a data set takes a while to open."""
    return open_images(name, labels=False, limit=n_images)


def _checked(entry: ImageEntry, item: Item) -> Image.Image:
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
    return decoded(content, MAX_PIXELS) if isinstance(content, bytes) else content.convert("RGB")
