"""Pictures for the page: thumbnails from the store, photographs from the study's own list, uploads from memory."""

import io
import secrets
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import UInt8
from PIL import Image
from starlette.exceptions import HTTPException

from vitrail.app.lru_cache import LRUCache
from vitrail.data import ImageEntry, Manifest, load_mask, stored_image
from vitrail.data.geometry import resize_and_crop
from vitrail.errors import DataError

__all__ = ["Photographs", "Thumbnails", "Upload", "Uploads", "encode_jpeg", "model_view"]

CACHE_BYTES = 128 * 2**20
"""Thumbnails in memory: those of 10,000 images of 64 x 64 pixels."""


UPLOAD_BYTES = 384 * 2**20
"""Decoded uploads in memory: one of the largest, or six of 16 million pixels."""

BYTES_OF_A_PIXEL = 4
"""As Pillow keeps red, green and blue."""


@dataclass(frozen=True)
class Upload:
    """A visitor's photograph, kept in memory only, with every measure of it and its position on the map of images."""

    photograph: Image.Image
    arrays: dict[str, np.ndarray]


class Uploads:
    """The last few uploads, under names that cannot be guessed; the oldest goes first."""

    def __init__(self, max_uploads: int = 8, max_bytes: int = UPLOAD_BYTES) -> None:
        """Start empty.

        Args:
            max_uploads: How many uploads stay.
            max_bytes: Limit for their decoded photographs together. The newest stays even if it is larger.
        """
        self.max_uploads = max_uploads
        self.max_bytes = max_bytes
        self._uploads: OrderedDict[str, Upload] = OrderedDict()

    def add(self, upload: Upload) -> str:
        """Keep an upload.

        Args:
            upload: The photograph and its measures.

        Returns:
            Its name: `u` and random hexadecimal digits.
        """
        name = "u" + secrets.token_hex(8)
        self._uploads[name] = upload
        while len(self._uploads) > 1 and (len(self._uploads) > self.max_uploads or self.n_bytes > self.max_bytes):
            self._uploads.popitem(last=False)
        return name

    @property
    def n_bytes(self) -> int:
        """Bytes of the decoded photographs."""
        photographs = [each.photograph for each in list(self._uploads.values())]
        return sum(BYTES_OF_A_PIXEL * each.width * each.height for each in photographs)

    def get(self, name: str) -> Upload:
        """The upload of a name.

        Args:
            name: As `add` returned it.

        Returns:
            The upload.

        Raises:
            HTTPException: 404 if it has gone.
        """
        upload = self._uploads.get(name)
        if upload is None:
            raise HTTPException(
                404,
                f"That photograph is no longer here: only the last {self.max_uploads} are kept, or fewer large ones. "
                "Drop it again.",
            )
        return upload


class Thumbnails:
    """The study's thumbnails, read a block of images at a time."""

    def __init__(self, dataset: xr.Dataset, block: int = 256) -> None:
        """Open them.

        Args:
            dataset: The study.
            block: Images read together: neighbours are asked for together.
        """
        self._array = dataset.get("thumbnail")
        self._block = block
        self._cache: LRUCache[np.ndarray] = LRUCache(CACHE_BYTES)

    def read(self, image: int) -> UInt8[np.ndarray, "row column channel"]:
        """One thumbnail.

        Args:
            image: Index in the study.

        Returns:
            Its pixels, 0 to 255.

        Raises:
            HTTPException: 404 for a study without thumbnails.
        """
        array = self._array
        if array is None:
            raise HTTPException(404, "This study was made without thumbnails.")
        start = image - image % self._block
        block = self._cache.get_or_create(
            start, lambda: np.asarray(array.isel(image=slice(start, start + self._block)).values)
        )
        thumbnail: UInt8[np.ndarray, "row column channel"] = block[image - start]
        return thumbnail


class Photographs:
    """The photographs behind a study, looked up in its own list of images only: no request names a file."""

    def __init__(self, manifest: Manifest, ids: Sequence[str]) -> None:
        """Look the images up.

        Args:
            manifest: The study's list of images.
            ids: The images on the page, in its order; an unfinished study has fewer than its list.
        """
        self._manifest = manifest
        self._entries: Sequence[ImageEntry] = manifest.images
        if len(ids) < len(manifest.images):
            entries = {entry.id: entry for entry in manifest.images}
            self._entries = [entries[name] for name in ids]

    def read(self, image: int) -> Image.Image:
        """The photograph as the study read it.

        Args:
            image: Index in the study.

        Returns:
            The decoded photograph.

        Raises:
            HTTPException: 404 with the reason if it cannot be read again.
        """
        try:
            return stored_image(self._manifest, self._entries[image])
        except DataError as reason:
            raise HTTPException(404, str(reason)) from reason

    def mask(self, image: int) -> np.ndarray | None:
        """The mask of a photograph's objects as the study read it.

        Args:
            image: Index in the study.

        Returns:
            Instance ids [row, column]; None where the image has no mask.

        Raises:
            HTTPException: 404 with the reason if it cannot be read again.
        """
        try:
            return load_mask(self._entries[image])
        except DataError as reason:
            raise HTTPException(404, str(reason)) from reason


def encode_jpeg(picture: Image.Image, quality: int = 90) -> bytes:
    """Encode a picture as JPEG.

    Args:
        picture: An RGB picture.
        quality: Of JPEG, 1 to 95.

    Returns:
        The file's bytes.
    """
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def model_view(photograph: Image.Image, preprocessing: Mapping[str, Any]) -> Image.Image:
    """The part of a photograph that reaches the model, in its colours: the steps that a plan names, without torch.

    Args:
        photograph: As it was decoded.
        preprocessing: A plan's preprocessing.

    Returns:
        An RGB picture of `size`.
    """
    return resize_and_crop(photograph, preprocessing)
