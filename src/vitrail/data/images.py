"""What travels between the parts of this folder: items before anybody looked at them, entries after."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import msgspec
from PIL import Image

from vitrail.errors import DataError

__all__ = ["Content", "ImageEntry", "ImageSource", "Item", "Manifest", "Skipped", "first_reasons"]

Content = bytes | Image.Image
"""What an item yields: an encoded image, or one that only exists decoded (the built-in crops)."""


@dataclass(frozen=True)
class Item:
    """One image before anybody looked at it."""

    id: str
    class_name: str | None
    content: Path | Callable[[], Content]


@dataclass(frozen=True)
class Skipped:
    """An image that is not part of the study, and why."""

    id: str
    reason: str


@dataclass(frozen=True)
class ImageEntry:
    """A usable image: where it is and what was in it; `path` is None without a file, `mask` without a mask.

    `scaling` says how its values became 8 bits, where the file leaves that open. `sides` are the (columns, rows) of the
    upright image; None in a list of an earlier version.
    """

    id: str
    path: str | None
    label: int | None
    bytes: int
    digest: str
    mask: str | None = None
    mask_digest: str | None = None
    scaling: str | None = None
    sides: tuple[int, int] | None = None


@dataclass(frozen=True)
class ImageSource:
    """Images in their fixed order, with labels where names gave them; the first `limit` usable ones are meant.

    `name` is what `open_images` takes to open the same images again, or None for an object in memory. `max_pixels` is
    the largest size that is decoded, None for the usual cap.
    """

    name: str | None
    items: tuple[Item, ...]
    labels: tuple[int | None, ...]
    labels_from: str
    skipped: tuple[Skipped, ...] = ()
    limit: int | None = None
    max_pixels: int | None = None

    @cached_property
    def _by_id(self) -> dict[str, Item]:
        return {item.id: item for item in self.items}

    def item(self, id_: str) -> Item:
        """The item with this id.

        Args:
            id_: As in a manifest.

        Returns:
            The item.

        Raises:
            DataError: There is none.
        """
        if id_ not in self._by_id:
            raise DataError(f"{self.name or 'This data set'} no longer holds an image {id_!r}.")
        return self._by_id[id_]


@dataclass(frozen=True)
class Manifest:
    """What a scan found: the images of the study in order, and every file left out with its reason."""

    source: str | None
    labels_from: str
    images: tuple[ImageEntry, ...]
    skipped: tuple[Skipped, ...]
    masks_from: str | None = None
    max_pixels: int | None = None

    @property
    def digest(self) -> str:
        """One digest of ids, labels, contents and masks in their order; where the files lie does not enter."""
        lines = (
            f"{entry.id!r} {entry.label} {entry.digest}{' ' + entry.mask_digest if entry.mask_digest else ''}\n"
            for entry in self.images
        )
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def to_json(self) -> str:
        """The manifest as JSON; file names that are no UTF-8 survive as escaped surrogates.

        Returns:
            The same text for the same manifest.
        """
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """The manifest that a text describes.

        Args:
            text: From `to_json`, also of an earlier version.

        Returns:
            The manifest.

        Raises:
            ValueError: The text is none of ours.
        """
        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.DecodeError:  # among others for the name of a file that is no UTF-8
            content = json.loads(text)
        try:
            return msgspec.convert(content, cls)
        except msgspec.ValidationError as error:
            raise ValueError(str(error)) from error


def first_reasons(skipped: Sequence[Skipped]) -> str:
    """The first five images that were left out, a line each with the reason.

    Args:
        skipped: All that were left out.

    Returns:
        Lines that follow a sentence.
    """
    return "".join(f"\n  {each.id}: {each.reason}" for each in skipped[:5])
