"""What a set of images says together: mean, its interval, and the spread over images. Pure functions of arrays."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int

__all__ = ["STATISTICS", "Summary", "summary"]

STATISTICS = ("mean", "low", "high", "q05", "median", "q95")
"""`low` and `high` bound the mean (95 %); `q05`, `median` and `q95` are quantiles over the images."""

BOOTSTRAP_UP_TO = 2_000
"""Above this many images the normal interval and the bootstrap's agree to three digits, and the bootstrap is slow."""

QUANTILES_FROM = 5_000
RESAMPLES = 500


@dataclass(frozen=True)
class Summary:
    """`values` lead with the dimension of `STATISTICS`; `quantiles_of` images gave the quantiles, evenly spaced."""

    values: Float32[np.ndarray, "statistic ..."]
    n_images: int
    quantiles_of: int
    interval: str


def summary(values: Float32[np.ndarray, "image ..."], seed: int = 0) -> Summary:
    """Mean over images with its 95 % interval, and the 5, 50 and 95 % quantiles. NaN (padding) stays NaN."""
    n_images = len(values)
    flat = np.ascontiguousarray(values.reshape(n_images, -1))
    mean = flat.mean(axis=0, dtype=np.float64)
    bootstrapped = n_images <= BOOTSTRAP_UP_TO
    low, high = _bootstrap(flat, seed) if bootstrapped else _normal(flat, mean)
    sample = flat[evenly_spaced(n_images, QUANTILES_FROM)]
    quantiles = np.quantile(np.ascontiguousarray(sample.T), (0.05, 0.5, 0.95), axis=1)
    stacked = np.stack([mean, low, high, *quantiles]).astype(np.float32)
    return Summary(
        stacked.reshape(len(STATISTICS), *values.shape[1:]),
        n_images,
        len(sample),
        "bootstrap, 500 resamples" if bootstrapped else "normal",
    )


def evenly_spaced(n: int, at_most: int) -> Int[np.ndarray, "chosen"]:
    """Indices of at most `at_most` of `n` things, evenly spaced over them, first and last included."""
    return np.unique(np.linspace(0, n - 1, min(n, at_most)).round().astype(np.int64))


def _bootstrap(
    flat: Float32[np.ndarray, "image cell"], seed: int
) -> tuple[Float64[np.ndarray, "cell"], Float64[np.ndarray, "cell"]]:
    n_images = len(flat)
    draws = np.random.default_rng(seed).multinomial(n_images, np.full(n_images, 1 / n_images), size=RESAMPLES)
    means = draws.astype(np.float32) @ flat / n_images
    low, high = np.quantile(means, (0.025, 0.975), axis=0)
    return low, high


def _normal(
    flat: Float32[np.ndarray, "image cell"], mean: Float64[np.ndarray, "cell"]
) -> tuple[Float64[np.ndarray, "cell"], Float64[np.ndarray, "cell"]]:
    half = 1.96 * flat.std(axis=0, dtype=np.float64) / np.sqrt(len(flat))
    return mean - half, mean + half
