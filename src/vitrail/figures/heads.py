"""Figures of a study's heads: which matter, how far they look. Pure functions from a dataset to a matplotlib figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from vitrail.errors import UsageError
from vitrail.figures import panels
from vitrail.figures.style import FORMATS, blank, explain, head_name, number, save, styled
from vitrail.figures.values import (
    HeadValues,
    Image,
    head_values,
    hops_of_layers,
    image_position,
    importance_metrics,
    main_metric,
    strengths,
)

__all__ = [
    "entropy_by_layer",
    "figures_of",
    "importance_line",
    "importance_map",
    "save",
    "strength_over_hops",
    "study_overview",
]

INTERVALS = "Whiskers and bands: 95 % interval of the mean, bootstrap over images."


@styled
def importance_map(study: xr.Dataset, metric: str = "head_probability", image: Image = None) -> Any:
    """Layers x heads as a heat map, and beside it each head as a dot with the interval of its mean.

    `image` is a position or an id; None takes the mean over images. Raises `UsageError` for a measure that the study
    does not hold per head.
    """
    shown = head_values(study, metric, image)
    n_layers, n_heads = shown.values.shape
    map_width = min(7.5, max(1.5, 0.36 * n_heads + 1.2))
    figure = blank(map_width + 4.0, max(3.0, min(9.5, 0.21 * n_layers + 2.0)), f"{_heading(shown)}, {shown.whose}")
    left, right = figure.subplots(1, 2, width_ratios=(map_width, 3.4))
    cells = panels.heat_map(left, shown)
    panels.dots_by_layer(right, shown)
    bar = figure.colorbar(cells, ax=left, aspect=30, pad=0.02)
    _calm(bar, shown.axis)
    explain(figure, *shown.reading(), _intervals(shown), _unpruned(shown), _limits(shown))
    return figure


@styled
def importance_line(study: xr.Dataset, metric: str = "head_probability", image: Image = None) -> Any:
    """The measure over the head index, 0 being the unpruned model; the borders of layers are marked.

    For one image of several, the mean over all goes behind it. Raises `UsageError` as `importance_map` does.
    """
    shown = head_values(study, metric, image)
    mean = head_values(study, metric) if shown.one_image and study.sizes["image"] > 1 else None
    figure = blank(8.5, 3.3, f"{_heading(shown)}, {shown.whose}")
    axes = figure.subplots()
    panels.line(axes, shown, mean)
    if mean is not None:
        axes.legend(loc="best")
    explain(figure, *shown.reading(), _intervals(shown), _limits(shown))
    return figure


@styled
def entropy_by_layer(study: xr.Dataset, image: Image = None) -> Any:
    """Entropy of attention strength of every head against its layer, with the upper bound ln(hops).

    Dots are coloured by importance where the study holds it. Raises `UsageError` where it holds no entropy.
    """
    shown = head_values(study, "strength_entropy", image)
    figure = blank(6.5, 3.8, f"How far heads spread, {shown.whose}")
    axes = figure.subplots()
    tint = _tint(study, image)
    dots = _entropy_panel(axes, study, shown, tint)
    if dots is not None and tint is not None:
        _calm(figure.colorbar(dots, ax=axes, aspect=30, pad=0.02), tint.axis)
    axes.legend(loc="lower right")
    explain(figure, *shown.reading(), _whiskers(shown), "Dashed: mean of the layer.")
    return figure


@styled
def strength_over_hops(study: xr.Dataset, layer: int, head: int, image: Image = None) -> Any:
    """Attention strength of one head over distance: mean and 5-95 % of the images, one image on top of them.

    Raises `UsageError` where the study holds no strength, and for a head or an image that is not there.
    """
    figure = blank(5.6, 3.4, f"How far {head_name(layer, head)} looks{_of_image(study, image)}")
    _strength_panel(figure.subplots(), study, layer, head, image)
    explain(figure, *_strength_reading(study, layer, head))
    return figure


@styled
def study_overview(study: xr.Dataset, image: Image = None) -> Any:
    """One page: importance as map and line, entropy against layer, strength of the most important head.

    Panels of what the study does not hold are left out. Raises `UsageError` where nothing of it is there.
    """
    metric = main_metric(study)
    rows = [metric is not None, "strength_entropy" in study]
    if not any(rows):
        raise UsageError(
            "An overview was asked for; this study holds no measure of heads. Study it with --measures heads."
        )
    figure = blank(11.0, 3.9 * sum(rows) + 0.5, _overview_title(study, image))
    parts = iter(np.atleast_1d(figure.subfigures(sum(rows), 1)))
    readings: list[str] = []
    ranked: list[tuple[int, int]] = []
    if metric is not None:
        shown = head_values(study, metric, image)
        ranked = shown.ranked
        readings.append(_importance_row(next(parts), study, shown))
    if rows[1]:
        readings.append(_reach_row(next(parts), study, image, ranked))
    explain(figure, *readings)
    return figure


def figures_of(study: xr.Dataset, folder: str | Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Draws every figure that the study has the numbers for into `folder`; the files written.

    Raises `UsageError` for an unknown format, and where the study holds no measure of heads.
    """
    refuse_formats(formats)
    written: list[Path] = []
    for name, figure in _whole_set(study):
        written.extend(save(figure, Path(folder) / f"{name}.{kind}") for kind in formats)
    return written


