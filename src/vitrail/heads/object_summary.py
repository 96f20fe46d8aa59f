"""Heads and layers ranked by how well their attention finds objects, over the images of a study. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float

from vitrail.layer_summary import finite_mean, images_with_values
from vitrail.stats import candidates_for_largest, simultaneous_intervals

__all__ = ["TOP", "ExampleMap", "ScoreSummary", "example_maps", "is_of_class_token", "scale_of_map", "summarise_scores"]

NULL = "_null"

TOP = 0.98
"""Quantile of a map at which its colours end: one sink would leave nothing to see of the rest."""


@dataclass(frozen=True, eq=False)
class ScoreSummary:
    """One score of the maps of every head, or of every layer, over the images that have objects.

    Rows are [layer head] or [layer]; NaN where there is no map. Intervals are of all rows at once, so that they hold of
    the best one too, and NaN where there is none (`reason`).

    Attributes:
        name: Of the measure.
        n_images: Images with objects that have a score in every layer that has any.
        mean: Mean over these images, 0 to 1.
        low, high: Ends of its 95 % interval.
        null: Mean against other images' objects, of the images that have such a score.
        excess: Mean difference of the score and its null, of the same images.
        excess_low, excess_high: Ends of its 95 % interval.
        may_be_best: Rows that may be the best of all images, at 95 %.
        centre: Mean score of a blob in the middle; NaN where there is none of this kind.
        over_centre_low: Lower end of the 95 % interval of the mean difference to the blob.
        reason: Why rows have no interval, and how many; empty where all have one.
    """

    name: str
    n_images: int
    mean: Float[np.ndarray, "*row"]
    low: Float[np.ndarray, "*row"]
    high: Float[np.ndarray, "*row"]
    null: Float[np.ndarray, "*row"]
    excess: Float[np.ndarray, "*row"]
    excess_low: Float[np.ndarray, "*row"]
    excess_high: Float[np.ndarray, "*row"]
    may_be_best: Bool[np.ndarray, "*row"]
    centre: float
    over_centre_low: Float[np.ndarray, "*row"]
    reason: str

    @property
    def ranked(self) -> list[tuple[int, ...]]:
        """Indices of the rows, the best first; ties in order."""
        rows = np.argwhere(np.isfinite(self.mean))
        order = np.argsort(-self.mean[tuple(rows.T)], kind="stable")
        return [tuple(map(int, row)) for row in rows[order]]


def summarise_scores(study: xr.Dataset, name: str) -> ScoreSummary | None:
    """Sums up one score over the images of a study.

    Args:
        study: A study.
        name: Of a measure of heads or layers, such as "object_auroc" or "object_layer_iou".

    Returns:
        The summary; None where the study does not hold the measure, or no image has objects.
    """
    if name not in study:
        return None
    values = study[name].to_numpy().astype(np.float64)
    if not np.isfinite(values).any():
        return None
    masked = images_with_values(values)
    values = values[masked]
    null = study[name + NULL].to_numpy()[masked] if name + NULL in study else np.full(values.shape, np.nan)
    low, high, reason = simultaneous_intervals(values, limits=(0.0, 1.0))
    excess = _difference(values, null)
    centre = _centre(study, name)[masked]
    over_centre = _difference(values, np.broadcast_to(centre.reshape(-1, *[1] * (values.ndim - 1)), values.shape))
    return ScoreSummary(
        name=name,
        n_images=len(values),
        mean=_mean(values),
        low=low,
        high=high,
        null=_mean(null),
        excess=excess.mean,
        excess_low=excess.low,
        excess_high=excess.high,
        may_be_best=candidates_for_largest(values),
        centre=float(_mean(centre)),
        over_centre_low=over_centre.low,
        reason=reason,
    )


def is_of_class_token(plan: Mapping[str, Any], layer: int) -> bool:
    """Whether the maps of a layer that are scored are those of its class token; else they are the mean over queries.

    Args:
        plan: The attributes of a study.
        layer: Index of a layer whose maps join the patches of a grid.

    Returns:
        False where the class token joins in a later layer, too.
    """
    prefixes = plan.get("prefixes")
    return bool(plan.get("class_token", True) and (prefixes is None or prefixes[layer] > 0))


class ExampleMap(NamedTuple):
    """A head's map of one image of a study.

    Attributes:
        image: Position of the image.
        weights: Attention to each patch.
        score: AUROC against the objects of the image.
    """

    image: int
    weights: Float[np.ndarray, "patch"]
    score: float


def example_maps(study: xr.Dataset, layer: int, head: int, n_examples: int) -> list[ExampleMap]:
    """Maps of one head of images from that where it finds the objects best to that where it finds them worst.

    Args:
        study: A study.
        layer: Index of the layer.
        head: Index of the head.
        n_examples: How many to give, at most.

    Returns:
        Evenly spaced among the images whose maps the study holds; none where it holds no maps.
    """
    if not {"object_map", "object_auroc"} <= set(study):
        return []
    scores = study["object_auroc"][:, layer, head].to_numpy()
    maps = study["object_map"][:, layer, head].to_numpy()
    scored = np.flatnonzero(np.isfinite(maps).any(1) & np.isfinite(scores))
    ordered = scored[np.argsort(-scores[scored], kind="stable")]
    chosen = np.unique(np.linspace(0, len(ordered) - 1, min(n_examples, len(ordered))).round().astype(int))
    return [ExampleMap(int(at), maps[at][np.isfinite(maps[at])], float(scores[at])) for at in ordered[chosen]]


def scale_of_map(weights: Float[np.ndarray, "patch"]) -> tuple[float, float]:
    """Where the colours of a map begin and end.

    Args:
        weights: Attention to each patch.

    Returns:
        The lowest weight and the 98 % quantile; above it by a hair where they are equal.
    """
    low, high = float(weights.min()), float(np.quantile(weights, TOP))
    return low, max(high, low + 1e-12)


class _Difference(NamedTuple):
    mean: Float[np.ndarray, "*row"]
    low: Float[np.ndarray, "*row"]
    high: Float[np.ndarray, "*row"]


def _difference(values: Float[np.ndarray, "image *row"], others: Float[np.ndarray, "image *row"]) -> _Difference:
    """Mean difference with intervals of all rows at once, of the images that have one."""
    differences = values - others
    if not np.isfinite(differences).any():
        return _Difference(*np.full((3, *values.shape[1:]), np.nan))
    differences = differences[images_with_values(differences)]
    low, high, _ = simultaneous_intervals(differences, limits=(-1.0, 1.0))
    return _Difference(_mean(differences), low, high)


def _centre(study: xr.Dataset, name: str) -> Float[np.ndarray, "image"]:
    """What a blob in the middle scores of each image; NaN for maps of object patches, which are no map of the image."""
    *words, score = name.split("_")
    centre = f"object_centre_{score}"
    if "patch" in words or centre not in study:
        return np.full(study.sizes["image"], np.nan)
    return np.asarray(study[centre].to_numpy().astype(np.float64))


def _mean(values: Float[np.ndarray, "image *row"]) -> Float[np.ndarray, "*row"]:
    return finite_mean(np.moveaxis(values, 0, -1))
