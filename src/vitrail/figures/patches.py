"""Figures of patches: which way patches are pulled, what they see, and which patches everybody keeps.

Each has one panel a layer, at one scale, over the photograph in pale grey if there is one. Directions are never told by
hue alone: the flow carries ticks, so that it can be read in grey and by colour-blind people.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from PIL import Image

from vitrail.errors import UsageError
from vitrail.figures.photo_grid import (
    COVER,
    KEY_PANELS,
    PANEL_INCHES,
    PER_ROW,
    draw_background,
    draw_outline,
    grid_extent,
    mark_patch,
)
from vitrail.figures.style import COOL, INK, MARK, SOFT, Figure, FigureTable, blank, explain, number, styled, when
from vitrail.grid import Grid, positions, view_in_patches
from vitrail.layer_summary import in_first_patches
from vitrail.patches.layer_maps import (
    coverage_by_layer,
    layer_grids,
    mean_lengths,
    patch_maps,
    pull_lengths,
    scale_of_lengths,
)
from vitrail.selection import ImageChoice, describe_choice
from vitrail.sentence import percent

__all__ = [
    "BOTH",
    "FIGURES",
    "flow_colours",
    "hub_map",
    "tendency_arrows",
    "tendency_flow",
    "window_coverage",
    "window_object_map",
    "windows_of_patch",
]

MARGIN_INCHES = 0.9
"""Height for the title and the lines under the figure."""

ARROW_PATCHES = 2
"""Length at which the longest arrows are drawn, in patches: longer ones cross."""

MIN_TICK = 0.15
"""Share of the scale from which a pull has a tick: shorter ones have no clear direction."""

LATER_ROUNDS = (0, (1.5, 1.2))
"""Dashes around hubs that are no sinks."""

MIN_HUB_SHARE = 0.05
"""Lowest upper end of the scale of hubs: a hub in one image of hundreds would look like one in all."""

SUMMED_IMAGES = 64
"""Images whose windows are summed up for a study: the sum no longer changes visibly, and takes a second."""


@styled
def tendency_arrows(study: xr.Dataset, image: ImageChoice = None, photo: Image.Image | None = None) -> Figure:
    """An arrow from each patch to the centre of its interactions, all panels at one scale.

    Over all images arrows are means of tendencies: they are short where images disagree.

    Args:
        study: A study that holds `tendency`.
        image: A position or an id; None takes all images.
        photo: The image as the model sees it, drawn in pale grey behind the panels.

    Returns:
        The figure.

    Raises:
        UsageError: The study holds no tendencies, or has no such image.
    """
    pulls, unit, description = _pulls(study, image)
    lengths = pull_lengths(pulls)
    longest, means = scale_of_lengths(lengths), mean_lengths(lengths)

    def draw(axes: Any, layer: int, grid: Grid) -> None:
        y, x = (axis.reshape(grid) for axis in positions(grid))
        pull = pulls[layer, : grid[0] * grid[1]].reshape(*grid, 2) / longest * ARROW_PATCHES
        axes.quiver(
            x,
            y,
            pull[..., 0],
            pull[..., 1],
            angles="xy",
            scale_units="xy",
            scale=1,
            color=COOL,
            width=0.011,
            headwidth=3.6,
            headlength=4.0,
            headaxislength=3.6,
            minlength=0.3,
            edgecolor="white",
            linewidth=0.25,
        )

    figure = _layers(
        study, f"Which way patches are pulled: {description}", photo, draw, lambda layer: _one_decimal(means[layer])
    )
    explain(
        figure,
        "An arrow leads from a patch towards the centre of the interactions in its window.",
        f"All panels at one scale: the 95 % longest arrow, {number(longest)} {unit}, is drawn "
        f"{ARROW_PATCHES} patches of its panel long.",
        f"Beside the layer: mean length in {unit}. Patches at the border can only point inward.",
        "Our construction, after Ma et al. 2022.",
    )
    return figure


@styled
def tendency_flow(study: xr.Dataset, image: ImageChoice = None, photo: Image.Image | None = None) -> Figure:
    """Tendencies as optical flow is drawn: hue is the direction, strength of colour the length; a wheel beside it.

    Args:
        study: A study that holds `tendency`.
        image: A position or an id; None takes all images.
        photo: The image as the model sees it, drawn in pale grey behind the panels.

    Returns:
        The figure.

    Raises:
        UsageError: The study holds no tendencies, or has no such image.
    """
    pulls, unit, description = _pulls(study, image)
    lengths = pull_lengths(pulls)
    radius, means = scale_of_lengths(lengths), mean_lengths(lengths)

    def draw(axes: Any, layer: int, grid: Grid) -> None:
        pull = pulls[layer, : grid[0] * grid[1]].reshape(*grid, 2)
        colours = flow_colours(pull, radius)
        over = np.dstack([colours, np.full(grid, 0.8 if photo is not None else 1.0)])
        axes.imshow(over, extent=grid_extent(grid), interpolation="nearest")
        _ticks(axes, pull, radius)

    figure = _layers(
        study, f"Tendencies as flow: {description}", photo, draw, lambda layer: _one_decimal(means[layer]), extra=_wheel
    )
    explain(
        figure,
        "Hue and tick: the direction in which a patch is pulled (see the wheel). Strength of colour: how far, full at",
        f"{number(radius)} {unit}, the 95 % longest of the figure. Beside the layer: mean length in {unit}.",
        "Our construction, after Ma et al. 2022.",
    )
    return figure


def _pulls(study: xr.Dataset, image: ImageChoice) -> tuple[Float[np.ndarray, "layer patch xy"], str, str]:
    """Tendencies of one image or their mean, in the unit that all layers share; the unit; whose they are."""
    values, description = patch_maps(study, "tendency", image)
    tendency = study["tendency"]
    pulls = in_first_patches(
        xr.DataArray(values, dims=tendency.dims[1:], attrs=tendency.attrs), study.attrs.get("grids")
    )
    return pulls.to_numpy(), str(pulls.attrs.get("unit", "patches")).partition(",")[0], description


@styled
def windows_of_patch(study: xr.Dataset, patch: int, image: int | str = 0, photo: Image.Image | None = None) -> Figure:
    """The window of one patch through the layers: the box that holds most of its interactions.

    Args:
        study: A study that holds `window`.
        patch: Index of the patch, row by row.
        image: A position or an id.
        photo: The image as the model sees it, drawn in pale grey behind the panels.

    Returns:
        The figure.

    Raises:
        UsageError: The study holds no windows, or has no such image or patch.
    """
    sides, description = patch_maps(study, "window", image)
    _refuse_patch(study, patch)

    def draw(axes: Any, layer: int, grid: Grid) -> None:
        if patch >= grid[0] * grid[1]:
            return
        row, column = divmod(patch, grid[1])
        left, top, right, bottom = sides[layer, patch]
        corner = (column - left - 0.5, row - top - 0.5)
        for colour, width in (("white", 3.0), (MARK, 1.6)) if np.isfinite(left) else ():
            axes.add_patch(
                Rectangle(
                    corner,
                    left + right + 1,
                    top + bottom + 1,
                    fill=False,
                    edgecolor=colour,
                    linewidth=width,
                    clip_on=False,
                )
            )
        mark_patch(axes, row, column)

    def area(layer: int) -> str:
        left, top, right, bottom = sides[layer, patch]
        return "" if np.isnan(left) else f"{right + left + 1:.0f} x {bottom + top + 1:.0f}"

    figure = _layers(study, f"Windows of patch {patch}: {description}", photo, draw, area)
    explain(
        figure,
        "Square: the patch that asks. Frame: its window, the box of its area that holds most of its interactions;",
        "it need not hold the patch. Beside the layer: columns x rows. Our construction, after Ma et al. 2022.",
    )
    return figure


@styled
def window_coverage(study: xr.Dataset, image: ImageChoice = 0, photo: Image.Image | None = None) -> Figure:
    """The sum of all windows: how many patches have each patch in their window, as a share.

    Args:
        study: A study that holds `window`.
        image: A position or an id; None takes all images.
        photo: The image as the model sees it, drawn in pale grey behind the panels.

    Returns:
        The figure.

    Raises:
        UsageError: The study holds no windows, or has no such image.
    """
    covered = coverage_by_layer(study, image)

    def draw(axes: Any, layer: int, grid: Grid) -> None:
        axes.imshow(covered[layer], extent=grid_extent(grid), cmap=COVER, vmin=0, vmax=1, interpolation="nearest")

    def most(layer: int) -> str:
        return f"most {percent(covered[layer].max())}"

    figure = _layers(study, f"Where windows lie: {describe_choice(study, image)}", photo, draw, most, extra=_cover_bar)
    explain(
        figure,
        "Darker: more patches have this patch in their window. Even shade: windows go around their own patch;",
        "one dark place: all look there. Our construction, after Ma et al. 2022.",
    )
    return figure


@styled
def window_object_map(study: xr.Dataset, image: ImageChoice = 0, photo: Image.Image | None = None) -> Figure:
    """How much of each patch's window objects cover, and how much of the patch itself.

    Args:
        study: A study that holds `window_object_share`; of one image the objects are outlined by its `object_share`.
        image: A position or an id; None takes the mean over images.
        photo: The image as the model sees it, drawn in pale grey behind the panels.

    Returns:
        The figure.

    Raises:
        UsageError: The study does not hold the measure, or has no such image.
    """
    shares, description = patch_maps(study, "window_object_share", image)
    means, first = mean_lengths(shares), study.attrs["grids"][0]
    covered = patch_maps(study, "object_share", image)[0] if image is not None and "object_share" in study else None

    def draw(axes: Any, layer: int, grid: Grid) -> None:
        share = shares[layer, : grid[0] * grid[1]].reshape(grid)
        axes.imshow(share, extent=grid_extent(grid), cmap=COVER, vmin=0, vmax=1, interpolation="nearest")
        if covered is not None and tuple(first) == grid:
            view = view_in_patches(study.attrs, layer)
            draw_outline(axes, covered[: grid[0] * grid[1]].reshape(grid), view, view)

    figure = _layers(
        study,
        f"Windows that lie on objects: {description}",
        photo,
        draw,
        lambda layer: "" if np.isnan(means[layer]) else f"{percent(means[layer])}",
        extra=_object_bar,
    )
    explain(
        figure,
        "Darker: more of the patch's window lies on objects." + (" Line: the objects." if covered is not None else ""),
        "Beside the layer: mean over patches; evenly laid windows would have the share of the view that objects cover.",
        "Our construction, after Ma et al. 2022.",
    )
    return figure


@styled
def hub_map(study: xr.Dataset, image: ImageChoice = 0, photo: Image.Image | None = None) -> Figure:
    """Indiscriminative patches of one image (over all images: how often each patch is one), layer by layer.

    Of one image, sinks have a full frame and hubs of later rounds a dashed one, if the study holds `sink`.

    Args:
        study: A study that holds `hub`.
        image: A position or an id; None takes all images.
        photo: The image as the model sees it, drawn in pale grey behind the panels.

    Returns:
        The figure.

    Raises:
        UsageError: The study holds no hubs, or has no such image.
    """
    hubs, description = patch_maps(study, "hub", image)
    one_image, rounds = image is not None, "sink" in study
    sinks = patch_maps(study, "sink", image)[0] if rounds else hubs
    top = max(MIN_HUB_SHARE, float(np.nanmax(hubs)))

    def draw(axes: Any, layer: int, grid: Grid) -> None:
        share = hubs[layer, : grid[0] * grid[1]].reshape(grid)
        if not one_image:
            axes.imshow(share, extent=grid_extent(grid), cmap=COVER, vmin=0, vmax=top, interpolation="nearest")
            return
        for row, column in np.argwhere(share > 0):
            line = "-" if sinks[layer, row * grid[1] + column] > 0 else LATER_ROUNDS
            for colour, width, style in (("white", 2.4, "-"), (MARK, 1.3, line)):
                corner = (column - 0.5, row - 0.5)
                axes.add_patch(
                    Rectangle(
                        corner, 1, 1, fill=False, edgecolor=colour, linewidth=width, linestyle=style, clip_on=False
                    )
                )

    figure = _layers(
        study,
        f"Hubs, patches that most others keep: {description}",
        photo,
        draw,
        lambda layer: f"{np.nansum(hubs[layer]):.3g}",
        extra=None if one_image else lambda axes: _share_bar(axes, "no image", f"{percent(top)} of images"),
    )
    explain(
        figure,
        (
            "Full frame: a sink, kept by more than half of all patches; dashed: so kept once the sinks are taken away."
            if rounds
            else "Framed: kept by more than half of all patches, perhaps only once stronger hubs are taken away."
        )
        if one_image
        else "Darker: a hub in more images.",
        "Beside the layer: how many. They may carry information: removing them is no clean-up.",
        "Our construction, after Ma et al. 2022.",
    )
    return figure


def flow_colours(pull: Float[np.ndarray, "row column xy"], radius: float) -> Float[np.ndarray, "row column rgb"]:
    """Colours of equal lightness steps: hue (OKLCH) from the direction, paper white at no length.

    Args:
        pull: Vectors, x to the right, y down.
        radius: Length from which a colour is at its full strength, in the unit of `pull`.

    Returns:
        sRGB colours, 0 to 1.
    """
    strength = np.clip(np.nan_to_num(np.hypot(pull[..., 0], pull[..., 1])) / radius, 0, 1)
    hue = np.arctan2(np.nan_to_num(pull[..., 1]), np.nan_to_num(pull[..., 0]))
    light, chroma = 0.985 - 0.30 * strength, 0.145 * strength
    return _from_oklab(np.stack([light, chroma * np.cos(hue), chroma * np.sin(hue)], -1))


def _layers(
    study: xr.Dataset,
    title: str,
    photo: Image.Image | None,
    draw: Callable[[Any, int, Grid], None],
    note: Callable[[int], str],
    extra: Callable[[Any], None] | None = None,
) -> Figure:
    """A panel for every layer that has a grid; `extra` draws the key at their right."""
    grids = layer_grids(study)
    columns = min(PER_ROW, len(grids))
    rows = -(-len(grids) // columns)
    width = (columns + KEY_PANELS * (extra is not None)) * PANEL_INCHES + 0.3
    figure = blank(width, rows * (PANEL_INCHES + 0.18) + MARGIN_INCHES, title)
    cells = figure.add_gridspec(rows, columns + 1, width_ratios=[1] * columns + [KEY_PANELS if extra else 1e-3])
    for index, (layer, grid) in enumerate(grids.items()):
        axes = figure.add_subplot(cells[divmod(index, columns)])
        draw_background(axes, grid, photo, view_in_patches(study.attrs, layer))
        draw(axes, layer, grid)
        axes.set_title(f"L{layer}", fontweight="bold", pad=3)
        axes.set_title(note(layer), loc="right", fontsize=7, color=SOFT, pad=3)
    if extra is not None:
        extra(figure.add_subplot(cells[:, -1]))
    return figure


def _ticks(axes: Any, pull: Float[np.ndarray, "row column xy"], radius: float) -> None:
    """A short line in the direction of each patch that is pulled at all far."""
    y, x = (axis.reshape(pull.shape[:2]) for axis in positions(pull.shape[:2]))
    length = np.hypot(pull[..., 0], pull[..., 1])
    far: Bool[np.ndarray, "row column"] = length > MIN_TICK * radius
    unit = pull[far] / length[far][:, None] * 0.42
    axes.quiver(
        x[far],
        y[far],
        unit[:, 0],
        unit[:, 1],
        angles="xy",
        scale_units="xy",
        scale=1,
        color=INK,
        alpha=0.75,
        width=0.008,
        headwidth=2.6,
        headlength=2.4,
        headaxislength=2.2,
        pivot="mid",
    )


def _wheel(axes: Any) -> None:
    """The key of the flow: every direction and length, with ticks."""
    side = np.linspace(-1, 1, 121)
    x, y = np.meshgrid(side, side)
    inside = np.hypot(x, y) <= 1
    colours = np.dstack([flow_colours(np.dstack([x, y]), 1.0), inside.astype(float)])
    axes.imshow(colours, extent=(-1, 1, 1, -1), interpolation="bilinear")
    for angle in np.arange(0, 2 * np.pi, np.pi / 4):
        axes.annotate(
            "",
            (0.92 * np.cos(angle), 0.92 * np.sin(angle)),
            (0.6 * np.cos(angle), 0.6 * np.sin(angle)),
            arrowprops={"arrowstyle": "->", "color": INK, "linewidth": 0.8},
        )
    axes.set(xlim=(-1.15, 1.15), ylim=(1.15, -1.15), xticks=[], yticks=[])
    axes.set_aspect("equal")
    axes.spines[:].set_visible(False)
    axes.set_title("pulled that way", fontsize=7, color=SOFT, pad=3)


def _cover_bar(axes: Any) -> None:
    _share_bar(axes, "no patch", "half of them", "all patches")


def _object_bar(axes: Any) -> None:
    _share_bar(axes, "background", "half of it", "all on objects")


def _share_bar(axes: Any, *words: str) -> None:
    """The colours from the first word to the last, evenly spaced."""
    axes.set_axis_off()
    bar = axes.figure.colorbar(
        ScalarMappable(Normalize(0, 1), COVER),
        cax=axes.inset_axes((0.05, 0.2, 0.12, 0.6)),
        ticks=np.linspace(0, 1, len(words)),
    )
    bar.ax.set_yticklabels(words)
    bar.outline.set_visible(False)


def _refuse_patch(study: xr.Dataset, patch: int) -> None:
    n_patches = max(grid[0] * grid[1] for grid in layer_grids(study).values())
    if not 0 <= patch < n_patches:
        raise UsageError(f"Patch {patch} was asked for; this model has patches 0 to {n_patches - 1}.")


def _one_decimal(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.1f}"


def _from_oklab(lab: Float[np.ndarray, "row column lab"]) -> Float[np.ndarray, "row column rgb"]:
    """sRGB of OKLab colours (Ottosson 2020), clipped to what a screen shows."""
    to_lms = np.array(
        [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip((lab @ to_lms.T) ** 3 @ to_rgb.T, 0, 1)
    rgb: Float[np.ndarray, "row column rgb"] = np.where(
        linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055
    )
    return rgb


def _draw_summed_windows(study: xr.Dataset) -> Figure:
    return window_coverage(study.isel(image=slice(SUMMED_IMAGES)), None)


def _draw_hubs(study: xr.Dataset) -> Figure:
    return hub_map(study, None)


def _draw_window_objects(study: xr.Dataset) -> Figure | None:
    """Of one image over its photograph, in the layers that have the grid of the first; of a study the mean.

    None where no such layer has windows: in a pyramid whose first stages attend to pooled tokens.
    """
    if "view" not in study:
        return window_object_map(study, None)
    grids = study.attrs["grids"]
    first = study.assign_attrs(grids=[grid if grid == grids[0] else None for grid in grids])
    if not layer_grids(first):
        return None
    return window_object_map(first, 0, Image.fromarray(study["view"].to_numpy()))


BOTH: FigureTable = (("window_object_map", when(lambda study: "window_object_share" in study, _draw_window_objects)),)
"""Drawn of a study and of one image."""

FIGURES: FigureTable = (
    ("window_coverage", when(lambda study: "window" in study, _draw_summed_windows)),
    ("tendency_flow", when(lambda study: "tendency" in study, tendency_flow)),
    ("hub_map", when(lambda study: "hub" in study and bool(study["hub"].any()), _draw_hubs)),
)
