"""Attention of one query over the photograph: where it looks, and who looks at it."""

from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from PIL import Image

from vitrail.errors import UsageError
from vitrail.figures.style import ATTENTION, INK, blank, explain, number, styled

__all__ = ["attention_over_photo", "most_attended_patch"]

CLIP = 0.99
"""The scale ends at this quantile of what is drawn, because one sink patch would leave everything else blank."""

PAPER = (0.45, 0.5)
"""Grey of the photograph's black, and the range up to white: light enough for colour to be read on top of it."""


@styled
def attention_over_photo(
    photo: Image.Image, weights: Float[np.ndarray, "query key"], grid: tuple[int, int], prefix: int, query: int,
    title: str,
) -> Any:  # fmt: skip
    """Three pictures: the photograph with the query, where the query looks, and who looks at the query.

    `photo` is what the model sees; `weights` one head's attention over all tokens, the `prefix` tokens first, then the
    patches of `grid` (rows, columns); `query` a token's index. Both maps share one scale, from 0 to the 99 % quantile
    of the two, stated at the bar. Raises `UsageError` for a query or a map that does not fit the grid.
    """
    _check(weights, grid, prefix, query)
    looks, looked_at = weights[query, prefix:].reshape(grid), weights[prefix:, query].reshape(grid)
    both = np.concatenate([looks.ravel(), looked_at.ravel()])
    top = float(np.quantile(both, CLIP)) or float(both.max()) or 1.0
    shape = photo.height / photo.width
    figure = blank(8.4, min(9.0, 2.2 * shape + 1.35), title)
    axes = figure.subplots(1, 3)
    _photograph(axes[0], np.asarray(photo.convert("RGB")), grid)
    axes[0].set_title(_query_name(query, prefix, grid))
    grey = _pale(photo)
    norm = Normalize(0.0, top)
    shown = None
    for panel, values, words in (
        (axes[1], looks, f"Where it looks\n{100 * looks.sum():.0f} % goes to patches"),
        (axes[2], looked_at, f"Who looks at it\n{number(float(looked_at.mean()))} from a patch, on average"),
    ):
        _photograph(panel, grey, grid)
        shown = panel.imshow(
            values, cmap=ATTENTION, norm=norm, extent=_extent(grid), interpolation="nearest", aspect="auto"
        )
        panel.set_title(words)
    if query >= prefix:
        for panel in axes:
            _mark(panel, query - prefix, grid)
    bar = figure.colorbar(
        shown, ax=axes, aspect=20, pad=0.015, shrink=0.72, extend="max" if both.max() > top else "neither"
    )
    bar.outline.set_visible(False)
    bar.ax.set_facecolor(str(PAPER[0] + PAPER[1] / 2))
    bar.set_label("attention weight\n(a query's sum is 1)", fontsize=7)
    explain(figure, *_reading(grid, prefix, query, top, bool(both.max() > top)))
    return figure


def most_attended_patch(weights: Float[np.ndarray, "query key"], grid: tuple[int, int], prefix: int) -> int:
    """Token index of the patch that the other tokens look at most, on average; its look at itself does not count."""
    n_patches = grid[0] * grid[1]
    received = weights[:, prefix : prefix + n_patches].sum(0) - np.diagonal(weights)[prefix : prefix + n_patches]
    return prefix + int(received.argmax())


def _check(weights: Float[np.ndarray, "query key"], grid: tuple[int, int], prefix: int, query: int) -> None:
    n_tokens = prefix + grid[0] * grid[1]
    if weights.shape != (n_tokens, n_tokens):
        raise UsageError(
            f"Attention over a photograph needs a map of {n_tokens} x {n_tokens} tokens ({prefix} before the patches, "
            f"grid {grid[0]} x {grid[1]}); found {weights.shape}. Pass one head's map, and its layer's grid and prefix."
        )
    if not 0 <= query < n_tokens:
        raise UsageError(
            f"Token {query} was asked for; this map has tokens 0 to {n_tokens - 1}, patches from {prefix} on."
        )


def _extent(grid: tuple[int, int]) -> tuple[float, float, float, float]:
    """Axes count in patches, so that cells and photograph lie on each other."""
    return (-0.5, grid[1] - 0.5, grid[0] - 0.5, -0.5)


def _pale(photo: Image.Image) -> UInt8[np.ndarray, "row column channel"]:
    grey = PAPER[0] + PAPER[1] * np.asarray(photo.convert("L"), dtype=np.float64) / 255
    return np.repeat((grey * 255).round().astype(np.uint8)[..., None], 3, axis=2)


def _photograph(axes: Any, pixels: UInt8[np.ndarray, "row column channel"], grid: tuple[int, int]) -> None:
    rows, columns = grid
    axes.imshow(pixels, extent=_extent(grid), interpolation="lanczos", aspect="auto")
    axes.set_box_aspect(pixels.shape[0] / pixels.shape[1])
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), xlabel="column (patches)", ylabel="row (patches)")
    axes.set_xticks([0, columns - 1] if columns > 1 else [0])
    axes.set_yticks([0, rows - 1] if rows > 1 else [0])
    axes.xaxis.labelpad = axes.yaxis.labelpad = -6
    axes.spines[:].set_visible(False)
    axes.label_outer()


def _mark(axes: Any, patch: int, grid: tuple[int, int]) -> None:
    """A frame that is seen on light and on dark."""
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


def _reading(grid: tuple[int, int], prefix: int, query: int, top: float, clipped: bool) -> tuple[str, ...]:
    even = 1 / (grid[0] * grid[1] + prefix)
    return (
        "Darker: more attention. Framed: the query."
        if query >= prefix
        else "Darker: more attention; the query is no patch.",
        f"Both maps have one scale, 0 to {number(top)}"
        + (" (the 99 % quantile; above it the darkest colour)." if clipped else "."),
        f"Even attention to all tokens would be {number(even)}.",
        "Source: this head's attention after the softmax, this image. It says where a head reads, not what for.",
    )
