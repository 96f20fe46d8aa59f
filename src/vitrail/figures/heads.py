"""Figures of a study's heads: which matter, how far they look. Functions from a dataset to a matplotlib figure."""

from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from vitrail.errors import UsageError
from vitrail.figures import panels
from vitrail.figures.style import (
    Figure,
    FigureTable,
    blank,
    describe_measure,
    explain,
    head_name,
    number,
    save,
    style_colorbar,
    styled,
    when,
)
from vitrail.heads.head_values import (
    HeadStrength,
    HeadValues,
    head_strength,
    head_values,
    heads_with_strength,
    hops_of_layers,
    importance_metrics,
    main_metric,
)
from vitrail.selection import ImageChoice, describe_choice

__all__ = [
    "FIGURES",
    "entropy_by_layer",
    "heads_by_layer",
    "importance_line",
    "importance_map",
    "save",
    "strength_of_top_heads",
    "strength_over_hops",
    "study_overview",
]

INTERVALS = "Whiskers and bands: 95 % interval of the mean over images, where they are enough for one."
N_TOP = 3
"""Heads whose strength over distance is drawn side by side."""


@styled
def importance_map(study: xr.Dataset, metric: str = "head_probability", image: ImageChoice = None) -> Figure:
    """Layers x heads as a heat map, and beside it each head as a dot with the interval of its mean.

    Args:
        study: A study as `open_study` gives it.
        metric: Name of a measure per image, layer and head.
        image: A position or an id; None takes the mean over images.

    Returns:
        The figure.

    Raises:
        UsageError: The study does not hold the measure per head, or has no such image.
    """
    values = head_values(study, metric, image)
    n_layers, n_heads = values.values.shape
    map_width = min(7.5, max(1.5, 0.36 * n_heads + 1.2))
    height = max(3.0, min(9.5, 0.21 * n_layers + 2.0))
    figure = blank(map_width + 4.0, height, f"{_heading(values)}, {values.description}")
    left, right = figure.subplots(1, 2, width_ratios=(map_width, 3.4))
    cells = panels.heat_map(left, values)
    panels.dots_by_layer(right, values)
    style_colorbar(figure.colorbar(cells, ax=left, aspect=30, pad=0.02), panels.axis_label(values))
    explain(figure, *describe_measure(values.attrs), _intervals(values), _unpruned(values), _limits(values))
    return figure


@styled
def importance_line(study: xr.Dataset, metric: str = "head_probability", image: ImageChoice = None) -> Figure:
    """The measure over the head index, 0 being the unpruned model; the borders of layers are marked.

    For one image of several, the mean over all goes behind it.

    Args:
        study: A study as `open_study` gives it.
        metric: Name of a measure per image, layer and head.
        image: A position or an id; None takes the mean over images.

    Returns:
        The figure.

    Raises:
        UsageError: The study does not hold the measure per head, or has no such image.
    """
    values = head_values(study, metric, image)
    mean = _mean_behind(study, values)
    figure = blank(8.5, 3.3, f"{_heading(values)}, {values.description}")
    axes = figure.subplots()
    panels.line(axes, values, mean)
    if mean is not None:
        axes.legend(loc="best")
    explain(figure, *describe_measure(values.attrs), _intervals(values), _limits(values))
    return figure


@styled
def entropy_by_layer(study: xr.Dataset, image: ImageChoice = None) -> Figure:
    """Entropy of attention strength of every head against its layer, with the upper bound ln(hops).

    Dots are coloured by importance where the study holds it.

    Args:
        study: A study as `open_study` gives it.
        image: A position or an id; None takes the mean over images.

    Returns:
        The figure.

    Raises:
        UsageError: The study holds no entropy, or has no such image.
    """
    values = head_values(study, "strength_entropy", image)
    figure = blank(6.5, 3.8, f"How far heads spread, {values.description}")
    axes = figure.subplots()
    tint = _tint(study, image)
    dots = panels.dots_over_layers(axes, values, hops_of_layers(study), tint)
    if dots is not None and tint is not None:
        style_colorbar(figure.colorbar(dots, ax=axes, aspect=30, pad=0.02), panels.axis_label(tint))
    axes.legend(loc="lower right")
    explain(figure, *describe_measure(values.attrs), _whiskers(values), "Dashed: mean of the layer.")
    return figure


