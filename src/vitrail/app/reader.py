"""A study as the page asks for it: one image's numbers, one head's numbers over all images, and summaries of sets."""

from collections.abc import Hashable, Iterator
from dataclasses import replace
from threading import Event, Lock
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float32, Int
from starlette.exceptions import HTTPException

from vitrail.app.shelf import Shelf
from vitrail.app.summary import QUANTILES_FROM, Summary, evenly_spaced, summary
from vitrail.measure import MEASURES

__all__ = ["Reader", "chosen_images"]

WHOLE_BYTES = 512 * 2**20
"""An array up to this size is read once and kept; a larger one is read where it is asked. The largest of 50,000 images
of a ViT-B, attention strength, has 403 MB."""

SHELF_BYTES = 1024 * 2**20
Chosen = Int[np.ndarray, "chosen"]
Told = tuple[tuple[str, ...], Summary]
WARM = (
    ("head_probability", False),
    ("strength_entropy", False),
    ("strength_entropy", True),
    ("attention_strength", False),
)


class Reader:
    """Reads one open study. Every method may be called from any thread."""

    def __init__(self, dataset: xr.Dataset) -> None:
        self.dataset = dataset
        self.n_images = int(dataset.sizes["image"])
        self._whole = Shelf(SHELF_BYTES)
        self._summing = Lock()
        self._summaries: dict[tuple[str, bool], Summary] = {}

    @property
    def measures(self) -> list[str]:
        """The measures of `measure.py` that this study holds."""
        return [name for name in MEASURES if name in self.dataset.data_vars]

    def warm(self, leaving: Event) -> None:
        """Read ahead what the first screen shows, so that no visitor waits for it; stops on `leaving`."""
        for name, over_heads in WARM:
            if name in self.dataset and not leaving.is_set():
                self.summary_of_all(name, over_heads)

    def known(self, name: str) -> xr.DataArray:
        """The array called `name`; 404 with the names there are, if there is none."""
        if name not in self.dataset:
            names = ", ".join(str(other) for other in self.dataset.data_vars)
            raise HTTPException(404, f"This study holds no array called {name!r}. It holds: {names}.")
        return self.dataset[name]

    def index(self, dimension: str, text: str, array: xr.DataArray) -> int:
        """The index that a request names, checked against the array."""
        if dimension not in array.dims:
            raise HTTPException(
                404, f"{array.name} has no dimension {dimension}; it has {', '.join(map(str, array.dims))}."
            )
        size = array.sizes[dimension]
        if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) >= size:
            raise HTTPException(404, f"There is no {dimension} {text[:20]!r} here. Valid: 0 to {size - 1}.")
        return int(text)

    def piece(self, name: str, chosen: dict[str, str]) -> tuple[tuple[str, ...], np.ndarray]:
        """The array with the chosen indices fixed: the dimensions left, and the values."""
        array = self.known(name)
        fixed = {dimension: self.index(dimension, text, array) for dimension, text in chosen.items()}
        left = tuple(str(dimension) for dimension in array.dims if dimension not in fixed)
        if array.nbytes > WHOLE_BYTES or ("image" in fixed and not self._whole.holds(name)):
            return left, np.asarray(array.isel(fixed).values)
        place = tuple(fixed.get(str(dimension), slice(None)) for dimension in array.dims)
        return left, np.asarray(self.whole(name)[place])

    def slice_of_one(self, name: str, values: np.ndarray, chosen: dict[str, str]) -> tuple[tuple[str, ...], np.ndarray]:
        """As `piece`, of one image that the study does not hold; `values` have no image dimension."""
        array = self.known(name)
        fixed = {dimension: self.index(dimension, text, array) for dimension, text in chosen.items()}
        dims = [str(dimension) for dimension in array.dims if dimension != "image"]
        place = tuple(fixed.get(dimension, slice(None)) for dimension in dims)
        return tuple(dimension for dimension in dims if dimension not in fixed), np.asarray(np.asarray(values)[place])

    def whole(self, name: str) -> np.ndarray:
        """All of one array, kept in memory while there is room."""
        return self._whole.take(name, lambda: np.asarray(self.dataset[name].values))

    def summary(self, name: str, images: Chosen | None, over_heads: bool, fixed: dict[str, int]) -> Told:
        """Mean, interval and quantiles of an array over all images, or over some; the dimensions left beside it.

        `over_heads` averages the heads of a layer first; `fixed` picks a layer or a head.
        """
        array = self.known(name)
        if over_heads and ("head" not in array.dims or "head" in fixed):
            raise HTTPException(404, f"{name} has no heads to average over here.")
        if images is not None:
            made = self._summary_of(array, images, over_heads, fixed)
        else:
            whole = self.summary_of_all(name, over_heads)
            kept = [dimension for dimension in array.dims[1:] if not (over_heads and dimension == "head")]
            place = tuple(fixed.get(str(dimension), slice(None)) for dimension in kept)
            made = replace(whole, values=np.asarray(whole.values[(slice(None), *place)]))
        gone = {"image", *fixed, *(("head",) if over_heads else ())}
        return tuple(str(dimension) for dimension in array.dims if dimension not in gone), made

    def summary_of_all(self, name: str, over_heads: bool = False) -> Summary:
        """Over every image of the study: made once, then kept."""
        with self._summing:
            if (name, over_heads) not in self._summaries:
                array = self.known(name)
                made = self._streamed(array, over_heads) if array.nbytes > WHOLE_BYTES else None
                self._summaries[name, over_heads] = made or summary(_numbers(self.whole(name), over_heads, array.dims))
            return self._summaries[name, over_heads]

    def _summary_of(self, array: xr.DataArray, images: Chosen, over_heads: bool, fixed: dict[str, int]) -> Summary:
        """Over some images; of an array too large to keep at most 5,000 of them, evenly spaced, are read."""
        left = tuple(dimension for dimension in array.dims if dimension not in fixed)
        if array.nbytes <= WHOLE_BYTES:
            place = tuple(fixed.get(str(dimension), slice(None)) for dimension in array.dims[1:])
            return summary(_numbers(self.whole(str(array.name))[(images, *place)], over_heads, left))
        read = images[evenly_spaced(len(images), QUANTILES_FROM)]
        return summary(_numbers(np.asarray(array.isel(fixed | {"image": read}).values), over_heads, left))

    def _streamed(self, array: xr.DataArray, over_heads: bool) -> Summary:
        """As `summary`, in one pass that never holds the array: exact mean, quantiles of evenly spaced images."""
        total = squares = 0.0
        kept = []
        chosen = evenly_spaced(self.n_images, QUANTILES_FROM)
        for start, block in self._blocks(array):
            numbers = _numbers(block, over_heads, array.dims)
            total = total + numbers.sum(axis=0, dtype=np.float64)
            squares = squares + np.einsum("i...,i...->...", numbers, numbers, dtype=np.float64)
            here = chosen[(chosen >= start) & (chosen < start + len(block))]
            kept.append(numbers[here - start])
        spread = summary(np.concatenate(kept))
        mean = np.asarray(total / self.n_images)
        half = 1.96 * np.sqrt(np.maximum(squares / self.n_images - mean**2, 0) / self.n_images)
        values = np.concatenate([np.stack([mean, mean - half, mean + half]).astype(np.float32), spread.values[3:]])
        return Summary(values, self.n_images, spread.n_images, "normal")

    def _blocks(self, array: xr.DataArray) -> Iterator[tuple[int, np.ndarray]]:
        step = max(1, int(32 * 2**20 / max(1, array.nbytes / self.n_images)))
        chunk = int((array.encoding.get("chunks") or (1,))[0])
        step = -(-step // chunk) * chunk
        for start in range(0, self.n_images, step):
            yield start, np.asarray(array.isel(image=slice(start, start + step)).values)

    def place(self, looked: dict[str, np.ndarray], neighbours: int = 5) -> Float32[np.ndarray, "xy"] | None:
        """Where a new image lies on the standing map: the mean place of the images with the nearest head
        probabilities. Our construction; None for a study without that map."""
        if "image_xy" not in self.dataset or "head_probability" not in looked or "head_probability" not in self.dataset:
            return None
        known = self.whole("head_probability").reshape(self.n_images, -1)
        distance = np.nansum((known - looked["head_probability"].reshape(1, -1)) ** 2, axis=1)
        nearest = np.argsort(distance, kind="stable")[:neighbours]
        return np.asarray(self.whole("image_xy")[nearest].mean(axis=0), dtype=np.float32)


def _numbers(values: np.ndarray, over_heads: bool, dims: tuple[Hashable, ...]) -> Float32[np.ndarray, "image ..."]:
    numbers = np.asarray(values, dtype=np.float32)
    if not over_heads:
        return numbers
    return np.asarray(np.nanmean(numbers, axis=dims.index("head")), dtype=np.float32)


def chosen_images(indices: Any, n_images: int) -> Int[np.ndarray, "chosen"]:
    """The images that a request lists, checked: integers of this study, at least one, each at most once."""
    if not isinstance(indices, list) or not all(type(index) is int for index in indices):
        raise HTTPException(422, 'Send the images as {"images": [0, 5, 17]}, integers only.')
    if not 0 < len(indices) <= n_images:
        raise HTTPException(422, f"{len(indices)} images were listed; send between 1 and {n_images}.")
    chosen = np.unique(np.asarray(indices, dtype=np.int64))
    if chosen[0] < 0 or chosen[-1] >= n_images:
        raise HTTPException(404, f"Images run from 0 to {n_images - 1}; {chosen[0]} to {chosen[-1]} were asked for.")
    return chosen
