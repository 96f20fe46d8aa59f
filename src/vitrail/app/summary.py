"""Statistics over a set of images: mean, its interval, and quantiles. Pure functions of arrays."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int

from vitrail.stats import Interval, mean_interval, moment_interval, share_interval

__all__ = ["QUANTILES_FROM", "STATISTICS", "SetSummary", "evenly_spaced", "summarise"]

STATISTICS = ("mean", "low", "high", "q05", "median", "q95")
"""`low` and `high` bound the mean (95 %); `q05`, `median` and `q95` are quantiles over the images."""

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
        n_images: Images in the set.
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

    Args:
        values: One row per image, in any unit. NaN (padding of missing heads) gives NaN.
        seed: Of the resampled images.
        is_share: The values are yes (1) or no (0).
        limits: The range that a value can have at all, if there is one.

    Returns:
        The statistics, in the unit of `values`; ends of an interval that cannot be trusted are NaN, and `interval` says
        why.
    """
    n_images = len(values)
    flat = np.ascontiguousarray(values.reshape(n_images, -1))
    mean = flat.mean(axis=0, dtype=np.float64)
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
        low[which], high[which], reason = interval.low, interval.high, reason or interval.reason
    sample = flat[evenly_spaced(n_images, QUANTILES_FROM)]
    quantiles = np.quantile(np.ascontiguousarray(sample.T), (0.05, 0.5, 0.95), axis=1)
    stacked = np.stack([mean, low, high, *quantiles]).astype(np.float32)
    method = "Clopper-Pearson" if is_share else "skew-corrected" if by_moments else "studentised bootstrap"
    return SetSummary(
        stacked.reshape(len(STATISTICS), *values.shape[1:]),
        n_images,
        len(sample),
        f"{method}; {reason}" if reason else method,
    )


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
