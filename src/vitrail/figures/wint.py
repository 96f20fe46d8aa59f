"""Figures of a WinT: the windows that its patches predict, layer by layer, over the photograph and summed up.

Heads are told apart by the dashes of their frames as well as by colour.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image

from vitrail.errors import UsageError
from vitrail.figures.photo_grid import (
    COVER,
    KEY_PANELS,
    PANEL_INCHES,
    PER_ROW,
    draw_background,
    grid_extent,
    mark_patch,
)
from vitrail.figures.style import COOL, INK, LINE, MARK, SOFT, Figure, FigureTable, blank, explain, number, styled, when
from vitrail.grid import Grid, view_in_patches
from vitrail.sentence import percent
from vitrail.windows.window_maps import (
    agreement_by_layer,
    area_of_layers,
    spread_patches,
    sum_of_windows,
    window_areas,
    window_grid,
    window_layer,
    window_sides,
)

__all__ = [
    "FIGURES",
    "area_by_layer",
    "lines_of_areas",
    "lines_of_overlaps",
    "overlap_by_layer",
    "summed_windows",
    "windows_by_layer",
]

FRAMES = (
    (COOL, "-"),
    (MARK, (0, (4, 1.5))),
    (INK, (0, (1.2, 1.2))),
    ("#6b4fa0", (0, (5, 1.5, 1.2, 1.5))),
    ("#3d7a52", (0, (7, 2))),
    ("#9a7b00", (0, (2.5, 2.5))),
)
"""Colour and dashes of the windows of each head; more heads begin again."""

INSET = 0.06
"""Patches by which the frame of each head lies within that of the one before, so that equal windows stay apart."""

OURS = "Our construction, after Ma et al. 2022."


@styled
def windows_by_layer(
    study: xr.Dataset,
    patch: int | None = None,
    image: int | str = 0,
    photo: Image.Image | None = None,
    *,
    teacher: xr.Dataset | None = None,
) -> Figure:
    """The predicted windows of one patch in every layer.

    Args:
        study: A study that holds `predicted_window`.
        patch: Index of the patch, row by row; None: the one in the middle.
        image: A position or an id.
        photo: The image as the model sees it, drawn in pale grey behind the panels.
        teacher: Windows of a teacher for the same image, to draw in a second row.

    Returns:
        The figure.

    Raises:
        UsageError: The study holds no windows, or has no such image or patch.
    """
    grid, sides = window_grid(study), window_sides(study, image)
    view = view_in_patches(study.attrs, window_layer(study))
    patch = _checked_patch(grid, patch)
    rows = {"predicted": sides}
    if teacher is not None:
        rows = {"student": sides, "teacher": window_sides(teacher, 0)}
    n_layers, n_windows = sides.shape[:2]
    columns = min(PER_ROW, n_layers) if teacher is None else n_layers
    per_set = -(-n_layers // columns)
    n_rows = per_set * len(rows)
    row, column = divmod(patch, grid[1])
    title = f"Predicted windows of the patch in row {row}, column {column}"
    figure = blank(columns * PANEL_INCHES + 0.3, n_rows * (PANEL_INCHES + 0.18) + 1.0, title)
    cells = figure.add_gridspec(n_rows, columns)
    for block, (name, windows) in enumerate(rows.items()):
        areas = window_areas(windows, grid, patch)
        for layer in range(n_layers):
            axes = figure.add_subplot(cells[block * per_set + layer // columns, layer % columns])
            draw_background(axes, grid, photo, view)
            for window in range(windows.shape[1]):
                _draw_frame(axes, windows[layer, window, patch], grid, (row, column), window)
            mark_patch(axes, row, column)
            axes.set_title(f"L{layer}" if teacher is None else f"{name} L{layer}", fontweight="bold", pad=3)
            axes.set_title(f"{percent(areas[layer])}", loc="right", fontsize=7, color=SOFT, pad=3)
    if n_windows > 1:
        _draw_head_key(figure, n_windows)
    explain(
        figure,
        "Square: the patch that asks. Frames: what it may see,",
        "one window a head." if n_windows > 1 else "one window for all heads.",
        "At the right of each panel: mean share of the image within.",
        OURS,
    )
    return figure


@styled
def summed_windows(
    study: xr.Dataset,
    patches: Sequence[int] | None = None,
    image: int | str = 0,
    photo: Image.Image | None = None,
) -> Figure:
    """For each chosen query the sum of its windows over layers and heads, as a share.

    Args:
        study: A study that holds `predicted_window`.
        patches: Indices of patches, row by row; None: four, spread over the grid.
        image: A position or an id.
        photo: The image as the model sees it, drawn in pale grey behind the panels.

    Returns:
        The figure.

    Raises:
        UsageError: The study holds no windows, or has no such image or patch.
    """
    grid, sides = window_grid(study), window_sides(study, image)
    view = view_in_patches(study.attrs, window_layer(study))
    queries = [_checked_patch(grid, patch) for patch in (spread_patches(grid) if patches is None else patches)]
    columns = min(PER_ROW, len(queries))
    rows = -(-len(queries) // columns)
    width = (columns + KEY_PANELS) * PANEL_INCHES + 0.3
    figure = blank(width, rows * (PANEL_INCHES + 0.18) + 0.9, "How often each patch lies in the window, all layers")
    cells = figure.add_gridspec(rows, columns + 1, width_ratios=[1] * columns + [KEY_PANELS])
    for index, patch in enumerate(queries):
        axes = figure.add_subplot(cells[divmod(index, columns)])
        draw_background(axes, grid, photo, view)
        summed = sum_of_windows(sides, grid, patch)
        axes.imshow(summed, extent=grid_extent(grid), cmap=COVER, vmin=0, vmax=1, interpolation="nearest")
        row, column = divmod(patch, grid[1])
        mark_patch(axes, row, column)
        axes.set_title(f"row {row}, column {column}", pad=3)
    key = figure.add_subplot(cells[:, -1])
    key.set_axis_off()
    colours = ScalarMappable(Normalize(0, 1), COVER)
    bar = figure.colorbar(colours, cax=key.inset_axes((0.05, 0.2, 0.12, 0.6)), ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["in no layer", "in half", "in every layer"])
    bar.outline.set_visible(False)
    explain(figure, "Square: the patch that asks. Darker: within its window in more layers and heads.", OURS)
    return figure


def area_by_layer(study: xr.Dataset) -> Figure:
    """Mean area of predicted windows against the layer.

    Args:
        study: A study that holds `predicted_area`.

    Returns:
        The figure.

    Raises:
        UsageError: The study holds no areas.
    """
    return lines_of_areas(area_of_layers(study))


def overlap_by_layer(study: xr.Dataset) -> Figure:
    """How well predicted windows agree with others, layer by layer: intersection over union.

    Args:
        study: A study that holds measures of overlap.

    Returns:
        The figure.

    Raises:
        UsageError: The study holds none of them.
    """
    return lines_of_overlaps(agreement_by_layer(study))


@styled
def lines_of_areas(areas: Mapping[str, Float[np.ndarray, "layer"]]) -> Figure:
    """Mean area of windows against the layer, a line for each of several models.

    Args:
        areas: Shares of the image by the name of the line; the first is drawn strongest.

    Returns:
        The figure.

    Raises:
        UsageError: There is no line, or lines differ in length.
    """
    how = "Mean share of the image that a patch may see; full attention would be at 1."
    return _draw_lines(areas, "Area of windows by layer", "share of the image", how)


@styled
def lines_of_overlaps(overlaps: Mapping[str, Float[np.ndarray, "layer"]]) -> Figure:
    """Agreement of windows with others against the layer, a line for each comparison.

    Args:
        overlaps: Intersection over union by the name of the line; the first is drawn strongest.

    Returns:
        The figure.

    Raises:
        UsageError: There is no line, or lines differ in length.
    """
    how = "1: the same windows; 0: apart. Compare with the line for windows moved to other patches at random."
    return _draw_lines(overlaps, "Agreement of predicted windows by layer", "intersection over union", how)


def _draw_lines(lines: Mapping[str, Float[np.ndarray, "layer"]], title: str, unit: str, how: str) -> Figure:
    if not lines or len({len(values) for values in lines.values()}) != 1:
        lengths = {name: len(values) for name, values in lines.items()}
        raise UsageError(f"{title}: give lines of one length; found {lengths}.")
    figure = blank(4.6, 3.0, title)
    axes = figure.add_subplot()
    for index, (name, values) in enumerate(lines.items()):
        colour, dashes = FRAMES[index % len(FRAMES)]
        width = 2.0 if index == 0 else 1.4
        axes.plot(values, color=colour, linestyle=dashes, marker="o", markersize=3.5, linewidth=width, label=name)
    n_layers = len(next(iter(lines.values())))
    axes.set(xlabel="layer (index)", ylabel=unit, ylim=(0, 1.02), xticks=range(n_layers))
    axes.grid(axis="y", color=LINE)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, handlelength=3.2)
    last = ", ".join(f"{name} {number(float(values[-1]))}" for name, values in lines.items())
    explain(figure, f"Last layer: {last}.", how, OURS)
    return figure


def _draw_frame(axes: Any, sides: Float[np.ndarray, "side"], grid: Grid, query: tuple[int, int], window: int) -> None:
    left, top, right, bottom = np.floor(sides + 0.5)
    row, column = query
    inset = INSET * (window - 1)
    first_column, first_row = max(0.0, column - left), max(0.0, row - top)
    last_column, last_row = min(grid[1] - 1.0, column + right), min(grid[0] - 1.0, row + bottom)
    colour, dashes = FRAMES[window % len(FRAMES)]
    corner = (first_column - 0.5 + inset, first_row - 0.5 + inset)
    size = last_column - first_column + 1 - 2 * inset, last_row - first_row + 1 - 2 * inset
    for edge, width, style in (("white", 2.6, "-"), (colour, 1.4, dashes)):
        axes.add_patch(
            Rectangle(corner, *size, fill=False, edgecolor=edge, linewidth=width, linestyle=style, clip_on=False)
        )


def _draw_head_key(figure: Figure, n_windows: int) -> None:
    styles = [FRAMES[window % len(FRAMES)] for window in range(n_windows)]
    handles = [Line2D([], [], color=colour, linestyle=dashes) for colour, dashes in styles]
    names = [f"H{window}" for window in range(n_windows)]
    figure.legend(handles, names, loc="upper right", ncols=n_windows, handlelength=2.6)


def _checked_patch(grid: Grid, patch: int | None) -> int:
    n_patches = grid[0] * grid[1]
    if patch is None:
        return (grid[0] // 2) * grid[1] + grid[1] // 2
    if not 0 <= patch < n_patches:
        raise UsageError(f"Patch {patch} was asked for; this grid has patches 0 to {n_patches - 1}.")
    return patch


FIGURES: FigureTable = (
    ("window_area", when(area_of_layers, area_by_layer)),
    ("window_agreement", when(agreement_by_layer, overlap_by_layer)),
)