@styled
def heads_by_layer(study: xr.Dataset, metric: str, title: str, image: ImageChoice = None) -> Figure:
    """A measure of every head against its layer, with the spread over images.

    Args:
        study: A study as `open_study` gives it.
        metric: Name of a measure per image, layer and head.
        title: Title of the figure.
        image: A position or an id; None takes the mean over images.

    Returns:
        The figure.

    Raises:
        UsageError: The study does not hold the measure per head, or has no such image.
    """
    values = head_values(study, metric, image)
    figure = blank(6.5, 3.4, f"{title}, {values.description}")
    axes = figure.subplots()
    panels.dots_over_layers(axes, values, None, None)
    axes.legend(loc="best")
    sentences = describe_measure(values.attrs)
    explain(figure, "A dot is a head.", *sentences, _whiskers(values), "Dashed: mean of the layer.")
    return figure


@styled
def strength_over_hops(study: xr.Dataset, layer: int, head: int, image: ImageChoice = None) -> Figure:
    """Attention strength of one head over distance: mean and 5-95 % of the images, one image on top of them.

    Args:
        study: A study that holds `attention_strength`.
        layer: Index of the layer.
        head: Index of the head.
        image: An image to draw on top, by position or id; None: none.

    Returns:
        The figure.

    Raises:
        UsageError: The study holds no strength, or has no such head or image.
    """
    strength = head_strength(study, layer, head, image)
    figure = blank(5.6, 3.4, f"How far {head_name(layer, head)} looks{_of_image(study, image)}")
    panels.strength(figure.subplots(), strength, _strength_unit(study))
    explain(figure, *_strength_explanation(study, strength))
    return figure


@styled
def strength_of_top_heads(study: xr.Dataset, image: ImageChoice = None) -> Figure:
    """Attention strength over distance of the three most important heads that have one, side by side.

    Args:
        study: A study that holds `attention_strength`.
        image: An image to draw on top, by position or id; None: none.

    Returns:
        The figure.

    Raises:
        UsageError: The study holds no strength, or has no such image.
    """
    heads = heads_with_strength(study)[:N_TOP]
    if not heads:
        raise UsageError("Strength over hops was asked for; no head of this study has any. Use --measures heads.")
    ranked = "most important " if main_metric(study) is not None else "first "
    title = f"How far the {ranked}heads look{_of_image(study, image)}"
    figure = blank(3.1 * len(heads) + 0.4, 3.4, title)
    for axes, (layer, head) in zip(figure.subplots(1, len(heads), squeeze=False)[0], heads, strict=True):
        panels.strength(axes, head_strength(study, layer, head, image), _strength_unit(study))
        axes.set_title(head_name(layer, head))
        if axes is not figure.axes[0]:
            axes.set_ylabel("log scale" if axes.get_yscale() == "log" else "")
            axes.get_legend().remove()
    explain(figure, *_strength_explanation(study, None))
    return figure


@styled
def study_overview(study: xr.Dataset, image: ImageChoice = None) -> Figure:
    """One page: importance as map and line, entropy against layer, strength of the most important head.

    Panels of what the study does not hold are left out.

    Args:
        study: A study as `open_study` gives it.
        image: A position or an id; None takes the mean over images.

    Returns:
        The figure.

    Raises:
        UsageError: The study holds neither importance nor entropy, or has no such image.
    """
    metric = main_metric(study)
    with_entropy = "strength_entropy" in study
    n_rows = (metric is not None) + with_entropy
    if not n_rows:
        raise UsageError(
            "An overview was asked for; this study holds no measure of heads. Study it with --measures heads."
        )
    figure = blank(11.0, 3.9 * n_rows + 0.5, _overview_title(study, image))
    rows = iter(figure.subfigures(n_rows, 1, squeeze=False)[:, 0])
    sentences: list[str] = []
    ranked: list[tuple[int, int]] | None = None
    if metric is not None:
        values = head_values(study, metric, image)
        ranked = values.ranked
        sentences.append(_draw_importance(next(rows), study, values))
    if with_entropy:
        sentences.append(_draw_reach(next(rows), study, image, ranked))
    explain(figure, *sentences)
    return figure


def _draw_importance(part: Any, study: xr.Dataset, values: HeadValues) -> str:
    n_heads = values.values.shape[1]
    left, right = part.subplots(1, 2, width_ratios=(min(4.5, 1.3 + 0.28 * n_heads), 6.5))
    cells = panels.heat_map(left, values)
    left.set_title("Importance of every head")
    style_colorbar(part.colorbar(cells, ax=left, aspect=30, pad=0.02), panels.axis_label(values))
    panels.line(right, values, _mean_behind(study, values))
    right.set_title("The same, head by head", pad=14)
    band = "Band: 95 % interval of the mean." if values.low is not None else ""
    return " ".join([f"Top, {values.title}:", *describe_measure(values.attrs), band])


