"""Attention of one query over the photograph: where it looks, and who looks at it."""

from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from PIL import Image

from vitrail.figures.photo_grid import grid_extent, sides_of_both
from vitrail.figures.style import ATTENTION, INK, Figure, blank, explain, number, style_colorbar, styled
from vitrail.grid import Grid, Sides
from vitrail.heads.query_maps import QueryMaps

__all__ = ["attention_over_photo"]

PAPER = (0.45, 0.5)
"""Grey of the photograph's black, and the range up to white: light enough for colour to be read on top of it."""


@styled
def attention_over_photo(
    photo: Image.Image,
    maps: QueryMaps,
    grid: Grid,
    prefix: int,
    query: int,
    title: str,
    view: Sides | None = None,
) -> Figure:
    """Three pictures: the photograph with the query, where the query looks, and who looks at the query.

    Both maps share one scale, from 0 to their common 99 % quantile, stated at the bar.

    Args:
        photo: What the model sees.
        maps: One query's row and column of a head's map (`heads.query_maps.query_maps`).
        grid: Rows and columns of patches.
        prefix: Tokens before the patches.
        query: Index of a token.
        title: Title of the figure.
        view: How many patches long the sides of the photograph are (`grid.view_in_patches`); None: the grid's.

    Returns:
        The figure.
    """
    aspect = photo.height / photo.width
    figure = blank(8.4, min(9.0, 2.2 * aspect + 1.35), title)
    axes = figure.subplots(1, 3)
    _draw_photo(axes[0], np.asarray(photo.convert("RGB")), grid, view)
    axes[0].set_title(_query_name(query, prefix, grid))
    grey = _fade(photo)
    norm = Normalize(0.0, maps.scale)
    overlay: Any = None
    for panel, values, words in (
        (axes[1], maps.attends, f"Where it looks\n{100 * maps.patch_share:.0f} % goes to patches"),
        (axes[2], maps.received, f"Who looks at it\n{number(maps.mean_received)} from a patch, on average"),
    ):
        _draw_photo(panel, grey, grid, view)
        overlay = panel.imshow(
            values, cmap=ATTENTION, norm=norm, extent=grid_extent(grid), interpolation="nearest", aspect="auto"
        )
        panel.set_title(words)
    if query >= prefix:
        for panel in axes:
            _frame_patch(panel, query - prefix, grid)
    extend = "max" if maps.clipped else "neither"
    bar = figure.colorbar(overlay, ax=axes, aspect=20, pad=0.015, shrink=0.72, extend=extend)
    bar.ax.set_facecolor(str(PAPER[0] + PAPER[1] / 2))
    style_colorbar(bar, "attention weight\n(a query's sum is 1)")
    explain(figure, *_explanation(grid, prefix, query, maps))
    return figure


def _fade(photo: Image.Image) -> UInt8[np.ndarray, "row column channel"]:
    grey = PAPER[0] + PAPER[1] * np.asarray(photo.convert("L"), dtype=np.float64) / 255
    return np.repeat((grey * 255).round().astype(np.uint8)[..., None], 3, axis=2)


def _draw_photo(axes: Any, pixels: UInt8[np.ndarray, "row column channel"], grid: Grid, view: Sides | None) -> None:
    """Axes count in patches, so that cells and photograph lie on each other."""
    (rows, columns), (height, width) = grid, view or grid
    axes.imshow(pixels, extent=grid_extent((height, width)), interpolation="lanczos", aspect="auto")
    below, right = sides_of_both(grid, view)
    axes.set_box_aspect(below / height * pixels.shape[0] / (right / width * pixels.shape[1]))
    axes.set(xlim=(-0.5, right - 0.5), ylim=(below - 0.5, -0.5), xlabel="column (patches)", ylabel="row (patches)")
    axes.set_xticks([0, columns - 1] if columns > 1 else [0])
    axes.set_yticks([0, rows - 1] if rows > 1 else [0])
    axes.xaxis.labelpad = axes.yaxis.labelpad = -6
    axes.spines[:].set_visible(False)
    axes.label_outer()


def _frame_patch(axes: Any, patch: int, grid: tuple[int, int]) -> None:
    """A frame that stands out on light and on dark."""
    row, column = divmod(patch, grid[1])
    for colour, width in ((INK, 3.2), ("white", 1.6)):
        axes.add_patch(
            Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=colour, linewidth=width, joinstyle="miter")
        )


def _query_name(query: int, prefix: int, grid: tuple[int, int]) -> str:
    if query >= prefix:
        row, column = divmod(query - prefix, grid[1])
        return f"Query\npatch at row {row}, column {column}"
    return "Query\nclass token" if query == 0 else f"Query\nprefix token {query}"


def _explanation(grid: tuple[int, int], prefix: int, query: int, maps: QueryMaps) -> tuple[str, ...]:
    even = 1 / (grid[0] * grid[1] + prefix)
    return (
        "Darker: more attention. Framed: the query."
        if query >= prefix
        else "Darker: more attention; the query is no patch.",
        f"Both maps have one scale, 0 to {number(maps.scale)}"
        + (" (the 99 % quantile; above it the darkest colour)." if maps.clipped else "."),
        f"Even attention to all tokens would be {number(even)}.",
        "Source: this head's attention after the softmax, this image. It says where a head reads, not what for.",
    )
