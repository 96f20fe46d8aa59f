"""Figures of tokens and neurons: norms, grouping and robustness of a study, and the charts of one image.

The charts of one image (panels, curves, scatter) take arrays, which the close look at an image computes.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import xarray as xr
from jaxtyping import Float, Int
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator

from vitrail.errors import UsageError
from vitrail.figures.style import (
    BAND,
    COOL,
    INK,
    LINE,
    MARK,
    SOFT,
    Figure,
    FigureTable,
    blank,
    explain,
    styled,
    when,
)
from vitrail.grid import Grid, Sides
from vitrail.selection import describe_choice
from vitrail.tokens.display import rgb_image, sign_map
from vitrail.tokens.outliers import OUTLIER_DEVIATIONS
from vitrail.tokens.summary import MeanCurve, grouping_quantities, norms_of_layers, patch_norms, robustness

__all__ = [
    "FIGURES",
    "Curve",
    "Panel",
    "coloured",
    "curves",
    "grouping_by_layer",
    "norms_by_layer",
    "overlaid",
    "panels",
    "position_grid",
    "scatter_of_tokens",
    "survival",
    "token_map",
    "view_panels",
]

CYCLE = (COOL, MARK, "#5a7d2a", "#7a4aa0", "#8a6d0a", "#5a6170", "#b0417a")
LOG_FROM = 10
"""Norms that differ by more than this factor are drawn on a log scale."""
MARKERS = ("o", "s", "^", "D", "v", "P")

PAPER, OPACITY = 0.35, 0.85
"""Lowest grey of a photograph under patch values, and the share of orange where they are highest."""

Picture = Float[np.ndarray, "row column colour"]


@dataclass(frozen=True, eq=False)
class Panel:
    """One picture of a figure.

    Attributes:
        picture: Red, green, blue of each pixel, 0 to 1.
        title: Its title.
        mark: A box to point at, in pixels: row, column, height, width.
    """

    picture: Float[np.ndarray, "row column colour"]
    title: str = ""
    mark: tuple[float | int, float | int, float | int, float | int] | None = None


@dataclass(frozen=True, eq=False)
class Curve:
    """A line with its interval.

    Attributes:
        name: What the legend calls it.
        x: The points.
        mean: Value at each point.
        low: Lower end of the interval at each point; None: no interval.
        high: Upper end of the interval.
        dashed: Whether the line is what others are compared with: dashed, and of no colour that another line has.
    """

    name: str
    x: Float[np.ndarray, "point"]
    mean: Float[np.ndarray, "point"]
    low: Float[np.ndarray, "point"] | None = None
    high: Float[np.ndarray, "point"] | None = None
    dashed: bool = False


@styled
def panels(rows: Sequence[Sequence[Panel]], title: str, *sentences: str, side: float = 1.35) -> Figure:
    """Pictures in rows, each with its title.

    Args:
        rows: The pictures.
        title: Title of the figure.
        sentences: How to read it.
        side: Size of a picture in inches.

    Returns:
        The figure.
    """
    width = max(len(row) for row in rows)
    figure = blank(max(4.5, width * side), len(rows) * (side + 0.24) + 0.75, title)
    grid = figure.subplots(len(rows), width, squeeze=False)
    for axes_row, row in zip(grid, rows, strict=True):
        for column, axes in enumerate(axes_row):
            axes.set_axis_off()
            if column < len(row):
                _draw_panel(axes, row[column])
    explain(figure, *sentences)
    return figure


def _draw_panel(axes: Any, panel: Panel) -> None:
    axes.imshow(np.clip(panel.picture, 0, 1), interpolation="nearest")
    axes.set_title(panel.title, fontsize=6.8, pad=2)
    if panel.mark is not None:
        row, column, height, width = panel.mark
        box = mpl.patches.Rectangle((column - 0.5, row - 0.5), width, height, fill=False, edgecolor=MARK, linewidth=1.2)
        axes.add_patch(box)


def view_panels(
    views: Sequence[Float[np.ndarray, "colour row column"]],
    titles: Sequence[str],
    *,
    one_scale: bool = False,
    clip: float = 1.0,
) -> tuple[list[Panel], list[Panel]]:
    """Two rows for views: as published (the positive part), and signed, orange for positive.

    Args:
        views: Views of a neuron, [colour row column].
        titles: A title for each.
        one_scale: Draws all views on one scale instead of each on its own.
        clip: Quantile of the pixels at which an own signed scale ends: below 1 where a few pixels outshine all.

    Returns:
        The row as published and the signed one.
    """
    scale = max(float(view.max()) for view in views) if one_scale else None
    reach = max(float(np.abs(view.sum(axis=0)).max()) for view in views) if one_scale else None
    diverging = mpl.colormaps["PuOr_r"]
    published = [Panel(rgb_image(view, scale), title) for view, title in zip(views, titles, strict=True)]
    ends = [reach if one_scale else float(np.quantile(np.abs(view.sum(axis=0)), clip)) or None for view in views]
    both = [
        Panel(diverging(0.5 + sign_map(view, end) / 2)[..., :3], "signed")
        for view, end in zip(views, ends, strict=True)
    ]
    return published, both


def token_map(
    values: Float[np.ndarray, "patch"], grid: tuple[int, int], low: float | None = None, high: float | None = None
) -> Picture:
    """Values of patches as a picture in cividis.

    Args:
        values: A value for each patch, row by row.
        grid: Rows and columns of patches.
        low: Value of the darkest colour; None: the lowest.
        high: Value of the brightest colour; None: the highest.

    Returns:
        Red, green, blue of each patch, 0 to 1.
    """
    low = float(values.min()) if low is None else low
    high = float(values.max()) if high is None else high
    scaled = np.clip((values - low) / (high - low if high > low else 1.0), 0, 1)
    return np.asarray(mpl.colormaps["cividis"](scaled.reshape(grid))[..., :3])


def coloured(colours: Float[np.ndarray, "patch colour"], grid: tuple[int, int]) -> Picture:
    """Colours of patches as a picture.

    Args:
        colours: Red, green, blue of each patch, as `tokens.ColourBasis.colours` gives them.
        grid: Rows and columns of patches.

    Returns:
        The same, on the grid.
    """
    return colours.reshape(*grid, 3)


def overlaid(
    photo: Picture,
    values: Float[np.ndarray, "patch"],
    grid: Grid,
    top: float = 0.98,
    view: Sides | None = None,
    low: float | None = None,
) -> Picture:
    """A photograph in grey under patch values, clear where they are low and orange where they are high.

    Args:
        photo: Red, green, blue of each pixel, 0 to 1.
        values: A value for each patch, row by row.
        grid: Rows and columns of patches.
        top: Quantile at which the scale ends: a few sinks of attention would leave nothing to see of the rest.
        view: How many patches long the sides of the photograph are (`grid.view_in_patches`); None: the grid's.
        low: Where the scale begins, in the unit of the values; None: at the lowest.

    Returns:
        Red, green, blue of each pixel, 0 to 1; pixels behind the last patch are clear.
    """
    low, high = float(values.min()) if low is None else low, float(np.quantile(values, top))
    scaled = np.clip((values - low) / max(high - low, 1e-12), 0, 1).reshape(grid)
    row, column = (
        ((np.arange(n_pixels) + 0.5) * side / n_pixels).astype(np.int64)
        for n_pixels, side in zip(photo.shape, view or grid, strict=False)
    )
    n_below, n_right = max(0, int(row[-1]) + 1 - grid[0]), max(0, int(column[-1]) + 1 - grid[1])
    share = np.pad(scaled, ((0, n_below), (0, n_right)))[row[:, None], column, None]
    grey = PAPER + (1 - PAPER) * photo.mean(axis=-1, keepdims=True)
    return np.asarray(grey * (1 - OPACITY * share) + OPACITY * share * np.array(mpl.colors.to_rgb(MARK)))


def position_grid(similarity: Float[np.ndarray, "query key"], grid: tuple[int, int], every: int = 1) -> Picture:
    """Cosine similarity of position embeddings: the map of each patch, where the patch itself lies on the grid.

    Args:
        similarity: Cosine of each pair of patches.
        grid: Rows and columns of patches.
        every: Takes only every so many rows and columns.

    Returns:
        Red, green, blue of each cell, 0 to 1.
    """
    rows, columns = range(0, grid[0], every), range(0, grid[1], every)
    tiled = np.ones((len(rows) * (grid[0] + 1), len(columns) * (grid[1] + 1), 3))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            tile = token_map(similarity[row * grid[1] + column], grid, float(similarity.min()), 1.0)
            tiled[i * (grid[0] + 1) :, j * (grid[1] + 1) :][: grid[0], : grid[1]] = tile
    return tiled


@styled
def curves(
    parts: Mapping[str, Sequence[Curve]],
    title: str,
    x: str,
    y: str,
    *sentences: str,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Lines with intervals, one panel per entry of `parts`, on common axes.

    Args:
        parts: Lines by the title of their panel.
        title: Title of the figure.
        x: Label of the x axes.
        y: Label of the y axis.
        sentences: How to read it.
        limits: Ends of the y axis; None: those of the lines.

    Returns:
        The figure.
    """
    figure = blank(2.5 * len(parts) + 0.4, 2.9, title)
    grid = figure.subplots(1, len(parts), squeeze=False, sharex=True, sharey=True)[0]
    for axes, (name, lines) in zip(grid, parts.items(), strict=True):
        axes.set_title(name)
        axes.set_xlabel(x)
        axes.grid(color=LINE, linewidth=0.6)
        for index, curve in enumerate(lines):
            _draw_curve(axes, curve, index)
        if limits is not None:
            axes.set_ylim(*limits)
    grid[0].set_ylabel(y)
    names = [[curve.name for curve in lines] for lines in parts.values()]
    for index, axes in enumerate(grid):
        if index + 1 == len(grid) or names[index] != names[index + 1]:
            axes.legend(frameon=False, fontsize=6.5, labelcolor=INK)
    explain(figure, *sentences)
    return figure