def refuse_formats(formats: Sequence[str]) -> None:
    """Raises `UsageError` unless every format is one that figures can be written as."""
    unknown = [kind for kind in formats if kind not in FORMATS]
    if unknown or not formats:
        raise UsageError(
            f"Figures were asked for as {', '.join(unknown) or 'nothing'}; choose from {', '.join(FORMATS)}."
        )


def _whole_set(study: xr.Dataset) -> Any:
    """(name, figure), one at a time so that no more than one is held."""
    yield "overview", study_overview(study)
    metric = main_metric(study)
    for name in importance_metrics(study):
        yield f"importance_map_{name}", importance_map(study, name)
    if metric is not None:
        yield "importance_line", importance_line(study, metric)
    if "strength_entropy" in study:
        yield "entropy_by_layer", entropy_by_layer(study)
    if "attention_strength" in study:
        for layer, head in _heads_with_strength(study, _ranked(study, metric))[:3]:
            yield f"strength_{head_name(layer, head)}", strength_over_hops(study, layer, head)


# --- parts of figures ------------------------------------------------------------------------------------------------


def _importance_row(part: Any, study: xr.Dataset, shown: HeadValues) -> str:
    n_heads = shown.values.shape[1]
    left, right = part.subplots(1, 2, width_ratios=(min(4.5, 1.3 + 0.28 * n_heads), 6.5))
    cells = panels.heat_map(left, shown)
    left.set_title("Importance of every head")
    _calm(part.colorbar(cells, ax=left, aspect=30, pad=0.02), shown.axis)
    mean = head_values(study, shown.metric) if shown.one_image and study.sizes["image"] > 1 else None
    panels.line(right, shown, mean)
    right.set_title("The same, head by head", pad=14)
    return " ".join(
        [f"Top, {shown.title}:", *shown.reading(), "Band: 95 % interval of the mean." if shown.low is not None else ""]
    )


def _reach_row(part: Any, study: xr.Dataset, image: Image, ranked: list[tuple[int, int]]) -> str:
    shown = head_values(study, "strength_entropy", image)
    tint = _tint(study, image)
    known = _heads_with_strength(study, ranked or shown.ranked) if "attention_strength" in study else []
    axes = part.subplots(1, 2 if known else 1, width_ratios=(5.6, 4.4) if known else None, squeeze=False)[0]
    dots = _entropy_panel(axes[0], study, shown, tint)
    axes[0].set_title("How far heads spread, by layer")
    if dots is not None and tint is not None:
        _calm(part.colorbar(dots, ax=axes[0], aspect=30, pad=0.02), tint.axis)
    if known:
        layer, head = known[0]
        _strength_panel(axes[1], study, layer, head, image)
        which = ", the most important head" if ranked and known[0] == ranked[0] else ""
        axes[1].set_title(f"How far {head_name(layer, head)} looks{which}")
    return " ".join([f"Bottom, {shown.title}:", *shown.reading(), _whiskers(shown)])


