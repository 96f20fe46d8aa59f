"""Figures of the patches room: which way patches are pulled, what they see, and which patches everybody keeps.

Each has one panel a layer, at one scale, over the photograph in pale grey if there is one. Directions are never told by
hue alone: the flow carries ticks, so that it can be read in grey and by colour-blind people.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, UInt8
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.patches import Rectangle
from PIL import Image

from vitrail.errors import UsageError
from vitrail.figures.style import ATTENTION, COOL, INK, MARK, SOFT, blank, explain, number, styled
from vitrail.figures.values import image_position

__all__ = ["flow_colours", "hub_map", "tendency_arrows", "tendency_flow", "window_coverage", "windows_of_patch"]

PER_ROW = 6
PANEL_INCHES = 1.55
HEAD_INCHES = 0.9
KEY_PANELS = 0.75
"""Width of a key, in panels."""
PALE = (0.62, 0.36)
"""Lowest grey of a pale photograph, and its range."""

COVER = LinearSegmentedColormap.from_list("vitrail_cover", ATTENTION(np.linspace(0, 1, 256)))

Which = int | str | None
"""An image by its position or id; None: all images together."""


@styled
def tendency_arrows(study: xr.Dataset, image: Which = None, photo: Image.Image | None = None) -> Any:
    """An arrow from each patch to the centre of its interactions, all panels at one scale.

    Over all images arrows are means of tendencies: they are short where images disagree.
    """
    pulls, whose = _chosen(study, "tendency", image)
    lengths = _lengths(pulls)
    longest = _scale(lengths)

    def draw(axes: Any, layer: int, grid: tuple[int, int]) -> None:
        x, y = np.meshgrid(np.arange(grid[1]), np.arange(grid[0]))
        pull = pulls[layer, : grid[0] * grid[1]].reshape(*grid, 2) / longest * 2
        axes.quiver(
            x, y, pull[..., 0], pull[..., 1], angles="xy", scale_units="xy", scale=1, color=COOL, width=0.011,
            headwidth=3.6, headlength=4.0, headaxislength=3.6, minlength=0.3, edgecolor="white", linewidth=0.25,
        )  # fmt: skip

    figure = _layers(study, f"Which way patches are pulled: {whose}", photo, draw, lambda layer: _mean(lengths[layer]))
    explain(
        figure,
        "An arrow leads from a patch towards the centre of the interactions in its window.",
        f"All panels at one scale: the 95 % longest arrow, {number(longest)} patches, is drawn 2 patches long.",
        "Beside the layer: mean length in patches. Patches at the border can only point inward.",
        "Our construction, after Ma et al. 2022.",
    )
    return figure


@styled
def tendency_flow(study: xr.Dataset, image: Which = None, photo: Image.Image | None = None) -> Any:
    """Tendencies as optical flow is drawn: hue is the direction, strength of colour the length; a wheel beside it."""
    pulls, whose = _chosen(study, "tendency", image)
    lengths = _lengths(pulls)
    radius = _scale(lengths)

    def draw(axes: Any, layer: int, grid: tuple[int, int]) -> None:
        pull = pulls[layer, : grid[0] * grid[1]].reshape(*grid, 2)
        colours = flow_colours(pull, radius)
        over = np.dstack([colours, np.full(grid, 0.8 if photo is not None else 1.0)])
        axes.imshow(over, extent=grid_extent(grid), interpolation="nearest")
        _ticks(axes, pull, radius)

    figure = _layers(
        study, f"Tendencies as flow: {whose}", photo, draw, lambda layer: _mean(lengths[layer]), extra=_wheel
    )
    explain(
        figure,
        "Hue and tick: the direction in which a patch is pulled (see the wheel). Strength of colour: how far, full at",
        f"{number(radius)} patches, the 95 % longest of the figure. Beside the layer: mean length in patches.",
        "Our construction, after Ma et al. 2022.",
    )
    return figure


@styled
def windows_of_patch(study: xr.Dataset, patch: int, image: Which = 0, photo: Image.Image | None = None) -> Any:
    """The window of one patch through the layers: the box that holds most of its interactions."""
    sides, whose = _chosen(study, "window", image_position(study, 0 if image is None else image))

    def draw(axes: Any, layer: int, grid: tuple[int, int]) -> None:
        if patch >= grid[0] * grid[1]:
            return
        row, column = divmod(patch, grid[1])
        left, top, right, bottom = sides[layer, patch]
        corner = (column - left - 0.5, row - top - 0.5)
        for colour, width in (("white", 3.0), (MARK, 1.6)):
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
        for colour, size in (("white", 6.0), (INK, 4.0)):
            axes.plot([column], [row], "s", color=colour, markersize=size, markeredgewidth=0)

    def area(layer: int) -> str:
        left, top, right, bottom = sides[layer, patch]
        return "" if np.isnan(left) else f"{right + left + 1:.0f} x {bottom + top + 1:.0f}"

    _refuse_patch(study, patch)
    figure = _layers(study, f"Windows of patch {patch}: {whose}", photo, draw, area)
    explain(
        figure,
        "Square: the patch that asks. Frame: its window, the box of its area that holds most of its interactions;",
        "it need not hold the patch. Beside the layer: columns x rows. Our construction, after Ma et al. 2022.",
    )
    return figure


@styled
def window_coverage(study: xr.Dataset, image: Which = 0, photo: Image.Image | None = None) -> Any:
    """The sum of all windows: how many patches have each patch in their window, as a share (None: mean over images)."""
    _, whose = _chosen(study, "window", image)
    chosen = range(study.sizes["image"]) if image is None else [image_position(study, image)]
    sides = study["window"].isel(image=list(chosen)).to_numpy().astype(np.float64)
    covered = {
        layer: np.mean([coverage(each[layer, : grid[0] * grid[1]], grid) for each in sides], axis=0)
        for layer, grid in enumerate(_grids(study))
        if grid is not None
    }

    def draw(axes: Any, layer: int, grid: tuple[int, int]) -> None:
        axes.imshow(covered[layer], extent=grid_extent(grid), cmap=COVER, vmin=0, vmax=1, interpolation="nearest")

    def most(layer: int) -> str:
        return f"most {covered[layer].max():.0%}"

    figure = _layers(study, f"Where windows lie: {whose}", photo, draw, most, extra=_cover_bar)
    explain(
        figure,
        "Darker: more patches have this patch in their window. Even shade: windows go around their own patch;",
        "one dark place: all look there. Our construction, after Ma et al. 2022.",
    )
    return figure


@styled
def hub_map(study: xr.Dataset, image: Which = 0, photo: Image.Image | None = None) -> Any:
    """Indiscriminative patches of one image (or, over all images, how often each place is one), layer by layer."""
    found, whose = _chosen(study, "hub", image)
    one = image is not None

    def draw(axes: Any, layer: int, grid: tuple[int, int]) -> None:
        share = found[layer, : grid[0] * grid[1]].reshape(grid)
        if not one:
            top = max(0.05, float(np.nanmax(found)))
            axes.imshow(share, extent=grid_extent(grid), cmap=COVER, vmin=0, vmax=top, interpolation="nearest")
            return
        for row, column in np.argwhere(share > 0):
            for colour, width in (("white", 2.4), (MARK, 1.3)):
                axes.add_patch(
                    Rectangle(
                        (column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=colour, linewidth=width, clip_on=False
                    )
                )

    figure = _layers(
        study, f"Patches that everybody keeps: {whose}", photo, draw, lambda layer: f"{np.nansum(found[layer]):.3g}"
    )
    explain(
        figure,
        "Framed: kept by more than half of all patches, and by far more than others are."
        if one
        else "Darker: a hub in more images.",
        "Beside the layer: how many. They may carry information: removing them is no clean-up.",
        "Our construction, after Ma et al. 2022.",
    )
    return figure


def flow_colours(pull: Float[np.ndarray, "row column xy"], radius: float) -> Float[np.ndarray, "row column rgb"]:
    """Colours of equal lightness steps: hue (OKLCH) from the direction, paper white at no length, full at `radius`."""
    strength = np.clip(np.nan_to_num(np.hypot(pull[..., 0], pull[..., 1])) / radius, 0, 1)
    hue = np.arctan2(np.nan_to_num(pull[..., 1]), np.nan_to_num(pull[..., 0]))
    light, chroma = 0.985 - 0.30 * strength, 0.145 * strength
    return _from_oklab(np.stack([light, chroma * np.cos(hue), chroma * np.sin(hue)], -1))


def coverage(sides: Float[np.ndarray, "patch side"], grid: tuple[int, int]) -> Float[np.ndarray, "row column"]:
    """Share of the patches whose window holds each place."""
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    left, top, right, bottom = sides.T
    rows, columns = np.arange(grid[0]), np.arange(grid[1])
    in_rows = (rows >= (row - top)[:, None]) & (rows <= (row + bottom)[:, None])
    in_columns = (columns >= (column - left)[:, None]) & (columns <= (column + right)[:, None])
    covered: Float[np.ndarray, "row column"] = in_rows.astype(float).T @ in_columns.astype(float)
    return covered / len(sides)


# --- panels ----------------------------------------------------------------------------------------------------------


def _layers(
    study: xr.Dataset,
    title: str,
    photo: Image.Image | None,
    draw: Callable[[Any, int, tuple[int, int]], None],
    note: Callable[[int], str],
    extra: Callable[[Any], None] | None = None,
) -> Any:
    """A panel for every layer that has a grid; `extra` draws the key at their right."""
    grids = _grids(study)
    shown = [layer for layer, grid in enumerate(grids) if grid is not None]
    columns = min(PER_ROW, len(shown))
    rows = -(-len(shown) // columns)
    width = (columns + KEY_PANELS * (extra is not None)) * PANEL_INCHES + 0.3
    figure = blank(width, rows * (PANEL_INCHES + 0.18) + HEAD_INCHES, title)
    places = figure.add_gridspec(rows, columns + 1, width_ratios=[1] * columns + [KEY_PANELS if extra else 1e-3])
    for index, layer in enumerate(shown):
        grid = grids[layer]
        assert grid is not None
        axes = figure.add_subplot(places[divmod(index, columns)])
        ground(axes, grid, photo)
        draw(axes, layer, grid)
        axes.set_title(f"L{layer}", fontweight="bold", pad=3)
        axes.set_title(note(layer), loc="right", fontsize=7, color=SOFT, pad=3)
    if extra is not None:
        extra(figure.add_subplot(places[:, -1]))
    return figure


def ground(axes: Any, grid: tuple[int, int], photo: Image.Image | None) -> None:
    if photo is None:
        axes.set_facecolor("#f7f6f2")
    else:
        axes.imshow(_pale(photo), extent=grid_extent(grid), interpolation="lanczos", aspect="auto")
    axes.set(xlim=(-0.5, grid[1] - 0.5), ylim=(grid[0] - 0.5, -0.5), xticks=[], yticks=[])
    axes.set_aspect("equal")
    axes.spines[:].set_visible(False)


def grid_extent(grid: tuple[int, int]) -> tuple[float, float, float, float]:
    return (-0.5, grid[1] - 0.5, grid[0] - 0.5, -0.5)


def _pale(photo: Image.Image) -> UInt8[np.ndarray, "row column channel"]:
    grey = PALE[0] + PALE[1] * np.asarray(photo.convert("L"), dtype=np.float64) / 255
    return np.repeat((grey * 255).round().astype(np.uint8)[..., None], 3, axis=2)


def _ticks(axes: Any, pull: Float[np.ndarray, "row column xy"], radius: float) -> None:
    """A short line in the direction of each patch that is pulled at all far."""
    x, y = np.meshgrid(np.arange(pull.shape[1]), np.arange(pull.shape[0]))
    length = np.hypot(pull[..., 0], pull[..., 1])
    far: Bool[np.ndarray, "row column"] = length > 0.15 * radius
    unit = pull[far] / length[far][:, None] * 0.42
    axes.quiver(
        x[far], y[far], unit[:, 0], unit[:, 1], angles="xy", scale_units="xy", scale=1, color=INK, alpha=0.75,
        width=0.008, headwidth=2.6, headlength=2.4, headaxislength=2.2, pivot="mid",
    )  # fmt: skip


def _wheel(axes: Any) -> None:
    """The key of the flow: every direction and length, with ticks."""
    side = np.linspace(-1, 1, 121)
    x, y = np.meshgrid(side, side)
    inside = np.hypot(x, y) <= 1
    colours = np.dstack([flow_colours(np.dstack([x, y]), 1.0), inside.astype(float)])
    axes.imshow(colours, extent=(-1, 1, 1, -1), interpolation="bilinear")
    for angle in np.arange(0, 2 * np.pi, np.pi / 4):
        axes.annotate(
            "", (0.92 * np.cos(angle), 0.92 * np.sin(angle)), (0.6 * np.cos(angle), 0.6 * np.sin(angle)),
            arrowprops={"arrowstyle": "->", "color": INK, "linewidth": 0.8},
        )  # fmt: skip
    axes.set(xlim=(-1.15, 1.15), ylim=(1.15, -1.15), xticks=[], yticks=[])
    axes.set_aspect("equal")
    axes.spines[:].set_visible(False)
    axes.set_title("pulled that way", fontsize=7, color=SOFT, pad=3)


def _cover_bar(axes: Any) -> None:
    axes.set_axis_off()
    bar = axes.figure.colorbar(
        ScalarMappable(Normalize(0, 1), COVER), cax=axes.inset_axes((0.05, 0.2, 0.12, 0.6)), ticks=[0, 0.5, 1]
    )
    bar.ax.set_yticklabels(["no patch", "half of them", "all patches"])
    bar.outline.set_visible(False)


# --- values ----------------------------------------------------------------------------------------------------------


def _chosen(study: xr.Dataset, name: str, image: Which) -> tuple[Float[np.ndarray, "layer patch ..."], str]:
    """One image's values, or the mean over images; and whose they are."""
    if name not in study:
        raise UsageError(
            f"This study holds no {name!r}; it has {', '.join(map(str, study.data_vars))}. "
            "Study the images with --measures patches."
        )
    values = study[name]
    if image is not None:
        at = image_position(study, image)
        return values[at].to_numpy().astype(np.float64), f"image {study['image'].values[at]}"
    return values.mean("image", skipna=True).to_numpy().astype(
        np.float64
    ), f"mean over {values.sizes['image']:,} images"


