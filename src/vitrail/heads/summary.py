"""A study's heads in one table: what pruning each of them does over all images, with intervals.

Works on a finished study, an `xarray.Dataset`, without torch.
"""

from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int, Num

from vitrail.analysis import analyses
from vitrail.errors import UsageError
from vitrail.heads.correction import (
    Corrected,
    correct_estimate,
    correct_mean,
    exact_part,
    exact_values,
    how_corrected,
    rank_agreement,
    too_few_exact,
)
from vitrail.heads.exact_names import EXACT_VALUES
from vitrail.layer_summary import in_first_patches
from vitrail.stats import (
    Interval,
    candidates_for_largest,
    mean_interval,
    quantile_interval,
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

PRUNING = (
    "label",
    "prediction",
    "probability",
    "head_probability",
    EXACT_VALUES["head_probability"],
    "head_flip",
    "head_prediction",
)
"""What the numbers of pruning are read from."""


def head_table(study: xr.Dataset, *, seed: int = 0) -> xr.Dataset:
    """Statistics per layer and head over all images of a study.

    Args:
        study: an opened study.
        seed: of the resampled images.

    Returns:
        Arrays [layer head], NaN for heads that a layer does not have:

        - `NAME_mean`, `_median`, `_q05`, `_q95` for every measure that the study holds per (image, layer, head), in the
          unit that `NAME_mean.attrs["unit"]` says: that of the measure, but in a hierarchy patches of its first layer;
        - `drop_...` the same for the probability of the label lost by pruning, p - p~, and `drop_share_large`, the
          share of images that lose more than 0.1;
        - `drop_bound`: what the mean drop exceeds in at most 5 % of samples, whatever the distribution (one-sided);
          only where it is small it is shown that the head can go. `drop_may_be_largest`: 1 for heads whose mean drop
          may be the largest of all, at 95 %;
        - `flip_share`: share of images whose prediction changes;
        - `accuracy`: after pruning, where the study holds `head_prediction`. `attrs["accuracy"]` is the accuracy with
          nothing pruned.

        Of a study with `importance="corrected"`, the means of estimated measures and their intervals are corrected by
        the images on which every head was pruned (`correct_estimate`); everything else of them is of those images, and
        `attrs["corrected"]` says how many they are. Below 25 of them nothing is corrected, and the means of estimates
        have no interval.

        Each statistic has a 95 % interval (`vitrail.stats`), `.._low` and `.._high` (of a mean: `NAME_low`,
        `NAME_high`); NaN where none can be trusted, and `attrs["no_interval"]` says why.

    Raises:
        UsageError: a study without images.
    """
    table = _Table(study, seed)
    for name, array in study.data_vars.items():
        if array.dims == ("image", "layer", "head") and array.dtype.kind == "f":
            values = in_first_patches(array, study.attrs.get("grids"))
            _add_statistics(table, study, str(name), values.to_numpy(), seed)
            table.columns[f"{name}_mean"].attrs["unit"] = str(values.attrs.get("unit", ""))
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
        if words := how_corrected(study):
            self.attrs["corrected"] = words

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
        Heads per image; of a study whose estimates are corrected, per image on which every head was pruned.

    Raises:
        UsageError: a study without `head_probability`.
    """
    if not {"probability", "head_probability"} <= set(map(str, study)):
        raise UsageError(
            "Heads that matter were to be counted; this study does not hold head_probability. Study a model with a "
            "classifier with --measures heads."
        )
    return np.asarray((_drops(exact_part(study)) > LARGE_DROP).sum((1, 2)))


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


def _drops(study: xr.Dataset) -> Float[np.ndarray, "image layer head"]:
    return np.asarray(
        study["probability"].to_numpy().astype(np.float64)[:, None, None] - study["head_probability"].to_numpy()
    )


def _add_statistics(
    table: _Table, study: xr.Dataset, name: str, values: Float[np.ndarray, "image layer head"], seed: int
) -> None:
    present = ~np.isnan(values).all(0)
    columns, limits = values[:, present].astype(np.float64), value_limits(name)
    mean, exact = np.nanmean(columns, 0), exact_values(study, name)
    corrected = None if exact is None else correct_mean(columns, exact[:, present], seed=seed)
    if exact is None:
        interval = mean_interval(columns, limits=limits, seed=seed)
    elif corrected is None:
        unknown = np.full(len(mean), np.nan)
        interval = Interval(unknown, unknown, too_few_exact(exact))
    else:
        mean, interval = corrected.mean, Interval(corrected.low, corrected.high, _unbounded(corrected))
        columns = exact[~np.isnan(exact).all((1, 2))][:, present]
    table[f"{name}_mean"] = _on_heads(mean, present)
    _add_interval(table, name, interval, present)
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
        _add_statistics(table, study, "drop", _drops(study), seed)
        drop = _drops(exact_part(study))
        _add_share(table, "drop_share_large", drop > LARGE_DROP, ~np.isnan(drop).all(0))
    if "head_flip" in study:
        _add_share(table, "flip_share", study["head_flip"].to_numpy().astype(bool), present_heads(study))
    if {"label", "prediction", "head_prediction"} <= set(study):
        label = study["label"].to_numpy()
        correct = study["head_prediction"].to_numpy() == label[:, None, None]
        _add_share(table, "accuracy", correct, present_heads(study))
        table.attrs["accuracy"] = float((study["prediction"].to_numpy() == label).mean())


def _add_verdicts(table: _Table, study: xr.Dataset, seed: int) -> None:
    if {"probability", "head_probability"} <= set(study):
        drop = _drops(exact_part(study))
        present = ~np.isnan(drop).all(0)
        table["drop_bound"] = _on_heads(upper_bound(drop[:, present], (-1.0, 1.0), seed=seed), present)
        largest = candidates_for_largest(drop[:, present], seed=seed)
        table["drop_may_be_largest"] = _on_heads(largest.astype(np.float64), present)


def _add_interval(table: _Table, name: str, interval: Interval, present: np.ndarray) -> None:
    table[f"{name}_low"] = _on_heads(interval.low, present)
    table[f"{name}_high"] = _on_heads(interval.high, present)
    if interval.reason:
        table.attrs.setdefault("no_interval", interval.reason)


def _unbounded(corrected: Corrected) -> str:
    lacks = np.isnan(corrected.low) & ~np.isnan(corrected.mean)
    return "too few exact values differ from the rest" if lacks.any() else ""


def _on_heads(values: Num[np.ndarray, "heads"], present: Bool[np.ndarray, "layer head"]) -> xr.DataArray:
    full = np.full(present.shape, np.nan)
    full[present] = values
    return xr.DataArray(full, dims=("layer", "head"))