def _draw_reach(part: Any, study: xr.Dataset, image: ImageChoice, ranked: list[tuple[int, int]] | None) -> str:
    values = head_values(study, "strength_entropy", image)
    tint = _tint(study, image)
    heads = heads_with_strength(study, values.ranked if ranked is None else ranked)
    axes = part.subplots(1, 2 if heads else 1, width_ratios=(5.6, 4.4) if heads else None, squeeze=False)[0]
    dots = panels.dots_over_layers(axes[0], values, hops_of_layers(study), tint)
    axes[0].set_title("How far heads spread, by layer")
    if dots is not None and tint is not None:
        style_colorbar(part.colorbar(dots, ax=axes[0], aspect=30, pad=0.02), panels.axis_label(tint))
    if heads:
        layer, head = heads[0]
        panels.strength(axes[1], head_strength(study, layer, head, image), _strength_unit(study))
        which = ", the most important head" if ranked and heads[0] == ranked[0] else ""
        axes[1].set_title(f"How far {head_name(layer, head)} looks{which}")
    return " ".join([f"Bottom, {values.title}:", *describe_measure(values.attrs), _whiskers(values)])


def _mean_behind(study: xr.Dataset, values: HeadValues) -> HeadValues | None:
    """The mean over all images, to go behind one of several."""
    return head_values(study, values.metric) if values.one_image and study.sizes["image"] > 1 else None


def _tint(study: xr.Dataset, image: ImageChoice) -> HeadValues | None:
    metric = main_metric(study)
    return None if metric is None else head_values(study, metric, image)


def _heading(values: HeadValues) -> str:
    return values.title[:1].upper() + values.title[1:]


def _intervals(values: HeadValues) -> str:
    return INTERVALS if values.low is not None else ""


def _unpruned(values: HeadValues) -> str:
    return "" if values.unpruned is None else f"Dotted: nothing pruned ({number(values.unpruned)})."


def _limits(values: HeadValues) -> str:
    return str(values.attrs.get("limits", ""))


def _whiskers(values: HeadValues) -> str:
    return "" if values.one_image else "Whiskers: 5 to 95 % of the images."


def _of_image(study: xr.Dataset, image: ImageChoice) -> str:
    n_images = study.sizes["image"]
    if image is None:
        return f", {n_images:,} images" if n_images > 1 else ""
    return f", {describe_choice(study, image)}"


def _strength_unit(study: xr.Dataset) -> str:
    return str(study["attention_strength"].attrs.get("unit", "mean attention weight per neighbour"))


def _strength_explanation(study: xr.Dataset, strength: HeadStrength | None) -> tuple[str, ...]:
    attrs = study["attention_strength"].attrs
    near = ""
    if strength is not None and not np.isnan(strength.near_share):
        near = f"Hops 0 and 1 hold {100 * strength.near_share:.0f} % of the summed strength."
    _, _, source = describe_measure(attrs)
    how = "High at few hops: looks at neighbours. Flat: every distance alike."
    return how, near, source, str(attrs.get("limits", ""))


def _overview_title(study: xr.Dataset, image: ImageChoice) -> str:
    model = str(study.attrs.get("model", "")) or "Study"
    n_images = study.sizes["image"]
    if image is not None or n_images == 1:
        return f"{model}{_of_image(study, 0 if image is None else image)}"
    return f"{model}, {n_images:,} images"


def _has_overview(study: xr.Dataset) -> bool:
    return main_metric(study) is not None or "strength_entropy" in study


def _main_importance_line(study: xr.Dataset) -> Figure | None:
    metric = main_metric(study)
    return None if metric is None else importance_line(study, metric)


def _importance_map_where_measured(study: xr.Dataset, metric: str) -> Figure | None:
    return importance_map(study, metric) if metric in study else None


FIGURES: FigureTable = (
    ("overview", when(_has_overview, study_overview)),
    *(
        (f"importance_map_{metric}", partial(_importance_map_where_measured, metric=metric))
        for metric in importance_metrics()
    ),
    ("importance_line", _main_importance_line),
    ("entropy_by_layer", when(lambda study: "strength_entropy" in study, entropy_by_layer)),
    ("strength_of_top_heads", when(heads_with_strength, strength_of_top_heads)),
)
