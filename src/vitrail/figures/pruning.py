"""Figure of cumulative pruning: accuracy over the number of heads pruned, by every ranking and by orders at random."""

from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from vitrail.errors import UsageError
from vitrail.figures.style import BAND, COOL, DASHES, INK, MARK, SOFT, Figure, blank, explain, styled
from vitrail.pruning.ranking import Area, Curves, area_table

__all__ = ["pruning_curves"]

CHANCE = "#e9e7e0"
"""What orders at random reach."""

MAX_RANKINGS = 12
"""Rankings that are drawn, the best: four rows of three."""


@styled
def pruning_curves(curves: Curves, model: str = "", *, seed: int = 0) -> Figure:
    """A small chart per ranking, the best first: accuracy with the least and the most important heads pruned first.

    Range and mean of the random orders go behind; the last chart has the areas between with their intervals.

    Args:
        curves: Which images are answered correctly after pruning.
        model: Name of the model, for the title.
        seed: Of the bootstrap.

    Returns:
        The figure.

    Raises:
        UsageError: There is no ranking.
    """
    if not curves.least:
        raise UsageError("Pruning curves were to be drawn; there is no ranking among them.")
    table = area_table(curves, seed=seed)
    names = list(table)[:MAX_RANKINGS]
    n_columns = min(3, len(names) + 1)
    n_rows = -(-(len(names) + 1) // n_columns)
    correctness = curves.labels.correctness
    title = f"{correctness[0].upper()}{correctness[1:]} with heads pruned one after the other"
    title = f"{title}, {model}" if model else title
    figure = blank(2.9 * n_columns, 2.15 * n_rows + 0.9, title)
    grid = figure.subplots(n_rows, n_columns, squeeze=False)
    for at, (axes, name) in enumerate(zip(grid.flat, names, strict=False)):
        _draw_curve(axes, curves, name, table[name])
        axes.set_ylabel(correctness.replace(" with ", "\nwith ") if at % n_columns == 0 else "")
        axes.set_xlabel("heads pruned" if at + n_columns >= len(names) else "")
    grid.flat[0].legend(loc="best", fontsize=6, handlelength=1.8)
    _draw_areas(grid.flat[len(names)], table, names, correctness.replace(" with ", "\nwith "))
    for axes in list(grid.flat)[len(names) + 1 :]:
        axes.set_visible(False)
    n_orders, _, n_some = curves.random.shape
    explain(
        figure,
        f"Rankings come from other images than these {next(iter(curves.least.values())).shape[1]:,}. A ranking that "
        "knows which heads matter lies high with its least important heads pruned first (blue) and low with its most "
        f"important first (orange). Grey: {n_orders} orders at random, range and mean, on {n_some} of the images. "
        f"Area: mean {correctness} between blue and orange over all numbers of heads, with 95 % interval over "
        f"images{_words_of_chance(table)}. Our construction, after Li et al. 2023 (arXiv 2303.13731).",
    )
    return figure


def _words_of_chance(table: dict[str, Area]) -> str:
    if not np.isfinite(next(iter(table.values())).chance):
        return ""
    n = len(table)
    lie = f"{n} rankings that know nothing lie" if n > 1 else "a ranking that knows nothing lies"
    return f"; the grey band is where {lie} (95 %, by the spread of the orders)"


def _draw_curve(axes: Any, curves: Curves, name: str, area: Area) -> None:
    counts = curves.counts
    chance = curves.random_accuracy()
    axes.fill_between(counts, chance.lowest, chance.highest, color=CHANCE, linewidth=0, label="random, range")
    axes.plot(counts, chance.mean, color=SOFT, linewidth=1.0, linestyle=DASHES["dashed"], label="random, mean")
    axes.plot(counts, curves.accuracy("least", name), "o-", color=COOL, markersize=2.6, label="least important first")
    axes.plot(counts, curves.accuracy("most", name), "s-", color=MARK, markersize=2.6, label="most important first")
    axes.set(ylim=(0, 1), xlim=(0, counts[-1]))
    axes.set_title(f"{name}   area {area.between[0]:.2f}")
    axes.grid(axis="y")


def _draw_areas(axes: Any, table: dict[str, Area], names: list[str], correctness: str) -> None:
    """Areas between the two curves, a row per ranking, before what chance gives."""
    rows = np.arange(len(names))
    for row, name in zip(rows, names, strict=True):
        value, low, high = table[name].between
        axes.hlines(row, low, high, color=BAND, linewidth=5)
        axes.plot([value], [row], "o", color=COOL, markersize=3.6)
    chance = next(iter(table.values())).chance
    if np.isfinite(chance):
        ends = np.abs([table[name].between for name in names])
        axes.axvspan(-chance, chance, color=CHANCE, linewidth=0, zorder=0)
        if (far := 1.1 * float(np.nanmax(ends))) < chance:  # the band of few orders would leave no room for the areas
            axes.set_xlim(-far, far)
    axes.axvline(0, color=INK, linewidth=0.9, linestyle=DASHES["dotted"])
    axes.set_yticks(rows, names)
    axes.set(ylim=(len(names) - 0.5, -0.5), xlabel=f"area between ({correctness})")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_title("What the rankings know")
    axes.tick_params(left=False)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
