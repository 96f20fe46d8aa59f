"""Quantities over the layers of a model: the mean over images with its interval, and the spread of images."""

from collections.abc import Sequence
from typing import Any

from vitrail.figures.style import BAND, COOL, WHISKER, Figure, axis_title, blank, explain, spaced_indices, styled
from vitrail.layer_summary import LayerQuantity

__all__ = ["quantities_over_layers"]

PER_ROW = 3


@styled
def quantities_over_layers(quantities: Sequence[LayerQuantity], title: str, *sentences: str) -> Figure:
    """A panel for each quantity: the mean over images with its 95 % interval, and where 90 % of the images lie.

    Args:
        quantities: What to draw, each with a value per image and layer.
        title: Title of the figure.
        sentences: How to read it.

    Returns:
        The figure.
    """
    columns = min(PER_ROW, len(quantities))
    rows = -(-len(quantities) // columns)
    figure = blank(max(4.2, 3.1 * columns), 2.3 * rows + 0.7, title)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, quantity in zip(grid, quantities, strict=False):
        _draw_quantity(axes, quantity)
    for axes in grid[len(quantities) :]:
        axes.set_axis_off()
    spread = "Line: mean over images; band: its 95 % interval, where images are enough; bars: 5 to 95 % of the images."
    explain(figure, *sentences, spread if len(quantities[0].values) > 1 else "")
    return figure


def _draw_quantity(axes: Any, quantity: LayerQuantity) -> None:
    statistics = quantity.statistics
    n_images, n_layers = quantity.values.shape
    if n_images > 1:
        axes.vlines(statistics.layers, statistics.bottom, statistics.top, color=WHISKER, linewidth=1.0)
        axes.fill_between(statistics.layers, statistics.low, statistics.high, color=BAND, linewidth=0)
    axes.plot(statistics.layers, statistics.mean, color=COOL, marker="o", markersize=3)
    axes.set(xlabel="layer (index)", ylabel=axis_title("", quantity.unit).strip(" ()"), xlim=(-0.5, n_layers - 0.5))
    axes.set_title(quantity.title, fontsize=7.6)
    axes.set_xticks(spaced_indices(n_layers, 12))
    axes.grid(axis="y")
