"""What the figures draw, taken out of a study: one image, or the mean over images with its interval."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int

from vitrail.errors import UsageError
from vitrail.figures.style import axis_title
from vitrail.heads.summary import bootstrap_interval
from vitrail.measure import MEASURES

__all__ = [
    "HeadValues",
    "head_values",
    "hops_of_layers",
    "image_position",
    "importance_metrics",
    "main_metric",
    "strengths",
]

LOW_MATTERS = frozenset({"head_probability"})
"""Measures whose low values mark the important heads; of the others it is the high ones."""

MAIN = ("head_probability", "head_divergence", "head_loss_change", "head_token_shift")
"""What importance is read from, in order of preference."""

N_NAMED = 3

Image = int | str | None
"""An image by its position or id; None: the mean over all."""


@dataclass(frozen=True)
class HeadValues:
    """One number per head. `values` is NaN for heads that a layer does not have; `low` and `high` bound the mean over
    images (95 %, bootstrap), None for a single image. `unpruned` is the value with nothing pruned, where that means
    anything. `whose` says whose numbers these are."""

    metric: str
    values: Float[np.ndarray, "layer head"]
    low: Float[np.ndarray, "layer head"] | None
    high: Float[np.ndarray, "layer head"] | None
    unpruned: float | None
    whose: str
    one_image: bool
    attrs: Mapping[str, Any]

    @property
    def axis(self) -> str:
        """Title and unit for an axis or a colour bar."""
        unit = str(self.attrs.get("unit", ""))
        if unit == "bool":
            unit = "0 or 1" if self.one_image else "share of images"
        return axis_title(str(self.attrs.get("title", self.metric)), "0 to 1" if unit == "1" else unit)

    @property
    def title(self) -> str:
        return str(self.attrs.get("title", self.metric))

    @cached_property
    def heads(self) -> Int[np.ndarray, "n_heads pair"]:
        """(layer, head) of every head that is there, in order of layers."""
        return np.argwhere(~np.isnan(self.values))

    @cached_property
    def ranked(self) -> list[tuple[int, int]]:
        """Heads from the most to the least important; ties in order of layers."""
        flat = np.array([self.values[layer, head] for layer, head in self.heads])
        order = np.argsort(flat if self.metric in LOW_MATTERS else -flat, kind="stable")
        return [(int(layer), int(head)) for layer, head in self.heads[order]]

    @property
    def standing_out(self) -> list[tuple[int, int]]:
        """At most three of the most important heads: those that lie far from the usual head, by a quarter of the way
        to the first of them."""
        if not self.ranked:
            return []
        usual = float(np.nanmedian(self.values))
        away = [abs(float(self.values[pair]) - usual) for pair in self.ranked[:N_NAMED]]
        return [pair for pair, far in zip(self.ranked, away, strict=False) if far >= away[0] / 4]

    def reading(self) -> tuple[str, str, str]:
        """How to read low and high, and the source, as sentences."""
        low, high = (str(self.attrs.get(key, "")).replace(": ", ", ", 1) for key in ("low", "high"))
        source = self.attrs.get("source", "")
        return (
            f"Low: {low}." if low else "",
            f"High: {high}." if high else "",
            f"Source: {source}." if source else "",
        )


def head_values(study: xr.Dataset, metric: str, image: Image = None) -> HeadValues:
    """A measure per (image, layer, head), of one image or as the mean over images.

    Raises `UsageError` for a measure that the study does not hold per head, and for an image that it does not have.
    """
    per_head = [str(name) for name, array in study.data_vars.items() if array.dims == ("image", "layer", "head")]
    if metric not in per_head:
        raise UsageError(
            f"A figure of {metric!r} was asked for; this study holds, per head: {', '.join(per_head) or 'nothing'}."
        )
    array = study[metric]
    numbers = array.to_numpy().astype(np.float64)
    numbers[:, ~_present(study, numbers)] = np.nan
    n_images = len(numbers)
    if n_images == 0:
        raise UsageError(f"A figure of {metric!r} was asked for; the study holds no images. Run `vitrail study` first.")
    if image is not None or n_images == 1:
        at = image_position(study, 0 if image is None else image)
        return HeadValues(
            metric, numbers[at], None, None, _unpruned(study, metric, at), f"image {_id(study, at)}", True, array.attrs
        )
    low, high = _interval(numbers)
    return HeadValues(
        metric, numbers.mean(0), low, high, _unpruned(study, metric, None),
        f"mean over {n_images:,} images", False, array.attrs,
    )  # fmt: skip


def image_position(study: xr.Dataset, image: int | str) -> int:
    """Where an image stands in the study. Raises `UsageError` if it is not there."""
    n_images = study.sizes["image"]
    if isinstance(image, int):
        if 0 <= image < n_images:
            return image
        raise UsageError(f"Image {image} was asked for; the study has images 0 to {n_images - 1}.")
    ids = study["image"].to_numpy().astype(str) if "image" in study.coords else np.array([], dtype=str)
    found = np.flatnonzero(ids == image)
    if not found.size:
        some = ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "")
        raise UsageError(f"There is no image {image!r} in this study. Its {n_images} images are named like: {some}")
    return int(found[0])


def importance_metrics(study: xr.Dataset) -> list[str]:
    """Measures of importance that the study holds, those that speak of the model's answer first."""
    held = [
        name
        for name, measure in MEASURES.items()
        if name.startswith("head_") and measure.dims == ("image", "layer", "head") and measure.unit != "class"
    ]
    return sorted((name for name in held if name in study), key=lambda name: (name not in MAIN, held.index(name)))


