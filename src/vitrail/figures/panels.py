"""The single charts that figures are put together from: each draws one quantity onto given axes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.collections import LineCollection
from matplotlib.ticker import MaxNLocator

from vitrail.figures.style import (
    BAND,
    COOL,
    DASHES,
    INK,
    LINE,
    MARK,
    SOFT,
    WHISKER,
    axis_title,
    colour_scale,
    head_name,
    ink_on,
    number,
    spaced_indices,
)
from vitrail.heads.head_values import HeadStrength, HeadValues

__all__ = ["axis_label", "dots_by_layer", "dots_over_layers", "heat_map", "line", "strength"]

Point = tuple[float | int, float | int]

MAX_NUMBERED = (16, 8)
"""Up to so many (layers, heads) the cells of a heat map carry their number: more would not be readable."""

MANY_CELLS = 400
"""From so many cells the white lines between them are thin: they would cover the colours."""

MANY_DOTS = 300
"""From so many dots in a column they and their whiskers are small."""

MAX_WITH_MARKERS = 64
"""Up to so many heads the line has a marker at each."""

LOG_FROM = 30
"""Strengths that differ by more than this factor are drawn on a log scale."""

NAME_POINTS = 6.5
LINE_HEIGHT, CHARACTER_WIDTH = 1.3, 0.6
"""Of the names of outstanding heads: height of a line in sizes of the font, width of a character in such heights."""

ROOM_ABOVE_CEILING = 0.09
"""Free height above the line ln(hops) for its words, as a share of the axis."""


def axis_label(values: HeadValues) -> str:
    """Title and unit of a measure for an axis or a colour bar.

    Args:
        values: The measure.

    Returns:
        The text, in lines.
    """
    return axis_title(values.title, values.unit)


def heat_map(axes: Any, head_values: HeadValues) -> Any:
    """Draws layers down, heads across, one cell per head; blank where a layer has fewer.

    Args:
        axes: Where to draw.
        head_values: One number per head.

    Returns:
        The cells, for a colour bar.
    """
    colours, norm = colour_scale(head_values.values)
    n_layers, n_heads = head_values.values.shape
    edges = (np.arange(n_heads + 1) - 0.5, np.arange(n_layers + 1) - 0.5)
    width = 0.8 if n_layers * n_heads < MANY_CELLS else 0.3
    cells = axes.pcolormesh(
        *edges, np.ma.masked_invalid(head_values.values), cmap=colours, norm=norm, edgecolors="white", linewidth=width
    )
    if n_layers <= MAX_NUMBERED[0] and n_heads <= MAX_NUMBERED[1]:
        for layer, head in head_values.heads:
            value = head_values.values[layer, head]
            axes.text(
                head,
                layer,
                number(float(f"{value:.2g}")),
                ha="center",
                va="center",
                fontsize=6,
                color=ink_on(colours(norm(value))),
            )
    axes.set(xlim=(-0.5, n_heads - 0.5), ylim=(n_layers - 0.5, -0.5), xlabel="head (index)", ylabel="layer (index)")
    axes.set_xticks(spaced_indices(n_heads, 12))
    axes.set_yticks(spaced_indices(n_layers, 16))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return cells


def dots_by_layer(axes: Any, head_values: HeadValues) -> None:
    """Draws a dot per head with its interval, in rows that align with the heat map's; nothing pruned as a line.

    Args:
        axes: Where to draw.
        head_values: One number per head.
    """
    n_layers = len(head_values.values)
    layers, heads = head_values.heads.T
    rows = layers + _offsets(head_values, 0.32)
    values = head_values.values[layers, heads]
    small = len(values) > MANY_DOTS
    if head_values.unpruned is not None:
        axes.axvline(head_values.unpruned, color=INK, linewidth=0.9, linestyle=DASHES["dotted"])
    if head_values.low is not None and head_values.high is not None:
        axes.hlines(
            rows,
            head_values.low[layers, heads],
            head_values.high[layers, heads],
            color=WHISKER,
            linewidth=0.4 if small else 0.9,
        )
    axes.plot(values, rows, "o", color=COOL, markersize=2.0 if small else 3.2, markeredgewidth=0)
    for layer in range(1, n_layers):
        axes.axhline(layer - 0.5, color=LINE, linewidth=0.5, zorder=0)
    axes.set(ylim=(n_layers - 0.5, -0.5), xlabel=axis_label(head_values))
    axes.tick_params(left=False, labelleft=False)
    axes.spines["left"].set_visible(False)
    row_of_head = dict(zip(map(tuple, head_values.heads.tolist()), rows, strict=True))
    outstanding = {pair: (float(head_values.values[pair]), row_of_head[pair]) for pair in head_values.outstanding}
    for value, row in outstanding.values():
        axes.plot([value], [row], "o", color=MARK, markersize=4, markeredgewidth=0, zorder=4)
    for pair in _readable(axes, outstanding):
        _name_head(axes, pair, outstanding[pair], (0, 2.5), ha="center", va="bottom")


def line(axes: Any, head_values: HeadValues, mean: HeadValues | None = None) -> None:
    """Draws a measure over the head index, 0 being the unpruned model, with the layers' borders.

    Args:
        axes: Where to draw.
        head_values: One number per head.
        mean: The mean over images, to go behind one of them, dashed.
    """
    layers, heads = head_values.heads.T
    index = np.arange(1, len(layers) + 1)
    values = head_values.values[layers, heads]
    _layer_borders(axes, layers)
    if head_values.low is not None and head_values.high is not None:
        axes.fill_between(
            index, head_values.low[layers, heads], head_values.high[layers, heads], color=BAND, linewidth=0, zorder=1
        )
    if mean is not None:
        axes.plot(
            index,
            mean.values[layers, heads],
            color=SOFT,
            linewidth=1.0,
            linestyle=DASHES["dashed"],
            label=mean.description,
        )
    start = [] if head_values.unpruned is None else [head_values.unpruned]
    x = index if head_values.unpruned is None else np.concatenate([[0], index])
    marker = "o" if len(index) <= MAX_WITH_MARKERS else ""
    axes.plot(
        x,
        [*start, *values],
        color=COOL,
        linewidth=1.2,
        marker=marker,
        markersize=2.4,
        label=head_values.description,
        zorder=3,
    )
    if head_values.unpruned is not None:
        axes.axhline(head_values.unpruned, color=INK, linewidth=0.8, linestyle=DASHES["dotted"], alpha=0.7, zorder=2)
        axes.plot([0], start, "s", color=INK, markersize=3.6, zorder=4)
    zero = "" if head_values.unpruned is None else " (0: nothing pruned)"
    axes.set(
        xlim=(-1 if zero else 0, len(index) + 1),
        xlabel=f"head index, in order of layers{zero}",
        ylabel=axis_label(head_values),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
    _name_extremes(axes, head_values)


def _layer_borders(axes: Any, layers: Int[np.ndarray, "head"]) -> None:
    """A faint line where a layer begins, and its name at the top where there is room."""
    names = sorted(set(layers.tolist()))
    starts = [int(np.flatnonzero(layers == layer)[0]) for layer in names]
    step = -(-len(names) // 16)
    for at, (layer, start) in enumerate(zip(names, starts, strict=True)):
        if at % 2:
            stop = starts[at + 1] if at + 1 < len(starts) else len(layers)
            axes.axvspan(start + 0.5, stop + 0.5, color="#f7f6f2", zorder=0, linewidth=0)
        if at % step == 0:
            width = int((layers == layer).sum())
            axes.text(
                start + (width + 1) / 2,
                1.01,
                f"L{layer}",
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize=6.5,
                color=SOFT,
            )


def _name_extremes(axes: Any, head_values: HeadValues) -> None:
    """Names of the most important heads, on the side that points away from the line."""
    order = {pair: at for at, pair in enumerate(map(tuple, head_values.heads.tolist()), start=1)}
    outstanding = {pair: (order[pair], float(head_values.values[pair])) for pair in head_values.outstanding}
    for x, value in outstanding.values():
        axes.plot([x], [value], "o", color=MARK, markersize=4, zorder=5)
    axes.margins(y=0.12)
    for pair in _readable(axes, outstanding):
        below = outstanding[pair][1] < head_values.median
        _name_head(axes, pair, outstanding[pair], (5, -2 if below else 2), ha="left", va="top" if below else "bottom")


def _readable(axes: Any, places: Mapping[tuple[int, int], Point]) -> list[tuple[int, int]]:
    """The heads, the first before the others, whose names cover no other's; the axes have their limits."""
    axes.get_xlim(), axes.get_ylim()  # settles limits that follow the data
    height = LINE_HEIGHT * NAME_POINTS / 72 * axes.figure.dpi
    kept: dict[tuple[int, int], Any] = {}
    for pair, place in places.items():
        at, width = axes.transData.transform(place), len(head_name(*pair)) * CHARACTER_WIDTH * height
        if all(abs(at[0] - other[0]) >= width or abs(at[1] - other[1]) >= height for other in kept.values()):
            kept[pair] = at
    return list(kept)


