"""Figures of two studies compared: every measure, the layers, and the heads."""

from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Int

from vitrail.comparison.findings import ALPHA, heads_by_difference, measures_by_effect
from vitrail.figures.style import (
    BAND,
    COOL,
    DASHES,
    INK,
    LINE,
    MARK,
    SOFT,
    WHISKER,
    Figure,
    axis_title,
    blank,
    explain,
    head_name,
    styled,
)

__all__ = ["heads_against_heads", "layers_side_by_side", "measures_that_differ"]

MOST_PANELS = 9
"""Measures drawn by layer, those that differ most."""

PANELS_PER_ROW = 3
N_NAMED = 4
"""Heads that are named in a scatter: more labels would cover each other."""


@styled
def measures_that_differ(compared: xr.Dataset) -> Figure:
    """Every measure's difference in standard deviations over images, with its interval.

    Args:
        compared: What `vitrail.compare` gives.

    Returns:
        The figure.
    """
    order = measures_by_effect(compared)[::-1]
    table = compared.sel(measure=order)
    effect = table["standardised"].to_numpy()
    is_one = np.isfinite(effect) & (effect != 0)  # elsewhere nothing says how long a standard deviation is
    spread = np.divide(table["mean_difference"].to_numpy(), effect, out=np.full(len(order), np.nan), where=is_one)
    is_alone = table["difference"].notnull().sum("image").to_numpy() < 2
    standardised = np.where(np.isnan(effect) & ~is_alone, 0.0, effect)  # no image differs
    ends = np.stack([table[end].to_numpy() for end in ("low_all", "high_all")]) / spread
    drawn = np.abs([standardised, *ends])
    last = 1.1 * drawn[np.isfinite(drawn)].max(initial=0.1)  # where a difference that is alike in every image stands
    differs = table["p"].to_numpy() < ALPHA
    figure = blank(6.8, 0.7 + 0.24 * len(order), "What differs, in standard deviations of the images' differences")
    axes = figure.subplots()
    for row, each in enumerate(differs):
        colour = MARK if each else SOFT
        low, high = ends[:, row]
        if np.isfinite(low + high):
            axes.hlines(row, low, high, color=colour if each else WHISKER, linewidth=1.4)
        if np.isfinite(standardised[row]):
            axes.plot(standardised[row], row, "o", color=colour, markersize=4)
        elif is_alone[row]:
            _note(axes, row, 0.0, "of one image")
        else:
            _draw_alike(axes, row, np.copysign(last, standardised[row]), colour)
    axes.axvline(0, color=INK, linewidth=0.8, linestyle=DASHES["dotted"])
    axes.set_yticks(range(len(order)), [str(title) for title in table["title"].values])
    axes.set(xlabel=f"less in {compared.attrs['name_b']}   |   more in {compared.attrs['name_b']}")
    axes.set_ylim(-0.7, len(order) - 0.3)
    axes.grid(axis="x")
    explain(
        figure,
        "Mean over the images of the difference of the same image, over the standard deviation of these differences.",
        "Bars: 95 % intervals of all measures together, where images are enough.",
        f"Orange: p below {ALPHA} against random signs, corrected for all measures.",
    )
    return figure


def _draw_alike(axes: Any, row: int, end: float, colour: str) -> None:
    """A difference that is the same in every image, which no axis reaches."""
    axes.plot(end, row, ">" if end > 0 else "<", color=colour, markersize=5)
    _note(axes, row, end, "in every image alike")


def _note(axes: Any, row: int, at: float, words: str) -> None:
    """Words beside a place of a row, towards the middle of the axis."""
    place = {"xytext": (-6, 0), "ha": "right"} if at > 0 else {"xytext": (6, 0), "ha": "left"}
    axes.annotate(words, (at, row), textcoords="offset points", va="center", fontsize=6.5, color=INK, **place)


