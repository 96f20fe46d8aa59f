"""A study's heads in one table: what pruning each of them does over all images, with intervals.

Works on a finished study, an `xarray.Dataset`, without torch.
"""

from typing import NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from vitrail.errors import UsageError

__all__ = [
    "LARGE_DROP",
    "Corrected",
    "bootstrap_interval",
    "correct_estimate",
    "head_table",
    "heads_that_matter",
    "present_heads",
    "quantile_interval",
    "rank_agreement",
    "spearman",
]

LARGE_DROP = 0.1
"""A drop of the label's probability that counts as large in `drop_share_large`."""

QUANTILES = {"q05": 0.05, "median": 0.5, "q95": 0.95}

Z_95 = 1.959964


def head_table(study: xr.Dataset, *, seed: int = 0, resamples: int = 1000) -> xr.Dataset:
    """Per layer and head, over all images of a study; heads that a layer does not have are NaN.

    - `NAME_mean`, `_median`, `_q05`, `_q95` for every measure the study holds per (image, layer, head);
    - `drop_...` the same for the probability of the label lost by pruning, p - p~, and `drop_share_large`, the share of
      images that lose more than 0.1;
    - `flip_share`: images whose prediction changes;
    - `accuracy`: after pruning, where the study holds `head_prediction`. `attrs["accuracy"]` is the accuracy with
      nothing pruned.

    Each comes with a 95 % bootstrap interval, `.._low` and `.._high` (of a mean: `NAME_low`, `NAME_high`), NaN for a
    study of one image. Images are resampled with `seed`, the same images for every head; intervals of quantiles are
    what infinitely many resamples give. Raises `UsageError` for a study without images.
    """
    n_images = study.sizes.get("image", 0)
    if n_images == 0:
        raise UsageError("A table of heads was asked for; the study holds no images. Run `vitrail study` first.")
    table = xr.Dataset(attrs={"n_images": n_images, "seed": seed, "resamples": resamples})
    for name, values in study.data_vars.items():
        if values.dims == ("image", "layer", "head") and values.dtype.kind == "f":
            _add_statistics(table, str(name), values.to_numpy(), seed, resamples)
    _add_pruning(table, study, seed, resamples)
    return table


def heads_that_matter(study: xr.Dataset) -> Int[np.ndarray, "image"]:
    """How many heads each image needs: those without which its label loses more than 0.1 of probability.

    Li et al. 2023 report that few do. Raises `UsageError` for a study without `head_probability`.
    """
    if not {"probability", "head_probability"} <= set(map(str, study)):
        raise UsageError(
            "Heads that matter were to be counted; this study does not hold head_probability. Study a model with a "
            "classifier with --measures heads."
        )
    drop = study["probability"].to_numpy()[:, None, None] - study["head_probability"].to_numpy()
    return np.asarray((drop > LARGE_DROP).sum((1, 2)))


def _add_statistics(
    table: xr.Dataset, name: str, values: Float[np.ndarray, "image layer head"], seed: int, resamples: int
) -> None:
    present = ~np.isnan(values).all(0)
    columns = values[:, present].astype(np.float64)
    table[f"{name}_mean"] = _on_heads(np.nanmean(columns, 0), present)
    _add_interval(table, name, values, present, seed, resamples)
    for suffix, quantile in QUANTILES.items():
        table[f"{name}_{suffix}"] = _on_heads(np.nanquantile(columns, quantile, axis=0), present)
        for side, bound in zip(("low", "high"), quantile_interval(columns, quantile), strict=True):
            table[f"{name}_{suffix}_{side}"] = _on_heads(bound, present)


def _add_share(
    table: xr.Dataset, name: str, values: np.ndarray, present: np.ndarray, seed: int, resamples: int
) -> None:
    table[name] = _on_heads(values[:, present].mean(0), present)
    _add_interval(table, name, values, present, seed, resamples)


def _add_pruning(table: xr.Dataset, study: xr.Dataset, seed: int, resamples: int) -> None:
    if {"probability", "head_probability"} <= set(study):
        drop = study["probability"].to_numpy()[:, None, None] - study["head_probability"].to_numpy()
        _add_statistics(table, "drop", drop, seed, resamples)
        _add_share(table, "drop_share_large", drop > LARGE_DROP, ~np.isnan(drop).all(0), seed, resamples)
    if "head_flip" in study:
        _add_share(table, "flip_share", study["head_flip"].to_numpy(), present_heads(study), seed, resamples)
    if {"label", "prediction", "head_prediction"} <= set(study):
        label = study["label"].to_numpy()
        right = study["head_prediction"].to_numpy() == label[:, None, None]
        _add_share(table, "accuracy", right, present_heads(study), seed, resamples)
        table.attrs["accuracy"] = float((study["prediction"].to_numpy() == label).mean())


def _add_interval(
    table: xr.Dataset, name: str, values: np.ndarray, present: np.ndarray, seed: int, resamples: int
) -> None:
    low, high = bootstrap_interval(values[:, present].astype(np.float64), seed, resamples)
    table[f"{name}_low"] = _on_heads(low, present)
    table[f"{name}_high"] = _on_heads(high, present)


