"""What the page must know before it draws anything: the study's plan, sizes, measures and accuracy, as JSON."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vitrail.app.reader import Reader
from vitrail.app.summary import summary
from vitrail.data import Manifest, class_title
from vitrail.study.plan import Plan

__all__ = ["description"]


def description(reader: Reader, plan: Plan, manifest: Manifest, name: str) -> dict[str, Any]:
    """The study in words and counts; every array's meaning beside its dimensions."""
    dataset = reader.dataset
    return {
        "name": name,
        "model": plan.model,
        "sizes": {str(dimension): int(size) for dimension, size in dataset.sizes.items()},
        "n_heads": plan.n_heads,
        "grids": plan.grids,
        "prefixes": plan.prefixes,
        "class_token": plan.class_token,
        "measures": {measure: _described(dataset[measure]) for measure in reader.measures},
        "left_out": plan.left_out,
        "class_names": [class_title(name) for name in plan.class_names or ()],
        "accuracy": _accuracy(reader),
        "labels_from": plan.labels_from,
        "own_labels": any(entry.label is not None for entry in manifest.images),
        "missing_images": int(dataset.attrs["missing_images"]),
        "has_map": "image_xy" in dataset,
        "has_thumbnails": "thumbnail" in dataset,
    }


def _described(array: Any) -> dict[str, Any]:
    told: Mapping[str, Any] = array.attrs
    return {
        "dims": [str(dimension) for dimension in array.dims],
        **{key: str(told.get(key, "")) for key in ("title", "unit", "low", "high", "source", "limits")},
    }


def _accuracy(reader: Reader) -> dict[str, Any] | None:
    """Share of images whose top-1 prediction is the label, with its interval; None without a classifier."""
    if "prediction" not in reader.dataset:
        return None
    right = reader.whole("prediction") == reader.whole("label")
    share, low, high = (float(number) for number in summary(np.asarray(right, dtype=np.float32)[:, None]).values[:3, 0])
    return {"value": share, "low": low, "high": high, "n_right": int(right.sum())}
