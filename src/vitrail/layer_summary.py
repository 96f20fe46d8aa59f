"""Quantities over the layers of a model, summed up over the images of a study. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int

from vitrail.grid import patch_sides
from vitrail.measure import range_or_unit
from vitrail.stats import mean_interval

__all__ = [
    "LayerQuantity",
    "LayerStatistics",
    "finite_mean",
    "images_in_every_layer",
    "images_with_values",
    "in_first_patches",
    "is_in_patches",
    "layer_quantity",
]

CENTRAL_90 = (0.05, 0.95)
"""Quantiles between which nine images in ten lie."""


class LayerStatistics(NamedTuple):
    """Statistics over images of the layers that have any value.

    Attributes:
        layers: Indices of those layers.
        mean: Mean over the images that have a value.
        low: Lower end of the 95 % interval of the mean; NaN where images are too few.
        high: Upper end of the same interval.
        bottom: 5 % quantile over images.
        top: 95 % quantile over images.
    """

    layers: Int[np.ndarray, "known"]
    mean: Float[np.ndarray, "known"]
    low: Float[np.ndarray, "known"]
    high: Float[np.ndarray, "known"]
    bottom: Float[np.ndarray, "known"]
    top: Float[np.ndarray, "known"]


@dataclass(frozen=True, eq=False)
class LayerQuantity:
    """One quantity of each image and layer.

    Attributes:
        title: What it is.
        unit: Its unit.
        values: The values, [image layer]; NaN where a layer has none.
    """

    title: str
    unit: str
    values: Float[np.ndarray, "image layer"]

    @cached_property
    def statistics(self) -> LayerStatistics:
        """Mean, interval and spread over images, layer by layer."""
        finite = np.isfinite(self.values)
        layers = np.flatnonzero(finite.any(0))
        rows = np.full((len(layers), 5), np.nan)
        for row, layer in zip(rows, layers, strict=True):
            values = self.values[finite[:, layer], layer]
            low, high, _ = mean_interval(values)
            row[:] = values.mean(), low, high, *np.quantile(values, CENTRAL_90)
        return LayerStatistics(layers, *rows.T)

    @property
    def layer_means(self) -> Float[np.ndarray, "layer"]:
        """Mean over images of every layer; NaN for a layer without a value."""
        return finite_mean(self.values.T)


def layer_quantity(study: xr.Dataset, name: str) -> LayerQuantity:
    """A measure of images and layers, averaged over whatever else it has dimensions for.

    Args:
        study: A study that holds the measure.
        name: Name of a measure whose first dimensions are image and layer.

    Returns:
        The quantity with the measure's title and unit; lengths as `in_first_patches` gives them.
    """
    array = in_first_patches(study[name], study.attrs.get("grids"))
    numbers = array.to_numpy().astype(np.float64)
    unit = str(array.attrs.get("unit", ""))
    values = finite_mean(numbers.reshape(*numbers.shape[:2], -1))
    return LayerQuantity(str(array.attrs.get("title", name)), range_or_unit(unit), values)


def is_in_patches(unit: str) -> bool:
    """Whether values are lengths counted in patches of their own layer.

    Args:
        unit: Of a measure.

    Returns:
        True for "patches" and for sides and pairs of them.
    """
    return unit == "patches" or unit.startswith(("patches,", "patches left"))


def in_first_patches(array: xr.DataArray, grids: Sequence[Sequence[int] | None] | None) -> xr.DataArray:
    """Lengths that compare between the layers of a hierarchy, whose patches are longer in later layers.

    Args:
        array: A measure with its unit.
        grids: The grid of each layer, as the plan of the study has it; None: not known.

    Returns:
        The array in patches of the first layer that has a grid, which its unit says; itself where all layers have one
        grid and where values are no lengths in patches.
    """
    unit = str(array.attrs.get("unit", ""))
    if not is_in_patches(unit) or "layer" not in array.dims or len({tuple(each) for each in grids or () if each}) < 2:
        return array
    assert grids is not None
    first = next(layer for layer, grid in enumerate(grids) if grid is not None)
    sides = patch_sides(grids)
    converted = (array * xr.DataArray(sides / sides[first], dims="layer")).transpose(*array.dims)
    return converted.assign_attrs({**array.attrs, "unit": unit.replace("patches", f"patches of L{first}", 1)})


def images_in_every_layer(values: Float[np.ndarray, "image layer *rest"]) -> Bool[np.ndarray, "image"]:
    """Images that have a value in every layer that has any, so that means over them compare between layers.

    Without it layers would be of other images: a small object has no patch on a coarse grid and no score there.

    Args:
        values: Numbers, NaN where there is none.

    Returns:
        True for these.
    """
    finite = np.isfinite(values).reshape(*values.shape[:2], -1).any(-1)
    layers = finite.any(0)
    return np.asarray(finite[:, layers].all(1) & layers.any())


def images_with_values(values: Float[np.ndarray, "image layer *rest"]) -> Bool[np.ndarray, "image"]:
    """Images to take means over: those in every layer, or where there are none, those with any value.

    Args:
        values: Numbers, NaN where there is none.

    Returns:
        True for `images_in_every_layer`; where no image is, for every image that has a value; if none has, for all.
    """
    has_any = np.isfinite(values).reshape(len(values), -1).any(1)
    choices = (images_in_every_layer(values), has_any)
    return next((images for images in choices if images.any()), np.ones(len(values), dtype=bool))


def finite_mean(values: Float[np.ndarray, "*lead item"]) -> Float[np.ndarray, "*lead"]:
    """The mean over the last dimension of what is finite.

    Args:
        values: Numbers, NaN where there is none.

    Returns:
        Means; NaN where nothing is finite.
    """
    finite = np.isfinite(values)
    sums = np.where(finite, values, 0).sum(-1)
    return np.where(finite.any(-1), sums / np.maximum(finite.sum(-1), 1), np.nan)
