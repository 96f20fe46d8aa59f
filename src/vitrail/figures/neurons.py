"""Figures of the neurons room: views, filters, colours and similarity of tokens, grouping, robustness, relevance.

They take arrays, as nothing of this but norms, scores and answers lies in a study; `benchmarks/neurons.py pictures`
makes those of the documentation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import xarray as xr
from jaxtyping import Float, Int
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator

from vitrail.errors import UsageError
from vitrail.figures.style import BAND, COOL, INK, LINE, MARK, SOFT, blank, explain, styled
from vitrail.heads.summary import bootstrap_interval
from vitrail.neurons.amounts import AMOUNTS, cells_that_divide
from vitrail.neurons.display import shown, signed
from vitrail.neurons.outliers import OUTLIER_DEVIATIONS, norm_outliers

__all__ = [
    "Curve",
    "Panel",
    "coloured",
    "curves",
    "grouping_by_layer",
    "norms_by_layer",
    "overlaid",
    "panels",
    "position_grid",
    "scatter_of_tokens",
    "survival",
    "token_map",
    "view_panels",
]

CYCLE = (COOL, MARK, "#5a7d2a", "#7a4aa0", "#8a6d0a", "#5a6170")
LOG_FROM = 10
"""Norms that differ by more than this factor are drawn on a log scale."""
MARKERS = ("o", "s", "^", "D", "v", "P")

Picture = Float[np.ndarray, "row column colour"]


@dataclass(frozen=True, eq=False)
class Panel:
    """One picture of a figure, 0 to 1, and its title; `mark` is a patch (row, column, height, width) to point at."""

    picture: Float[np.ndarray, "row column colour"]
    title: str = ""
    mark: tuple[float | int, float | int, float | int, float | int] | None = None


@dataclass(frozen=True, eq=False)
class Curve:
    """A line with its interval: `low` and `high` are the ends of the interval at each x."""

    name: str
    x: Float[np.ndarray, "point"]
    mean: Float[np.ndarray, "point"]
    low: Float[np.ndarray, "point"] | None = None
    high: Float[np.ndarray, "point"] | None = None
    dashed: bool = False


@styled
def panels(rows: Sequence[Sequence[Panel]], title: str, *reading: str, side: float = 1.35) -> Any:
    """Pictures in rows, each with its title; `side` is a picture's size in inches, `reading` how to read them."""
    width = max(len(row) for row in rows)
    figure = blank(max(4.5, width * side), len(rows) * (side + 0.24) + 0.75, title)
    grid = figure.subplots(len(rows), width, squeeze=False)
    for axes_row, row in zip(grid, rows, strict=True):
        for place, axes in enumerate(axes_row):
            axes.set_axis_off()
            if place < len(row):
                _draw(axes, row[place])
    explain(figure, *reading)
    return figure


def _draw(axes: Any, panel: Panel) -> None:
    axes.imshow(np.clip(panel.picture, 0, 1), interpolation="nearest")
    axes.set_title(panel.title, fontsize=6.8, pad=2)
    if panel.mark is not None:
        row, column, height, width = panel.mark
        box = mpl.patches.Rectangle((column - 0.5, row - 0.5), width, height, fill=False, edgecolor=MARK, linewidth=1.2)
        axes.add_patch(box)


def view_panels(
    views: Sequence[Float[np.ndarray, "colour row column"]],
    titles: Sequence[str],
    *,
    one_scale: bool = False,
    clip: float = 1.0,
) -> tuple[list[Panel], list[Panel]]:
    """Two rows for views: as published (positive part, own scale or one for all) and signed, orange for positive.

    `clip` is the quantile of the pixels at which an own signed scale ends: below 1 where a few pixels outshine all.
    """
    scale = max(float(view.max()) for view in views) if one_scale else None
    reach = max(float(np.abs(view.sum(axis=0)).max()) for view in views) if one_scale else None
    diverging = mpl.colormaps["PuOr_r"]
    published = [Panel(shown(view, scale), title) for view, title in zip(views, titles, strict=True)]
    ends = [reach if one_scale else float(np.quantile(np.abs(view.sum(axis=0)), clip)) or None for view in views]
    both = [
        Panel(diverging(0.5 + signed(view, end) / 2)[..., :3], "signed") for view, end in zip(views, ends, strict=True)
    ]
    return published, both