def present_heads(study: xr.Dataset) -> np.ndarray:
    """Which (layer, head) the model has; bool and int measures are padded with values that do not tell."""
    n_heads = study.attrs.get("n_heads")
    if n_heads is not None and len(n_heads) == study.sizes["layer"]:
        return np.asarray(np.arange(study.sizes["head"]) < np.asarray(n_heads)[:, None])
    for name in ("head_probability", "head_divergence", "head_token_shift"):
        if name in study:
            return np.asarray(~np.isnan(study[name].to_numpy()).all(0))
    sizes = (study.sizes["layer"], study.sizes["head"])
    return np.ones(sizes, dtype=bool)


def _on_heads(values: np.ndarray, present: np.ndarray) -> xr.DataArray:
    full = np.full(present.shape, np.nan)
    full[present] = values
    return xr.DataArray(full, dims=("layer", "head"))


def bootstrap_interval(
    values: Float[np.ndarray, "image *rest"], seed: int = 0, resamples: int = 1000
) -> tuple[Float[np.ndarray, "*rest"], Float[np.ndarray, "*rest"]]:
    """95 % percentile bootstrap interval of the mean over images; all columns see the same resampled images.

    NaN for a single image, which says nothing of others.
    """
    rng = np.random.default_rng(seed)
    n_images = len(values)
    if n_images < 2:
        nothing = np.full(values.shape[1:], np.nan)
        return nothing, nothing.copy()
    flat = values.reshape(n_images, -1)
    means = np.empty((resamples, flat.shape[1]))
    step = max(1, 2**22 // n_images)
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        times_drawn = rng.multinomial(n_images, np.full(n_images, 1 / n_images), size=stop - start)
        means[start:stop] = times_drawn @ flat / n_images
    low, high = np.quantile(means, (0.025, 0.975), axis=0).reshape(2, *values.shape[1:])
    return low, high


def quantile_interval(
    values: Float[np.ndarray, "image *rest"], quantile: float
) -> tuple[Float[np.ndarray, "*rest"], Float[np.ndarray, "*rest"]]:
    """95 % bootstrap interval of a quantile over images, without drawing.

    Of the k-th smallest of n values, infinitely many resamples lie at or below the j-th smallest in a share of
    P(Bin(n, j / n) >= k) (Efron 1979, section 3), so the interval ends at two of the values. NaN for a single image.
    """
    from scipy.stats import binom

    n_images = len(values)
    if n_images < 2:
        nothing = np.full(values.shape[1:], np.nan)
        return nothing, nothing.copy()
    rank = max(1, int(np.ceil(n_images * quantile)))
    reached = binom.sf(rank - 1, n_images, np.arange(1, n_images + 1) / n_images)
    ordered = np.sort(values, axis=0)
    low, high = (ordered[int(np.argmax(reached >= share))] for share in (0.025, 0.975))
    return low, high


def spearman(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"]) -> float:
    """Spearman's rank correlation; ties share their mean rank; NaN when either side is constant."""
    ranks = [rank - rank.mean() for rank in (_ranks(a), _ranks(b))]
    scale = float(np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float((ranks[0] * ranks[1]).sum()) / scale if scale else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[inverse])


def rank_agreement(
    estimate: Float[np.ndarray, "image layer head"], exact: Float[np.ndarray, "other layer head"]
) -> float:
    """How well an estimate ranks heads: Spearman over heads of the means over images, -1 .. 1 (the same order)."""
    means = [values.astype(np.float64).mean(0).ravel() for values in (estimate, exact)]
    present = ~(np.isnan(means[0]) | np.isnan(means[1]))
    return spearman(means[0][present], means[1][present])


class Corrected(NamedTuple):
    """Mean over images per head with a 95 % interval, in the unit of what was corrected."""

    mean: Float[np.ndarray, "layer head"]
    low: Float[np.ndarray, "layer head"]
    high: Float[np.ndarray, "layer head"]


def correct_estimate(
    estimate: Float[np.ndarray, "image layer head"],
    sample: Int[np.ndarray, "drawn"],
    exact: Float[np.ndarray, "drawn layer head"],
) -> Corrected:
    """The mean over all images of what `exact` measured on a sample, with the estimate on all as control variate.

    `sample` are the drawn images' positions in `estimate`. Regression estimator for double sampling (Cochran, Sampling
    Techniques, 1977, chapter 12): mean(exact) - slope (mean(estimate on the sample) - mean(estimate)). Its variance is
    that of the residuals over the sample size plus that of the explained part over all images. The interval is normal
    and needs images drawn at random, some dozens at least. Raises `UsageError` for fewer than 4.
    """
    if len(sample) < 4 or len(sample) != len(exact):
        raise UsageError(
            f"Correcting an estimate needs at least 4 images with exact values, one row each; found {len(sample)} "
            f"sampled images and {len(exact)} exact rows. Run the exact sweep on more images."
        )
    known = estimate[sample].astype(np.float64)
    centred, target = known - known.mean(0), exact.astype(np.float64)
    spread = (centred**2).sum(0)
    slope = (centred * (target - target.mean(0))).sum(0) / np.where(spread > 0, spread, 1.0)
    mean = target.mean(0) - slope * (known.mean(0) - estimate.astype(np.float64).mean(0))
    residual = target - target.mean(0) - slope * centred
    variance = (residual**2).sum(0) / (len(sample) - 2) / len(sample) + slope**2 * known.var(0, ddof=1) / len(estimate)
    half = Z_95 * np.sqrt(variance)
    return Corrected(mean, mean - half, mean + half)