def _name_head(axes: Any, pair: tuple[int, int], place: Point, offset: Point, **words: Any) -> None:
    axes.annotate(
        head_name(*pair),
        place,
        xytext=offset,
        textcoords="offset points",
        fontsize=NAME_POINTS,
        color=MARK,
        fontweight="bold",
        annotation_clip=False,
        **words,
    )


def dots_over_layers(
    axes: Any, head_values: HeadValues, n_hops: Int[np.ndarray, "layer"] | None, tint: HeadValues | None
) -> Any:
    """Draws every head's value against its layer: a dot, its spread over images, and the mean of the layer.

    Args:
        axes: Where to draw.
        head_values: One number per head.
        n_hops: Hop distances of each layer, whose logarithm is drawn as the upper bound of an entropy; None: no bound.
        tint: What the dots are coloured by; None: one colour.

    Returns:
        The dots, for a colour bar; None without a tint.
    """
    layers, heads = head_values.heads.T
    x = layers + _offsets(head_values, 0.3)
    values = head_values.values[layers, heads]
    n_layers = len(head_values.values)
    if head_values.spread is not None:
        low, high = head_values.spread[:, layers, heads]
        axes.vlines(x, low, high, color=WHISKER, linewidth=0.8, zorder=1)
    means = head_values.layer_means
    axes.plot(
        range(n_layers),
        means,
        color=SOFT,
        linewidth=1.1,
        linestyle=DASHES["dashed"],
        zorder=2,
        label="mean of the layer",
    )
    size = 26 if len(values) <= MANY_DOTS // 2 else 10
    if tint is None:
        dots = axes.scatter(x, values, s=size, color=COOL, edgecolors="white", linewidths=0.4, zorder=3)
    else:
        colours, norm = colour_scale(tint.values)
        dots = axes.scatter(
            x,
            values,
            s=size,
            c=tint.values[layers, heads],
            cmap=colours,
            norm=norm,
            edgecolors=SOFT,
            linewidths=0.4,
            zorder=3,
        )
    if n_hops is not None:
        _draw_ceiling(axes, n_hops)
    axes.set(xlim=(-0.7, n_layers - 0.3), xlabel="layer (index)", ylabel=axis_label(head_values))
    axes.set_xticks(spaced_indices(n_layers, 24))
    axes.grid(axis="y")
    return None if tint is None else dots