def token_map(
    values: Float[np.ndarray, "patch"], grid: tuple[int, int], low: float | None = None, high: float | None = None
) -> Picture:
    """Values of patches as a picture in cividis, `low` to `high` (by default the range of the values)."""
    low = float(values.min()) if low is None else low
    high = float(values.max()) if high is None else high
    scaled = np.clip((values - low) / (high - low if high > low else 1.0), 0, 1)
    return np.asarray(mpl.colormaps["cividis"](scaled.reshape(grid))[..., :3])


def coloured(colours: Float[np.ndarray, "patch colour"], grid: tuple[int, int]) -> Picture:
    """Colours of patches (`tokens.ColourBasis.colours`) as a picture."""
    return colours.reshape(*grid, 3)


def overlaid(photo: Picture, values: Float[np.ndarray, "patch"], grid: tuple[int, int], top: float = 0.98) -> Picture:
    """A photograph in grey under patch values, clear where they are low and orange where they are high.

    The scale ends at the quantile `top`: a few sinks of attention would leave nothing to see of the rest.
    """
    rows, columns = photo.shape[0] // grid[0], photo.shape[1] // grid[1]
    low, high = float(values.min()), float(np.quantile(values, top))
    scaled = np.clip((values - low) / max(high - low, 1e-12), 0, 1).reshape(grid)
    share = np.kron(scaled, np.ones((rows, columns)))[: photo.shape[0], : photo.shape[1], None]
    grey = 0.35 + 0.65 * photo.mean(axis=-1, keepdims=True)
    return np.asarray(grey * (1 - 0.85 * share) + 0.85 * share * np.array(mpl.colors.to_rgb(MARK)))


def position_grid(similarity: Float[np.ndarray, "query key"], grid: tuple[int, int], every: int = 1) -> Picture:
    """Cosine similarity of position embeddings: the map of each patch, at the patch's own place on the grid."""
    rows, columns = range(0, grid[0], every), range(0, grid[1], every)
    found = np.ones((len(rows) * (grid[0] + 1), len(columns) * (grid[1] + 1), 3))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            tile = token_map(similarity[row * grid[1] + column], grid, float(similarity.min()), 1.0)
            found[i * (grid[0] + 1) :, j * (grid[1] + 1) :][: grid[0], : grid[1]] = tile
    return found


@styled
def curves(parts: Mapping[str, Sequence[Curve]], title: str, x: str, y: str, *reading: str, limits: Any = None) -> Any:
    """Lines with intervals, one panel per entry of `parts`, on common axes."""
    figure = blank(2.5 * len(parts) + 0.4, 2.9, title)
    grid = figure.subplots(1, len(parts), squeeze=False, sharex=True, sharey=True)[0]
    for axes, (name, lines) in zip(grid, parts.items(), strict=True):
        axes.set_title(name)
        axes.set_xlabel(x)
        axes.grid(color=LINE, linewidth=0.6)
        for place, each in enumerate(lines):
            _line(axes, each, place)
        if limits is not None:
            axes.set_ylim(*limits)
    grid[0].set_ylabel(y)
    named = [[each.name for each in lines] for lines in parts.values()]
    for place, axes in enumerate(grid):
        if place + 1 == len(grid) or named[place] != named[place + 1]:
            axes.legend(frameon=False, fontsize=6.5, labelcolor=INK)
    explain(figure, *reading)
    return figure


def _line(axes: Any, each: Curve, place: int) -> None:
    colour = CYCLE[place % len(CYCLE)]
    axes.plot(
        each.x, each.mean, color=colour, label=each.name, linewidth=1.3, markersize=3,
        marker=MARKERS[place % len(MARKERS)], linestyle="--" if each.dashed else "-",
    )  # fmt: skip
    if each.low is not None and each.high is not None:
        axes.fill_between(each.x, each.low, each.high, color=colour, alpha=0.16, linewidth=0)


@styled
def scatter_of_tokens(
    layouts: Mapping[str, Float[np.ndarray, "shown xy"]],
    owner: Int[np.ndarray, "token"],
    sizes: Float[np.ndarray, "token"],
    names: Mapping[int, str],
    title: str,
    *reading: str,
) -> Any:
    """t-SNE of one image's tokens, one panel per layer: coloured by object, as large as their rollout; the last row of
    each layout is the class token if it has one row more than `owner`, drawn as a star."""
    figure = blank(2.2 * len(layouts) + 0.2, 2.9, title)
    grid = figure.subplots(1, len(layouts), squeeze=False)[0]
    for axes, (name, xy) in zip(grid, layouts.items(), strict=True):
        axes.set_title(name)
        axes.set_xticks([])
        axes.set_yticks([])
        for place, (number, label) in enumerate(names.items()):
            chosen = owner == number
            colour = "#c9c5bb" if number == 0 else CYCLE[(place - (0 in names)) % len(CYCLE)]
            area = 6 + 60 * sizes[chosen] / max(float(sizes.max()), 1e-12)
            axes.scatter(*xy[: len(owner)][chosen].T, s=area, color=colour, label=label, alpha=0.8, linewidth=0)
        if len(xy) > len(owner):
            axes.scatter(*xy[-1], marker="*", s=70, color=INK, label="class token", linewidth=0)
    grid[-1].legend(frameon=False, fontsize=6.2, loc="upper left", bbox_to_anchor=(1, 1), markerscale=0.7)
    explain(figure, *reading)
    return figure


