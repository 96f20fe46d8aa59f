"""Pictures for the page: thumbnails from the store, photographs from the study's own list, uploads from memory."""

import io
import math
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

from vitrail.app.shelf import Shelf
from vitrail.data import Manifest, stored_image
from vitrail.errors import DataError

__all__ = ["Photographs", "Thumbnails", "Upload", "Uploads", "encoded", "seen_by_model"]


@dataclass(frozen=True)
class Upload:
    """A photograph that a visitor gave, held in memory only; every measure of it, and its place on the map."""

    photograph: Image.Image
    arrays: dict[str, np.ndarray]


class Uploads:
    """The last few uploads, under names that cannot be guessed; the oldest goes first."""

    def __init__(self, at_most: int = 8) -> None:
        self.at_most = at_most
        self._held: OrderedDict[str, Upload] = OrderedDict()

    def add(self, upload: Upload) -> str:
        """Keep it; returns its name, `u` and random hex digits."""
        name = "u" + secrets.token_hex(8)
        self._held[name] = upload
        while len(self._held) > self.at_most:
            self._held.popitem(last=False)
        return name

    def named(self, name: str) -> Upload:
        """The upload of that name; 404 if it has gone."""
        if name not in self._held:
            raise HTTPException(
                404, f"That photograph is no longer here: only the last {self.at_most} are kept. Drop it again."
            )
        return self._held[name]


class Thumbnails:
    """The study's thumbnails, read a block of images at a time."""

    def __init__(self, dataset: xr.Dataset, block: int = 256) -> None:
        self._array = dataset.get("thumbnail")
        self._block = block
        self._shelf = Shelf(128 * 2**20)

    def of(self, image: int) -> UInt8[np.ndarray, "row column channel"]:
        """One thumbnail; 404 where the study has none."""
        array = self._array
        if array is None:
            raise HTTPException(404, "This study was made without thumbnails.")
        start = image - image % self._block
        held = self._shelf.take(start, lambda: np.asarray(array.isel(image=slice(start, start + self._block)).values))
        thumbnail: UInt8[np.ndarray, "row column channel"] = held[image - start]
        return thumbnail


class Photographs:
    """The photographs behind a study, found through its own list of images only: no request names a file."""

    def __init__(self, manifest: Manifest, ids: Sequence[str]) -> None:
        """`ids` are the images that the page shows, in its order; an unfinished study has fewer than its list."""
        self._manifest = manifest
        entries = {entry.id: entry for entry in manifest.images}
        self._entries = [entries[name] for name in ids]

    def of(self, image: int) -> Image.Image:
        """The photograph as the study read it; 404 with the reason if it cannot be read again."""
        try:
            return stored_image(self._manifest, self._entries[image])
        except DataError as reason:
            raise HTTPException(404, str(reason)) from reason


def encoded(picture: Image.Image, quality: int = 90) -> bytes:
    """The picture as JPEG."""
    held = io.BytesIO()
    picture.save(held, "JPEG", quality=quality, subsampling=0)
    return held.getvalue()


def seen_by_model(photograph: Image.Image, preprocessing: Mapping[str, Any]) -> Image.Image:
    """The part of the photograph that reaches the model, not normalised: the steps that timm names, without torch."""
    rows, columns = preprocessing["size"]
    crop_pct, mode = preprocessing["crop_pct"], preprocessing["crop_mode"]
    scaled = (math.floor(columns / crop_pct), math.floor(rows / crop_pct))
    if mode != "squash":
        ratios = (photograph.width / scaled[0], photograph.height / scaled[1])
        ratio = max(ratios) if mode == "border" else min(ratios)
        scaled = (_rounded(photograph.width, ratio, scaled[0]), _rounded(photograph.height, ratio, scaled[1]))
    method = Image.Resampling[preprocessing["interpolation"].upper()]
    left, top = round((scaled[0] - columns) / 2), round((scaled[1] - rows) / 2)
    return photograph.convert("RGB").resize(scaled, method).crop((left, top, left + columns, top + rows))


def _rounded(side: int, ratio: float, meant: int) -> int:
    """The scaled side: exactly `meant` where it is the side that fits, rounded down like torchvision's otherwise."""
    exact = side / ratio
    return meant if abs(exact - meant) < 1e-6 else int(exact)
