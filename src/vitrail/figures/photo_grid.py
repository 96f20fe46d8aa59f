"""A grid of patches, over the photograph in pale grey if there is one: what figures of patches and windows draw on."""

from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.colors import LinearSegmentedColormap
from PIL import Image

from vitrail.figures.style import ATTENTION, COOL, INK
from vitrail.grid import Grid, Sides

__all__ = [
    "COVER",
    "KEY_PANELS",
    "PANEL_INCHES",
    "PER_ROW",
    "draw_background",
    "draw_outline",
    "grid_extent",
    "mark_patch",
    "sides_of_both",
]

PER_ROW = 6
PANEL_INCHES = 1.55
KEY_PANELS = 0.75
"""Width of a key, in panels."""

OBJECT_SHARE = 0.5
"""Share of a cell that objects cover from which it lies inside the line around them."""

PALE = (0.62, 0.36)
"""Lowest grey of a pale photograph, and its range."""

COVER = LinearSegmentedColormap.from_list("vitrail_cover", ATTENTION(np.linspace(0, 1, 256)))
"""Colours of shares over a photograph: clear at 0."""


def draw_background(axes: Any, grid: Grid, photo: Image.Image | None, view: Sides | None = None) -> None:
    """Prepares axes whose unit is a patch, with the photograph in pale grey.

    Args:
        axes: Where to draw.
        grid: Rows and columns of patches.
        photo: The image as the model sees it, of any size; None: plain paper.
        view: How many patches long the sides of what the model sees are (`grid.view_in_patches`); None: the grid's.
    """
    if photo is None:
        axes.set_facecolor("#f7f6f2")
    else:
        axes.imshow(_fade(photo), extent=grid_extent(view or grid), interpolation="lanczos", aspect="auto")
    rows, columns = grid if photo is None else sides_of_both(grid, view)
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), xticks=[], yticks=[])
    axes.set_aspect("equal")
    axes.spines[:].set_visible(False)


def grid_extent(sides: Sides) -> tuple[float, float, float, float]:
    """The extent of a picture that begins where the grid does.

    Args:
        sides: Rows and columns of patches that it is long.

    Returns:
        Left, right, bottom, top in patches.
    """
    return (-0.5, sides[1] - 0.5, sides[0] - 0.5, -0.5)


def sides_of_both(grid: Grid, view: Sides | None) -> Sides:
    """The sides of axes that show a photograph and all patches on it.

    Args:
        grid: Rows and columns of patches.
        view: How many patches long the sides of what the model sees are; None: the grid's.

    Returns:
        Rows and columns, in patches.
    """
    rows, columns = view or grid
    return max(grid[0], rows), max(grid[1], columns)


def draw_outline(axes: Any, objects: Float[np.ndarray, "row column"], own: Sides, view: Sides) -> None:
    """Draws a line around objects, closed at the borders of the grid that they are known on.

    Args:
        axes: Where to draw, in patches.
        objects: Share of each cell of a grid that objects cover; it may be another grid than that of the axes.
        own: How many of these cells long the sides of what the model sees are (`grid.view_in_patches`).
        view: How many patches of the axes long they are.
    """
    y, x = (
        np.clip(np.arange(-1, cells + 1) + 0.5, 0, cells) * patches / side - 0.5
        for cells, side, patches in zip(objects.shape, own, view, strict=True)
    )
    axes.contour(x, y, np.pad(objects, 1), levels=[OBJECT_SHARE], colors=[COOL], linewidths=1.2)


def mark_patch(axes: Any, row: int, column: int) -> None:
    """Marks the patch that asks with a square that stands out on light and on dark.

    Args:
        axes: Where to draw.
        row: Row of the patch.
        column: Column of the patch.
    """
    for colour, size in (("white", 6.0), (INK, 4.0)):
        axes.plot([column], [row], "s", color=colour, markersize=size, markeredgewidth=0)


def _fade(photo: Image.Image) -> UInt8[np.ndarray, "row column channel"]:
    grey = PALE[0] + PALE[1] * np.asarray(photo.convert("L"), dtype=np.float64) / 255
    return np.repeat((grey * 255).round().astype(np.uint8)[..., None], 3, axis=2)
