"""Figures of a WinT: the windows that its patches predict, layer by layer, over the photograph and summed up.

All take plain arrays: sides [layer, window, patch, side] in patches left, top, right, bottom of the query, as
`vitrail.wint.evaluate.predicted_windows` gives them for one image. One window a layer is shared by the heads, or there
is one a head. Heads are told apart by the dashes of their frames as well as by colour.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image

from vitrail.errors import UsageError
from vitrail.figures.patches import COVER, PANEL_INCHES, PER_ROW, grid_extent, ground
from vitrail.figures.style import COOL, INK, LINE, MARK, SOFT, blank, explain, number, styled

__all__ = [
    "area_by_layer",
    "figures_of",
    "hard_masks",
    "overlap_by_layer",
    "spread_patches",
    "summed_masks",
    "windows_by_layer",
]

Sides = Float[np.ndarray, "layer window patch side"]
Grid = tuple[int, int]

FRAMES = (
    (COOL, "-"), (MARK, (0, (4, 1.5))), (INK, (0, (1.2, 1.2))), ("#6b4fa0", (0, (5, 1.5, 1.2, 1.5))),
    ("#3d7a52", (0, (7, 2))), ("#9a7b00", (0, (2.5, 2.5))),
)  # fmt: skip
"""Colour and dashes of the windows of each head; more heads begin again."""

AGREEMENT = {
    "queries and keys without the mask": "predicted_overlap_open", "its attention": "predicted_overlap",
    "moved at random": "predicted_overlap_moved",
}  # fmt: skip
"""What predicted windows are compared with, and the measure of a study that tells."""

OURS = "Our construction, after Ma et al. 2022."


@styled
def windows_by_layer(
    sides: Sides, grid: Grid, patch: int, photo: Image.Image | None = None, taught: Sides | None = None
) -> Any:
    """The predicted windows of one patch in every layer; `taught`: those of a teacher, in a second row."""
    _refuse(sides, grid, patch)
    rows = {"predicted": sides} if taught is None else {"student": sides, "teacher": taught}
    n_layers, n_windows = sides.shape[:2]
    columns = min(PER_ROW, n_layers) if taught is None else n_layers
    per_set = -(-n_layers // columns)
    n_rows = per_set * len(rows)
    row, column = divmod(patch, grid[1])
    title = f"Predicted windows of the patch in row {row}, column {column}"
    figure = blank(columns * PANEL_INCHES + 0.3, n_rows * (PANEL_INCHES + 0.18) + 1.0, title)
    places = figure.add_gridspec(n_rows, columns)
    for block, (name, shown) in enumerate(rows.items()):
        masks = hard_masks(shown[:, :, patch : patch + 1], grid, patch)
        for layer in range(n_layers):
            axes = figure.add_subplot(places[block * per_set + layer // columns, layer % columns])
            ground(axes, grid, photo)
            for window in range(n_windows):
                _frame(axes, shown[layer, window, patch], grid, (row, column), window)
            for colour, size in (("white", 6.0), (INK, 4.0)):
                axes.plot([column], [row], "s", color=colour, markersize=size, markeredgewidth=0)
            label = f"L{layer}" if taught is None else f"{name} L{layer}"
            axes.set_title(label, fontweight="bold", pad=3)
            area = float(masks[layer].mean(-1).mean())
            axes.set_title(f"{area:.0%}", loc="right", fontsize=7, color=SOFT, pad=3)
    if n_windows > 1:
        _heads_key(figure, n_windows)
    explain(
        figure,
        "Square: the patch that asks. Frames: what it may see,",
        "one window a head." if n_windows > 1 else "one window for all heads.",
        "At the right of each panel: mean share of the image within.", OURS,
    )  # fmt: skip
    return figure


@styled
def summed_masks(sides: Sides, grid: Grid, patches: Sequence[int], photo: Image.Image | None = None) -> Any:
    """For each chosen query the sum of its windows over layers (and heads), as a share: S_ij = sum_l M^l_ij."""
    for patch in patches:
        _refuse(sides, grid, patch)
    columns = min(PER_ROW, len(patches))
    rows = -(-len(patches) // columns)
    width = (columns + 0.75) * PANEL_INCHES + 0.3
    figure = blank(width, rows * (PANEL_INCHES + 0.18) + 0.9, "How often each patch lies in the window, all layers")
    places = figure.add_gridspec(rows, columns + 1, width_ratios=[1] * columns + [0.75])
    for index, patch in enumerate(patches):
        axes = figure.add_subplot(places[divmod(index, columns)])
        ground(axes, grid, photo)
        summed = hard_masks(sides[:, :, patch : patch + 1], grid, patch).mean((0, 1, 2)).reshape(grid)
        axes.imshow(summed, extent=grid_extent(grid), cmap=COVER, vmin=0, vmax=1, interpolation="nearest")
        row, column = divmod(patch, grid[1])
        for colour, size in (("white", 6.0), (INK, 4.0)):
            axes.plot([column], [row], "s", color=colour, markersize=size, markeredgewidth=0)
        axes.set_title(f"row {row}, column {column}", pad=3)
    key = figure.add_subplot(places[:, -1])
    key.set_axis_off()
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), COVER), cax=key.inset_axes((0.05, 0.2, 0.12, 0.6)),
                          ticks=[0, 0.5, 1])  # fmt: skip
    bar.ax.set_yticklabels(["in no layer", "in half", "in every layer"])
    bar.outline.set_visible(False)
    explain(figure, "Square: the patch that asks. Darker: within its window in more layers and heads.", OURS)
    return figure


@styled
def area_by_layer(areas: Mapping[str, Float[np.ndarray, "layer"]]) -> Any:
    """Mean area of windows against the layer, a line for each model; the first is drawn strongest."""
    return _by_layer(
        areas,
        "Area of windows by layer",
        "share of the image",
        "Mean share of the image that a patch may see; full attention would be at 1.",
    )


@styled
def overlap_by_layer(overlaps: Mapping[str, Float[np.ndarray, "layer"]]) -> Any:
    """How well predicted windows agree with others, layer by layer: intersection over union, a line each."""
    return _by_layer(
        overlaps, "Agreement of predicted windows by layer", "intersection over union",
        "1: the same windows; 0: apart. Compare with the line for windows moved to other patches at random.",
    )  # fmt: skip


def hard_masks(
    sides: Float[np.ndarray, "layer window query side"], grid: Grid, first: int = 0
) -> Bool[np.ndarray, "layer window query patch"]:
    """Which patches lie in each window, sides rounded half up; `first`: the patch that the first query is."""
    query = np.arange(first, first + sides.shape[2])
    row, column = query // grid[1], query % grid[1]
    rows, columns = np.arange(grid[0]), np.arange(grid[1])
    left, top, right, bottom = np.moveaxis(np.floor(sides + 0.5)[..., None], -2, 0)
    down, across = rows - row[:, None], columns - column[:, None]
    in_rows = (down >= -top) & (down <= bottom)
    in_columns = (across >= -left) & (across <= right)
    inside = in_rows[..., :, None] & in_columns[..., None, :]
    itself = (down == 0)[..., :, None] & (across == 0)[..., None, :]
    masks: Bool[np.ndarray, "layer window query patch"] = (inside | itself).reshape(*sides.shape[:3], -1)
    return masks


def figures_of(study: xr.Dataset) -> Iterator[tuple[str, Any]]:
    """Area and agreement of a WinT's windows over the images of a study, by their file names; none of other models."""
    for name, measures, draw in (
        ("window_area", {"this model": "predicted_area"}, area_by_layer),
        ("window_agreement", AGREEMENT, overlap_by_layer),
    ):
        lines = {
            words: study[measure].mean(("image", "head")).to_numpy()
            for words, measure in measures.items()
            if measure in study
        }
        if lines:
            yield name, draw(lines)


