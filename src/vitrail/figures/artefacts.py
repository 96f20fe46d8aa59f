"""The figure of artefacts: which layer writes them, what registers leave of them, and what maps look like then."""

from typing import Any

import xarray as xr

from vitrail.figures.style import COOL, LINE, MARK, SOFT, Figure, blank, explain, styled
from vitrail.tokens.outliers import outlier_counts

__all__ = ["artefact_trial"]

COLOURS = {"as it is": MARK, "registers": COOL, "random neurons": SOFT}
MAPS = {"token_norm": "length of tokens", "class_attention": "class token's attention"}


@styled
def artefact_trial(trial: xr.Dataset) -> Figure:
    """Causes and cure of tokens of outlying length.

    Args:
        trial: What `vitrail.tokens.artefact_trial.try_registers` gives.

    Returns:
        The figure.
    """
    n_examples, worst = trial.sizes["example"], int(trial.attrs["worst_layer"])
    figure = blank(8.4, 2.6 + 1.55 * n_examples, f"Tokens of outlying length: {trial.attrs['name']}")
    parts: Any = figure.subfigures(2, 1, height_ratios=[2.3, 1.55 * n_examples])
    upper, lower = parts
    _draw_layers(upper, trial)
    axes = lower.subplots(n_examples, 5, squeeze=False)
    for row in range(n_examples):
        axes[row, 0].imshow(trial["photo"][row].to_numpy())
        column = 1
        for name, words in MAPS.items():
            for model in ("as it is", "registers"):
                panel = axes[row, column]
                values = trial[name].sel(model=model)[row].to_numpy().reshape(trial.attrs["grid"])
                panel.imshow(values, cmap="cividis")
                if row == 0:
                    after = f", L{worst}" if name == "token_norm" else ", last"
                    panel.set_title(f"{words}{after}\n{model}: up to {values.max():.3g}", fontsize=6.5)
                else:
                    panel.set_title(f"up to {values.max():.3g}", fontsize=6.8)
                column += 1
        for panel in axes[row]:
            panel.set_axis_off()
    explain(
        figure,
        "Registers: zero tokens that are given what the neurons that write these tokens would write, after Jiang et "
        "al. 2025 (arXiv 2506.08010); grey: as many other neurons of the same layers. Each map has its own scale.",
    )
    return figure


def _draw_layers(figure: Any, trial: xr.Dataset) -> None:
    left, right = figure.subplots(1, 2)
    written = trial["written"].to_numpy()
    layers = range(len(written))
    for part, (words, colour) in enumerate((("attention", COOL), ("MLP", MARK))):
        left.bar([at + 0.4 * part - 0.2 for at in layers], written[:, part], width=0.4, color=colour, label=words)
    left.set(xlabel="layer (index)", ylabel="added to the token's length")
    left.legend(frameon=False, fontsize=6.5)
    counts = outlier_counts(trial)
    for model, colour in COLOURS.items():
        right.plot(counts.sel(model=model).to_numpy(), "o-", color=colour, markersize=3, label=model)
    right.set(xlabel="after layer (index)", ylabel="patches of an image that stand out")
    right.set_ylim(bottom=0)
    right.legend(frameon=False, fontsize=6.5)
    for axes in (left, right):
        axes.grid(axis="y", color=LINE, linewidth=0.6)
