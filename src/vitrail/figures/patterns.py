"""Figures of attention patterns: the map of all heads of all images, the clusters, and the pattern of every head."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float
from matplotlib.colors import ListedColormap, to_rgb

from vitrail.errors import UsageError
from vitrail.figures.panels import every
from vitrail.figures.style import (
    INK,
    LINE,
    SOFT,
    blank,
    colour_scale,
    explain,
    head_name,
    ink_on,
    save,
    styled,
)
from vitrail.figures.values import Image, image_position
from vitrail.heads.pattern_names import NAMES
from vitrail.heads.pattern_tables import Cluster, clusters, head_patterns

__all__ = ["cluster_maps", "figures_of", "pattern_map", "patterns_by_head"]

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
"""By name, in steps of lightness too, so that they differ in print; the name stands in every cell all the same."""

SHORT = {"row band": "row", "column band": "column"}

KINDS = {"patch": "patch", "cls": "class-token"}

N_CELLS = 60
"""Cells of the density landscape along a side."""

MAX_CLUSTERS = 24


@styled
def pattern_map(study: xr.Dataset, kind: str = "patch", image: Image = 0) -> Any:
    """All heads of all images as a density landscape, the heads of one image on top, coloured by layer.

    Clusters are numbered at their middle. `kind` is patch or cls. Raises `UsageError` where the study has no such map,
    and for an image that is not there.
    """
    xy = _places(study, kind)
    at = image_position(study, 0 if image is None else image)
    figure = blank(6.6, 5.6, f"Map of {KINDS[kind]} patterns, {study.sizes['image']:,} images")
    axes = figure.subplots()
    everything = xy.reshape(-1, 2)
    known = everything[~np.isnan(everything[:, 0])]
    _landscape(axes, known)
    layers, heads = np.argwhere(~np.isnan(xy[at, ..., 0])).T
    dots = _dots(axes, xy[at, layers, heads], layers, study.sizes["layer"])
    bar = figure.colorbar(dots, ax=axes, aspect=30, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("layer of the image's heads", fontsize=7)
    bar.set_ticks(every(study.sizes["layer"], 16))
    bar.ax.tick_params(length=2)
    _number_clusters(axes, xy, study[f"pattern_{kind}_cluster"].to_numpy())
    axes.set(xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_visible(False)
    attrs = study[f"pattern_{kind}_xy"].attrs
    explain(
        figure,
        f"Grey: how many of {len(known):,} maps lie there. Dots: the heads of image {_id(study, at)}.",
        "Numbers: clusters.",
        f"Source: {attrs.get('source', '')}.",
        _coder(study, kind),
        str(attrs.get("limits", "")),
    )
    return figure


@styled
def cluster_maps(study: xr.Dataset) -> Any:
    """The mean map of each cluster of patch patterns, with its name and its rule, the largest first.

    Raises `UsageError` where the study has no clusters.
    """
    found = [each for each in clusters(study) if each.size] if "patch_cluster_map" in study else []
    if not found:
        raise UsageError(
            "Clusters of patterns were to be drawn; this study has none. Study more images with --measures patterns."
        )
    shown = found[:MAX_CLUSTERS]
    n_columns = min(6, max(3, len(shown)))
    n_rows = -(-len(shown) // n_columns)
    n_maps = int((study["pattern_patch_cluster"].to_numpy() >= 0).sum())
    figure = blank(1.9 * n_columns + 0.3, 2.65 * n_rows + 0.9, f"Clusters of patch patterns, {_images(study)}")
    grid = figure.subplots(n_rows, n_columns, squeeze=False)
    maps = study["patch_cluster_map"].to_numpy()
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, cluster in zip(grid.flat, shown, strict=False):
        _draw_cluster(axes, cluster, maps[cluster.number])
    left_out = f"{len(found) - len(shown)} smaller clusters are not shown." if len(found) > len(shown) else ""
    explain(
        figure,
        "Each picture: mean attention of patches (down) to patches (across) over the cluster's maps, square root, dark "
        f"is high. {n_maps:,} maps lie in clusters, the rest in none.",
        left_out,
        "The name follows from the rule under it (our construction); named are the heads with most of their maps here.",
        str(study["pattern_patch_cluster"].attrs.get("limits", "")),
    )
    return figure


@styled
def patterns_by_head(study: xr.Dataset) -> Any:
    """Layers x heads: the name of each head's pattern and its image dependence.

    Raises `UsageError` where the study holds no patterns.
    """
    found = head_patterns(study)
    n_layers, n_heads = study.sizes["layer"], study.sizes["head"]
    with_dependence = any(each.image_dependence is not None for each in found)
    width = max(2.4, 0.62 * n_heads + 1.0)
    figure = blank(
        max(5.4, width * (2 if with_dependence else 1) + 1.2), max(3.0, 0.27 * n_layers + 1.9),
        f"Pattern of every head, {_images(study)}",
    )  # fmt: skip
    panels = figure.subplots(1, 2 if with_dependence else 1, squeeze=False)[0]
    named = np.full((n_layers, n_heads), np.nan)
    for each in found:
        if each.named.name in NAMES:
            named[each.layer, each.head] = NAMES.index(each.named.name)
    colours = ListedColormap([COLOURS[name] for name in NAMES])
    panels[0].pcolormesh(
        np.ma.masked_invalid(named), cmap=colours, vmin=-0.5, vmax=len(NAMES) - 0.5, edgecolors="white", linewidth=0.8
    )
    for each in found:
        if n_heads <= 12 and each.named.name in COLOURS:
            _name_cell(panels[0], each.layer, each.head, each.named.label, COLOURS[each.named.name])
    panels[0].set_title("name, by rule")
    if with_dependence:
        _dependence(figure, panels[1], study["image_dependence"].to_numpy())
    for axes in panels:
        axes.set(ylim=(n_layers, 0), xlabel="head (index)", ylabel="layer (index)")
        axes.set_xticks(np.arange(n_heads) + 0.5, range(n_heads))
        axes.set_yticks(np.arange(n_layers) + 0.5, range(n_layers))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    legend = "" if n_heads <= 12 else f"Colours: {', '.join(NAMES)}, dark blue to yellow."
    explain(
        figure,
        "Named from the mean of its numbers over images, by the first rule that holds; content is what no rule takes.",
        legend,
        "Image dependence 0: the same map for all images; 1: nothing in common." if with_dependence else "",
        "Source: our construction, after Li et al. 2023.",
    )
    return figure


def figures_of(study: xr.Dataset, folder: str | Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Draws what the study holds of patterns into `folder`; the files written."""
    drawn = [("patterns_by_head", patterns_by_head)] if "pattern_rule" in study else []
    figures = [(name, draw(study)) for name, draw in drawn]
    figures += [(f"pattern_map_{kind}", pattern_map(study, kind)) for kind in KINDS if f"pattern_{kind}_xy" in study]
    if "patch_cluster_map" in study and study.sizes["cluster"]:
        figures.append(("pattern_clusters", cluster_maps(study)))
    return [save(figure, Path(folder) / f"{name}.{kind}") for name, figure in figures for kind in formats]


