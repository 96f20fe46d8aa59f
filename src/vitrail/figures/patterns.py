"""Figures of attention patterns: the map of all heads of all images, the clusters, and the pattern of every head."""

import textwrap
from functools import partial
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Int
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.patches import Patch

from vitrail.errors import UsageError
from vitrail.figures.style import (
    INK,
    LINE,
    SOFT,
    Figure,
    FigureTable,
    blank,
    colour_scale,
    describe_measure,
    explain,
    head_name,
    ink_on,
    spaced_indices,
    style_colorbar,
    styled,
    when,
)
from vitrail.patterns.density import KINDS, pattern_clusters_at, pattern_density, pattern_positions
from vitrail.patterns.names import NAMES
from vitrail.patterns.tables import Cluster, all_patterns, pattern_clusters
from vitrail.selection import image_id, image_position
from vitrail.sentence import percent

__all__ = ["FIGURES", "cluster_maps", "pattern_map", "patterns_by_head"]

COLOURS = {
    "self": "#1b4f72",
    "shift": "#3f88b5",
    "row band": "#7d5ba6",
    "column band": "#c6a5d8",
    "local": "#4c9a6a",
    "sink": "#c8470a",
    "uniform": "#c9c6bd",
    "content": "#e3b23c",
}
"""By name, in steps of lightness too, so that they differ in print; the name stands in every cell with room."""

LEGEND_COLUMNS, LEGEND_BELOW = 4, 2.0
"""Names side by side, and how many layers the legend lies below the cells."""

SHORT = {"row band": "row", "column band": "column"}

GREYS = ["#f1efe9", "#e4e1d9", "#d3d0c7", "#bfbcb3", "#a9a69e"]
"""Of the density landscape, from thin to dense."""

LOWEST_LEVEL = 0.06
"""Share of the highest density from which a place is grey: below lies the blur of single maps."""

MAX_CLUSTERS = 24
"""Clusters that are drawn: four rows of six."""

MAX_NAMED_HEADS = 12
"""Up to so many heads a layer, cells carry text; a legend names their colours where there are more."""

CELL_INCHES = {True: 0.62, False: 0.24}
"""Width of a cell with text, and of one without."""


