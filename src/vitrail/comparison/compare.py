"""Paired differences of every measure of two studies, with intervals and a null of random signs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from vitrail.analysis import split_names
from vitrail.comparison.align import AlignedMeasure, align, common_depths, comparable_measures, mean_of_present
from vitrail.comparison.pairs import Pair, describe_labels, open_pair
from vitrail.data import LabelSource
from vitrail.dataset import MeasureDataset
from vitrail.measure import Measure
from vitrail.stats import mean_interval, require_seed, sign_flip_p_values, simultaneous_intervals
from vitrail.study.store import study_folder

__all__ = ["CORRECT", "compare"]

CORRECT = Measure(
    name="correct",
    title="prediction is the label",
    dims=("image",),
    unit="bool",
    low="0: another class is predicted",
    high="1: the label is predicted",
    source="`prediction` equals `label`; its mean is the accuracy",
    limits="Only where the labels are the data set's own.",
    dtype="bool",
)
"""What a comparison adds to the measures of the studies."""

N_ORDERS = 999
"""Random orders of heads that the correspondence of heads is compared with."""

ROUNDING = 1e-12
"""Differences below this share of the values are those of sums in another order."""

SUFFIXES = ("a", "b", "difference", "low", "high", "low_all", "high_all", "p")
"""What is said of every cell of a measure."""


def compare(
    a: str | Path | xr.Dataset,
    b: str | Path | xr.Dataset,
    *,
    measures: str | Sequence[str] | None = None,
    seed: int = 0,
) -> xr.Dataset:
    """Compares two studies of the same images: two models, or one before and after fine-tuning or pruning.

    Images are joined by what is in their files, whatever they are called. Models with as many blocks, such as one
    before and after pruning, are compared block by block; others layer by layer, at the same depth; head by head only
    where both have the same heads. Lengths in patches are shares of the image's side where patches are not all alike.

    Args:
        a: Folder of the first study, or the study as `open_study` gives it.
        b: The second alike; differences are b less a.
        measures: Names of measures; None for all that both hold.
        seed: Of resampled images, signs and orders.

    Returns:
        Of every measure that both studies hold and that means the same in both (dimension `measure`):

        - `mean_a`, `mean_b`, `mean_difference` over images and all cells, with `low`, `high` (95 %, each alone),
          `low_all`, `high_all` (95 %, all measures together) and `p` (random signs, corrected for all measures);
          `standardised`: the mean difference in standard deviations of the difference over images, infinite where it is
          the same in every image; NaN where no image differs, and of a single image, which says nothing of others;
        - `difference` [image measure];
        - `NAME_a`, `NAME_b`, `NAME_difference`, `NAME_low`, `NAME_high`, `NAME_low_all`, `NAME_high_all`, `NAME_p` by
          layer (coordinates `depth` and, block by block, `layer_a` and `layer_b`, its index in each model) and whatever
          else the measure has, corrected for all cells of the measure; and `NAME_head_..` [all_layer head] where both
          models have the same heads.

        Of every image: `change`, how much it changed in all measures together (1: as much as the root mean square over
        images), and with classifiers `same_prediction`. `attrs`: models, folders, numbers of images, `left_out` (the
        reason by measure), `no_interval` (why `low` and `high` are NaN, by measure), `labels`, and `heads_correspond`,
        the correlation of heads of the same index with its p-value, against heads of a layer in random order.

    Raises:
        StudyError: One of them is no finished study.
        UsageError: They are the same study, share no image, or hold no measure that can be compared, as where the
            options that a measure depends on differ; or the seed is out of range.

    Example:
        >>> import vitrail
        >>> compared = vitrail.compare("study-before", "study-after")
        >>> compared["mean_difference"].sel(measure="attention_distance")
    """
    require_seed(seed)
    pair = open_pair(study_folder(a), study_folder(b))
    names = None if measures is None else split_names(measures)
    usable, left_out = comparable_measures(pair, names)
    result: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    cells: dict[str, Measure] = {}
    by_image: dict[str, AlignedMeasure] = {}
    moved, heads = [], list[Float[np.ndarray, "side layer head"]]()
    for measure in usable:
        aligned = align(pair, measure)
        if np.isnan(aligned.b - aligned.a).all():
            left_out[measure.name] = "no image has a value in both studies"
            continue
        of_measure: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
        if aligned.dims:
            of_measure |= _cells(measure.name, aligned.dims, aligned.a, aligned.b, aligned.limits, seed)
        if aligned.by_head is not None:
            dims = ("all_layer", "head")
            of_measure |= _cells(f"{measure.name}_head", dims, *aligned.by_head, aligned.limits, seed)
            heads.append(np.stack([mean_of_present(values, (0,)) for values in aligned.by_head]))
        result |= of_measure
        cells |= dict.fromkeys(of_measure, aligned.measure)
        moved.append(_distance(aligned.b - aligned.a))
        by_image[measure.name] = _over_cells(aligned)
    if names is None and (correct := _correctness(pair)) is not None:
        by_image["correct"] = correct
    table, no_interval = _table(by_image, seed)
    result |= table
    result["change"] = (("image",), _change(moved))
    if not pair.label_reason and all("prediction" in side.data for side in (pair.a, pair.b)):
        predictions = [np.asarray(side.data["prediction"].values)[side.rows] for side in (pair.a, pair.b)]
        result["same_prediction"] = (("image",), predictions[0] == predictions[1])
    ids = [side.data["image"].to_numpy()[side.rows].astype(np.str_) for side in (pair.a, pair.b)]
    coordinates = {"image": ids[0], "image_b": ("image", ids[1]), "measure": list(by_image)}
    dataset: xr.Dataset = MeasureDataset(dict(result), coords=coordinates)
    if "layer" in dataset.dims:
        dataset = dataset.assign_coords(depth=("layer", common_depths(pair)))
        if (same := pair.same_layers) is not None:
            dataset = dataset.assign_coords(layer_a=("layer", same.a), layer_b=("layer", same.b))
    attributes = _attributes(pair, left_out, _correspondence(heads, seed))
    return _with_words(dataset, by_image, cells).assign_attrs(attributes, no_interval=no_interval)


# --- statistics ------------------------------------------------------------------------------------------------------


def _cells(
    name: str,
    dims: tuple[str, ...],
    a: Float[np.ndarray, "image *cells"],
    b: Float[np.ndarray, "image *cells"],
    limits: tuple[float, float] | None,
    seed: int,
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """The statistics of every cell of a measure, corrected for all of them."""
    difference = b - a
    alone = mean_interval(difference, limits=limits, seed=seed)
    together = simultaneous_intervals(difference, limits=limits, seed=seed)
    both = np.isnan(difference)
    values = (
        mean_of_present(np.where(both, np.nan, a), (0,)),
        mean_of_present(np.where(both, np.nan, b), (0,)),
        mean_of_present(difference, (0,)),
        alone.low,
        alone.high,
        together.low,
        together.high,
        sign_flip_p_values(difference, seed=seed),
    )
    return {f"{name}_{suffix}": (dims, each) for suffix, each in zip(SUFFIXES, values, strict=True)}


def _over_cells(aligned: AlignedMeasure) -> AlignedMeasure:
    """The measure as one number an image: the mean over the cells that both studies have."""
    axes = tuple(range(1, aligned.a.ndim))
    if not axes:
        return aligned
    absent = np.isnan(aligned.b - aligned.a)
    sides = [mean_of_present(np.where(absent, np.nan, values), axes) for values in (aligned.a, aligned.b)]
    return AlignedMeasure(aligned.measure, (), sides[0], sides[1], None)


def _correctness(pair: Pair) -> AlignedMeasure | None:
    sides = (pair.a, pair.b)
    if pair.label_reason or any(side.plan.labels != LabelSource.GIVEN for side in sides):
        return None
    if not all({"prediction", "label"} <= set(side.data) for side in sides):
        return None
    values = [
        (np.asarray(side.data["prediction"].values) == np.asarray(side.data["label"].values))[side.rows].astype(float)
        for side in sides
    ]
    for each in values:
        each[~pair.same_label()] = np.nan
    return AlignedMeasure(CORRECT, (), values[0], values[1], None)


def _table(
    by_image: Mapping[str, AlignedMeasure], seed: int
) -> tuple[dict[str, tuple[tuple[str, ...], np.ndarray]], dict[str, str]]:
    """The statistics of every measure over its cells, and why some have no interval."""
    difference = np.stack([each.b - each.a for each in by_image.values()], axis=1)
    alone = [mean_interval(each.b - each.a, limits=each.limits, seed=seed) for each in by_image.values()]
    together = simultaneous_intervals(difference, seed=seed)
    mean = mean_of_present(difference, (0,))
    absent = np.isnan(difference)
    spread = np.sqrt(mean_of_present((difference - mean) ** 2, (0,)))
    spread[(~absent).sum(0) < 2] = np.nan
    sides = [np.stack([getattr(each, side) for each in by_image.values()], axis=1) for side in ("a", "b")]
    means = [mean_of_present(np.where(absent, np.nan, side), (0,)) for side in sides]
    columns = {
        "mean_a": means[0],
        "mean_b": means[1],
        "mean_difference": mean,
        "low": np.array([float(each.low) for each in alone]),
        "high": np.array([float(each.high) for each in alone]),
        "low_all": together.low,
        "high_all": together.high,
        "p": sign_flip_p_values(difference, seed=seed),
        "standardised": _effect_sizes(mean, spread, np.maximum(*np.abs(means))),
    }
    table = {name: (("measure",), np.asarray(values)) for name, values in columns.items()}
    reasons = {name: each.reason for name, each in zip(by_image, alone, strict=True) if each.reason}
    return {**table, "difference": (("image", "measure"), difference)}, reasons


def _effect_sizes(
    mean: Float[np.ndarray, "measure"], spread: Float[np.ndarray, "measure"], size: Float[np.ndarray, "measure"]
) -> Float[np.ndarray, "measure"]:
    """Mean differences over their standard deviations, where rounding of numbers of this size counts as none."""
    mean, spread = (np.where(np.abs(values) <= ROUNDING * size, 0.0, values) for values in (mean, spread))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(mean / spread)


def _distance(difference: Float[np.ndarray, "image *cells"]) -> Float[np.ndarray, "image"]:
    """How far each image moved in one measure: root mean square over its cells, in that of all images."""
    distance = np.sqrt(mean_of_present(difference.reshape(len(difference), -1) ** 2, (1,)))
    scale = np.sqrt(float(mean_of_present(distance**2, (0,))))
    relative = distance / scale if scale > 0 else np.where(np.isnan(distance), np.nan, 0.0)
    return np.asarray(relative)


def _change(distances: Sequence[Float[np.ndarray, "image"]]) -> Float[np.ndarray, "image"]:
    return np.asarray(np.sqrt(mean_of_present(np.stack(distances, axis=1) ** 2, (1,))))


def _correspondence(heads: Sequence[Float[np.ndarray, "side layer head"]], seed: int) -> dict[str, float] | None:
    """Whether heads of the same index do the same: our construction.

    The correlation, over heads, of a measure in both models once the mean of each layer is taken off; against heads of
    one side dealt out anew within their layers. Measures of few layers correlate by chance, so each correlation (its
    Fisher transform, whose null is nearly normal) is taken in standard deviations of its own null; that which stands
    out most counts, there and here.
    """
    if not heads or heads[0].shape[-1] < 2:
        return None
    centred = [each - mean_of_present(each, (-1,))[..., None] for each in heads]
    rng = np.random.default_rng(seed)
    present = np.any([~np.isnan(each[0]) for each in heads], axis=0)
    order = np.tile(np.arange(present.shape[1]), (len(present), 1))
    dealt = [_correlations(centred, order)]
    for _ in range(N_ORDERS):
        for layer, is_present in enumerate(present):
            at = np.flatnonzero(is_present)
            order[layer, at] = rng.permutation(at)
        dealt.append(_correlations(centred, order))
    transformed = np.arctanh(np.clip(dealt, ROUNDING - 1, 1 - ROUNDING))
    spread = transformed.std(0)
    standard = (transformed - transformed.mean(0)) / np.where(spread > 0, spread, np.inf)
    reached = int((standard.max(1) >= standard[0].max()).sum())
    return {"correlation": dealt[0][int(standard[0].argmax())], "p": reached / len(dealt)}


def _correlations(
    centred: Sequence[Float[np.ndarray, "side layer head"]], order: Int[np.ndarray, "layer head"]
) -> list[float]:
    """Of each measure, with the heads of its second side in an order; 0 for one that is constant."""
    correlations = []
    for a, b in centred:
        other = np.take_along_axis(b, order, axis=1)
        both = ~np.isnan(a + other)
        scale = np.sqrt((a[both] ** 2).sum() * (other[both] ** 2).sum())
        correlations.append(float((a[both] * other[both]).sum() / scale) if scale > 0 else 0.0)
    return correlations


# --- words -----------------------------------------------------------------------------------------------------------


def _with_words(
    dataset: xr.Dataset, by_image: Mapping[str, AlignedMeasure], cells: Mapping[str, Measure]
) -> xr.Dataset:
    """Title and unit beside every number."""
    titles = [each.measure.title for each in by_image.values()]
    units = [each.measure.unit for each in by_image.values()]
    for name, measure in cells.items():
        if not name.endswith("_p"):
            dataset[name].attrs = {"title": measure.title, "unit": measure.unit}
    return dataset.assign_coords(title=("measure", titles), unit=("measure", units))


def _attributes(pair: Pair, left_out: dict[str, str], correspondence: dict[str, float] | None) -> dict[str, object]:
    sides = {"a": pair.a, "b": pair.b}
    of_sides = {
        f"{word}_{key}": value
        for key, side in sides.items()
        for word, value in (
            ("model", side.plan.model),
            ("study", side.folder.resolve().name),
            ("n_images", side.plan.n_images),
            ("n_layers", side.plan.n_layers),
            ("n_heads", side.plan.n_heads),
            ("grids", side.plan.grids),
        )
    }
    names = _short_names(pair)
    return {
        **of_sides,
        "name_a": names[0],
        "name_b": names[1],
        "n_shared": pair.n_shared,
        "n_compared": len(pair.a.rows),
        "same_heads": pair.same_heads,
        "labels": describe_labels(pair),
        "left_out": left_out,
        "heads_correspond": correspondence,
    }


def _short_names(pair: Pair) -> tuple[str, str]:
    """What the two are called in figures: their models, or their folders where the models have one name."""
    models = _short_name(pair.a.plan.model), _short_name(pair.b.plan.model)
    folders = pair.a.folder.resolve().name, pair.b.folder.resolve().name
    if models[0] != models[1]:
        return models
    return folders if folders[0] != folders[1] else (f"{folders[0]} (first)", f"{folders[1]} (second)")


def _short_name(model: str) -> str:
    """Without the library that it is of, and of a folder without the way to it."""
    return Path(model).name if Path(model).is_absolute() else model.rpartition(":")[2]