def _draw_curve(axes: Any, curve: Curve | MeanCurve, index: int) -> None:
    is_reference = isinstance(curve, Curve) and curve.dashed
    colour, dashes = (INK, "--") if is_reference else (CYCLE[index % len(CYCLE)], "-")
    marker = MARKERS[index % len(MARKERS)]
    axes.plot(
        curve.x,
        curve.mean,
        color=colour,
        label=curve.name,
        linewidth=1.3,
        markersize=3,
        marker=marker,
        linestyle=dashes,
    )
    if curve.low is not None and curve.high is not None:
        axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.16, linewidth=0)


@styled
def scatter_of_tokens(
    layouts: Mapping[str, Float[np.ndarray, "drawn xy"]],
    owner: Int[np.ndarray, "token"],
    sizes: Float[np.ndarray, "token"],
    names: Mapping[int, str],
    title: str,
    *sentences: str,
) -> Figure:
    """t-SNE of one image's tokens, one panel per layer: coloured by object, as large as their rollout.

    Args:
        layouts: Positions of the tokens by the title of their panel; the last row is the class token if there is one
            row more than in `owner`, drawn as a star.
        owner: Number of the object that each patch lies on, 0 for none.
        sizes: Rollout of each patch.
        names: Name of each object.
        title: Title of the figure.
        sentences: How to read it.

    Returns:
        The figure.
    """
    figure = blank(2.2 * len(layouts) + 0.2, 2.9, title)
    grid = figure.subplots(1, len(layouts), squeeze=False)[0]
    for axes, (name, xy) in zip(grid, layouts.items(), strict=True):
        axes.set_title(name)
        axes.set_xticks([])
        axes.set_yticks([])
        for index, (number, label) in enumerate(names.items()):
            chosen = owner == number
            colour = "#c9c5bb" if number == 0 else CYCLE[(index - (0 in names)) % len(CYCLE)]
            area = 6 + 60 * sizes[chosen] / max(float(sizes.max()), 1e-12)
            axes.scatter(*xy[: len(owner)][chosen].T, s=area, color=colour, label=label, alpha=0.8, linewidth=0)
        if len(xy) > len(owner):
            axes.scatter(*xy[-1], marker="*", s=70, color=INK, label="class token", linewidth=0)
    grid[-1].legend(frameon=False, fontsize=6.2, loc="upper left", bbox_to_anchor=(1, 1), markerscale=0.7)
    explain(figure, *sentences)
    return figure


