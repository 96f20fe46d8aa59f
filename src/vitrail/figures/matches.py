"""The figure of matches: a patch of a photograph, and the patches of other images that are most like it."""

from typing import Any

import numpy as np
import xarray as xr
from PIL import Image

from vitrail.figures.photo_grid import draw_background, grid_extent, mark_patch
from vitrail.figures.style import ATTENTION, Figure, blank, explain, style_colorbar, styled

__all__ = ["patch_matches"]

PER_ROW = 4
PANEL_INCHES = 2.0


@styled
def patch_matches(matches: xr.Dataset) -> Figure:
    """The photograph with its patch, then the images with the most similar patches, the best first.

    Args:
        matches: What `vitrail.tokens.matches.match_patches` gives.

    Returns:
        The figure.
    """
    rows, columns = grid = int(matches.attrs["grid"][0]), int(matches.attrs["grid"][1])
    below, across = matches.attrs["view_in_patches"]
    n_panels = 1 + matches.sizes["match"]
    n_rows = -(-n_panels // PER_ROW)
    row, column = matches.attrs["patch"]
    aspect = matches.sizes["row"] / matches.sizes["column"]
    title = f"Patches most like row {row}, column {column} after L{matches.attrs['layer']}: {matches.attrs['name']}"
    figure = blank(PER_ROW * PANEL_INCHES + 0.9, n_rows * (PANEL_INCHES * aspect + 0.35) + 0.8, title)
    axes = figure.subplots(n_rows, PER_ROW, squeeze=False)
    likeness = np.concatenate([matches["likeness"].to_numpy()[None], matches["match_likeness"].to_numpy()])
    views = [matches["view"].to_numpy(), *matches["match_view"].to_numpy()]
    low, high = matches.attrs["shown_from"], float(likeness[1:].max())
    overlay: Any = None
    names = ["", *matches["match"].values]
    places = [row * columns + column, *matches["match_place"].values]
    for panel, view, cosines, name, place in zip(axes.flat, views, likeness, names, places, strict=False):
        draw_background(panel, grid, Image.fromarray(view), (below, across))
        shown = np.ma.masked_less(cosines.reshape(rows, columns), low)
        overlay = panel.imshow(
            shown, cmap=ATTENTION, vmin=low, vmax=high, extent=grid_extent(grid), interpolation="nearest", aspect="auto"
        )
        mark_patch(panel, *divmod(int(place), columns))
        panel.set_title(f"{_short(str(name))}\n{cosines.max():.2f}" if name else "the chosen patch\n", fontsize=6.8)
    for panel in axes.flat[n_panels:]:
        panel.set_axis_off()
    style_colorbar(figure.colorbar(overlay, ax=axes, aspect=30, pad=0.015, shrink=0.7), "cosine similarity")
    explain(
        figure,
        f"Squares: the chosen patch, and the most similar one of each image, the best of {matches.sizes['image']}. "
        "Colour: the tenth of all patches drawn whose tokens are most alike.",
    )
    return figure


def _short(name: str, longest: int = 28) -> str:
    return name if len(name) <= longest else f"..{name[2 - longest :]}"
