"""Maps over the grid of patches, layer by layer, of one image or over all: pulls, windows, hubs. No torch."""

from typing import NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Float

from vitrail.errors import UsageError
from vitrail.grid import Grid, box_masks, boxes_of_sides
from vitrail.selection import ImageChoice, describe_choice, image_position

__all__ = [
    "PatchMaps",
    "coverage",
    "coverage_by_layer",
    "layer_grids",
    "mean_lengths",
    "patch_maps",
    "pull_lengths",
    "scale_of_lengths",
]

SCALE_PERCENTILE = 95
"""Lengths are drawn on a scale that ends at this percentile: few long ones would make all others dots."""


class PatchMaps(NamedTuple):
    """A measure of patches, of one image or averaged over images.

    Attributes:
        values: The measure without its dimension `image`, [layer patch ...]; NaN where a layer has no such patch.
        description: Whose values these are.
    """

    values: Float[np.ndarray, "layer patch ..."]
    description: str


def patch_maps(study: xr.Dataset, name: str, image: ImageChoice) -> PatchMaps:
    """One image's values of a measure of patches, or the mean over images.

    Args:
        study: A study that holds the measure.
        name: Name of a measure with the dimensions image, layer, patch, ...
        image: A position or an id; None for the mean over images.

    Returns:
        The values and whose they are.

    Raises:
        UsageError: The study does not hold the measure, or has no such image.
    """
    array = _measure(study, name)
    chosen = array.mean("image", skipna=True) if image is None else array[image_position(study, image)]
    return PatchMaps(chosen.to_numpy().astype(np.float64), describe_choice(study, image))


def layer_grids(study: xr.Dataset) -> dict[int, Grid]:
    """The layers whose patches were measured, each with its grid.

    Args:
        study: A study with `grids` in its attributes.

    Returns:
        (rows, columns) by index of the layer; without the layers that have no grid or no numbers.
    """
    grids = study.attrs["grids"]
    measured = [True] * len(grids)
    name = next((name for name in ("window", "tendency", "field_size") if name in study), None)
    if name is not None:
        first = study[name][0].to_numpy()
        measured = (~np.isnan(first.reshape(len(first), -1)).all(-1)).tolist()
    return {
        layer: (int(grid[0]), int(grid[1])) for layer, grid in enumerate(grids) if grid is not None and measured[layer]
    }


def pull_lengths(pulls: Float[np.ndarray, "layer patch xy"]) -> Float[np.ndarray, "layer patch"]:
    """Length of each tendency, in patches.

    Args:
        pulls: Tendencies in patches, x to the right, y down.

    Returns:
        Lengths; NaN where there is no patch.
    """
    lengths: Float[np.ndarray, "layer patch"] = np.hypot(pulls[..., 0], pulls[..., 1])
    return lengths


def mean_lengths(lengths: Float[np.ndarray, "layer patch"]) -> Float[np.ndarray, "layer"]:
    """Mean length of each layer.

    Args:
        lengths: Lengths in patches; NaN is left out.

    Returns:
        Means; NaN for a layer without any.
    """
    finite = ~np.isnan(lengths)
    sums = np.where(finite, lengths, 0).sum(1)
    return np.where(finite.any(1), sums / np.maximum(finite.sum(1), 1), np.nan)


def scale_of_lengths(lengths: Float[np.ndarray, "layer patch"]) -> float:
    """The 95th percentile of all lengths of a figure, so that its panels can be compared.

    Args:
        lengths: Lengths in patches; NaN is left out.

    Returns:
        A length above 0; 1 where there is none.
    """
    finite = lengths[~np.isnan(lengths)]
    return float(np.percentile(finite, SCALE_PERCENTILE)) or 1.0 if finite.size else 1.0


def coverage(sides: Float[np.ndarray, "patch side"], grid: Grid) -> Float[np.ndarray, "row column"]:
    """Share of the patches whose window holds each patch.

    Args:
        sides: Patches to the left, top, right, bottom of each query that its window holds.
        grid: Rows and columns of patches.

    Returns:
        Shares, 0 (in no window) to 1 (in all).
    """
    masks = box_masks(np.stack(boxes_of_sides(sides, grid), axis=-1), grid)
    return np.asarray(masks.mean(axis=0).reshape(grid))


def coverage_by_layer(study: xr.Dataset, image: ImageChoice) -> dict[int, Float[np.ndarray, "row column"]]:
    """The sum of all windows of each layer that has any: the share of patches whose window holds each patch.

    Args:
        study: A study that holds `window`.
        image: A position or an id; None for the mean over images.

    Returns:
        Shares on the grid, by index of the layer.

    Raises:
        UsageError: The study holds no windows, or has no such image.
    """
    array = _measure(study, "window")
    positions = range(study.sizes["image"]) if image is None else [image_position(study, image)]
    sides = array.isel(image=list(positions)).to_numpy().astype(np.float64)
    return {
        layer: np.mean([coverage(each[layer, : grid[0] * grid[1]], grid) for each in sides], axis=0)
        for layer, grid in layer_grids(study).items()
    }


def _measure(study: xr.Dataset, name: str) -> xr.DataArray:
    if name not in study:
        raise UsageError(
            f"This study holds no {name!r}; it has {', '.join(map(str, study.data_vars))}. "
            "Study the images with --measures patches."
        )
    return study[name]