# --- parts of figures ------------------------------------------------------------------------------------------------


def _places(study: xr.Dataset, kind: str) -> Float[np.ndarray, "image layer head xy"]:
    if kind not in KINDS:
        raise UsageError(f"A map of {kind!r} patterns was asked for; there are patch and cls.")
    name = f"pattern_{kind}_xy"
    if name not in study:
        reason = study.attrs.get("left_out", {}).get(name, "study it with --measures patterns")
        raise UsageError(f"A map of {KINDS[kind]} patterns was asked for; this study has none: {reason}.")
    return study[name].to_numpy().astype(np.float64)


def _landscape(axes: Any, xy: Float[np.ndarray, "head xy"]) -> None:
    """Shades of grey by density, in equal steps of its square root."""
    from scipy.ndimage import gaussian_filter

    low, high = xy.min(0), xy.max(0)
    margin = 0.06 * max(float((high - low).max()), 1e-6)
    centre, half = (low + high) / 2, float((high - low).max()) / 2 + margin
    edges = [np.linspace(middle - half, middle + half, N_CELLS * 2 + 1) for middle in centre]
    counts, _, _ = np.histogram2d(xy[:, 0], xy[:, 1], bins=edges)
    height = np.sqrt(gaussian_filter(counts, 1.6))
    top = max(float(height.max()), 1e-12)
    middles = [(edge[1:] + edge[:-1]) / 2 for edge in edges]
    greys = ["#f1efe9", "#e4e1d9", "#d3d0c7", "#bfbcb3", "#a9a69e"]
    axes.contourf(*middles, height.T, levels=np.linspace(0.06, 1.0, 6) * top, colors=greys, extend="max")
    axes.set(xlim=edges[0][[0, -1]], ylim=edges[1][[0, -1]])


