"""Figure of cumulative pruning: accuracy over the number of heads pruned, by every ranking and by orders at random."""

from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.ticker import MaxNLocator

from vitrail.errors import UsageError
from vitrail.figures.style import BAND, COOL, INK, MARK, SOFT, blank, explain, styled
from vitrail.heads.ranking import Area, Curves, area_table

__all__ = ["pruning_curves"]

MAX_SHOWN = 12


@styled
def pruning_curves(curves: Curves, model: str = "", *, seed: int = 0) -> Any:
    """A small chart per ranking, the best first: accuracy with its least and its most important heads pruned first, the
    range and mean of the random orders behind; the last chart has the areas between with their intervals.

    Raises `UsageError` where there is no ranking.
    """
    if not curves.least:
        raise UsageError("Pruning curves were to be drawn; there is no ranking among them.")
    table = area_table(curves, seed=seed)
    shown = list(table)[:MAX_SHOWN]
    n_columns = min(3, len(shown) + 1)
    n_rows = -(-(len(shown) + 1) // n_columns)
    title = f"Accuracy with heads pruned one after the other{f', {model}' if model else ''}"
    figure = blank(2.9 * n_columns, 2.15 * n_rows + 0.9, title)
    grid = figure.subplots(n_rows, n_columns, squeeze=False)
    for at, (axes, name) in enumerate(zip(grid.flat, shown, strict=False)):
        _curve(axes, curves, name, table[name])
        axes.set_ylabel("top-1 accuracy" if at % n_columns == 0 else "")
        axes.set_xlabel("heads pruned" if at + n_columns >= len(shown) else "")
    grid.flat[0].legend(loc="best", fontsize=6, handlelength=1.8)
    _areas(grid.flat[len(shown)], table, shown)
    for axes in list(grid.flat)[len(shown) + 1 :]:
        axes.set_visible(False)
    n_orders, _, n_some = curves.random.shape
    explain(
        figure,
        f"Rankings come from other images than these {next(iter(curves.least.values())).shape[1]:,}. A ranking that "
        "knows which heads matter lies high with its least important heads pruned first (blue) and low with its most "
        f"important first (orange). Grey: {n_orders} orders at random, range and mean, on {n_some} of the images. "
        "Area: mean accuracy between blue and orange over all numbers of heads, with 95 % interval (bootstrap over "
        "images). Our construction, after Li et al. 2023 (arXiv 2303.13731).",
    )
    return figure


def _curve(axes: Any, curves: Curves, name: str, area: Area) -> None:
    counts = curves.counts
    chance: Float[np.ndarray, "order k"] = curves.random.mean(-1)
    axes.fill_between(counts, chance.min(0), chance.max(0), color="#e9e7e0", linewidth=0, label="random, range")
    axes.plot(counts, chance.mean(0), color=SOFT, linewidth=1.0, linestyle=(0, (4, 3)), label="random, mean")
    axes.plot(counts, curves.least[name].mean(-1), "o-", color=COOL, markersize=2.6, label="least important first")
    axes.plot(counts, curves.most[name].mean(-1), "s-", color=MARK, markersize=2.6, label="most important first")
    axes.set(ylim=(0, 1), xlim=(0, counts[-1]))
    axes.set_title(f"{name}   area {area.between[0]:.2f}")
    axes.grid(axis="y")


def _areas(axes: Any, table: dict[str, Area], shown: list[str]) -> None:
    """Areas between the two curves, a row per ranking."""
    rows = np.arange(len(shown))
    for row, name in zip(rows, shown, strict=True):
        value, low, high = table[name].between
        axes.hlines(row, low, high, color=BAND, linewidth=5)
        axes.plot([value], [row], "o", color=COOL, markersize=3.6)
    axes.axvline(0, color=INK, linewidth=0.9, linestyle=(0, (2, 3)))
    axes.set_yticks(rows, shown)
    axes.set(ylim=(len(shown) - 0.5, -0.5), xlabel="area between (accuracy)")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_title("What the rankings know")
    axes.tick_params(left=False)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
