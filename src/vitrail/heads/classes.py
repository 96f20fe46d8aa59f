"""Which heads matter for which class. Works on a finished study, without torch."""

from typing import NamedTuple

import numpy as np
import xarray as xr

from vitrail.errors import UsageError
from vitrail.heads.summary import bootstrap_interval

__all__ = ["ClassHeads", "HeadDrop", "class_table", "heads_by_class"]


class HeadDrop(NamedTuple):
    """Mean probability of the label that the images of a class lose without one head, with a 95 % bootstrap interval.

    `low` and `high` are NaN for a class with one image. `elsewhere`: the mean over all images of other classes, NaN
    where there are none.
    """

    layer: int
    head: int
    drop: float
    low: float
    high: float
    elsewhere: float

    @property
    def is_own(self) -> bool:
        """The class needs this head more than other images do: its interval lies above theirs."""
        return self.low > self.elsewhere


class ClassHeads(NamedTuple):
    """The heads that matter most for one class, the first first. `note` says what keeps the numbers from meaning more;
    empty where nothing does."""

    label: int
    name: str
    n_images: int
    accuracy: float
    heads: list[HeadDrop]
    note: str


def class_table(study: xr.Dataset, *, seed: int = 0, resamples: int = 1000) -> xr.Dataset:
    """Per class, layer and head: `drop`, the mean probability of the label lost without the head, with its 95 %
    bootstrap interval `drop_low`, `drop_high`; per class `n_images` and `accuracy` with nothing pruned.

    Classes are those of the study's labels, in `class` as numbers; heads that a layer does not have are NaN, as are the
    intervals of classes with one image. `attrs["labels"]` says where the labels come from. Raises `UsageError` for a
    study without images or without `head_probability`, which models without a classifier do not have.
    """
    _refuse_without_drops(study)
    drop = study["probability"].to_numpy()[:, None, None] - study["head_probability"].to_numpy().astype(np.float64)
    label = study["label"].to_numpy()
    right = study["prediction"].to_numpy() == label if "prediction" in study else np.full(len(label), np.nan)
    classes = np.unique(label)
    shape = (len(classes), *drop.shape[1:])
    mean, low, high = (np.full(shape, np.nan) for _ in range(3))
    for at, each in enumerate(classes):
        mine = drop[label == each]
        mean[at] = mine.mean(0)
        low[at], high[at] = bootstrap_interval(mine, seed, resamples)
    dims = ("class", "layer", "head")
    return xr.Dataset(
        {
            "drop": (dims, mean),
            "drop_low": (dims, low),
            "drop_high": (dims, high),
            "n_images": ("class", np.array([(label == each).sum() for each in classes])),
            "accuracy": ("class", np.array([right[label == each].mean() for each in classes])),
        },
        coords={"class": classes},
        attrs={"labels": str(study.attrs.get("labels_from", "")), "n_images": len(label), "seed": seed},
    )


def heads_by_class(study: xr.Dataset, *, n_heads: int = 3, seed: int = 0, resamples: int = 1000) -> list[ClassHeads]:
    """For every class of the study its `n_heads` most important heads by mean drop of the label's probability.

    Classes with most images come first. Notes say where a class has one image, or where the labels are the model's own
    predictions. Raises `UsageError` as `class_table` does.
    """
    table = class_table(study, seed=seed, resamples=resamples)
    names = study.attrs.get("class_names")
    counts = table["n_images"].to_numpy()
    total = (table["drop"] * table["n_images"]).sum("class", skipna=False).to_numpy()
    order = np.argsort(-counts, kind="stable")
    found = []
    for at in order:
        label, count = int(table["class"][at]), int(counts[at])
        mine = table["drop"].to_numpy()[at]
        others = int(counts.sum()) - count
        elsewhere = (total - count * mine) / others if others else np.full_like(mine, np.nan)
        ranked = np.argsort(-np.nan_to_num(mine, nan=-np.inf), axis=None)[:n_heads]
        heads = [
            HeadDrop(
                int(layer), int(head), float(mine[layer, head]), float(table["drop_low"][at, layer, head]),
                float(table["drop_high"][at, layer, head]), float(elsewhere[layer, head]),
            )
            for layer, head in zip(*np.unravel_index(ranked, mine.shape), strict=True)
            if not np.isnan(mine[layer, head])
        ]  # fmt: skip
        name = str(names[label]) if names and 0 <= label < len(names) else str(label)
        note = _note(count, others, table.attrs["labels"])
        found.append(ClassHeads(label, name, count, float(table["accuracy"][at]), heads, note))
    return found


def _note(count: int, others: int, labels_from: str) -> str:
    notes = []
    if count == 1:
        notes.append("One image: this says what the heads do there, nothing of the class.")
    if not others:
        notes.append("All images are of this class, so there is nothing to compare it with.")
    if "own top-1" in labels_from:
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