def _draw_ceiling(axes: Any, n_hops: Int[np.ndarray, "layer"]) -> None:
    """ln(hops), the entropy of a head to which every distance is alike; by layer where grids differ."""
    steps = [
        [(layer - 0.5, np.log(hops)), (layer + 0.5, np.log(hops))] for layer, hops in enumerate(n_hops) if hops > 1
    ]
    if not steps:
        return
    axes.add_collection(LineCollection(steps, colors=INK, linewidths=0.9, linestyles=[DASHES["dotted"]], zorder=2))
    alike = len({int(hops) for hops in n_hops if hops > 1}) == 1
    first = int(next(hops for hops in n_hops if hops > 1))
    words = f"ln {first} = {np.log(first):.2f}: all {first} distances alike" if alike else "ln(hops) of the layer"
    top = max(step[0][1] for step in steps)
    axes.annotate(
        words,
        steps[0][0] if alike else steps[-1][1],
        xytext=(0, 4),
        textcoords="offset points",
        fontsize=6.5,
        color=INK,
        ha="left" if alike else "right",
        va="bottom",
    )
    bottom, highest = axes.get_ylim()
    axes.set_ylim(top=max(highest, top + ROOM_ABOVE_CEILING * (top - bottom)))


def strength(axes: Any, head_strength: HeadStrength, unit: str) -> None:
    """Draws the strength of one head over hops: mean and 5-95 % of the images, one image, even attention.

    Args:
        axes: Where to draw.
        head_strength: What to draw.
        unit: Unit of a strength.
    """
    hops = np.arange(len(head_strength.mean))
    if head_strength.spread is not None:
        label = f"5 to 95 % of {head_strength.n_images:,} images"
        axes.fill_between(hops, *head_strength.spread, color=BAND, linewidth=0, label=label)
        axes.plot(hops, head_strength.mean, color=COOL, marker="o", markersize=3, label="mean")
    if head_strength.of_image is not None:
        axes.plot(hops, head_strength.of_image, color=MARK, marker="o", markersize=3, linewidth=1.2, label="this image")
    if head_strength.uniform is not None:
        label = "even attention to all tokens"
        axes.axhline(head_strength.uniform, color=INK, linewidth=0.9, linestyle=DASHES["dotted"], label=label)
    axes.set(
        xlim=(-0.3, len(hops) - 0.7),
        xlabel="distance (hops between patches)",
        ylabel=axis_title("attention strength", unit),
    )
    _log_where_far_apart(axes, head_strength.mean)
    axes.set_xticks(spaced_indices(len(hops), 16))
    axes.grid(axis="y")
    axes.legend(loc="best")


def _log_where_far_apart(axes: Any, values: Float[np.ndarray, "hop"]) -> None:
    """From 0, or with a log scale (said on the axis) where the smallest strength would be a hair above 0."""
    if values.min() > 0 and values.max() > LOG_FROM * values.min():
        axes.set_yscale("log")
        axes.set_ylabel(f"{axes.get_ylabel()}, log scale")
    else:
        axes.set_ylim(bottom=0)


def _offsets(head_values: HeadValues, half_width: float) -> Float[np.ndarray, "head"]:
    """Small steps to either side that keep the heads of a layer apart, in the order of heads."""
    layers, heads = head_values.heads.T
    counts = np.array([(layers == layer).sum() for layer in layers])
    rank = np.array([np.sum((layers == layer) & (heads < head)) for layer, head in head_values.heads])
    return np.asarray(np.where(counts > 1, (rank / np.maximum(counts - 1, 1) * 2 - 1) * half_width, 0.0))