@styled
def grouping_by_layer(study: xr.Dataset) -> Any:
    """The grouping scores of a study over its layers: mean over the images that have them, with 95 % intervals.

    Raises `UsageError` for a study without them.
    """
    names = [str(name) for name in study.data_vars if str(name).startswith("grouping_")]
    if not names:
        raise UsageError("This study holds no grouping scores; they need masks: run_study(..., masks=FOLDER).")
    n_images = int(np.isfinite(study[names[0]].to_numpy()).all(axis=1).sum())
    figure = blank(2.2 * min(3, len(names)) + 0.4, 1.9 * -(-len(names) // 3) + 0.9, f"Grouping, {n_images} images")
    grid = figure.subplots(-(-len(names) // 3), min(3, len(names)), squeeze=False, sharex=True).flatten()
    for axes, name in zip(grid, names, strict=False):
        values = study[name].to_numpy()
        known = values[np.isfinite(values).all(axis=1)]
        half = 1.96 * known.std(axis=0, ddof=min(1, len(known) - 1)) / max(1, len(known)) ** 0.5
        x, mean = np.arange(known.shape[1], dtype=float), known.mean(axis=0)
        _line(axes, Curve(name, x, mean, mean - half, mean + half), 0)
        axes.set_title(study[name].attrs["title"], fontsize=7.2)
        axes.set_xlabel("after layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color=LINE, linewidth=0.6)
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    explain(figure, study[names[0]].attrs["source"], study[names[0]].attrs["limits"])
    return figure


@styled
def norms_by_layer(study: xr.Dataset) -> Any:
    """Lengths of tokens over the layers: patches with their spread, the class token, and how many patches stand out.

    Raises `UsageError` for a study without `token_norm`.
    """
    norms = patch_norms(study)
    figure = blank(7.4, 3.0, f"Lengths of tokens, {study.sizes['image']:,} images")
    left, right = figure.subplots(1, 2)
    layers = np.flatnonzero([each is not None for each in norms])
    spread = np.array([np.quantile(each, (0.05, 0.5, 0.95, 1.0)) for each in norms if each is not None])
    left.fill_between(layers, spread[:, 0], spread[:, 2], color=BAND, linewidth=0, label="90 % of all patches")
    left.plot(layers, spread[:, 1], color=COOL, label="median patch")
    left.plot(layers, spread[:, 3], color=MARK, linewidth=1.0, linestyle="--", label="longest patch")
    if study.attrs.get("class_token"):
        of_class = np.nanmedian(study["token_norm"].to_numpy()[:, :, 0], axis=0)
        left.plot(layers, of_class[layers], color=SOFT, linestyle=":", label="class token, median")
    left.set(xlabel="after layer", ylabel="L2 norm")
    if spread[:, 3].max() > LOG_FROM * spread[:, 1].min():
        left.set(yscale="log", ylabel="L2 norm, log scale")
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        left.yaxis.set_minor_locator(NullLocator())
    else:
        left.set_ylim(bottom=0)
    outlying = [float(norm_outliers(each).sum(1).mean()) for each in norms if each is not None]
    right.bar(layers, outlying, color=MARK, width=0.7)
    right.set(xlabel="after layer", ylabel="patches of an image that stand out")
    for axes in (left, right):
        axes.grid(axis="y", color=LINE, linewidth=0.6)
    left.legend(frameon=False, fontsize=6.5)
    explain(
        figure,
        f"Right: patches more than {OUTLIER_DEVIATIONS:g} robust standard deviations above the median of their layer, "
        "mean over images; such patches are artefacts that carry no local content (Darcet et al. 2023, "
        "arXiv 2309.16588; the cut is ours).",
        study["token_norm"].attrs.get("limits", ""),
    )
    return figure


def patch_norms(study: xr.Dataset) -> list[Float[np.ndarray, "image patch"] | None]:
    """The norms of patches alone, layer by layer; None where a layer has none.

    Raises `UsageError` for a study without `token_norm`.
    """
    if "token_norm" not in study:
        raise UsageError("This study holds no token_norm; study it with --measures neurons.")
    values = study["token_norm"].to_numpy()
    found: list[Float[np.ndarray, "image patch"] | None] = []
    for layer, prefix in enumerate(study.attrs["prefixes"]):
        known = ~np.isnan(values[0, layer])
        known[:prefix] = False
        found.append(values[:, layer, known] if known.any() else None)
    return found


@styled
def survival(study: xr.Dataset) -> Any:
    """What is left of the label's probability as patches are lost or displaced, and how far tokens drift by layer.

    Raises `UsageError` for a study without occlusion or shuffling.
    """
    held = {name for name in study.data_vars if str(name).startswith(("occlusion_", "shuffle_"))}
    probable = [name for name in ("random", "salient", "non_salient") if f"occlusion_{name}" in held]
    drifts = [name for name in ("occlusion_drift", "shuffle_drift") if name in held]
    parts = [bool(probable), "shuffle_probability" in held, *(True for _ in drifts)]
    if not any(parts):
        raise UsageError("This study holds no occlusion or shuffling; study it with --measures neurons.")
    n_images = study.sizes["image"]
    whose = f"{n_images:,} images" if n_images > 1 else f"image {study['image'].to_numpy()[0]}"
    figure = blank(2.7 * sum(parts) + 0.3, 2.9, f"As patches are lost or displaced: {whose}")
    places = iter(figure.subplots(1, sum(parts), squeeze=False)[0])
    intact = study["probability"].to_numpy()[:, None]
    cells = [1, *cells_that_divide(_first_grid(study))]
    if probable:
        axes = next(places)
        for place, name in enumerate(probable):
            columns = np.concatenate([intact, study[f"occlusion_{name}"].to_numpy()], axis=1)
            _line(axes, _with_interval(name.replace("_", "-"), (0.0, *AMOUNTS), columns), place)
        axes.set(xlabel="share of patches lost", ylabel="probability of the label", title="lost")
        axes.legend(frameon=False, fontsize=6.5)
    if parts[1]:
        axes = next(places)
        columns = np.concatenate([intact, study["shuffle_probability"].to_numpy()], axis=1)
        _line(axes, _with_interval("shuffled", np.arange(len(cells)), columns), 0)
        axes.set(xlabel="cells", ylabel="probability of the label", title="displaced")
        axes.set_xticks(range(len(cells)), ["intact", *(f"{n} x {n}" for n in cells[1:])])
    for name in drifts:
        axes, values = next(places), study[name].to_numpy()
        lines = [f"{100 * amount:.0f} % lost" for amount in AMOUNTS] if name == "occlusion_drift" else [
            f"{n} x {n}" for n in cells[1:]]  # fmt: skip
        for place, words in enumerate(lines):
            _line(axes, _with_interval(words, np.arange(values.shape[1]), values[:, :, place]), place)
        axes.set(
            xlabel="after layer",
            ylabel="1 - cosine to intact",
            title="drift, random patches lost" if name == "occlusion_drift" else "drift, displaced",
        )
        axes.legend(frameon=False, fontsize=6.5)
    for axes in figure.axes:
        axes.set_ylim(bottom=0)
        axes.grid(color=LINE, linewidth=0.6)
    explain(
        figure,
        "Bands: 95 % interval of the mean (bootstrap over images)." if n_images > 1 else "",
        "The same number of patches is lost in every way;",
        "salient: under objects where the image has a mask, else of the highest rollout.",
        f"Lost patches: {study.attrs.get('options', {}).get('lost_patches', 'mean')}.",
        "After Nguyen et al. 2022; drift is our construction.",
        *({str(study[name].attrs.get("limits", "")) for name in sorted(map(str, held))[-1:]}),
    )
    return figure


def _first_grid(study: xr.Dataset) -> tuple[int, int]:
    grid = study.attrs["grids"][0]
    return int(grid[0]), int(grid[1])


def _with_interval(name: str, x: Any, columns: Float[np.ndarray, "image point"]) -> Curve:
    columns = columns.astype(np.float64)
    low, high = bootstrap_interval(columns)
    return Curve(name, np.asarray(x, dtype=np.float64), columns.mean(0), low, high)
