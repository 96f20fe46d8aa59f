"""Figures of heads and objects: which heads find them, and what the best head's map looks like on photographs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float
from PIL import Image

from vitrail.errors import UsageError
from vitrail.figures import panels
from vitrail.figures.photo_grid import COVER, draw_background, draw_outline, grid_extent
from vitrail.figures.style import (
    SOFT,
    Figure,
    FigureTable,
    blank,
    explain,
    head_name,
    style_colorbar,
    styled,
    when,
)
from vitrail.grid import Grid, view_in_patches
from vitrail.heads.head_values import HeadValues
from vitrail.heads.object_summary import (
    TOP,
    ScoreSummary,
    example_maps,
    is_of_class_token,
    scale_of_map,
    summarise_scores,
)
from vitrail.selection import image_id
from vitrail.sentence import percent

__all__ = ["BOTH", "FIGURES", "ONE_IMAGE_FIGURES", "best_maps", "example_map_grid", "score_maps"]

SCORES = {"pointing": "strongest patch on the object", "iou": "overlap (IoU)", "auroc": "AUROC"}
MAPS = {"": "the class token's map", "patch": "maps of object patches"}

N_EXAMPLES = 10
"""Photographs on which the best head's map is shown: two rows of five."""

N_HEADS = 5
"""Heads whose map of one photograph is shown, the best by AUROC."""

PER_ROW = 5
PANEL_INCHES = 1.55


@styled
def score_maps(study: xr.Dataset) -> Figure:
    """Layers x heads as heat maps, one for each score, of the class token's map and of those of object patches.

    Args:
        study: A study of heads and objects, or one image of it.

    Returns:
        The figure.

    Raises:
        UsageError: The study holds no scores.
    """
    rows = {kind: _summaries(study, kind) for kind in MAPS}
    rows = {kind: summaries for kind, summaries in rows.items() if summaries}
    if not rows:
        raise UsageError("Heads and objects were to be drawn; the study has no scores. Study with --measures objects.")
    first = next(iter(next(iter(rows.values())).values()))
    n_layers, n_heads = first.mean.shape
    width = min(4.6, max(2.3, 0.3 * n_heads + 1.4))
    height = max(1.9, min(6.0, 0.19 * n_layers + 0.7))
    whose = f"{first.n_images:,} images with objects" if first.n_images > 1 else f"image {image_id(study, 0)}"
    figure = blank(len(SCORES) * width, len(rows) * height + 1.1, f"Which heads find the objects: {whose}")
    grid = figure.subplots(len(rows), len(SCORES), squeeze=False)
    for axes_row, (kind, summaries) in zip(grid, rows.items(), strict=True):
        for axes, (score, words) in zip(axes_row, SCORES.items(), strict=True):
            if score in summaries:
                _draw_scores(
                    figure, axes, study, summaries[score], f"{_whose_map(study, kind, summaries[score])}\n{words}"
                )
            else:
                axes.set_axis_off()
    explain(
        figure,
        "Higher: the map finds the objects of its image better. Beside the name of the best head: its score; then the "
        "mean against other images' objects at the places where those lie"
        + (", and that of a blob in the middle of the view." if "object_centre_auroc" in study else "."),
        "Our construction.",
    )
    return figure


def _summaries(study: xr.Dataset, kind: str) -> dict[str, ScoreSummary]:
    prefix = f"object_{kind}_" if kind else "object_"
    summaries = {score: summarise_scores(study, f"{prefix}{score}") for score in SCORES}
    return {score: summary for score, summary in summaries.items() if summary is not None}


def _whose_map(study: xr.Dataset, kind: str, summary: ScoreSummary) -> str:
    if kind:
        return MAPS[kind]
    layers = np.flatnonzero(np.isfinite(summary.mean).any(1)).tolist()
    return _by_query(
        study, layers, MAPS[kind], "the map of the mean query", "the class token's map, or the mean query's"
    )


def _by_query(study: xr.Dataset, layers: Sequence[int], class_token: str, mean: str, both: str) -> str:
    """The words for whose maps these layers have: of the class token, of the mean query, or of both."""
    of_class_token = {is_of_class_token(study.attrs, layer) for layer in layers}
    return both if len(of_class_token) > 1 else class_token if True in of_class_token else mean


def _draw_scores(figure: Figure, axes: Any, study: xr.Dataset, summary: ScoreSummary, title: str) -> None:
    values = HeadValues(
        summary.name, summary.mean, None, None, None, None, "", summary.n_images == 1, study[summary.name].attrs
    )
    cells = panels.heat_map(axes, values)
    style_colorbar(figure.colorbar(cells, ax=axes, aspect=25, pad=0.02), "")
    layer, head = summary.ranked[0]
    chance = {"others' objects": summary.null[layer, head], "blob": summary.centre}
    by_chance = ", ".join(f"{words} {value:.2f}" for words, value in chance.items() if np.isfinite(value))
    axes.set_title(title, fontsize=7.6)
    best = f"best: {head_name(layer, head)} {summary.mean[layer, head]:.2f}"
    axes.set_xlabel(f"head (index)\n{best}" + (f"\n{by_chance}" if by_chance else ""), fontsize=7)


