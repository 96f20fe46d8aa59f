"""Which heads matter for which class. Works on a finished study, without torch."""

from typing import NamedTuple

import numpy as np
import xarray as xr

from vitrail.data import LabelSource
from vitrail.errors import UsageError
from vitrail.heads.correction import exact_part
from vitrail.stats import group_p_values, mean_interval

__all__ = ["ClassHeads", "HeadDrop", "class_table", "heads_by_class"]

SIGNIFICANT = 0.05
"""A head is a class's own if so large an excess of any head in any class would be rarer than this by chance."""


class HeadDrop(NamedTuple):
    """Mean probability of the label that the images of a class lose without one head, with its 95 % interval.

    `low` and `high` are NaN for a class with one image. `elsewhere`: the mean over all images of other classes, NaN
    where there are none. `p_value`: of the excess over them, corrected for all heads and classes; NaN where nothing can
    be compared.
    """

    layer: int
    head: int
    drop: float
    low: float
    high: float
    elsewhere: float
    p_value: float

    @property
    def is_own(self) -> bool:
        """The class needs this head more than other images do, beyond what chance gives any head of any class."""
        return self.p_value < SIGNIFICANT


class ClassHeads(NamedTuple):
    """The heads that matter most for one class, the first first, and all that it needs more than other images do.

    `own`: every head of the class that `is_own`, among `heads` or not, in the same order. `note` says what keeps the
    numbers from meaning more; empty where nothing does.
    """

    label: int
    name: str
    n_images: int
    accuracy: float
    heads: list[HeadDrop]
    own: list[HeadDrop]
    note: str


def class_table(study: xr.Dataset, *, seed: int = 0) -> xr.Dataset:
    """Drop of the label's probability per class, layer and head.

    Of a study whose estimates are corrected by a sample, it is of that sample: a class has too few of them to correct.

    Args:
        study: an opened study.
        seed: of the resampled and dealt images.

    Returns:
        Per class, layer and head: `drop`, the mean probability of the label lost without the head, its 95 % interval
        `drop_low`, `drop_high` (of each head alone), and `p_value` of its excess over the other classes, corrected for
        all heads and classes. Per class: `n_images` and `accuracy` with nothing pruned. Classes are those of the
        study's labels, in `class` as numbers. NaN for heads that a layer does not have, and for intervals and p-values
        of classes with one image. `attrs["labels"]` says where the labels come from.

    Raises:
        UsageError: a study without images or without `head_probability`, which models without a classifier do not have.
    """
    _refuse_without_drops(study)
    study = exact_part(study)
    drop = study["probability"].to_numpy()[:, None, None] - study["head_probability"].to_numpy().astype(np.float64)
    label = study["label"].to_numpy()
    correct = study["prediction"].to_numpy() == label if "prediction" in study else np.full(len(label), np.nan)
    classes = np.unique(label)
    shape = (len(classes), *drop.shape[1:])
    mean, low, high = (np.full(shape, np.nan) for _ in range(3))
    for at, each in enumerate(classes):
        of_class = drop[label == each]
        mean[at] = of_class.mean(0)
        low[at], high[at], _ = mean_interval(of_class, limits=(-1.0, 1.0), seed=seed)
    dims = ("class", "layer", "head")
    return xr.Dataset(
        {
            "drop": (dims, mean),
            "drop_low": (dims, low),
            "drop_high": (dims, high),
            "p_value": (dims, group_p_values(drop, label, seed=seed)),
            "n_images": ("class", np.array([(label == each).sum() for each in classes])),
            "accuracy": ("class", np.array([correct[label == each].mean() for each in classes])),
        },
        coords={"class": classes},
        attrs={"labels": str(study.attrs.get("labels", "")), "n_images": len(label), "seed": seed},
    )


def heads_by_class(study: xr.Dataset, *, n_heads: int = 3, seed: int = 0) -> list[ClassHeads]:
    """The most important heads of every class of a study, by mean drop of the label's probability.

    Args:
        study: an opened study.
        n_heads: how many for each class.
        seed: of the resampled and dealt images.

    Returns:
        The classes, those with most images first. Notes say where a class has one image, or where the labels are the
        model's own predictions.

    Raises:
        UsageError: as `class_table`.
    """
    table = class_table(study, seed=seed)
    names = study.attrs.get("class_names")
    counts = table["n_images"].to_numpy()
    total = (table["drop"] * table["n_images"]).sum("class", skipna=False).to_numpy()
    classes = []
    for at in np.argsort(-counts, kind="stable"):
        label, count = int(table["class"][at]), int(counts[at])
        drop = table["drop"].to_numpy()[at]
        others = int(counts.sum()) - count
        elsewhere = (total - count * drop) / others if others else np.full_like(drop, np.nan)
        ranked = np.argsort(-np.nan_to_num(drop, nan=-np.inf), axis=None)
        every = [
            HeadDrop(
                int(layer),
                int(head),
                float(drop[layer, head]),
                float(table["drop_low"][at, layer, head]),
                float(table["drop_high"][at, layer, head]),
                float(elsewhere[layer, head]),
                float(table["p_value"][at, layer, head]),
            )
            for layer, head in zip(*np.unravel_index(ranked, drop.shape), strict=True)
            if not np.isnan(drop[layer, head])
        ]
        name = str(names[label]) if names and 0 <= label < len(names) else str(label)
        note = _note(count, others, table.attrs["labels"])
        own = [head for head in every if head.is_own]
        classes.append(ClassHeads(label, name, count, float(table["accuracy"][at]), every[:n_heads], own, note))
    return classes


def _note(count: int, others: int, labels: str) -> str:
    notes = []
    if count == 1:
        notes.append("One image: this says what the heads do there, nothing of the class.")
    if not others:
        notes.append("All images are of this class, so there is nothing to compare it with.")
    if labels == LabelSource.PREDICTED:
        notes.append("The images have no labels: classes are the model's own predictions.")
    return " ".join(notes)


def _refuse_without_drops(study: xr.Dataset) -> None:
    if study.sizes.get("image", 0) == 0:
        raise UsageError("Heads by class were asked for; the study holds no images. Run `vitrail study` first.")
    if not {"probability", "head_probability", "label"} <= set(map(str, study)):
        raise UsageError(
            "Heads by class were asked for; this study does not hold probability and head_probability. Study a model "
            "with a classifier with --measures heads (without a classifier there are no classes)."
        )