@styled
def grouping_by_layer(study: xr.Dataset) -> Figure:
    """The grouping scores of a study over its layers: mean over the images that have them in every layer that has any.

    Args:
        study: A study with grouping scores.

    Returns:
        The figure.

    Raises:
        UsageError: The study holds none, or no image has any.
    """
    quantities = grouping_quantities(study)
    if not quantities:
        raise UsageError("This study holds no grouping scores; they need masks: run_study(..., masks=FOLDER).")
    counts = [len(quantity.values) for quantity in quantities]
    n_images = max(counts)
    columns, rows = min(3, len(quantities)), -(-len(quantities) // 3)
    title = f"Grouping, {n_images:,} image{'s' if n_images != 1 else ''}"
    figure = blank(2.2 * columns + 0.4, 1.9 * rows + 0.9, title)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten()
    for axes, quantity in zip(grid, quantities, strict=False):
        statistics = quantity.statistics
        axes.plot(statistics.layers, statistics.mean, color=COOL, linewidth=1.3, marker="o", markersize=3)
        axes.fill_between(statistics.layers, statistics.low, statistics.high, color=BAND, linewidth=0)
        whose = "" if len(quantity.values) == n_images else f", {len(quantity.values):,} of them"
        axes.set_title(textwrap.fill(f"{quantity.title}{whose}", 30), fontsize=7.2)
        axes.set_xlabel("after layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color=LINE, linewidth=0.6)
    for axes in grid[len(quantities) :]:
        axes.set_axis_off()
    attrs = next(study[name].attrs for name in study.data_vars if str(name).startswith("grouping_"))
    interval = "Bands: 95 % interval of the mean over images, where they are enough for one." if n_images > 1 else ""
    explain(figure, f"{attrs['source']}.", interval, attrs["limits"])
    return figure


@styled
def norms_by_layer(study: xr.Dataset) -> Figure:
    """Lengths of tokens over the layers: patches with their spread, the class token, and how many patches stand out.

    Args:
        study: A study that holds `token_norm`.

    Returns:
        The figure.

    Raises:
        UsageError: The study holds no norms of patches.
    """
    norms = norms_of_layers(study)
    n_images = study.sizes["image"]
    figure = blank(7.4, 3.0, f"Lengths of tokens, {n_images:,} image{'s' if n_images != 1 else ''}")
    left, right = figure.subplots(1, 2)
    left.fill_between(norms.layers, norms.low, norms.high, color=BAND, linewidth=0, label="90 % of all patches")
    left.plot(norms.layers, norms.median, color=COOL, label="median patch")
    left.plot(norms.layers, norms.longest, color=MARK, linewidth=1.0, linestyle="--", label="longest patch")
    if norms.class_token is not None:
        layers = np.arange(len(norms.class_token))
        left.plot(layers, norms.class_token, color=SOFT, linestyle=":", marker=".", label="class token, median")
    left.set(xlabel="after layer", ylabel="L2 norm")
    if norms.longest.max() > LOG_FROM * norms.median.min():
        left.set(yscale="log", ylabel="L2 norm, log scale")
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        left.yaxis.set_minor_locator(NullLocator())
    else:
        left.set_ylim(bottom=0)
    right.bar(norms.layers, norms.n_outliers, color=MARK, width=0.7)
    right.set(xlabel="after layer", ylabel="patches of an image that stand out")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color=LINE, linewidth=0.6)
    left.legend(frameon=False, fontsize=6.5)
    explain(
        figure,
        f"Right: patches more than {OUTLIER_DEVIATIONS:g} robust standard deviations above the median of their layer, "
        "mean over images; such patches are artefacts that carry no local content (Darcet et al. 2023, "
        "arXiv 2309.16588; the cut is ours).",
        study["token_norm"].attrs.get("limits", ""),
    )
    return figure


@styled
def survival(study: xr.Dataset) -> Figure:
    """What is left of the label's probability as patches are lost or displaced, and how far tokens drift by layer.

    Args:
        study: A study with measures of occlusion or shuffling.

    Returns:
        The figure.

    Raises:
        UsageError: The study holds none of them.
    """
    results = robustness(study)
    n_parts = sum(map(bool, (results.occlusion, results.shuffle, results.occlusion_drift, results.shuffle_drift)))
    n_images = study.sizes["image"]
    description = f"{n_images:,} images" if n_images > 1 else describe_choice(study, 0)
    figure = blank(2.7 * n_parts + 0.3, 2.9, f"As patches are lost or displaced: {description}")
    panels = iter(figure.subplots(1, n_parts, squeeze=False)[0])
    if results.occlusion:
        axes = next(panels)
        for index, curve in enumerate(results.occlusion):
            _draw_curve(axes, curve, index)
        axes.set(xlabel="share of patches lost", ylabel="probability of the label", title="lost")
        axes.legend(frameon=False, fontsize=6.5)
    if results.shuffle is not None:
        axes = next(panels)
        _draw_curve(axes, results.shuffle, 0)
        axes.set(xlabel="cells", ylabel="probability of the label", title="displaced")
        axes.set_xticks(range(len(results.cells)), ["intact", *(f"{n} x {n}" for n in results.cells[1:])])
    for lines, title in (
        (results.occlusion_drift, "drift, random patches lost"),
        (results.shuffle_drift, "drift, displaced"),
    ):
        if lines:
            axes = next(panels)
            for index, curve in enumerate(lines):
                _draw_curve(axes, curve, index)
            axes.set(xlabel="after layer", ylabel="1 - cosine to intact", title=title)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.legend(frameon=False, fontsize=6.5)
    for axes in figure.axes:
        axes.set_ylim(bottom=0)
        axes.grid(color=LINE, linewidth=0.6)
    explain(
        figure,
        "Bands: 95 % interval of the mean over images, where they are enough for one." if n_images > 1 else "",
        "The same number of patches is lost in every way;",
        "salient: under objects where the image has a mask, else of the highest rollout.",
        f"Lost patches: {study.attrs.get('options', {}).get('lost_patches', 'mean')}.",
        "After Nguyen et al. 2022; drift is our construction.",
        _limits_of_survival(study),
    )
    return figure


def _limits_of_survival(study: xr.Dataset) -> str:
    """The limits of shuffling where it was measured, else of occlusion."""
    names = sorted(str(name) for name in study.data_vars if str(name).startswith(("occlusion_", "shuffle_")))
    return str(study[names[-1]].attrs.get("limits", ""))


def _has_robustness(study: xr.Dataset) -> bool:
    return any(str(name).startswith(("occlusion_", "shuffle_")) for name in study)


FIGURES: FigureTable = (
    ("norms_by_layer", when(lambda study: "token_norm" in study and patch_norms(study), norms_by_layer)),
    ("grouping_by_layer", when(grouping_quantities, grouping_by_layer)),
    ("survival", when(_has_robustness, survival)),
)