@styled
def pattern_map(study: xr.Dataset, kind: str = "patch", image: int | str = 0) -> Figure:
    """All heads of all images as a density landscape, the heads of one image on top, coloured by layer.

    Clusters are numbered at their middle.

    Args:
        study: A study with patterns.
        kind: "patch" or "cls".
        image: The image whose heads are dots, by position or id.

    Returns:
        The figure.

    Raises:
        UsageError: There is no such kind or image, or the study has no such map.
    """
    xy = pattern_positions(study, kind)
    at = image_position(study, image)
    figure = blank(6.6, 5.6, f"Map of {KINDS[kind]} patterns, {_images(study)}")
    axes = figure.subplots()
    density = pattern_density(xy)
    top = max(float(density.height.max()), 1e-12)
    levels = np.linspace(LOWEST_LEVEL, 1.0, len(GREYS) + 1) * top
    axes.contourf(density.x, density.y, density.height.T, levels=levels, colors=GREYS, extend="max")
    axes.set(xlim=density.x[[0, -1]], ylim=density.y[[0, -1]])
    layers, heads = np.argwhere(~np.isnan(xy[at, ..., 0])).T
    dots = _draw_heads(axes, xy[at, layers, heads], layers, study.sizes["layer"])
    bar = figure.colorbar(dots, ax=axes, aspect=30, pad=0.02)
    style_colorbar(bar, "layer of the image's heads")
    bar.set_ticks(spaced_indices(study.sizes["layer"], 16))
    if f"pattern_{kind}_cluster" in study:
        _number_clusters(axes, xy, study[f"pattern_{kind}_cluster"].to_numpy())
    axes.set(xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_visible(False)
    attrs = study[f"pattern_{kind}_xy"].attrs
    explain(
        figure,
        f"Grey: how many of {density.n_maps:,} maps lie there. Dots: the heads of image {image_id(study, at)}.",
        "Numbers: clusters.",
        describe_measure(attrs)[2],
        _describe_latents(study, kind),
        str(attrs.get("limits", "")),
    )
    return figure


@styled
def cluster_maps(study: xr.Dataset) -> Figure:
    """The mean map of each cluster of patch patterns, with its name and its rule, the largest first.

    Args:
        study: A study with patterns.

    Returns:
        The figure.

    Raises:
        UsageError: The study has no clusters.
    """
    with_maps = [cluster for cluster in pattern_clusters(study) if cluster.size] if "patch_cluster_map" in study else []
    if not with_maps:
        raise UsageError(
            "Clusters of patterns were to be drawn; this study has none. Study more images with --measures patterns."
        )
    drawn = with_maps[:MAX_CLUSTERS]
    n_columns = min(6, max(3, len(drawn)))
    n_rows = -(-len(drawn) // n_columns)
    n_maps = sum(cluster.size for cluster in with_maps)
    figure = blank(1.9 * n_columns + 0.3, 2.65 * n_rows + 0.9, f"Clusters of patch patterns, {_images(study)}")
    grid = figure.subplots(n_rows, n_columns, squeeze=False)
    maps = study["patch_cluster_map"].to_numpy()
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, cluster in zip(grid.flat, drawn, strict=False):
        _draw_cluster(axes, cluster, maps[cluster.number])
    left_out = f"{len(with_maps) - len(drawn)} smaller clusters are not shown." if len(with_maps) > len(drawn) else ""
    explain(
        figure,
        "Each picture: mean attention of patches (down) to patches (across) over the cluster's maps, square root, from "
        f"its own lowest (white) to its highest (black). {n_maps:,} maps lie in clusters, the rest in none.",
        left_out,
        "The name follows from the rule under it (our construction); named are the heads with most of their maps here.",
        str(study["pattern_patch_cluster"].attrs.get("limits", "")),
    )
    return figure


@styled
def patterns_by_head(study: xr.Dataset) -> Figure:
    """Layers x heads: the name of each head's pattern and its image dependence.

    Args:
        study: A study that holds `pattern_rule`.

    Returns:
        The figure.

    Raises:
        UsageError: The study holds no patterns.
    """
    patterns = all_patterns(study)
    n_layers, n_heads = study.sizes["layer"], study.sizes["head"]
    with_dependence = any(pattern.image_dependence is not None for pattern in patterns)
    named = n_heads <= MAX_NAMED_HEADS
    width = max(2.4, CELL_INCHES[named] * n_heads + 1.0)
    figure = blank(
        max(5.4, width * (2 if with_dependence else 1) + 1.2),
        max(3.0, 0.27 * n_layers + 1.9),
        f"Pattern of every head, {_images(study)}",
    )
    panels = figure.subplots(1, 2 if with_dependence else 1, squeeze=False)[0]
    numbers = np.full((n_layers, n_heads), np.nan)
    for pattern in patterns:
        if pattern.naming.name in NAMES:
            numbers[pattern.layer, pattern.head] = NAMES.index(pattern.naming.name)
    colours = ListedColormap([COLOURS[name] for name in NAMES])
    cells = np.ma.masked_invalid(numbers)
    panels[0].pcolormesh(cells, cmap=colours, vmin=-0.5, vmax=len(NAMES) - 0.5, edgecolors="white", linewidth=0.8)
    for pattern in patterns:
        if named and pattern.naming.name in COLOURS:
            _name_cell(panels[0], pattern.layer, pattern.head, pattern.naming.label, COLOURS[pattern.naming.name])
    panels[0].set_title("name, by rule")
    if with_dependence:
        _draw_dependence(figure, panels[1], study["image_dependence"].to_numpy())
    for axes in panels:
        axes.set(ylim=(n_layers, 0), xlabel="head (index)", ylabel="layer (index)")
        axes.set_xticks(np.arange(n_heads) + 0.5, range(n_heads))
        axes.set_yticks(np.arange(n_layers) + 0.5, range(n_layers))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    if not named:
        handles = [Patch(color=COLOURS[name], label=name) for at, name in enumerate(NAMES) if (numbers == at).any()]
        panels[0].legend(
            handles=handles, loc="upper left", bbox_to_anchor=(0, -LEGEND_BELOW / n_layers), ncols=LEGEND_COLUMNS
        )
    explain(
        figure,
        "Named from the mean of its numbers over images, by the first rule that holds; content is what no rule takes.",
        "Image dependence 0: the same map for all images; 1: nothing in common." if with_dependence else "",
        "Source: our construction, after Li et al. 2023.",
    )
    return figure


def _draw_heads(axes: Any, xy: Float[np.ndarray, "head xy"], layers: Int[np.ndarray, "head"], n_layers: int) -> Any:
    colours, norm = colour_scale(np.array([0.0, max(1.0, n_layers - 1.0)]))
    return axes.scatter(
        xy[:, 0], xy[:, 1], c=layers, cmap=colours, norm=norm, s=26, edgecolors="white", linewidths=0.6, zorder=3
    )


def _number_clusters(
    axes: Any, xy: Float[np.ndarray, "image layer head xy"], cluster: Int[np.ndarray, "image layer head"]
) -> None:
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": LINE, "linewidth": 0.5}
    for number, (x, y) in pattern_clusters_at(xy, cluster).items():
        axes.text(x, y, str(number), fontsize=6.5, color=INK, ha="center", va="center", zorder=4, bbox=box)


def _draw_cluster(axes: Any, cluster: Cluster, values: Float[np.ndarray, "query key"]) -> None:
    axes.set_axis_on()
    axes.imshow(np.sqrt(values), cmap="bone_r", interpolation="nearest", aspect="equal")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(True)
    axes.set_title(f"{cluster.number}  {cluster.naming.label}", fontsize=7.5)
    heads = ", ".join(f"{head_name(layer, head)} {percent(share)}" for layer, head, share in cluster.heads)
    rule = textwrap.fill(cluster.naming.rule, 36, max_lines=3, placeholder=" …")
    axes.set_xlabel(f"{cluster.size:,} maps:\n{heads}\n{rule}", fontsize=5.8, loc="left", color=SOFT)


def _name_cell(axes: Any, layer: int, head: int, label: str, colour: str) -> None:
    name, _, step = label.partition(" (")
    text = f"({step}" if step else SHORT.get(name, name)
    axes.text(head + 0.5, layer + 0.5, text, ha="center", va="center", fontsize=5.8, color=ink_on(to_rgb(colour)))


def _draw_dependence(figure: Any, axes: Any, values: Float[np.ndarray, "layer head"]) -> None:
    colours, norm = colour_scale(np.array([0.0, 1.0]))
    cells = axes.pcolormesh(np.ma.masked_invalid(values), cmap=colours, norm=norm, edgecolors="white", linewidth=0.8)
    for layer, head in np.argwhere(~np.isnan(values)):
        if values.shape[1] <= MAX_NAMED_HEADS:
            axes.text(
                head + 0.5,
                layer + 0.5,
                f"{values[layer, head]:.2f}",
                ha="center",
                va="center",
                fontsize=5.8,
                color=ink_on(colours(norm(values[layer, head]))),
            )
    bar = figure.colorbar(cells, ax=axes, aspect=30, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2)
    axes.set_title("image dependence")


def _describe_latents(study: xr.Dataset, kind: str) -> str:
    """What the latents are, and how well they describe held-out images."""
    fit = study.attrs.get("patterns", {}).get(kind)
    if not fit:
        return ""
    errors = ", ".join(
        f"{name} {fit[key]:.3f}"
        for name, key in (("autoencoder", "autoencoder_error"), ("PCA", "pca_error"))
        if fit[key]
    )
    comparison = f" Error on held-out images, as a share of their variance: {errors}" if errors else ""
    low, high = fit.get("gain") or (None, None)  # not in studies of older versions
    if low is not None and high is not None:
        gain = fit["pca_error"] - fit["autoencoder_error"]
        comparison += f" (PCA - autoencoder: {gain:.4f}, 95 % interval {low:.4f} to {high:.4f})"
    comparison += "." if comparison else ""
    return f"Latents: {fit['n_latents']} of {fit['why']}.{comparison}"


def _images(study: xr.Dataset) -> str:
    n_images = study.sizes["image"]
    return f"{n_images:,} images" if n_images > 1 else f"image {image_id(study, 0)}"


def _has_clusters(study: xr.Dataset) -> bool:
    needed = {"patch_cluster_map", "pattern_patch_cluster", "pattern_rule"}
    return needed <= set(map(str, study)) and study.sizes["cluster"] > 0


def _map_where_measured(study: xr.Dataset, kind: str) -> Figure | None:
    return pattern_map(study, kind) if f"pattern_{kind}_xy" in study else None


FIGURES: FigureTable = (
    ("patterns_by_head", when(lambda study: "pattern_rule" in study, patterns_by_head)),
    *((f"pattern_map_{kind}", partial(_map_where_measured, kind=kind)) for kind in KINDS),
    ("pattern_clusters", when(_has_clusters, cluster_maps)),
)
