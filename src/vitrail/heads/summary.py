"""A study's heads in one table: what pruning each of them does over all images, with intervals.

Works on a finished study, an `xarray.Dataset`, without torch.
"""

from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int, Num

from vitrail.analysis import analyses
from vitrail.errors import UsageError
from vitrail.stats import (
    Interval,
    candidates_for_largest,
    mean_interval,
    quantile_interval,
    resampled_means,
    spearman,
    tails,
    upper_bound,
)

__all__ = [
    "LARGE_DROP",
    "NEGLIGIBLE_DROP",
    "Corrected",
    "correct_estimate",
    "head_table",
    "heads_that_matter",
    "present_heads",
    "pruning_table",
    "rank_agreement",
    "value_limits",
]

LARGE_DROP = 0.1
"""A drop of the label's probability that counts as large in `drop_share_large`."""

NEGLIGIBLE_DROP = 0.02
"""A head can go where its mean drop is shown to be below this: a fiftieth of the probability."""

QUANTILES = {"q05": 0.05, "median": 0.5, "q95": 0.95}
"""Of the values of a head over images."""

PRUNING = ("label", "prediction", "probability", "head_probability", "head_flip", "head_prediction")
"""What the numbers of pruning are read from."""

FEWEST_EXACT = 25
"""With fewer exact images the interval of a corrected estimate covers less than nine times in ten for skewed losses."""

Z_95 = 1.959964
"""Of a normal distribution, 95 % lies within so many standard deviations of the mean."""

NO_ERROR = 1e-9
"""A standard error below this share of another one is the rounding of float64, a few hundred roundings at most."""

NO_SPREAD = 1e-12
"""The same of a variance, as a share of the mean square that it is computed from."""


def head_table(study: xr.Dataset, *, seed: int = 0) -> xr.Dataset:
    """Statistics per layer and head over all images of a study.

    Args:
        study: an opened study.
        seed: of the resampled images.

    Returns:
        Arrays [layer head], NaN for heads that a layer does not have:

        - `NAME_mean`, `_median`, `_q05`, `_q95` for every measure that the study holds per (image, layer, head), in the
          unit of the measure;
        - `drop_...` the same for the probability of the label lost by pruning, p - p~, and `drop_share_large`, the
          share of images that lose more than 0.1;
        - `drop_bound`: what the mean drop exceeds in at most 5 % of samples, whatever the distribution (one-sided);
          only where it is small it is shown that the head can go. `drop_may_be_largest`: 1 for heads whose mean drop
          may be the largest of all, at 95 %;
        - `flip_share`: share of images whose prediction changes;
        - `accuracy`: after pruning, where the study holds `head_prediction`. `attrs["accuracy"]` is the accuracy with
          nothing pruned.

        Each statistic has a 95 % interval (`vitrail.stats`), `.._low` and `.._high` (of a mean: `NAME_low`,
        `NAME_high`); NaN where none can be trusted, and `attrs["no_interval"]` says why.

    Raises:
        UsageError: a study without images.
    """
    table = _Table(study, seed)
    for name, values in study.data_vars.items():
        if values.dims == ("image", "layer", "head") and values.dtype.kind == "f":
            _add_statistics(table, str(name), values.to_numpy(), seed)
    _add_pruning(table, study, seed)
    _add_verdicts(table, study, seed)
    return table.to_dataset()


def pruning_table(study: xr.Dataset, layer: int, head: int, *, seed: int = 0) -> xr.Dataset:
    """What pruning one head does, as `head_table` has it, without waiting for the intervals of all others.

    Args:
        study: an opened study.
        layer: index of the layer.
        head: index of the head.
        seed: of the resampled images.

    Returns:
        `drop_...`, `flip_share` and `accuracy` with their intervals, scalars; only what the study has numbers for, and
        not the verdicts `drop_bound` and `drop_may_be_largest`.

    Raises:
        UsageError: a study without images.
    """
    table = _Table(study, seed)
    stored = [name for name in PRUNING if name in study]
    study[stored].load()  # a chunk of the store holds all heads: one of them costs as much as all, which are then there
    _add_pruning(table, study[stored].isel(layer=[layer], head=[head], missing_dims="ignore"), seed)
    return table.to_dataset().squeeze()


class _Table:
    """Columns by name, made a dataset at the end: adding to a dataset one by one takes a millisecond each."""

    def __init__(self, study: xr.Dataset, seed: int) -> None:
        n_images = study.sizes.get("image", 0)
        if n_images == 0:
            raise UsageError("A table of heads was asked for; the study holds no images. Run `vitrail study` first.")
        self.columns: dict[str, xr.DataArray] = {}
        self.attrs: dict[str, Any] = {"n_images": n_images, "seed": seed}

    def __setitem__(self, name: str, column: xr.DataArray) -> None:
        self.columns[name] = column

    def to_dataset(self) -> xr.Dataset:
        return xr.Dataset(self.columns, attrs=self.attrs)