def spread_patches(grid: Grid) -> list[int]:
    """Four queries spread over the grid, for `summed_masks`."""
    rows, columns = ((size // 4, size - 1 - size // 4) for size in grid)
    return [row * grid[1] + column for row in rows for column in columns]


# --- panels ----------------------------------------------------------------------------------------------------------


def _by_layer(lines: Mapping[str, Float[np.ndarray, "layer"]], title: str, unit: str, how: str) -> Any:
    if not lines or len({len(values) for values in lines.values()}) != 1:
        raise UsageError(
            f"{title}: give lines of one length; found { ({name: len(each) for name, each in lines.items()}) }."
        )
    figure = blank(4.6, 3.0, title)
    axes = figure.add_subplot()
    ends = []
    for index, (name, values) in enumerate(lines.items()):
        colour, dashes = FRAMES[index % len(FRAMES)]
        width = 2.0 if index == 0 else 1.4
        axes.plot(values, color=colour, linestyle=dashes, marker="o", markersize=3.5, linewidth=width, label=name)
        ends.append(float(values[-1]))
    axes.set(xlabel="layer (index)", ylabel=unit, ylim=(0, 1.02), xticks=range(len(next(iter(lines.values())))))
    axes.grid(axis="y", color=LINE)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, handlelength=3.2)
    explain(figure, f"Last layer: {', '.join(f'{name} {number(end)}' for name, end in zip(lines, ends, strict=True))}.",
            how, OURS)  # fmt: skip
    return figure


def _frame(axes: Any, sides: Float[np.ndarray, "side"], grid: Grid, place: tuple[int, int], window: int) -> None:
    left, top, right, bottom = np.floor(sides + 0.5)
    row, column = place
    inset = 0.06 * window - 0.06
    first_column, first_row = max(0.0, column - left), max(0.0, row - top)
    last_column, last_row = min(grid[1] - 1.0, column + right), min(grid[0] - 1.0, row + bottom)
    colour, dashes = FRAMES[window % len(FRAMES)]
    corner = (first_column - 0.5 + inset, first_row - 0.5 + inset)
    size = last_column - first_column + 1 - 2 * inset, last_row - first_row + 1 - 2 * inset
    axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="white", linewidth=2.6, clip_on=False))
    axes.add_patch(
        Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=1.4, linestyle=dashes, clip_on=False)
    )


def _heads_key(figure: Any, n_windows: int) -> None:
    handles = [
        Line2D([], [], color=FRAMES[window % len(FRAMES)][0], linestyle=FRAMES[window % len(FRAMES)][1])
        for window in range(n_windows)
    ]
    names = [f"H{window}" for window in range(n_windows)]
    figure.legend(handles, names, loc="upper right", ncols=n_windows, handlelength=2.6)


def _refuse(sides: Sides, grid: Grid, patch: int) -> None:
    n_patches = grid[0] * grid[1]
    if sides.ndim != 4 or sides.shape[2:] != (n_patches, 4):
        raise UsageError(
            f"Sides of shape {list(sides.shape)} were given for a grid of {grid}; they must be "
            f"[layer, window, {n_patches}, 4]."
        )
    if not 0 <= patch < n_patches:
        raise UsageError(f"Patch {patch} was asked for; this grid has patches 0 to {n_patches - 1}.")
