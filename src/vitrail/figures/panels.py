"""The single charts that figures are put together from: each draws one quantity onto given axes."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.collections import LineCollection
from matplotlib.ticker import MaxNLocator

from vitrail.figures.style import (
    BAND,
    COOL,
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
)
from vitrail.figures.values import HeadValues

__all__ = ["dots_by_layer", "entropy", "every", "heat_map", "line", "strength"]

MAX_NUMBERED = (16, 8)
"""Up to so many (layers, heads) the cells of a heat map carry their number."""

LOG_FROM = 30
"""Strengths that differ by more than this factor are drawn on a log scale."""


def heat_map(axes: Any, shown: HeadValues) -> Any:
    """Layers down, heads across, one cell per head, blank where a layer has fewer; returns what a colour bar needs."""
    colours, norm = colour_scale(shown.values)
    n_layers, n_heads = shown.values.shape
    edges = (np.arange(n_heads + 1) - 0.5, np.arange(n_layers + 1) - 0.5)
    width = 0.8 if n_layers * n_heads < 400 else 0.3
    cells = axes.pcolormesh(
        *edges, np.ma.masked_invalid(shown.values), cmap=colours, norm=norm, edgecolors="white", linewidth=width
    )
    if n_layers <= MAX_NUMBERED[0] and n_heads <= MAX_NUMBERED[1]:
        for layer, head in shown.heads:
            value = shown.values[layer, head]
            axes.text(head, layer, number(float(f"{value:.2g}")), ha="center", va="center", fontsize=6,
                      color=ink_on(colours(norm(value))))  # fmt: skip
    axes.set(xlim=(-0.5, n_heads - 0.5), ylim=(n_layers - 0.5, -0.5), xlabel="head (index)", ylabel="layer (index)")
    axes.set_xticks(every(n_heads, 12))
    axes.set_yticks(every(n_layers, 16))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return cells


def dots_by_layer(axes: Any, shown: HeadValues) -> None:
    """Beside the heat map, rows aligned with it: a dot per head, its interval, nothing pruned as a line."""
    n_layers = len(shown.values)
    layers, heads = shown.heads.T
    rows = layers + offsets(shown, 0.32)
    values = shown.values[layers, heads]
    small = len(values) > 300
    if shown.unpruned is not None:
        axes.axvline(shown.unpruned, color=INK, linewidth=0.9, linestyle=(0, (2, 3)))
    if shown.low is not None and shown.high is not None:
        axes.hlines(
            rows, shown.low[layers, heads], shown.high[layers, heads], color=WHISKER, linewidth=0.4 if small else 0.9
        )
    axes.plot(values, rows, "o", color=COOL, markersize=2.0 if small else 3.2, markeredgewidth=0)
    for layer in range(1, n_layers):
        axes.axhline(layer - 0.5, color=LINE, linewidth=0.5, zorder=0)
    place = dict(zip(map(tuple, shown.heads.tolist()), rows, strict=True))
    for layer, head in shown.standing_out:
        value = shown.values[layer, head]
        axes.plot([value], [place[layer, head]], "o", color=MARK, markersize=4, markeredgewidth=0, zorder=4)
        axes.annotate(
            head_name(layer, head), (value, place[layer, head]), xytext=(0, 2.5), textcoords="offset points",
            ha="center", va="bottom", fontsize=6.5, color=MARK, fontweight="bold",
        )  # fmt: skip
    axes.set(ylim=(n_layers - 0.5, -0.5), xlabel=shown.axis)
    axes.tick_params(left=False, labelleft=False)
    axes.spines["left"].set_visible(False)


def line(axes: Any, shown: HeadValues, mean: HeadValues | None = None) -> None:
    """Over the head index, 0 being the unpruned model, with the layers' borders; `mean` goes behind, dashed."""
    layers, heads = shown.heads.T
    index = np.arange(1, len(layers) + 1)
    values = shown.values[layers, heads]
    _layer_borders(axes, layers)
    if shown.low is not None and shown.high is not None:
        axes.fill_between(index, shown.low[layers, heads], shown.high[layers, heads], color=BAND, linewidth=0, zorder=1)
    if mean is not None:
        axes.plot(index, mean.values[layers, heads], color=SOFT, linewidth=1.0, linestyle=(0, (4, 3)), label=mean.whose)
    start = [] if shown.unpruned is None else [shown.unpruned]
    x = index if shown.unpruned is None else np.concatenate([[0], index])
    marker = "o" if len(index) <= 64 else ""
    axes.plot(
        x, [*start, *values], color=COOL, linewidth=1.2, marker=marker, markersize=2.4, label=shown.whose, zorder=3
    )
    if shown.unpruned is not None:
        axes.axhline(shown.unpruned, color=INK, linewidth=0.8, linestyle=(0, (2, 3)), alpha=0.7, zorder=2)
        axes.plot([0], start, "s", color=INK, markersize=3.6, zorder=4)
    _name_extremes(axes, shown)
    zero = "" if shown.unpruned is None else " (0: nothing pruned)"
    axes.set(
        xlim=(-1 if zero else 0, len(index) + 1), xlabel=f"head index, in order of layers{zero}", ylabel=shown.axis
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")


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
            axes.text(start + (width + 1) / 2, 1.01, f"L{layer}", transform=axes.get_xaxis_transform(), ha="center",
                      va="bottom", fontsize=6.5, color=SOFT)  # fmt: skip


def _name_extremes(axes: Any, shown: HeadValues) -> None:
    """Names of the most important heads, on the side that points away from the line."""
    order = {pair: at for at, pair in enumerate(map(tuple, shown.heads.tolist()), start=1)}
    values = shown.values[~np.isnan(shown.values)]
    middle = np.median(values)
    for layer, head in shown.standing_out:
        value, x = shown.values[layer, head], order[layer, head]
        below = value < middle
        axes.plot([x], [value], "o", color=MARK, markersize=4, zorder=5)
        axes.annotate(
            head_name(layer, head), (x, value), xytext=(5, -2 if below else 2), textcoords="offset points", ha="left",
            va="top" if below else "bottom", fontsize=6.5, color=MARK, fontweight="bold", annotation_clip=False,
        )  # fmt: skip
    axes.margins(y=0.12)


def entropy(
    axes: Any, shown: HeadValues, spread: Float[np.ndarray, "bound layer head"] | None,
    n_hops: Int[np.ndarray, "layer"], tint: HeadValues | None,
) -> Any:  # fmt: skip
    """Every head's entropy against its layer; `spread` as whiskers, ln(hops) as a ceiling, colours by `tint`.

    Returns what a colour bar needs, None without a tint.
    """
    layers, heads = shown.heads.T
    x = layers + offsets(shown, 0.3)
    values = shown.values[layers, heads]
    n_layers = len(shown.values)
    if spread is not None:
        axes.vlines(x, spread[0, layers, heads], spread[1, layers, heads], color=WHISKER, linewidth=0.8, zorder=1)
    by_layer = [values[layers == layer].mean() if (layers == layer).any() else np.nan for layer in range(n_layers)]
    axes.plot(
        range(n_layers), by_layer, color=SOFT, linewidth=1.1, linestyle=(0, (4, 3)), zorder=2, label="mean of the layer"
    )
    size = 26 if len(values) <= 160 else 10
    if tint is None:
        dots = axes.scatter(x, values, s=size, color=COOL, edgecolors="white", linewidths=0.4, zorder=3)
    else:
        colours, norm = colour_scale(tint.values)
        dots = axes.scatter(
            x, values, s=size, c=tint.values[layers, heads], cmap=colours, norm=norm, edgecolors=SOFT, linewidths=0.4,
            zorder=3,
        )  # fmt: skip
    _ceiling(axes, n_hops)
    axes.set(xlim=(-0.7, n_layers - 0.3), xlabel="layer (index)", ylabel=shown.axis)
    axes.set_xticks(every(n_layers, 24))
    axes.grid(axis="y")
    return None if tint is None else dots


def _ceiling(axes: Any, n_hops: Int[np.ndarray, "layer"]) -> None:
    """ln(hops), the entropy of a head to which every distance is alike; by layer where grids differ."""
    steps = [
        [(layer - 0.5, np.log(hops)), (layer + 0.5, np.log(hops))] for layer, hops in enumerate(n_hops) if hops > 1
    ]
    if not steps:
        return
    axes.add_collection(LineCollection(steps, colors=INK, linewidths=0.9, linestyles=[(0, (2, 3))], zorder=2))
    alike = len({int(hops) for hops in n_hops if hops > 1}) == 1
    first = int(next(hops for hops in n_hops if hops > 1))
    words = f"ln {first} = {np.log(first):.2f}: all {first} distances alike" if alike else "ln(hops) of the layer"
    top = max(step[0][1] for step in steps)
    axes.annotate(
        words, steps[0][0] if alike else steps[-1][1], xytext=(0, 4), textcoords="offset points", fontsize=6.5,
        color=INK, ha="left" if alike else "right", va="bottom",
    )  # fmt: skip
    bottom, highest = axes.get_ylim()
    axes.set_ylim(top=max(highest, top + 0.09 * (top - bottom)))


def strength(
    axes: Any, values: Float[np.ndarray, "image hop"], at: int | None, unit: str, uniform: float | None
) -> None:
    """Over hops: mean and 5-95 % of the images, and one image on top; `uniform` is even attention to all tokens."""
    hops = np.arange(values.shape[1])
    several = len(values) > 1
    if several:
        low, high = np.quantile(values, (0.05, 0.95), axis=0)
        axes.fill_between(hops, low, high, color=BAND, linewidth=0, label=f"5 to 95 % of {len(values):,} images")
        axes.plot(hops, values.mean(0), color=COOL, marker="o", markersize=3, label="mean")
    if at is not None or not several:
        axes.plot(hops, values[at or 0], color=MARK, marker="o", markersize=3, linewidth=1.2, label="this image")
    if uniform is not None:
        axes.axhline(uniform, color=INK, linewidth=0.9, linestyle=(0, (2, 3)), label="even attention to all tokens")
    axes.set(
        xlim=(-0.3, len(hops) - 0.7),
        xlabel="distance (hops between patches)",
        ylabel=axis_title("attention strength", unit),
    )
    _log_where_far_apart(axes, values.mean(0) if several else values[0])
    axes.set_xticks(every(len(hops), 16))
    axes.grid(axis="y")
    axes.legend(loc="best")


def _log_where_far_apart(axes: Any, values: Float[np.ndarray, "hop"]) -> None:
    """From 0, or with a log scale (said on the axis) where the smallest strength would be a hair above 0."""
    if values.min() > 0 and values.max() > LOG_FROM * values.min():
        axes.set_yscale("log")
        axes.set_ylabel(f"{axes.get_ylabel()}, log scale")
    else:
        axes.set_ylim(bottom=0)


def offsets(shown: HeadValues, half_width: float) -> Float[np.ndarray, "head"]:
    """Small steps to either side that keep the heads of a layer apart, in the order of heads."""
    layers, heads = shown.heads.T
    counts = np.array([(layers == layer).sum() for layer in layers])
    rank = np.array([np.sum((layers == layer) & (heads < head)) for layer, head in shown.heads])
    return np.asarray(np.where(counts > 1, (rank / np.maximum(counts - 1, 1) * 2 - 1) * half_width, 0.0))


def every(n: int, at_most: int) -> list[int]:
    """Indices 0 .. n - 1, thinned to about `at_most` round steps."""
    step = next(step for step in (1, 2, 4, 5, 8, 10, 12, 16, 20, 50, 100, 1000) if n / step <= at_most)
    return list(range(0, n, step))