def value_limits(name: str) -> tuple[float, float] | None:
    """Range that the values of an array can have at all.

    Args:
        name: of an array of a study, or "drop" for the probability of the label lost by pruning.

    Returns:
        Lowest and highest possible value as its measure declares them (`Measure.value_range`), in its unit; None where
        there is none or nothing declares the array.
    """
    if name == "drop":
        return -1.0, 1.0
    declared = (measure for each in analyses().values() for measure in (*each.measures, *each.accompanying))
    return next((measure.value_range for measure in declared if measure.name == name), None)


def heads_that_matter(study: xr.Dataset) -> Int[np.ndarray, "image"]:
    """Number of heads that each image needs: those without which its label loses more than 0.1 of probability.

    Li et al. 2023 report that few do.

    Args:
        study: an opened study.

    Returns:
        Heads per image.

    Raises:
        UsageError: a study without `head_probability`.
    """
    if not {"probability", "head_probability"} <= set(map(str, study)):
        raise UsageError(
            "Heads that matter were to be counted; this study does not hold head_probability. Study a model with a "
            "classifier with --measures heads."
        )
    return np.asarray((_drops(study) > LARGE_DROP).sum((1, 2)))


def present_heads(study: xr.Dataset) -> Bool[np.ndarray, "layer head"]:
    """Which (layer, head) the model has; bool and int measures are padded with values that do not tell.

    Args:
        study: an opened study.

    Returns:
        True for heads of the model.
    """
    n_heads = study.attrs.get("n_heads")
    if n_heads is not None and len(n_heads) == study.sizes["layer"]:
        return np.asarray(np.arange(study.sizes["head"]) < np.asarray(n_heads)[:, None])
    for name in ("head_probability", "head_divergence", "head_value_change", "head_output_shift", "head_token_shift"):
        if name in study:
            return np.asarray(~np.isnan(study[name].to_numpy()).all(0))
    return np.ones((study.sizes["layer"], study.sizes["head"]), dtype=bool)


def rank_agreement(
    estimate: Float[np.ndarray, "image layer head"], exact: Float[np.ndarray, "other layer head"]
) -> float:
    """Agreement of an estimate with exact values on the order of heads.

    Args:
        estimate: per image, any unit; NaN for absent heads.
        exact: per image, of the same images or others; NaN for absent heads.

    Returns:
        Spearman's rank correlation over heads of the means over images, -1 .. 1 (the same order).
    """
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
    exact: Float[np.ndarray, "measured layer head"],
    *,
    seed: int = 0,
) -> Corrected:
    """Mean over all images of what `exact` measured on a sample, with the estimate on all images as control variate.

    Regression estimator for double sampling (Cochran, Sampling Techniques, 1977, chapter 12): mean(exact) - slope
    (mean(estimate on the sample) - mean(estimate)). Its interval is a studentised bootstrap of the sampled pairs, slope
    included, widened by what the estimate varies over all images. With 25 exact images it covers 95 % for normal values
    and 90 to 92 % for skewed ones; where losses range over several orders of magnitude, 85 %: use 200 images there.

    Args:
        estimate: on all images.
        sample: positions in `estimate` of images drawn at random.
        exact: on the sampled images, in their order, any unit.
        seed: of the resampled images.

    Returns:
        The corrected mean of every head with its interval; NaN for heads with NaN.

    Raises:
        UsageError: fewer than 25 sampled images, or another number of exact rows.
    """
    n_images = len(sample)
    if n_images < FEWEST_EXACT or n_images != len(exact):
        raise UsageError(
            f"Correcting an estimate needs at least {FEWEST_EXACT} images with exact values, one row each; found "
            f"{n_images} sampled images and {len(exact)} exact rows. Run the exact sweep on more images."
        )
    estimates = estimate.astype(np.float64).reshape(len(estimate), -1)
    truth = exact.astype(np.float64).reshape(n_images, -1)
    x, y = estimates[sample] - estimates.mean(0), truth - truth.mean(0)
    moments = (x, y, x * x, x * y, y * y)
    offset, error, slope = _regression([each.mean(0) for each in moments], n_images)
    means = np.split(resampled_means(np.concatenate(moments, axis=1), seed), len(moments), axis=1)
    resampled, errors, _ = _regression(means, n_images)
    without_spread = errors <= NO_ERROR * error  # pairs on one line, as far as this resample tells
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(without_spread, np.sign(resampled - offset) * np.inf, (resampled - offset) / errors)
    t = np.where(error > NO_ERROR * y.std(0), t, 0.0)  # on one line in all of them: nothing is left to err
    lower, upper = tails(t, 0.025)
    of_estimate = Z_95 * np.abs(slope) * estimates.std(0) / np.sqrt(len(estimates))
    mean = truth.mean(0) + offset
    low, high = mean - np.hypot(upper * error, of_estimate), mean + np.hypot(lower * error, of_estimate)
    shape = estimate.shape[1:]
    return Corrected(mean.reshape(shape), low.reshape(shape), high.reshape(shape))


