"""Statistics over a set of images: mean, its interval, and quantiles. Pure functions of arrays."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int

from vitrail.layer_summary import images_with_values
from vitrail.stats import Interval, mean_interval, moment_interval, share_interval

__all__ = ["QUANTILES_FROM", "STATISTICS", "SetSummary", "evenly_spaced", "summarise"]

STATISTICS = ("mean", "low", "high", "q05", "median", "q95")
"""`low` and `high` bound the mean (95 %); `q05`, `median` and `q95` are quantiles over the images."""

QUANTILES = (0.05, 0.5, 0.95)

QUANTILES_FROM = 5_000
"""Quantiles of more images than this are taken from so many of them, evenly spaced: within a per cent, and quick."""

MOMENTS_FROM = 20_000
"""Of more images than this the interval of a measure without a range follows from three moments. Resampling, which only
very skewed values need there, takes seconds a column; they have no interval, and the summary says so."""

CELLS_AT_ONCE = 2**22
"""Numbers taken at once: intervals are computed in float64, and a copy of all would be twice the array."""


@dataclass(frozen=True)
class SetSummary:
    """Statistics of an array over a set of images.

    Attributes:
        values: One array for each name in `STATISTICS`, in the measure's unit.
        n_images: Images in the set that the mean is of.
        quantiles_of: Images that gave the quantiles, evenly spaced over the set.
        interval: How `low` and `high` were found, in words.
    """

    values: Float32[np.ndarray, "statistic ..."]
    n_images: int
    quantiles_of: int
    interval: str


def summarise(
    values: Float32[np.ndarray, "image ..."],
    seed: int = 0,
    *,
    is_share: bool = False,
    limits: tuple[float, float] | None = None,
) -> SetSummary:
    """Mean over images with its 95 % interval, and the 5, 50 and 95 % quantiles.

    Images without a value in some layer that has any are left out (`images_with_values`); of the others each number is
    over what is there.

    Args:
        values: One row per image, in any unit; NaN where there is no value.
        seed: Of the resampled images.
        is_share: The values are yes (1) or no (0).
        limits: The range that a value can have at all, if there is one.

    Returns:
        The statistics, in the unit of `values`; ends of an interval that cannot be trusted are NaN, and `interval` says
        why.
    """
    measured = images_with_values(values.reshape(len(values), *(values.shape[1:] or (1,))))
    values = values if measured.all() else values[measured]
    n_images = len(values)
    flat = np.ascontiguousarray(values.reshape(n_images, -1))
    mean = flat.mean(axis=0, dtype=np.float64)
    some = _columns_with_gaps(flat, mean)
    mean[some] = np.nanmean(flat[:, some], axis=0, dtype=np.float64)
    low, high = np.full((2, len(mean)), np.nan)
    present, reason, step = np.flatnonzero(~np.isnan(mean)), "", max(1, CELLS_AT_ONCE // n_images)
    by_moments = limits is None and n_images > MOMENTS_FROM
    for start in range(0, len(present), step):
        which = present[start : start + step]
        part = flat[:, which]
        if is_share:
            interval = share_interval(part)
        elif by_moments:
            interval = _interval_of_moments(part)
        else:
            interval = mean_interval(part, limits=limits, seed=seed)
        low[which], high[which] = interval.low, interval.high
        reason = reason or interval.reason.partition(", for ")[0]  # without the count, which is of this step
    lacking = int(np.isnan(low[present]).sum())
    if 0 < lacking < len(present):
        reason = f"{reason}, for {lacking} of {len(present)} columns"
    sample = flat[evenly_spaced(n_images, QUANTILES_FROM)]
    quantiles = np.quantile(np.ascontiguousarray(sample.T), QUANTILES, axis=1)
    some = _columns_with_gaps(sample, quantiles[0])
    quantiles[:, some] = np.nanquantile(sample[:, some], QUANTILES, axis=0)
    stacked = np.stack([mean, low, high, *quantiles]).astype(np.float32)
    method = "Clopper-Pearson" if is_share else "skew-corrected" if by_moments else "studentised bootstrap"
    return SetSummary(
        stacked.reshape(len(STATISTICS), *values.shape[1:]),
        n_images,
        len(sample),
        f"{method}; {reason}" if reason else method,
    )


def _columns_with_gaps(
    values: Float32[np.ndarray, "image column"], statistic: Float[np.ndarray, "column"]
) -> Int[np.ndarray, "index"]:
    """Columns in which some images have a value and some have none, for which a statistic is NaN."""
    without = np.flatnonzero(np.isnan(statistic))
    return np.asarray(without[~np.isnan(values[:, without]).all(axis=0)])


def _interval_of_moments(values: Float32[np.ndarray, "image column"]) -> Interval:
    n_images, mean = len(values), values.mean(axis=0, dtype=np.float64)
    centred = values - mean
    variance = (centred**2).mean(axis=0)
    cube = (centred**3).mean(axis=0)
    skewness = cube / np.where(variance > 0, variance, 1) ** 1.5
    return moment_interval(mean, variance, skewness, n_images)


def evenly_spaced(n: int, at_most: int) -> Int[np.ndarray, "index"]:
    """Indices evenly spaced over `n` items, first and last included.

    Args:
        n: Number of items.
        at_most: Largest number of indices.

    Returns:
        Ascending indices from 0 to `n - 1`, without doubles.
    """
    return np.unique(np.linspace(0, n - 1, min(n, at_most)).round().astype(np.int64))
