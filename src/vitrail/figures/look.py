"""The figures of one image: which heads matter to it and where the most important one looks, what patches see."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float32
from PIL import Image

from vitrail.figures import neurons, patches, wint
from vitrail.figures.attention import attention_over_photo, most_attended_patch
from vitrail.figures.heads import (
    entropy_by_layer,
    importance_line,
    importance_map,
    refuse_formats,
    save,
    strength_over_hops,
    study_overview,
)
from vitrail.figures.style import head_name, number
from vitrail.figures.values import head_values, main_metric
from vitrail.measure import ROOMS

__all__ = ["LookedAt", "look_at"]


@dataclass(frozen=True)
class LookedAt:
    """An image as a study of one, what the model sees of it, and a layer's maps [head, token, token] on demand.

    `patch` (row, column on the grid of the first layer) is the one whose windows are drawn.
    """

    study: xr.Dataset
    view: Image.Image
    attention: Callable[[int], Float32[np.ndarray, "head token token"]]
    patch: tuple[int, int] | None = None


def look_at(seen: LookedAt, folder: str | Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Draws every figure that there are numbers for into `folder`; the files written.

    Raises `UsageError` for an unknown format.
    """
    refuse_formats(formats)
    written: list[Path] = []
    for name, figure in (*_head_figures(seen), *_patch_figures(seen), *_windows(seen), *_survival(seen)):
        written.extend(save(figure, Path(folder) / f"{name}.{kind}") for kind in formats)
    return written


def _patch_figures(seen: LookedAt) -> Iterator[tuple[str, Any]]:
    """Over the photograph, in the layers that have the grid of the first; others regroup the patches."""
    study = seen.study.copy()
    grids = study.attrs["grids"]
    study.attrs["grids"] = [grid if grid == grids[0] else None for grid in grids]
    if "window" in study:
        if seen.patch is not None:
            at = seen.patch[0] * grids[0][1] + seen.patch[1]
            yield "windows_of_patch", patches.windows_of_patch(study, at, 0, seen.view)
        yield "window_coverage", patches.window_coverage(study, 0, seen.view)
    if "tendency" in study:
        yield "tendency_arrows", patches.tendency_arrows(study, 0, seen.view)
        yield "tendency_flow", patches.tendency_flow(study, 0, seen.view)
    if "hub" in study:
        yield "hub_map", patches.hub_map(study, 0, seen.view)


def _windows(seen: LookedAt) -> Iterator[tuple[str, Any]]:
    if "predicted_window" not in seen.study:
        return
    grid = tuple(seen.study.attrs["grids"][0])
    sides = seen.study["predicted_window"].to_numpy()[0].astype(np.float64)
    row, column = seen.patch or (grid[0] // 2, grid[1] // 2)
    yield "predicted_windows", wint.windows_by_layer(sides, grid, row * grid[1] + column, seen.view)
    yield "predicted_windows_summed", wint.summed_masks(sides, grid, wint.spread_patches(grid), seen.view)


def _survival(seen: LookedAt) -> Iterator[tuple[str, Any]]:
    if any(str(name).startswith(("occlusion_", "shuffle_")) for name in seen.study):
        yield "survival", neurons.survival(seen.study)


def _head_figures(seen: LookedAt) -> Iterator[tuple[str, Any]]:
    study = seen.study
    if not set(ROOMS["heads"]) & set(map(str, study)):
        return
    yield "overview", study_overview(study)
    metric = main_metric(study)
    if metric is not None:
        yield "importance_map", importance_map(study, metric)
        yield "importance_line", importance_line(study, metric)
    if "strength_entropy" in study:
        yield "entropy_by_layer", entropy_by_layer(study)
    head = None if metric is None else _most_important_with_map(seen, metric)
    if metric is not None and head is not None:
        if "attention_strength" in study:
            yield f"strength_{head_name(*head)}", strength_over_hops(study, *head)
        yield from _attention_figures(seen, metric, *head)


def _most_important_with_map(seen: LookedAt, metric: str) -> tuple[int, int] | None:
    """The most important head among those whose map lies on the photograph."""
    known = (
        ~np.isnan(seen.study["attention_strength"].to_numpy()).all((0, 3))
        if "attention_strength" in seen.study
        else None
    )
    ranked = head_values(seen.study, metric).ranked
    return None if known is None else next((head for head in ranked if known[head]), None)


def _attention_figures(seen: LookedAt, metric: str, layer: int, head: int) -> Iterator[tuple[str, Any]]:
    weights = seen.attention(layer)[head]
    rows, columns = seen.study.attrs["grids"][layer]
    prefix = int(seen.study.attrs["prefixes"][layer])
    title = f"{head_name(layer, head)}: {_why(seen.study, metric, layer, head)}"
    queries = {"patch": most_attended_patch(weights, (rows, columns), prefix)}
    if prefix and seen.study.attrs["class_token"]:
        queries = {"class": 0, **queries}
    for words, query in queries.items():
        figure = attention_over_photo(seen.view, weights, (rows, columns), prefix, query, title)
        yield f"attention_{head_name(layer, head)}_{words}", figure


def _why(study: xr.Dataset, metric: str, layer: int, head: int) -> str:
    """Why this head is shown, with its number."""
    shown = head_values(study, metric)
    value = number(float(shown.values[layer, head]))
    if metric != "head_probability" or shown.unpruned is None:
        return f"{shown.title} {value}"
    return f"without it P({_label(study)}) goes from {number(shown.unpruned)} to {value}"


def _label(study: xr.Dataset) -> str:
    label, names = int(study["label"].to_numpy()[0]), study.attrs.get("class_names")
    return str(names[label]).split(",")[0] if names else f"class {label}"