def _regression(means: list[np.ndarray], n_images: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """From means of x, y, xx, xy, yy: the height of the regression line at x = 0, its standard error, and the slope."""
    x, y, xx, xy, yy = means
    spread = xx - x**2
    varies = spread > NO_SPREAD * xx
    divisor = np.where(varies, spread, 1.0)
    slope = np.where(varies, (xy - x * y) / divisor, 0.0)
    residual = np.maximum(yy - y**2 - slope**2 * spread, 0.0)
    leverage = 1 + np.where(varies, x**2 / divisor, 0.0)
    return y - slope * x, np.sqrt(residual * leverage / (n_images - 2)), slope


def _drops(study: xr.Dataset) -> Float[np.ndarray, "image layer head"]:
    return np.asarray(
        study["probability"].to_numpy().astype(np.float64)[:, None, None] - study["head_probability"].to_numpy()
    )


def _add_statistics(table: _Table, name: str, values: Float[np.ndarray, "image layer head"], seed: int) -> None:
    present = ~np.isnan(values).all(0)
    columns, limits = values[:, present].astype(np.float64), value_limits(name)
    table[f"{name}_mean"] = _on_heads(np.nanmean(columns, 0), present)
    _add_interval(table, name, mean_interval(columns, limits=limits, seed=seed), present)
    of_all = np.quantile if np.isfinite(columns).all() else np.nanquantile  # which takes each column by itself
    quantiles = of_all(columns, list(QUANTILES.values()), axis=0)
    for (suffix, quantile), values_there in zip(QUANTILES.items(), quantiles, strict=True):
        table[f"{name}_{suffix}"] = _on_heads(values_there, present)
        _add_interval(table, f"{name}_{suffix}", quantile_interval(columns, quantile, limits=limits), present)


def _add_share(table: _Table, name: str, values: Bool[np.ndarray, "image layer head"], present: np.ndarray) -> None:
    table[name] = _on_heads(values[:, present].mean(0), present)
    _add_interval(table, name, mean_interval(values[:, present]), present)


def _add_pruning(table: _Table, study: xr.Dataset, seed: int) -> None:
    if {"probability", "head_probability"} <= set(study):
        drop = _drops(study)
        present = ~np.isnan(drop).all(0)
        _add_statistics(table, "drop", drop, seed)
        _add_share(table, "drop_share_large", drop > LARGE_DROP, present)
    if "head_flip" in study:
        _add_share(table, "flip_share", study["head_flip"].to_numpy().astype(bool), present_heads(study))
    if {"label", "prediction", "head_prediction"} <= set(study):
        label = study["label"].to_numpy()
        correct = study["head_prediction"].to_numpy() == label[:, None, None]
        _add_share(table, "accuracy", correct, present_heads(study))
        table.attrs["accuracy"] = float((study["prediction"].to_numpy() == label).mean())


def _add_verdicts(table: _Table, study: xr.Dataset, seed: int) -> None:
    if {"probability", "head_probability"} <= set(study):
        drop = _drops(study)
        present = ~np.isnan(drop).all(0)
        table["drop_bound"] = _on_heads(upper_bound(drop[:, present], (-1.0, 1.0), seed=seed), present)
        largest = candidates_for_largest(drop[:, present], seed=seed)
        table["drop_may_be_largest"] = _on_heads(largest.astype(np.float64), present)


def _add_interval(table: _Table, name: str, interval: Interval, present: np.ndarray) -> None:
    table[f"{name}_low"] = _on_heads(interval.low, present)
    table[f"{name}_high"] = _on_heads(interval.high, present)
    if interval.reason:
        table.attrs.setdefault("no_interval", interval.reason)


def _on_heads(values: Num[np.ndarray, "heads"], present: Bool[np.ndarray, "layer head"]) -> xr.DataArray:
    full = np.full(present.shape, np.nan)
    full[present] = values
    return xr.DataArray(full, dims=("layer", "head"))
