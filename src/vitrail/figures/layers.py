"""Quantities over the layers of a model: every head as a dot, or the mean over images with its interval."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from vitrail.figures import panels
from vitrail.figures.style import BAND, COOL, WHISKER, axis_title, blank, explain, styled
from vitrail.figures.values import Image, head_values
from vitrail.heads.summary import bootstrap_interval

__all__ = ["OverLayers", "heads_by_layer", "over_layers", "per_image"]

PER_ROW = 3


@dataclass(frozen=True, eq=False)
class OverLayers:
    """One quantity of each image and layer, NaN where a layer has none."""

    title: str
    unit: str
    values: Float[np.ndarray, "image layer"]


def per_image(study: xr.Dataset, name: str) -> OverLayers:
    """A measure of images and layers, averaged over whatever else it has dimensions for."""
    array = study[name]
    numbers = array.to_numpy().astype(np.float64)
    values = _mean(numbers.reshape(*numbers.shape[:2], -1))
    unit = str(array.attrs.get("unit", ""))
    return OverLayers(str(array.attrs.get("title", name)), "0 to 1" if unit == "1" else unit, values)


@styled
def over_layers(quantities: Sequence[OverLayers], title: str, *reading: str) -> Any:
    """A panel for each quantity: the mean over images with its 95 % interval, and where 90 % of the images lie."""
    columns = min(PER_ROW, len(quantities))
    rows = -(-len(quantities) // columns)
    figure = blank(max(4.2, 3.1 * columns), 2.3 * rows + 0.7, title)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, quantity in zip(grid, quantities, strict=False):
        _panel(axes, quantity)
    for axes in grid[len(quantities) :]:
        axes.set_axis_off()
    n_images = len(quantities[0].values)
    spread = "Line: mean over images; band: its 95 % interval (bootstrap); bars: 5 to 95 % of the images."
    explain(figure, *reading, spread if n_images > 1 else "")
    return figure


@styled
def heads_by_layer(study: xr.Dataset, metric: str, title: str, image: Image = None) -> Any:
    """A measure of every head against its layer, with the spread over images.

    Raises `UsageError` for a measure that the study does not hold per head.
    """
    shown = head_values(study, metric, image)
    figure = blank(6.5, 3.4, f"{title}, {shown.whose}")
    axes = figure.subplots()
    spread = None
    if not shown.one_image:
        there = ~np.isnan(shown.values)
        spread = np.full((2, *there.shape), np.nan)
        spread[:, there] = np.quantile(study[metric].to_numpy().astype(np.float64)[:, there], (0.05, 0.95), axis=0)
    panels.entropy(axes, shown, spread, np.zeros(len(shown.values), dtype=np.int64), None)
    axes.legend(loc="best")
    whiskers = "Whiskers: 5 to 95 % of the images." if spread is not None else ""
    explain(figure, "A dot is a head.", *shown.reading(), whiskers, "Dashed: mean of the layer.")
    return figure


def _panel(axes: Any, quantity: OverLayers) -> None:
    known = np.isfinite(quantity.values)
    layers = np.flatnonzero(known.any(0))
    means, low, high, bottom, top = (np.full(len(layers), np.nan) for _ in range(5))
    for at, layer in enumerate(layers):
        values = quantity.values[known[:, layer], layer]
        means[at] = values.mean()
        bottom[at], top[at] = np.quantile(values, (0.05, 0.95))
        ends = bootstrap_interval(values[:, None])
        low[at], high[at] = float(ends[0][0]), float(ends[1][0])
    if len(quantity.values) > 1:
        axes.vlines(layers, bottom, top, color=WHISKER, linewidth=1.0)
        axes.fill_between(layers, low, high, color=BAND, linewidth=0)
    axes.plot(layers, means, color=COOL, marker="o", markersize=3)
    axes.set(
        xlabel="layer (index)",
        ylabel=axis_title("", quantity.unit).strip(" ()"),
        xlim=(-0.5, quantity.values.shape[1] - 0.5),
    )
    axes.set_title(quantity.title, fontsize=7.6)
    axes.set_xticks(panels.every(quantity.values.shape[1], 12))
    axes.grid(axis="y")


def _mean(numbers: Float[np.ndarray, "image layer other"]) -> Float[np.ndarray, "image layer"]:
    """The mean of what is known; NaN where nothing is."""
    known = np.isfinite(numbers)
    count = known.sum(-1)
    return np.where(count > 0, np.where(known, numbers, 0).sum(-1) / np.maximum(count, 1), np.nan)