def _dots(axes: Any, xy: Float[np.ndarray, "head xy"], layers: np.ndarray, n_layers: int) -> Any:
    colours, norm = colour_scale(np.array([0.0, max(1.0, n_layers - 1.0)]))
    return axes.scatter(
        xy[:, 0], xy[:, 1], c=layers, cmap=colours, norm=norm, s=26, edgecolors="white", linewidths=0.6, zorder=3
    )


def _number_clusters(axes: Any, xy: Float[np.ndarray, "image layer head xy"], cluster: np.ndarray) -> None:
    for number in range(int(cluster.max(initial=-1)) + 1):
        inside = xy[cluster == number]
        if len(inside):
            away = np.linalg.norm(inside - np.median(inside, axis=0), axis=1)
            axes.text(
                *inside[away.argmin()], str(number), fontsize=6.5, color=INK, ha="center", va="center", zorder=4,
                bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": LINE, "linewidth": 0.5},
            )  # fmt: skip


def _draw_cluster(axes: Any, cluster: Cluster, values: Float[np.ndarray, "query key"]) -> None:
    axes.set_axis_on()
    axes.imshow(np.sqrt(values), cmap="bone_r", interpolation="nearest", aspect="equal")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(True)
    axes.set_title(f"{cluster.number}  {cluster.named.label}", fontsize=7.5)
    heads = ", ".join(f"{head_name(layer, head)} {share:.0%}" for layer, head, share in cluster.heads)
    rule = textwrap.fill(cluster.named.rule, 36, max_lines=3, placeholder=" …")
    axes.set_xlabel(f"{cluster.size:,} maps:\n{heads}\n{rule}", fontsize=5.8, loc="left", color=SOFT)


def _name_cell(axes: Any, layer: int, head: int, label: str, colour: str) -> None:
    name, _, step = label.partition(" (")
    text = f"({step}" if step else SHORT.get(name, name)
    axes.text(head + 0.5, layer + 0.5, text, ha="center", va="center", fontsize=5.8, color=ink_on(to_rgb(colour)))


def _dependence(figure: Any, axes: Any, values: Float[np.ndarray, "layer head"]) -> None:
    colours, norm = colour_scale(np.array([0.0, 1.0]))
    cells = axes.pcolormesh(np.ma.masked_invalid(values), cmap=colours, norm=norm, edgecolors="white", linewidth=0.8)
    for layer, head in np.argwhere(~np.isnan(values)):
        if values.shape[1] <= 12:
            axes.text(
                head + 0.5, layer + 0.5, f"{values[layer, head]:.2f}", ha="center", va="center", fontsize=5.8,
                color=ink_on(colours(norm(values[layer, head]))),
            )  # fmt: skip
    bar = figure.colorbar(cells, ax=axes, aspect=30, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2)
    axes.set_title("image dependence")


def _coder(study: xr.Dataset, kind: str) -> str:
    """What the latents are, and how well they describe held-out images."""
    told = study.attrs.get("patterns", {}).get(kind)
    if not told:
        return ""
    errors = ", ".join(
        f"{name} {told[key]:.3f}"
        for name, key in (("autoencoder", "autoencoder_error"), ("PCA", "pca_error"))
        if told[key]
    )
    judged = f" Error on held-out images, as a share of their variance: {errors}." if errors else ""
    return f"Latents: {told['n_latents']} of {told['why']}.{judged}"


def _images(study: xr.Dataset) -> str:
    n_images = study.sizes["image"]
    return f"{n_images:,} images" if n_images > 1 else f"image {_id(study, 0)}"


def _id(study: xr.Dataset, at: int) -> str:
    return str(study["image"].to_numpy()[at]) if "image" in study.coords else str(at)