def main_metric(study: xr.Dataset) -> str | None:
    """The measure that importance is read from in this study, or None where it holds no such measure."""
    return next((name for name in MAIN if name in study), None) or next(iter(importance_metrics(study)), None)


def hops_of_layers(study: xr.Dataset) -> Int[np.ndarray, "layer"]:
    """How many hop distances each layer has: the longer side of its grid; 0 where it has no grid."""
    n_layers = study.sizes["layer"]
    grids = study.attrs.get("grids")
    if grids is not None and len(grids) == n_layers:
        return np.array([max(grid) if grid else 0 for grid in grids])
    if "attention_strength" in study:
        known = ~np.isnan(study["attention_strength"].to_numpy()).all(axis=(0, 2))
        return np.asarray(known.sum(-1))
    return np.zeros(n_layers, dtype=np.int64)


def strengths(study: xr.Dataset, layer: int, head: int) -> Float[np.ndarray, "image hop"]:
    """Attention strength of one head, without the hops that its layer does not have.

    Raises `UsageError` where the study holds none or the head is not there.
    """
    if "attention_strength" not in study:
        raise UsageError(
            "Strength over hops was asked for; this study does not hold attention_strength. "
            "Study it with --measures heads (the model needs a grid of patches)."
        )
    array = study["attention_strength"]
    if not (0 <= layer < array.sizes["layer"] and 0 <= head < array.sizes["head"]):
        raise UsageError(
            f"L{layer}H{head} was asked for; the study has layers 0 to {array.sizes['layer'] - 1} "
            f"with heads 0 to {array.sizes['head'] - 1}."
        )
    numbers = array.isel(layer=layer, head=head).to_numpy().astype(np.float64)
    known = ~np.isnan(numbers).all(0)
    if not known.any():
        raise UsageError(f"L{layer}H{head} has no attention strength: the head is not there, or its layer has no grid.")
    return np.asarray(numbers[:, known])


def _present(study: xr.Dataset, numbers: Float[np.ndarray, "image layer head"]) -> Bool[np.ndarray, "layer head"]:
    """Which heads there are; bool measures are padded with 0, which does not tell."""
    there: Bool[np.ndarray, "layer head"] = ~np.isnan(numbers).all(0)
    n_heads = study.attrs.get("n_heads")
    if n_heads is not None and len(n_heads) == len(there):
        return np.asarray(there & (np.arange(there.shape[1]) < np.array(n_heads)[:, None]))
    for name in MAIN:
        if name in study:
            there = there & ~np.isnan(study[name].to_numpy()).all(0)
            break
    return there


def _interval(
    numbers: Float[np.ndarray, "image layer head"],
) -> tuple[Float[np.ndarray, "layer head"], Float[np.ndarray, "layer head"]]:
    there = ~np.isnan(numbers).all(0)
    bounds = np.full((2, *there.shape), np.nan)
    if there.any():
        bounds[:, there] = bootstrap_interval(numbers[:, there])
    return bounds[0], bounds[1]


def _unpruned(study: xr.Dataset, metric: str, at: int | None) -> float | None:
    """The measure with nothing pruned: the plain probability, or 0 for what measures a change."""
    if metric == "head_probability":
        if "probability" not in study:
            return None
        plain = study["probability"].to_numpy().astype(np.float64)
        return float(plain.mean() if at is None else plain[at])
    return 0.0 if metric.startswith("head_") else None


def _id(study: xr.Dataset, at: int) -> str:
    return str(study["image"].to_numpy()[at]) if "image" in study.coords else str(at)
