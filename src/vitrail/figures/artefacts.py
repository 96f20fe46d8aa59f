"""The figure of artefacts: who writes them, what is left without their writers or with registers, and the maps."""

from typing import Any

import numpy as np
import xarray as xr

from vitrail.figures.style import COOL, LINE, MARK, SOFT, WHISKER, Figure, blank, explain, styled
from vitrail.tokens.artefact_findings import artefact_effects
from vitrail.tokens.outliers import REGISTER_MODELS, outlier_counts

__all__ = ["artefact_trial"]

COLOURS = {
    "as it is": MARK,
    "registers": COOL,
    "random neurons": SOFT,
    "neurons off": COOL,
    "other neurons off": SOFT,
    "heads off": COOL,
    "other heads off": SOFT,
}
NAMES = {"random neurons": "registers, other neurons"}
EFFECTS = {
    "outliers": "outlying patches after L{}",
    "same_top1": "same class",
    "outlier_attention": "attention on them",
    "attention_entropy": "entropy of the map",
    "object_silhouette": "silhouette by object",
    "silhouette": "silhouette, label-free",
}
MAPS = {"token_norm": "length of tokens", "class_attention": "class token's attention"}


@styled
def artefact_trial(trial: xr.Dataset) -> Figure:
    """Causes and cure of tokens of outlying length.

    Args:
        trial: What `vitrail.tokens.artefact_trial.try_registers` gives.

    Returns:
        The figure.
    """
    n_examples = trial.sizes["example"]
    figure = blank(8.4, 4.8 + 1.55 * n_examples, f"Tokens of outlying length: {trial.attrs['name']}")
    heights = [2.3, 2.2, *([1.55 * n_examples] if n_examples else [])]
    parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
    _draw_layers(parts[0], trial)
    _draw_effects(parts[1], trial)
    if n_examples:
        _draw_maps(parts[2], trial)
    explain(
        figure,
        "Off: for every token, the neurons or heads that write most of their length; grey: as many others. Registers: "
        "zero tokens that are given what these neurons would write, after Jiang et al. 2025 (arXiv 2506.08010); grey: "
        "as many other neurons of the same layers. Bars: 95 % intervals over images, where images are enough.",
        "Each map has its own scale." if n_examples else "",
    )
    return figure


def _draw_maps(figure: Any, trial: xr.Dataset) -> None:
    """Photographs with the lengths of their tokens and the class token's attention, before and after."""
    n_examples, worst = trial.sizes["example"], int(trial.attrs["worst_layer"])
    axes = figure.subplots(n_examples, 5, squeeze=False)
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


def _draw_layers(figure: Any, trial: xr.Dataset) -> None:
    """What layers and heads write, and outlying patches by layer with and without registers."""
    with_heads = not trial.attrs["no_heads"]
    left, *middle, right = figure.subplots(1, 3 if with_heads else 2)
    for panel in middle:
        _draw_heads(figure, panel, trial)
    written = trial["written"].to_numpy()
    layers = range(len(written))
    for part, (words, colour) in enumerate((("attention", COOL), ("MLP", MARK))):
        left.bar([at + 0.4 * part - 0.2 for at in layers], written[:, part], width=0.4, color=colour, label=words)
    left.set(xlabel="layer (index)", ylabel="added to the length")
    left.legend(frameon=False, fontsize=6.5)
    counts = outlier_counts(trial)
    for model in REGISTER_MODELS:
        right.plot(
            counts.sel(model=model).to_numpy(), "o-", color=COLOURS[model], markersize=3, label=NAMES.get(model, model)
        )
    right.set(xlabel="after layer (index)", ylabel="outlying patches, mean")
    right.set_ylim(0, 1.55 * (float(counts.max()) or 1))
    right.legend(frameon=False, fontsize=6.5, loc="upper right")
    right.locator_params(axis="x", integer=True)
    for axes in (left, right):
        axes.grid(axis="y", color=LINE, linewidth=0.6)


def _draw_heads(figure: Any, axes: Any, trial: xr.Dataset) -> None:
    written = trial["head_written"].to_numpy()
    largest = float(np.nanmax(np.abs(written))) or 1.0
    image = axes.imshow(written, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
    axes.set_title("written by heads", fontsize=7)
    axes.set(xlabel="head (index)", ylabel="layer (index)")
    axes.set_xticks(range(written.shape[1]))
    axes.set_yticks(range(written.shape[0]))
    figure.colorbar(image, ax=axes, shrink=0.8, label="added to the length")


def _draw_effects(figure: Any, trial: xr.Dataset) -> None:
    """What each model makes of tokens and answers, with its interval."""
    effects = artefact_effects(trial)
    models, names = effects["model"].values.tolist(), effects["effect"].values.tolist()
    panels = figure.subplots(1, len(names), sharey=True)
    for axes, name in zip(panels, names, strict=True):
        axes.set_title(EFFECTS[name].format(trial.attrs["worst_layer"]), fontsize=7)
        for row, model in enumerate(models):
            effect = effects.sel(effect=name, model=model)
            axes.plot([effect["low"], effect["high"]], [row, row], color=WHISKER, linewidth=2.2)
            axes.plot([effect["mean"]], [row], "o", color=COLOURS[model], markersize=4)
        axes.grid(axis="x", color=LINE, linewidth=0.6)
        axes.locator_params(axis="x", nbins=4)
        axes.tick_params(labelsize=6)
    panels[0].set_yticks(range(len(models)), [NAMES.get(model, model) for model in models])
    panels[0].invert_yaxis()
