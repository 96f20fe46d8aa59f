"""A study's arrays as the page asks for them: of one image, of one head over all images, and summaries of sets."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from threading import Event, Lock
from types import MappingProxyType
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float32, Int
from starlette.exceptions import HTTPException

from vitrail.analysis import BASE, analyses, measures
from vitrail.app.columns import Columns
from vitrail.app.lru_cache import LRUCache
from vitrail.app.summary import QUANTILES_FROM, SetSummary, evenly_spaced, summarise
from vitrail.heads.correction import correct_mean, too_few_exact, words_of_correction
from vitrail.heads.exact_names import EXACT_VALUES
from vitrail.heads.head_values import importance_metrics
from vitrail.heads.summary import value_limits
from vitrail.layer_summary import in_first_patches
from vitrail.stats import moment_interval

__all__ = ["StudyArrays", "parse_image_set"]

WHOLE_BYTES = 512 * 2**20
"""An array up to this size is read once and kept; a larger one is read where it is asked. The largest of 50,000 images
of a ViT-B, attention strength, has 403 MB."""

PIECEWISE_BYTES = 64 * 2**20
"""Of a larger array a head or layer is summarised alone where it is asked for: all heads of attention strength take a
minute over 50,000 images, one head a second."""

CACHE_BYTES = 1024 * 2**20
"""Whole arrays in memory: the largest one and some that are drawn beside it."""

BLOCK_BYTES = 32 * 2**20
"""Read at a time when an array is streamed: long enough for the disk, short against the memory of a laptop."""

NUMERIC_KINDS = "buif"
"""Kinds of numpy types that travel as numbers: bool, unsigned, signed and floating."""

MAX_ANSWER_BYTES = 256 * 2**20
"""Largest part of an array in one answer: one head of every image fits many times over."""

MAX_INDEX_DIGITS = 9
"""More digits than an index of any study has; Python's own limit on digits then never decides."""

SHAPES = frozenset({"side", "xy"})
"""Dimensions of boxes and arrows, which the page draws on the grid of their layer and in its patches."""

N_WARMED = 2
"""Measures of importance that are summarised ahead: the one that the page opens with, and the next in its list."""

ImageSet = Int[np.ndarray, "index"]
NamedSummary = tuple[tuple[str, ...], SetSummary]