def _grids(study: xr.Dataset) -> list[tuple[int, int] | None]:
    """Rows and columns of each layer; None where the patches room has no numbers for it."""
    name = next((name for name in ("window", "tendency", "field_size") if name in study), None)
    known = [True] * len(study.attrs["grids"])
    if name is not None:
        first = study[name][0].to_numpy()
        known = (~np.isnan(first.reshape(len(first), -1)).all(-1)).tolist()
    return [
        (int(grid[0]), int(grid[1])) if grid is not None and there else None
        for grid, there in zip(study.attrs["grids"], known, strict=True)
    ]


def _refuse_patch(study: xr.Dataset, patch: int) -> None:
    most = max(grid[0] * grid[1] for grid in _grids(study) if grid is not None)
    if not 0 <= patch < most:
        raise UsageError(f"Patch {patch} was asked for; this model has patches 0 to {most - 1}.")


def _lengths(pulls: Float[np.ndarray, "layer patch xy"]) -> Float[np.ndarray, "layer patch"]:
    lengths: Float[np.ndarray, "layer patch"] = np.hypot(pulls[..., 0], pulls[..., 1])
    return lengths


def _scale(lengths: Float[np.ndarray, "layer patch"]) -> float:
    """The 95th percentile of all lengths of a figure, so that panels can be compared."""
    known = lengths[~np.isnan(lengths)]
    return float(np.percentile(known, 95)) or 1.0 if known.size else 1.0


def _mean(values: Float[np.ndarray, "patch"]) -> str:
    return "" if np.isnan(values).all() else f"{np.nanmean(values):.1f}"


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
