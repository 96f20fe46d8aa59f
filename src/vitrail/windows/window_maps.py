"""Predicted windows of a study on the grid of patches: their masks, sums and lines over layers. No torch."""

from collections.abc import Mapping

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int

from vitrail.errors import UsageError
from vitrail.grid import Grid, boxes_of_sides, positions, window_masks
from vitrail.selection import image_position

__all__ = [
    "AGREEMENT",
    "Sides",
    "agreement_by_layer",
    "area_of_layers",
    "hard_masks",
    "inner_patches",
    "spread_patches",
    "sum_of_windows",
    "window_areas",
    "window_grid",
    "window_layer",
    "window_sides",
    "windows_as_study",
]

Sides = Float[np.ndarray, "layer window patch side"]
"""Patches to the left, top, right, bottom of the query; one window for all heads of a layer, or one a head."""

AGREEMENT = {
    "queries and keys without the mask": "predicted_overlap_open",
    "its attention": "predicted_overlap",
    "moved at random": "predicted_overlap_moved",
}
"""What predicted windows are compared with, and the measure of a study that says so."""

BORDER_SHARE = 4
"""Inner patches keep a quarter of the shorter side away from the border, which cuts windows."""


def windows_as_study(sides: Sides, grid: Grid) -> xr.Dataset:
    """Windows that a model predicts for one image, as a study of that image.

    Args:
        sides: Patches to the left, top, right, bottom of each query, [layer window patch side].
        grid: Rows and columns of patches.

    Returns:
        A dataset that the figures of windows take.

    Raises:
        UsageError: The sides do not fit the grid.
    """
    n_patches = grid[0] * grid[1]
    if sides.ndim != 4 or sides.shape[2:] != (n_patches, 4):
        raise UsageError(
            f"Sides of shape {list(sides.shape)} were given for a grid of {grid}; they must be "
            f"[layer, window, {n_patches}, 4]."
        )
    dims = ("image", "layer", "head", "patch", "side")
    return xr.Dataset({"predicted_window": (dims, sides[None])}, attrs={"grids": [list(grid)] * len(sides)})


def window_grid(study: xr.Dataset) -> Grid:
    """The grid that windows are predicted on, that of the first layer that has one.

    Args:
        study: A study with `grids` in its attributes.

    Returns:
        Rows and columns of patches.
    """
    rows, columns = study.attrs["grids"][window_layer(study)]
    return int(rows), int(columns)


def window_layer(study: xr.Dataset) -> int:
    """The first layer that has a grid, whose grid windows are predicted on.

    Args:
        study: A study with `grids` in its attributes.

    Returns:
        Its index.
    """
    return next(layer for layer, grid in enumerate(study.attrs["grids"]) if grid is not None)


def window_sides(study: xr.Dataset, image: int | str = 0) -> Sides:
    """Sides of the windows of one image.

    Args:
        study: A study that holds `predicted_window`.
        image: A position or an id.

    Returns:
        Patches to the left, top, right, bottom, [layer window patch side].

    Raises:
        UsageError: The study holds no predicted windows, or has no such image.
    """
    if "predicted_window" not in study:
        raise UsageError(
            "Predicted windows were to be drawn; this study holds none. Study a WinT with --measures windows."
        )
    return study["predicted_window"][image_position(study, image)].to_numpy().astype(np.float64)


def hard_masks(
    sides: Float[np.ndarray, "layer window query side"], grid: Grid, first: int = 0
) -> Bool[np.ndarray, "layer window query patch"]:
    """Which patches lie in each window; every query sees itself.

    Args:
        sides: Patches to the left, top, right, bottom of each query; rounded half up.
        grid: Rows and columns of patches.
        first: The patch that the first query is.

    Returns:
        A flag for each query and patch.
    """
    boxes = np.stack(boxes_of_sides(np.floor(sides + 0.5), grid, first=first), axis=-1)
    return np.asarray(window_masks(boxes, grid, first=first))


def window_areas(sides: Sides, grid: Grid, patch: int) -> Float[np.ndarray, "layer"]:
    """Area of one patch's windows in each layer, mean over heads.

    Args:
        sides: Sides of the windows of one image.
        grid: Rows and columns of patches.
        patch: Index of the query's patch.

    Returns:
        Shares of the grid, 0 to 1.
    """
    areas: Float[np.ndarray, "layer"] = hard_masks(sides[:, :, patch : patch + 1], grid, patch).mean((1, 2, 3))
    return areas


def sum_of_windows(sides: Sides, grid: Grid, patch: int) -> Float[np.ndarray, "row column"]:
    """The sum of one patch's windows over layers and heads, as a share: S_ij = mean over l, h of M^lh_ij.

    Args:
        sides: Sides of the windows of one image.
        grid: Rows and columns of patches.
        patch: Index of the query's patch.

    Returns:
        For each patch the share of windows that hold it, 0 to 1.
    """
    summed: Float[np.ndarray, "patch"] = hard_masks(sides[:, :, patch : patch + 1], grid, patch).mean((0, 1, 2))
    return summed.reshape(grid)


def spread_patches(grid: Grid) -> list[int]:
    """Four patches spread over the grid.

    Args:
        grid: Rows and columns of patches.

    Returns:
        Their indices, row by row.
    """
    rows, columns = ((size // 4, size - 1 - size // 4) for size in grid)
    return [row * grid[1] + column for row in rows for column in columns]


def inner_patches(grid: Grid) -> Int[np.ndarray, "inner"]:
    """Patches away from the border, which cuts windows.

    Args:
        grid: Rows and columns of patches.

    Returns:
        Their indices.
    """
    rows, columns = grid
    row, column = positions(grid)
    margin = min(rows, columns) // BORDER_SHARE
    inner = (np.minimum(row, rows - 1 - row) >= margin) & (np.minimum(column, columns - 1 - column) >= margin)
    return np.flatnonzero(inner)


def area_of_layers(study: xr.Dataset) -> Mapping[str, Float[np.ndarray, "layer"]]:
    """Mean area of windows in each layer.

    Args:
        study: Any study.

    Returns:
        A line by its name; none where the study holds no `predicted_area`.
    """
    return _lines(study, {"this model": "predicted_area"})


def agreement_by_layer(study: xr.Dataset) -> Mapping[str, Float[np.ndarray, "layer"]]:
    """Intersection over union of predicted windows with others, in each layer.

    Args:
        study: Any study.

    Returns:
        A line by the name of what windows are compared with; none where the study holds no overlap.
    """
    return _lines(study, AGREEMENT)


def _lines(study: xr.Dataset, measures: Mapping[str, str]) -> dict[str, Float[np.ndarray, "layer"]]:
    return {
        words: study[measure].mean(("image", "head")).to_numpy()
        for words, measure in measures.items()
        if measure in study
    }