class StudyArrays:
    """Reads the arrays of one open study. Every method may be called from any thread.

    Lengths are as everywhere in patches of the first layer (`in_first_patches`), but for those of boxes and arrows.
    """

    def __init__(self, dataset: xr.Dataset) -> None:
        """Read nothing yet.

        Args:
            dataset: The study, as `open_study` gives it.
        """
        self.dataset = dataset
        self.n_images = int(dataset.sizes["image"])
        n_heads = np.asarray(dataset.attrs.get("n_heads", []), dtype=np.int64)
        self._absent = np.arange(n_heads.max(initial=0)) >= n_heads[:, None]  # [layer, head]
        self._units: dict[str, str] = {}
        self._scales: dict[str, Float32[np.ndarray, "layer"]] = {}  # of lengths in patches of their layer
        for name, array in dataset.data_vars.items():
            if "layer" in array.dims:
                stored = xr.DataArray(np.ones(array.sizes["layer"]), dims="layer", attrs=array.attrs)
                converted = in_first_patches(stored, dataset.attrs.get("grids"))
                self._units[str(name)] = str(converted.attrs.get("unit", ""))
                if converted is not stored and SHAPES.isdisjoint(map(str, array.dims)):
                    self._scales[str(name)] = converted.to_numpy().astype(np.float32)
        self._cache: LRUCache[np.ndarray] = LRUCache(CACHE_BYTES)
        self._columns = Columns()
        self._summary_lock = Lock()
        self._summaries: dict[tuple[str, bool, bool], SetSummary] = {}
        self._pieces: dict[tuple[str, bool, bool, tuple[tuple[str, int], ...]], SetSummary] = {}

    @property
    def measures(self) -> list[str]:
        """The measures that this study holds: of registered analyses, then of packages not installed here."""
        return [name for name in measures() if name in self.dataset.data_vars] + self.undeclared

    @property
    def undeclared(self) -> list[str]:
        """Arrays whose attributes name an analysis that is not registered: the store tells how to read them."""
        known = analyses()
        return [
            str(name)
            for name, array in self.dataset.data_vars.items()
            if array.attrs.get("analysis", BASE) not in known and array.dtype.kind in NUMERIC_KINDS
        ]

    def warm_up(self, stop: Event) -> None:
        """Summarise ahead what the first screen shows, so that no visitor waits for it.

        Args:
            stop: Ends the work before the next array.
        """
        for name in importance_metrics(self.dataset)[:N_WARMED]:
            if not stop.is_set():
                self.summary_of_all(name, is_cost=bool(self.baseline(name)))

    def start(self) -> dict[str, int]:
        """Where the page opens: the head that matters most, and the image that needs it most.

        Returns:
            `layer`, `head` and `image`; the first of each in a study without importance of heads.
        """
        name = next(iter(importance_metrics(self.dataset)), None)
        if name is None:
            return {"layer": 0, "head": 0, "image": 0}
        is_cost = bool(self.baseline(name))
        means = np.nan_to_num(self.summary_of_all(name, is_cost=is_cost).values[0], nan=-np.inf)
        layer, head = np.unravel_index(int(means.argmax()), means.shape)
        _, values = self.read_slice(name, {"layer": str(layer), "head": str(head)})
        image = int(np.nan_to_num(self._cost(self.array(name), values, is_cost), nan=-np.inf).argmax())
        return {"layer": int(layer), "head": int(head), "image": image}

    def array(self, name: str) -> xr.DataArray:
        """The array of a name, not read yet.

        Args:
            name: A measure or another array of the study.

        Returns:
            The array.

        Raises:
            HTTPException: 404 with the names that exist.
        """
        if name not in self.dataset or self.dataset[name].dtype.kind not in NUMERIC_KINDS:
            names = ", ".join(
                str(other) for other, each in self.dataset.data_vars.items() if each.dtype.kind in NUMERIC_KINDS
            )
            raise HTTPException(404, f"This study holds no numbers called {name!r}. It holds: {names}.")
        return self.dataset[name]

    def index(self, dimension: str, text: str, array: xr.DataArray) -> int:
        """The index that a request names.

        Args:
            dimension: Its dimension.
            text: The index in decimal digits.
            array: The array that is indexed.

        Returns:
            The index, valid for the array.

        Raises:
            HTTPException: 404 with the valid range.
        """
        if dimension not in array.dims:
            raise HTTPException(
                404, f"{array.name} has no dimension {dimension}; it has {', '.join(map(str, array.dims))}."
            )
        size = array.sizes[dimension]
        if not text.isascii() or not text.isdigit() or len(text) > MAX_INDEX_DIGITS or int(text) >= size:
            raise HTTPException(404, f"There is no {dimension} {text[:20]!r} here. Valid: 0 to {size - 1}.")
        return int(text)

    def read_slice(self, name: str, indices: dict[str, str]) -> tuple[tuple[str, ...], np.ndarray]:
        """Part of an array.

        Args:
            name: The array.
            indices: Index by dimension, as a request writes them.

        Returns:
            The dimensions that remain, and the values.

        Raises:
            HTTPException: 404 for a name or an index that does not exist; 413 for more than one answer holds.
        """
        array = self.array(name)
        fixed = {dimension: self.index(dimension, text, array) for dimension, text in indices.items()}
        remaining = tuple(str(dimension) for dimension in array.dims if dimension not in fixed)
        n_bytes = array.isel(fixed).nbytes
        if n_bytes > MAX_ANSWER_BYTES:
            raise HTTPException(413, f"That is {n_bytes // 2**20} MB of {name}: ask for one image, layer or head.")
        columns = self._columns_of(array) if fixed and "image" not in fixed else None
        if columns is not None:
            picked = columns[tuple(fixed.get(str(dimension), slice(None)) for dimension in array.dims[1:])]
            return remaining, np.moveaxis(np.asarray(picked), -1, 0)
        if array.nbytes > WHOLE_BYTES or ("image" in fixed and name not in self._cache):
            return remaining, self._read(array, fixed)
        position = tuple(fixed.get(str(dimension), slice(None)) for dimension in array.dims)
        return remaining, np.asarray(self.load(name)[position])

    def slice_upload(
        self, name: str, values: np.ndarray, indices: dict[str, str]
    ) -> tuple[tuple[str, ...], np.ndarray]:
        """Part of an array of one image that the study does not hold.

        Args:
            name: The array.
            values: Its values for that image, without the image dimension.
            indices: Index by dimension, as a request writes them.

        Returns:
            The dimensions that remain, and the values.

        Raises:
            HTTPException: 404 for a name or an index that does not exist.
        """
        array = self.array(name)
        fixed = {dimension: self.index(dimension, text, array) for dimension, text in indices.items()}
        dims = [str(dimension) for dimension in array.dims if dimension != "image"]
        position = tuple(fixed.get(dimension, slice(None)) for dimension in dims)
        remaining = tuple(dimension for dimension in dims if dimension not in fixed)
        return remaining, np.asarray(self._convert(array, np.asarray(values), dims)[position])

    def load(self, name: str) -> np.ndarray:
        """All of one array, kept in memory while there is room.

        Args:
            name: The array.

        Returns:
            Its values, in the dimensions of the study.
        """
        return self._cache.get_or_create(name, lambda: self._read(self.dataset[name], {}))

    def unit(self, name: str) -> str:
        """The unit of an array.

        Args:
            name: The array.

        Returns:
            That of the measure, but in a hierarchy lengths are in patches of its first layer. It is that of boxes and
            arrows too, told in numbers: their values are in patches of their layer.
        """
        return self._units.get(name, str(self.dataset[name].attrs.get("unit", "")))

    def _read(self, array: xr.DataArray, fixed: Mapping[str, Any]) -> np.ndarray:
        """Part of an array from the disk; `fixed` picks an index, or several images, by dimension."""
        values = np.asarray(array.isel(fixed).values)
        remaining = [str(dimension) for dimension in array.dims if not isinstance(fixed.get(str(dimension)), int)]
        return self._convert(array, values, remaining, fixed.get("layer"))

    def _convert(
        self, array: xr.DataArray, values: np.ndarray, dims: Sequence[str], layer: int | None = None
    ) -> np.ndarray:
        """Values as they are stored, of all layers along `dims` or of one, in the unit that the page has them in."""
        scale = self._scales.get(str(array.name))
        if scale is None:
            return values
        if layer is not None:
            return np.asarray(values * scale[layer])
        return np.asarray(values * scale.reshape([-1 if dimension == "layer" else 1 for dimension in dims]))

    def summary(
        self, name: str, images: ImageSet | None, over_heads: bool, fixed: dict[str, int], *, is_cost: bool = False
    ) -> NamedSummary:
        """Mean, interval and quantiles of an array over a set of images.

        Args:
            name: The array.
            images: Indices of the images; None for all.
            over_heads: Average the heads of a layer first.
            fixed: Picks a layer or a head, by dimension.
            is_cost: Of what each image loses: the measure's baseline less the measure.

        Returns:
            The dimensions that remain, and the statistics.

        Raises:
            HTTPException: 404 for a name that does not exist, or heads that do not.
        """
        array = self.array(name)
        if array.dims[:1] != ("image",):
            raise HTTPException(404, f"{name} has no value for each image, so it has no mean over images.")
        if over_heads and ("head" not in array.dims or "head" in fixed):
            raise HTTPException(404, f"{name} has no heads to average over here.")
        if is_cost and not self.baseline(name):
            raise HTTPException(404, f"{name} is read against no other measure of this study, so it has no cost.")
        if images is not None:
            statistics = self._summary_of_set(array, images, over_heads, fixed, is_cost)
        elif fixed and PIECEWISE_BYTES < array.nbytes <= WHOLE_BYTES:
            piece = name, over_heads, is_cost, tuple(sorted(fixed.items()))
            if piece not in self._pieces:
                everything = np.arange(self.n_images)
                self._pieces[piece] = self._summary_of_set(array, everything, over_heads, fixed, is_cost)
            statistics = self._pieces[piece]
        else:
            of_all = self.summary_of_all(name, over_heads, is_cost=is_cost)
            dims = [dimension for dimension in array.dims[1:] if not (over_heads and dimension == "head")]
            position = tuple(fixed.get(str(dimension), slice(None)) for dimension in dims)
            statistics = replace(of_all, values=np.asarray(of_all.values[(slice(None), *position)]))
        dropped = {"image", *fixed, *(("head",) if over_heads else ())}
        return tuple(str(dimension) for dimension in array.dims if dimension not in dropped), statistics

    def summary_of_all(self, name: str, over_heads: bool = False, *, is_cost: bool = False) -> SetSummary:
        """Statistics over every image of the study: computed once, then kept.

        Args:
            name: The array.
            over_heads: Average the heads of a layer first.
            is_cost: Of what each image loses: the measure's baseline less the measure.

        Returns:
            The statistics.
        """
        key = name, over_heads, is_cost
        if key in self._summaries:  # not behind another one, which may take a minute
            return self._summaries[key]
        with self._summary_lock:
            if key not in self._summaries:
                array = self.array(name)
                if self._exact_name(name) is not None:
                    everything = np.arange(self.n_images)
                    self._summaries[key] = self._summary_of_set(array, everything, over_heads, {}, is_cost)
                elif array.nbytes > WHOLE_BYTES:
                    self._summaries[key] = self._stream_summary(array, over_heads, is_cost)
                else:
                    numbers = self._numbers(array, self._cost(array, self.load(name), is_cost), over_heads)
                    self._summaries[key] = _summarise(array, numbers, over_heads, is_cost)
            return self._summaries[key]

    def baseline(self, name: str) -> str:
        """The measure that another one is read against.

        Args:
            name: The measure.

        Returns:
            The name of its baseline; empty where it has none, or this study does not hold it.
        """
        declared = measures().get(name)
        baseline = declared.baseline if declared is not None else ""
        return baseline if baseline in self.dataset else ""

    def costs(self, name: str) -> Float32[np.ndarray, "image ..."]:
        """What each image loses: the measure's baseline less the measure.

        Args:
            name: A measure that has a baseline here.

        Returns:
            The differences, in the unit and the dimensions of the measure.
        """
        return self._cost(self.array(name), self.load(name), True)

    def _cost(
        self, array: xr.DataArray, values: np.ndarray, is_cost: bool, images: ImageSet | slice = slice(None)
    ) -> np.ndarray:
        """The values of these images, or how far they are below the baseline."""
        if not is_cost:
            return values
        plain = self.load(self.baseline(str(array.name)))[images]
        return np.asarray(plain.reshape(-1, *[1] * (values.ndim - 1)) - values, dtype=np.float32)

    def _summary_of_set(
        self, array: xr.DataArray, images: ImageSet, over_heads: bool, fixed: dict[str, int], is_cost: bool
    ) -> SetSummary:
        """Over some images; of an array too large to keep at most 5,000 of them, evenly spaced, are read."""

        def numbers(values: np.ndarray) -> Float32[np.ndarray, "image ..."]:
            return self._numbers(array, self._cost(array, values, is_cost, images), over_heads, fixed)

        if array.nbytes <= WHOLE_BYTES:
            position = tuple(fixed.get(str(dimension), slice(None)) for dimension in array.dims[1:])
            values = self.load(str(array.name))[(images, *position)]
        else:
            images = images[evenly_spaced(len(images), QUANTILES_FROM)]
            values = self._read(array, fixed | {"image": images})
        summary = _summarise(array, numbers(values), over_heads, is_cost)
        exact_name = self._exact_name(str(array.name))
        if exact_name is None:
            return summary
        of_sample = self._read(self.array(exact_name), fixed | {"image": images})
        return _corrected(summary, numbers(values), numbers(of_sample))

    def _numbers(
        self, array: xr.DataArray, values: np.ndarray, over_heads: bool, fixed: Mapping[str, int] = MappingProxyType({})
    ) -> Float32[np.ndarray, "image ..."]:
        """Values, or means over heads, with NaN for heads that a layer does not have: counts and flags hold 0 there."""
        numbers = np.asarray(values, dtype=np.float32)
        dims = [dimension for dimension in array.dims if dimension not in fixed]
        if self._absent.any() and {"layer", "head"} <= set(array.dims):
            absent = self._absent[tuple(fixed.get(dimension, slice(None)) for dimension in ("layer", "head"))]
            sizes = [
                size if dimension in ("layer", "head") else 1
                for dimension, size in zip(dims, numbers.shape, strict=True)
            ]
            numbers = np.where(np.reshape(absent, sizes), np.float32(np.nan), numbers)
        if not over_heads:
            return numbers
        axis = dims.index("head")
        n_heads = np.isfinite(numbers).sum(axis=axis)  # 0 in layers that have no such numbers
        with np.errstate(invalid="ignore"):
            return np.asarray(np.nansum(numbers, axis=axis) / n_heads, dtype=np.float32)

    def _exact_name(self, name: str) -> str | None:
        """The array of exact values on a sample of the images, beside one of estimates."""
        exact = EXACT_VALUES.get(name)
        return exact if exact in self.dataset else None

    def _stream_summary(self, array: xr.DataArray, over_heads: bool, is_cost: bool) -> SetSummary:
        """As `summarise`, in one pass that never loads the array: exact mean, quantiles of evenly spaced images.

        A number is over all images that have it; one that others lack has no interval.
        """
        origin, sums, counts = np.zeros(()), np.zeros(()), np.zeros(())
        samples = []
        sample_indices = evenly_spaced(self.n_images, QUANTILES_FROM)
        columns = self._columns_of(array)
        for start, block in self._blocks(array) if columns is None else _blocks_of_columns(columns):
            values = self._cost(array, block, is_cost, slice(start, start + len(block)))
            numbers = self._numbers(array, values, over_heads)
            if start == 0:
                origin = np.nan_to_num(numbers[0].astype(np.float64))  # sums of what differs from it keep their digits
            present = ~np.isnan(numbers)
            shifted = np.where(present, numbers - origin, 0)
            counts = counts + present.sum(axis=0)
            sums = sums + np.stack([(shifted**power).sum(axis=0) for power in (1, 2, 3)])
            in_block = sample_indices[(sample_indices >= start) & (sample_indices < start + len(block))]
            samples.append(numbers[in_block - start])
        of_samples = summarise(np.concatenate(samples))
        if self.n_images <= QUANTILES_FROM:
            return of_samples  # that is, of all images
        n_images = int(counts.max())
        mean, square, cube = sums / np.where(counts > 0, counts, np.nan)
        variance = np.maximum(square - mean**2, 0)
        skewness = (cube - 3 * mean * square + 2 * mean**3) / np.where(variance > 0, variance, 1) ** 1.5
        low, high, reason = moment_interval(mean, variance, skewness, n_images)
        ends = (np.stack([mean, *np.where(counts == n_images, (low, high), np.nan)]) + origin).astype(np.float32)
        words = f"skew-corrected; {reason}" if reason else "skew-corrected"
        return SetSummary(np.concatenate([ends, of_samples.values[3:]]), n_images, of_samples.n_images, words)

    def _columns_of(self, array: xr.DataArray) -> np.ndarray | None:
        """An array of every image, too large to keep in memory, with the images last."""
        if array.nbytes <= WHOLE_BYTES or array.dims[:1] != ("image",):
            return None
        return self._columns.get(str(array.name), array.shape, array.dtype, lambda: self._blocks(array))

    def _blocks(self, array: xr.DataArray) -> Iterator[tuple[int, np.ndarray]]:
        """The first image of each block and its values, in whole chunks of the store."""
        step = max(1, int(BLOCK_BYTES / max(1, array.nbytes / self.n_images)))
        chunk = int((array.encoding.get("chunks") or (1,))[0])
        step = -(-step // chunk) * chunk
        for start in range(0, self.n_images, step):
            yield start, self._read(array, {"image": slice(start, start + step)})


def _blocks_of_columns(columns: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The first image of each block and its values, the images first."""
    n_images = columns.shape[-1]
    step = max(1, int(BLOCK_BYTES / max(1, columns.nbytes / n_images)))
    for start in range(0, n_images, step):
        yield start, np.ascontiguousarray(np.moveaxis(columns[..., start : start + step], -1, 0))


def _summarise(
    array: xr.DataArray, numbers: Float32[np.ndarray, "image ..."], over_heads: bool, is_cost: bool
) -> SetSummary:
    """The summary of some numbers of an array, by what the array says of them."""
    is_bool = array.dtype.kind == "b"
    limits = (0.0, 1.0) if is_bool else value_limits(str(array.name))
    if is_cost and limits is not None:
        limits = limits[0] - limits[1], limits[1] - limits[0]
    return summarise(numbers, is_share=is_bool and not over_heads, limits=limits)


def _corrected(
    summary: SetSummary, estimates: Float32[np.ndarray, "image ..."], exact: Float32[np.ndarray, "image ..."]
) -> SetSummary:
    """The summary of estimates with the mean corrected by the images that have exact values, and quantiles of those."""
    mean = correct_mean(estimates, exact)
    if mean is None:
        values = summary.values.copy()
        values[1:3] = np.nan
        return replace(summary, values=values, interval=f"{summary.interval}; {too_few_exact(exact)}")
    rows = exact[~np.isnan(exact.reshape(len(exact), -1)).all(1)]
    quantiles = summarise(rows).values[3:]
    return replace(
        summary,
        values=np.concatenate([np.stack(mean), quantiles]).astype(np.float32),
        quantiles_of=len(rows),
        interval=f"studentised bootstrap, {words_of_correction(len(rows))}",
    )


def parse_image_set(indices: Any, n_images: int) -> ImageSet:
    """Check the images that a request lists.

    Args:
        indices: The value under "images" in the request's JSON.
        n_images: Number of images in the study.

    Returns:
        The indices, ascending, each once.

    Raises:
        HTTPException: 422 for anything but a list of integers that is not empty and not longer than the study; 404 for
            an index that the study does not have.
    """
    if not isinstance(indices, list) or not all(type(index) is int for index in indices):
        raise HTTPException(422, 'Send the images as {"images": [0, 5, 17]}, integers only.')
    if not 0 < len(indices) <= n_images:
        raise HTTPException(422, f"{len(indices)} images were listed; send between 1 and {n_images}.")
    lowest, highest = min(indices), max(indices)
    if lowest < 0 or highest >= n_images:
        raise HTTPException(404, f"Images run from 0 to {n_images - 1}; {lowest} to {highest} were asked for.")
    return np.unique(np.asarray(indices, dtype=np.int64))