@dataclass(frozen=True, eq=False)
class _MapPanel:
    """A map of a layer over a photograph, with the objects on the grid of the first layer."""

    photo: Image.Image
    weights: Float[np.ndarray, "patch"] | None
    layer: int
    objects: Float[np.ndarray, "row column"] | None
    title: str


@styled
def example_map_grid(study: xr.Dataset) -> Figure | None:
    """The map of the best head on photographs of the study, from the one where it finds the objects best to the worst.

    Args:
        study: A study that holds `object_map` of some images, and thumbnails.

    Returns:
        The figure; None where no image has a map.
    """
    summary = summarise_scores(study, "object_auroc")
    if summary is None or not {"object_map", "thumbnail"} <= set(study):
        return None
    layer, head = summary.ranked[0]
    examples = example_maps(study, layer, head, N_EXAMPLES)
    if not examples:
        return None
    drawn = [
        _MapPanel(
            Image.fromarray(study["thumbnail"][each.image].to_numpy()),
            each.weights,
            layer,
            _objects(study, each.image),
            f"AUROC {each.score:.2f}",
        )
        for each in examples
    ]
    return _draw_maps(
        study,
        drawn,
        f"{head_name(layer, head)}, the best head by AUROC, on {len(drawn)} photographs",
        f"From where it finds the objects best to where it finds them worst, evenly spaced among the images whose maps "
        f"are kept. {_reading(study, [layer])}",
    )


@styled
def best_maps(look: xr.Dataset) -> Figure | None:
    """The maps of the heads that find the objects of one photograph best.

    Args:
        look: One image, as `vitrail.look` gives it with a mask.

    Returns:
        The figure; None where the image has no objects.
    """
    summary = summarise_scores(look, "object_auroc")
    if summary is None or "head_map" not in look:
        return None
    photo, objects = Image.fromarray(look["view"].to_numpy()), _objects(look, 0)
    drawn = [_MapPanel(photo, None, summary.ranked[0][0], objects, "the objects")]
    best = summary.ranked[:N_HEADS]
    for layer, head in best:
        weights = look["head_map"][layer, head].to_numpy()
        title = f"{head_name(layer, head)}: {summary.mean[layer, head]:.2f}"
        drawn.append(_MapPanel(photo, weights[np.isfinite(weights)], layer, objects, title))
    return _draw_maps(
        look,
        drawn,
        f"Heads that find the objects best: {image_id(look, 0)}",
        f"Beside each head its AUROC: patches of the objects against all others. "
        f"{_reading(look, [layer for layer, _ in best])} One image decides nothing about a head.",
    )


def _reading(study: xr.Dataset, layers: Sequence[int]) -> str:
    patches = "patches look on average"
    whose = _by_query(study, layers, "the class token looks", patches, f"the class token looks, or {patches},")
    return (
        f"Darker: {whose} here; colours end where {percent(TOP)} of each map's patches lie below: sinks would leave "
        "nothing to see of the rest. Line: the objects."
    )


def _grid(study: xr.Dataset, layer: int) -> Grid:
    rows, columns = study.attrs["grids"][layer]
    return int(rows), int(columns)


def _objects(study: xr.Dataset, image: int) -> Float[np.ndarray, "row column"] | None:
    if "object_share" not in study or study.attrs["grids"][0] is None:
        return None
    rows, columns = _grid(study, 0)
    covered: np.ndarray = study["object_share"][image].to_numpy()[: rows * columns].reshape(rows, columns)
    return covered


def _draw_maps(study: xr.Dataset, drawn: Sequence[_MapPanel], title: str, reading: str) -> Figure:
    n_columns = min(PER_ROW + (len(drawn) == PER_ROW + 1), len(drawn))
    n_rows = -(-len(drawn) // n_columns)
    figure = blank(max(4.5, n_columns * PANEL_INCHES), n_rows * (PANEL_INCHES + 0.2) + 0.95, title)
    cells = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    for axes, panel in zip(cells, drawn, strict=False):
        grid, view = _grid(study, panel.layer), view_in_patches(study.attrs, panel.layer)
        draw_background(axes, grid, panel.photo, view)
        if panel.weights is not None:
            low, high = scale_of_map(panel.weights)
            axes.imshow(
                panel.weights.reshape(grid),
                extent=grid_extent(grid),
                cmap=COVER,
                vmin=low,
                vmax=high,
                interpolation="nearest",
            )
        if panel.objects is not None:
            draw_outline(axes, panel.objects, view_in_patches(study.attrs, 0), view)
        axes.set_title(panel.title, fontsize=7, color=SOFT, pad=3)
    for axes in cells[len(drawn) :]:
        axes.set_axis_off()
    explain(figure, reading)
    return figure


BOTH: FigureTable = (("object_scores", when(lambda study: any(_summaries(study, kind) for kind in MAPS), score_maps)),)
"""Drawn of a study and of one image."""

FIGURES: FigureTable = (("object_maps", example_map_grid),)

ONE_IMAGE_FIGURES: FigureTable = (("object_maps_of_image", best_maps),)