def _entropy_panel(axes: Any, study: xr.Dataset, shown: HeadValues, tint: HeadValues | None) -> Any:
    spread: Float[np.ndarray, "bound layer head"] | None = None
    if not shown.one_image:
        numbers = study["strength_entropy"].to_numpy().astype(np.float64)
        there = ~np.isnan(shown.values)
        spread = np.full((2, *there.shape), np.nan)
        spread[:, there] = np.quantile(numbers[:, there], (0.05, 0.95), axis=0)
    return panels.entropy(axes, shown, spread, hops_of_layers(study), tint)


def _strength_panel(axes: Any, study: xr.Dataset, layer: int, head: int, image: Image) -> None:
    values = strengths(study, layer, head)
    at = None if image is None else image_position(study, image)
    unit = str(study["attention_strength"].attrs.get("unit", "mean attention weight per neighbour"))
    panels.strength(axes, values, at, unit, _even_weight(study, layer))


def _even_weight(study: xr.Dataset, layer: int) -> float | None:
    """1 / number of tokens, where the study tells the layer's grid."""
    grids, prefixes = study.attrs.get("grids"), study.attrs.get("prefixes")
    if not grids or not prefixes or not grids[layer]:
        return None
    return float(1.0 / (grids[layer][0] * grids[layer][1] + prefixes[layer]))


def _tint(study: xr.Dataset, image: Image) -> HeadValues | None:
    metric = main_metric(study)
    return None if metric is None else head_values(study, metric, image)


def _ranked(study: xr.Dataset, metric: str | None) -> list[tuple[int, int]]:
    if metric is not None:
        return head_values(study, metric).ranked
    return [(layer, head) for layer in range(study.sizes["layer"]) for head in range(study.sizes["head"])]


def _heads_with_strength(study: xr.Dataset, heads: list[tuple[int, int]]) -> list[tuple[int, int]]:
    known = ~np.isnan(study["attention_strength"].to_numpy()).all(axis=(0, 3))
    return [(layer, head) for layer, head in heads if known[layer, head]]


def _calm(bar: Any, label: str) -> None:
    bar.outline.set_visible(False)
    bar.set_label(label, fontsize=7)
    bar.ax.tick_params(length=2)


# --- words -----------------------------------------------------------------------------------------------------------


def _heading(shown: HeadValues) -> str:
    return shown.title[:1].upper() + shown.title[1:]


def _intervals(shown: HeadValues) -> str:
    return INTERVALS if shown.low is not None else ""


def _unpruned(shown: HeadValues) -> str:
    return "" if shown.unpruned is None else f"Dotted: nothing pruned ({number(shown.unpruned)})."


def _limits(shown: HeadValues) -> str:
    return str(shown.attrs.get("limits", ""))


def _whiskers(shown: HeadValues) -> str:
    return "" if shown.one_image else "Whiskers: 5 to 95 % of the images."


def _of_image(study: xr.Dataset, image: Image) -> str:
    if image is None:
        n_images = study.sizes["image"]
        return f", {n_images:,} images" if n_images > 1 else ""
    at = image_position(study, image)
    return f", image {study['image'].to_numpy()[at]}" if "image" in study.coords else f", image {at}"


def _strength_reading(study: xr.Dataset, layer: int, head: int) -> tuple[str, ...]:
    attrs = study["attention_strength"].attrs
    values = strengths(study, layer, head).mean(0)
    total = float(values.sum())
    near = f"Hops 0 and 1 hold {100 * values[:2].sum() / total:.0f} % of the summed strength." if total > 0 else ""
    source = f"Source: {attrs['source']}." if attrs.get("source") else ""
    return (
        "High at few hops: looks at neighbours. Flat: every distance alike.",
        near,
        source,
        str(attrs.get("limits", "")),
    )


def _overview_title(study: xr.Dataset, image: Image) -> str:
    model = str(study.attrs.get("model", "")) or "Study"
    n_images = study.sizes["image"]
    if image is not None or n_images == 1:
        return f"{model}{_of_image(study, 0 if image is None else image)}"
    return f"{model}, {n_images:,} images"