@styled
def layers_side_by_side(compared: xr.Dataset) -> Figure | None:
    """Both models over depth, for the measures that differ most.

    Args:
        compared: What `vitrail.compare` gives.

    Returns:
        The figure; None where no measure has layers.
    """
    names = [name for name in measures_by_effect(compared) if _has_layers(compared, name)][:MOST_PANELS]
    if not names:
        return None
    columns = min(PANELS_PER_ROW, len(names))
    rows = -(-len(names) // columns)
    figure = blank(max(4.2, 3.1 * columns), 2.3 * rows + 0.9, "Over the depth of the models")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        _draw_layers(axes, compared, name)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, fontsize=7)
    explain(
        figure,
        "Means over images, heads and patches. Depth: 0 the input, 1 the output; of models with different numbers of "
        "blocks, values at the depths of the one with fewer layers.",
        f"Band, where images are enough: 95 % interval of the difference, of all layers together, added to the line of "
        f"{compared.attrs['name_a']}, so that it lies around that of {compared.attrs['name_b']}.",
        f"Filled dots: p below {ALPHA} for that layer against random signs, corrected for all layers of the measure.",
    )
    return figure


def _has_layers(compared: xr.Dataset, name: str) -> bool:
    variable = f"{name}_difference"
    return variable in compared and compared[variable].dims == ("layer",)


def _draw_layers(axes: Any, compared: xr.Dataset, name: str) -> None:
    depth, p = compared["depth"].to_numpy(), compared[f"{name}_p"].to_numpy()
    a, b = (compared[f"{name}_{side}"].to_numpy() for side in ("a", "b"))
    low, high = (a + compared[f"{name}_{end}"].to_numpy() for end in ("low_all", "high_all"))
    axes.fill_between(depth, low, high, color=BAND, linewidth=0)
    axes.plot(depth, a, color=COOL, label=compared.attrs["name_a"])
    axes.plot(depth, b, color=MARK, label=compared.attrs["name_b"])
    differs = p < ALPHA
    axes.plot(depth[differs], b[differs], "o", color=MARK, markersize=3.2)
    axes.plot(depth[~differs], b[~differs], "o", color=MARK, markerfacecolor="white", markersize=3.2)
    words = compared.sel(measure=name)
    axes.set_title(str(words["title"].item()), fontsize=7.6)
    axes.set(xlabel="depth", ylabel=axis_title("", str(words["unit"].item())).strip(" ()"), xlim=(0, 1))
    axes.grid(axis="y")


@styled
def heads_against_heads(compared: xr.Dataset, name: str) -> Figure:
    """Every head of one model against the head of the same index of the other.

    Args:
        compared: What `vitrail.compare` gives, of models with the same heads.
        name: A measure of heads.

    Returns:
        The figure.
    """
    a, b = (compared[f"{name}_head_{side}"].to_numpy() for side in ("a", "b"))
    differs = compared[f"{name}_head_p"].to_numpy() < ALPHA
    layer: Int[np.ndarray, "layer head"] = np.indices(a.shape)[0]
    words = compared.sel(measure=name)
    figure = blank(5.2, 4.6, f"Head by head: {words['title'].item()}")
    axes = figure.subplots()
    present = ~np.isnan(a + b)
    dots = axes.scatter(
        a[present],
        b[present],
        c=layer[present],
        cmap="cividis",
        s=np.where(differs[present], 26, 10),
        linewidths=np.where(differs[present], 0.8, 0.0).tolist(),
        edgecolors=MARK,
    )
    axes.autoscale(enable=False)
    axes.axline((0, 0), slope=1, color=LINE, linewidth=1.0, zorder=0)
    _name_heads(axes, compared, name)
    bar = figure.colorbar(dots, ax=axes, fraction=0.05, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("layer", fontsize=7)
    axes.set(xlabel=axis_title(compared.attrs["name_a"], str(words["unit"].item())), ylabel=compared.attrs["name_b"])
    axes.grid()
    explain(
        figure,
        "Means over images. On the line nothing changed.",
        f"Large dots with an orange edge: p below {ALPHA} against random signs, corrected for all heads.",
    )
    return figure


def _name_heads(axes: Any, compared: xr.Dataset, name: str) -> None:
    a, b = (compared[f"{name}_head_{side}"].to_numpy() for side in ("a", "b"))
    for head in heads_by_difference(compared, name)[:N_NAMED]:
        place = float(a[head]), float(b[head])
        axes.annotate(head_name(*head), place, (4, 4), textcoords="offset points", fontsize=6.5)
