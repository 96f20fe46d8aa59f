"""Figures of windows of heads: which heads need much of the image, and what is lost without the rest."""

import numpy as np
import xarray as xr

from vitrail.figures import panels
from vitrail.figures.style import (
    COOL,
    LINE,
    Figure,
    FigureTable,
    axis_title,
    blank,
    explain,
    style_colorbar,
    styled,
    when,
)
from vitrail.heads.head_values import head_values

__all__ = ["FIGURES", "head_window_areas"]

EFFECTS = ("head_window_divergence", "head_window_output_shift")


@styled
def head_window_areas(study: xr.Dataset) -> Figure:
    """The area of each head's windows, and the change of the output under them beside that under equal windows.

    Args:
        study: A study of windows of heads, or one image of it.

    Returns:
        The figure.
    """
    values = head_values(study, "head_window_area")
    effect = next((name for name in EFFECTS if name in study and f"{name}_equal" in study), None)
    n_layers, n_heads = values.values.shape
    width, height = max(3.0, 0.3 * n_heads + 1.8), max(2.4, min(6.0, 0.19 * n_layers + 0.9))
    figure = blank(width + (3.2 if effect else 0), height + 0.9, "How few patches each head needs")
    axes = figure.subplots(1, 2 if effect else 1, squeeze=False)[0]
    cells = panels.heat_map(axes[0], values)
    style_colorbar(figure.colorbar(cells, ax=axes[0], aspect=25, pad=0.02), "share of the grid")
    axes[0].set_title("area of the windows", fontsize=7.6)
    if effect:
        shared, equal = (study[name].to_numpy() for name in (effect, f"{effect}_equal"))
        highest = float(np.fmax.reduce(np.concatenate([shared, equal, [1e-6]])))
        axes[1].plot([0, highest], [0, highest], color=LINE, linewidth=1.0, zorder=0)
        axes[1].plot(equal, shared, "o", color=COOL, markersize=3, alpha=0.6)
        axes[1].set(
            xlabel=f"all windows of one area ({study[effect].attrs['unit']})",
            ylabel=axis_title("windows that share one budget", str(study[effect].attrs["unit"])),
        )
        axes[1].set_title("change of the output, image by image", fontsize=7.6)
        axes[1].grid()
    explain(
        figure,
        "Each patch of each head sees one box, itself and the prefix tokens; the mean area over all is the budget.",
        "Below the line: sharing the budget between heads changes the output less." if effect else "",
        "Our construction, after Ma et al. 2022.",
    )
    return figure


FIGURES: FigureTable = (("head_window_areas", when(lambda study: "head_window_area" in study, head_window_areas)),)
"""Names of files, and functions of a study that return a figure."""
