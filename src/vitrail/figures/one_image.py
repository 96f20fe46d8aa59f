"""Figures of one image, drawn from the dataset that `vitrail.look` gives: nothing is computed here but layout."""

from collections.abc import Callable, Sequence

import numpy as np
import xarray as xr
from jaxtyping import Float
from PIL import Image

from vitrail.data import class_title
from vitrail.figures import patches, wint
from vitrail.figures import tokens as token_figures
from vitrail.figures.attention import attention_over_photo
from vitrail.figures.heads import (
    entropy_by_layer,
    importance_line,
    importance_map,
    strength_over_hops,
    study_overview,
)
from vitrail.figures.style import Figure, FigureTable, head_name, number
from vitrail.figures.tokens import Curve, Panel
from vitrail.grid import view_in_patches
from vitrail.heads.head_values import head_values, heads_with_strength, main_metric
from vitrail.heads.query_maps import query_maps
from vitrail.patches.layer_maps import layer_grids
from vitrail.sentence import percent
from vitrail.tokens.summary import relevance_over_chance

__all__ = ["HEAD_FIGURES", "PATCH_FIGURES", "TOKEN_FIGURES", "WINDOW_FIGURES"]

N_LAYERS = 4
"""Layers of a figure that shows pictures layer by layer."""

CLIP = 0.999
"""Quantile of the pixels at which the scale of a faithful view ends: a few outshine all others."""


# --- heads -----------------------------------------------------------------------------------------------------------


def _overview(look: xr.Dataset) -> Figure | None:
    return study_overview(look) if main_metric(look) is not None or "strength_entropy" in look else None


def _importance_map(look: xr.Dataset) -> Figure | None:
    metric = main_metric(look)
    return None if metric is None else importance_map(look, metric)


def _importance_line(look: xr.Dataset) -> Figure | None:
    metric = main_metric(look)
    return None if metric is None else importance_line(look, metric)


def _entropy(look: xr.Dataset) -> Figure | None:
    return entropy_by_layer(look) if "strength_entropy" in look else None


def _strength(look: xr.Dataset) -> Figure | None:
    head = _top_head(look)
    return None if head is None or "attention_strength" not in look else strength_over_hops(look, *head)


def _attention_of_class(look: xr.Dataset) -> Figure | None:
    head = _top_head(look)
    if head is None or "class_attention" not in look:
        return None
    return _attention(look, *head, "class", 0)


def _attention_of_peak(look: xr.Dataset) -> Figure | None:
    head = _top_head(look)
    if head is None or "peak_attention" not in look:
        return None
    return _attention(look, *head, "peak", _prefix(look, head[0]) + int(look["peak_patch"][head]))


def _attention(look: xr.Dataset, layer: int, head: int, kind: str, query: int) -> Figure:
    grid, prefix = _grid(look, layer), _prefix(look, layer)
    n_tokens = prefix + grid[0] * grid[1]
    row, column = (look[f"{kind}_{way}"].to_numpy()[layer, head, :n_tokens] for way in ("attention", "received"))
    maps = query_maps(row, column, grid, prefix)
    return attention_over_photo(
        _view(look),
        maps,
        grid,
        prefix,
        query,
        f"{head_name(layer, head)}: {_caption(look, layer, head)}",
        view_in_patches(look.attrs, layer),
    )


def _top_head(look: xr.Dataset) -> tuple[int, int] | None:
    """The most important head among those whose map lies on the photograph."""
    heads = heads_with_strength(look) if main_metric(look) is not None else []
    return heads[0] if heads else None


def _caption(look: xr.Dataset, layer: int, head: int) -> str:
    """Why this head is drawn, with its number."""
    metric = main_metric(look)
    assert metric is not None
    values = head_values(look, metric)
    value = number(float(values.values[layer, head]))
    if metric != "head_probability" or values.unpruned is None:
        return f"{values.title} {value}"
    return f"without it P({_prediction(look)}) goes from {number(values.unpruned)} to {value}"


HEAD_FIGURES: FigureTable = (
    ("overview", _overview),
    ("importance_map", _importance_map),
    ("importance_line", _importance_line),
    ("entropy_by_layer", _entropy),
    ("strength_of_top_head", _strength),
    ("attention_of_class_token", _attention_of_class),
    ("attention_of_top_patch", _attention_of_peak),
)


# --- patches and windows ---------------------------------------------------------------------------------------------


def _over_photo(draw: Callable[..., Figure], name: str) -> Callable[[xr.Dataset], Figure | None]:
    """Draws over the photograph, in the layers that have the grid of the first; others regroup the patches."""

    def draw_or_none(look: xr.Dataset) -> Figure | None:
        if name not in look:
            return None
        grids = look.attrs["grids"]
        first = look.assign_attrs(grids=[grid if grid == grids[0] else None for grid in grids])
        return draw(first, 0, _view(look)) if layer_grids(first) else None

    return draw_or_none


def _windows_of_patch(look: xr.Dataset, image: int, photo: Image.Image) -> Figure:
    return patches.windows_of_patch(look, _patch(look), image, photo)


PATCH_FIGURES: FigureTable = (
    ("windows_of_patch", _over_photo(_windows_of_patch, "window")),
    ("window_coverage", _over_photo(patches.window_coverage, "window")),
    ("tendency_arrows", _over_photo(patches.tendency_arrows, "tendency")),
    ("tendency_flow", _over_photo(patches.tendency_flow, "tendency")),
    ("hub_map", _over_photo(patches.hub_map, "hub")),
)


def _predicted_windows(look: xr.Dataset) -> Figure | None:
    return wint.windows_by_layer(look, _patch(look), 0, _view(look)) if "predicted_window" in look else None


def _summed_windows(look: xr.Dataset) -> Figure | None:
    return wint.summed_windows(look, None, 0, _view(look)) if "predicted_window" in look else None


WINDOW_FIGURES: FigureTable = (
    ("predicted_windows", _predicted_windows),
    ("predicted_windows_summed", _summed_windows),
)


# --- tokens and neurons ----------------------------------------------------------------------------------------------


def _tokens(look: xr.Dataset) -> Figure | None:
    """Colours, lengths, and likeness to the patch, layer by layer."""
    if not {"token_colour", "token_norm"} <= set(look):
        return None
    layers = _some_layers(look)
    if not layers:
        return None
    rows = [[_photograph(look, words)] for words in ("colours", "lengths", "likeness to this patch")]
    for layer in layers:
        grid, prefix = _grid(look, layer), _prefix(look, layer)
        n_patches = grid[0] * grid[1]
        here = (layer, slice(n_patches))
        norms = look["token_norm"].to_numpy()[0, layer, prefix : prefix + n_patches]
        outlier = look["token_outlier"].to_numpy()[here]
        colours, likeness = look["token_colour"].to_numpy()[here], look["token_similarity"].to_numpy()[here]
        share = float(look["token_colour_share"][layer])
        rows[0].append(Panel(token_figures.coloured(colours, grid), f"after L{layer}: {percent(share)}"))
        stands = f", {outlier.sum()} stand{'s' if outlier.sum() == 1 else ''} out" if outlier.any() else ""
        lengths = token_figures.token_map(norms, grid, high=float(norms[~outlier].max()))
        rows[1].append(Panel(lengths, f"{norms.min():.0f} to {norms.max():.0f}{stands}"))
        row, column = (_row_and_column(look)[axis] * grid[axis] // _grid(look, 0)[axis] for axis in (0, 1))
        picture = token_figures.token_map(likeness, grid, high=1.0)
        rows[2].append(Panel(picture, f"{likeness.min():.2f} to 1", (row, column, 1, 1)))
    return token_figures.panels(
        rows,
        f"Patch tokens through the layers: {_name(look)}",
        "Top: the first three principal components of this image's tokens as red, green and blue, with the share of "
        "variance they hold; tokens of outlying length take no part. Middle: L2 norms, yellow is long; what lies 6 "
        "robust standard deviations above the median stands out; the scale ends below it. Bottom: cosine similarity of "
        "the marked patch to all others, yellow is alike.",
    )


def _methods(look: xr.Dataset) -> list[str]:
    return [name for name in look["relevance_method"].to_numpy().astype(str).tolist() if not name.startswith("random")]


def _relevance(look: xr.Dataset) -> Figure | None:
    if "relevance" not in look:
        return None
    words = f"for {_prediction(look)}" if look.attrs["n_classes"] is not None else "for the output"
    scores = look["relevance"]
    drawn = [
        Panel(
            token_figures.overlaid(
                _pixels(look),
                scores.sel(relevance_method=method).to_numpy(),
                _grid(look, 0),
                view=view_in_patches(look.attrs, 0),
                low=0.0 if method == "lrp" else None,
            ),
            method,
        )
        for method in _methods(look)
    ]
    return token_figures.panels(
        [[_photograph(look), *drawn]],
        f"Which patches matter {words}: {_name(look)}",
        "Clear to orange: lowest to the 98 % quantile of the image. raw: attention of the last layer; rollout: "
        "attention through all layers, the same for every class; gradient: attention times its gradient for this class "
        "(Chefer et al. 2021); grad_sam: the same, averaged over layers (after Barkan et al. 2021), which hierarchies "
        "have too; lrp: what the patch adds to the logit, from 0 (after Ali et al. 2022); self_similarity: cosine of "
        "the patch's last token with the image's embedding; prototype_similarity: with the prototype, both without a "
        "label. Which to believe is told by deletion and insertion.",
        side=1.9,
    )


def _relevance_curves(look: xr.Dataset) -> Figure | None:
    """Deletion and insertion of each method, and the range of random orders."""
    if "relevance_deletion" not in look:
        return None
    methods, steps = _methods(look), look["step"].to_numpy()
    result = relevance_over_chance(look, methods)
    parts: dict[str, list[Curve]] = {}
    for way, chance in result.chance.items():
        values = look[f"relevance_{way}"]
        parts[way] = [
            Curve(f"{method} ({gain:+.2f})", steps, values.sel(relevance_method=method).to_numpy())
            for method, gain in result.gains.items()
        ]
        parts[way].append(Curve(f"{result.n_random} random orders", steps, *chance, dashed=True))
    return token_figures.curves(
        parts,
        f"Which relevance to believe here: {_name(look)}, {_prediction(look)}",
        "share of patches",
        "probability of the prediction",
        "Deletion: the most relevant patches are painted over first (lower is better). Insertion: they come first "
        "(higher is better). In brackets: area between the two, beyond the mean of random orders, whose range is the "
        "band. After Petsiuk et al. 2018; one image decides nothing about a method.",
        limits=(0.0, 1.0),
    )


def _filters(look: xr.Dataset) -> Figure | None:
    if "filter_view" not in look:
        return None
    names = [f"filter {each}: {float(look['filter_auroc'][each]):.2f}" for each in look["rank"].to_numpy().tolist()]
    published, signed = token_figures.view_panels(_colour_first(look["filter_view"]), names)
    salient = token_figures.token_map(1.0 * look["patch_salient"].to_numpy(), _grid(look, 0))
    selection = look["patch_salient"].attrs.get("selection", "under objects, or of the highest rollout")
    return token_figures.panels(
        [[_photograph(look), *published], [Panel(salient, "salient"), *signed]],
        f"Filters through which salient patches stand out most and least: {_name(look)}",
        f"Global views of level 0 (after Nguyen et al. 2022) and the AUROC of their energy; salient: {selection}. 0.5: "
        "no better than chance. Below: signed, orange for positive.",
    )


def _views(look: xr.Dataset) -> Figure | None:
    if "neuron_view" not in look:
        return None
    levels, channel = look["view_level"].to_numpy().tolist(), int(look["neuron"])
    top, signed = token_figures.view_panels(_colour_first(look["neuron_view"]), [f"level {level}" for level in levels])
    names = [
        f"{path}: cos {cosine:.2f}"
        for path, cosine in zip(look["view_path"].to_numpy(), look["neuron_view_agreement"].to_numpy(), strict=True)
    ]
    _, faithful = token_figures.view_panels(_colour_first(look["neuron_view_faithful"]), names, clip=CLIP)
    faithful = [Panel(panel.picture, name) for panel, name in zip(faithful, names, strict=True)]
    everywhere, everywhere_signed = token_figures.view_panels(
        _colour_first(look["neuron_global_view"].expand_dims("one")), ["G_0"]
    )
    return token_figures.panels(
        [[_photograph(look), *top], [everywhere[0], *signed], [everywhere_signed[0], *faithful]],
        f"Channel {channel} of the marked patch through the levels: {_name(look)}",
        "Top: the plain view (after Nguyen et al. 2022), clip(V / max V). Middle: the same, signed, orange for "
        "positive. Bottom: what each pixel adds to the neuron with attention, norms and activations held still (ours), "
        "which is complete; cos is how far the two agree. Every picture has its own scale; that of the bottom row ends "
        "at 99.9 % of the pixels. G_0: all patches at level 0.",
    )


def _tsne(look: xr.Dataset) -> Figure | None:
    """Tokens of a few layers laid out, coloured by object, with how they group."""
    if "token_xy" not in look:
        return None
    xy, owner = look["token_xy"].to_numpy(), look["patch_object"].to_numpy()
    layers = [layer for layer in range(len(xy)) if np.isfinite(xy[layer]).all()]
    class_xy = look["class_token_xy"].to_numpy() if "class_token_xy" in look else np.full((len(xy), 2), np.nan)
    with_class = [
        xy[layer] if np.isnan(class_xy[layer]).any() else np.vstack([xy[layer], class_xy[layer]]) for layer in layers
    ]
    star = " The star is the class token, which was laid out with them." if np.isfinite(class_xy).any() else ""
    silhouette = (
        look["grouping_silhouette"].to_numpy()[0] if "grouping_silhouette" in look else np.full(len(xy), np.nan)
    )
    scores = [f"L{layer} {silhouette[layer]:.2f}" for layer in layers if np.isfinite(silhouette[layer])]
    grouping = (
        f"Silhouette of clusters of object tokens: {', '.join(scores)}." if scores else "One object: no grouping."
    )
    has_rollout = "relevance" in look and "rollout" in _methods(look)
    sizes = look["relevance"].sel(relevance_method="rollout").to_numpy() if has_rollout else np.ones(len(owner))
    return token_figures.scatter_of_tokens(
        {f"after L{layer}": tokens for layer, tokens in zip(layers, with_class, strict=True)},
        owner,
        sizes,
        {0: "background"} | {int(each): f"object {each}" for each in np.unique(owner) if each},
        f"t-SNE of the patch tokens: {_name(look)}",
        f"Each layer laid out on its own, cosine distance, seed 0; areas follow rollout where there is one.{star} "
        "Distances between far groups and sizes of groups mean nothing.",
        grouping,
    )


def _survival(look: xr.Dataset) -> Figure | None:
    measured = any(str(name).startswith(("occlusion_", "shuffle_")) for name in look)
    return token_figures.survival(look) if measured else None


TOKEN_FIGURES: FigureTable = (
    ("tokens", _tokens),
    ("relevance", _relevance),
    ("relevance_curves", _relevance_curves),
    ("filters", _filters),
    ("views", _views),
    ("tsne", _tsne),
    ("survival", _survival),
)


# --- what the dataset says of itself ---------------------------------------------------------------------------------


def _name(look: xr.Dataset) -> str:
    return str(look["image"].to_numpy()[0])


def _view(look: xr.Dataset) -> Image.Image:
    return Image.fromarray(look["view"].to_numpy())


def _pixels(look: xr.Dataset) -> Float[np.ndarray, "row column channel"]:
    return np.asarray(look["view"].to_numpy(), dtype=np.float64) / 255


def _grid(look: xr.Dataset, layer: int) -> tuple[int, int]:
    rows, columns = look.attrs["grids"][layer]
    return int(rows), int(columns)


def _prefix(look: xr.Dataset, layer: int) -> int:
    return int(look.attrs["prefixes"][layer])


def _row_and_column(look: xr.Dataset) -> tuple[int, int]:
    row, column = look.attrs["patch"]
    return int(row), int(column)


def _patch(look: xr.Dataset) -> int:
    row, column = _row_and_column(look)
    return row * _grid(look, 0)[1] + column


def _prediction(look: xr.Dataset) -> str:
    label, names = int(look["prediction"][0]), look.attrs.get("class_names")
    return class_title(names[label]) if names else f"class {label}"


def _photograph(look: xr.Dataset, title: str = "") -> Panel:
    """The view with the patch marked."""
    pixels, (rows, columns) = _pixels(look), view_in_patches(look.attrs, 0)
    height, width = pixels.shape[0] / rows, pixels.shape[1] / columns
    row, column = _row_and_column(look)
    return Panel(pixels, title or _name(look), (row * height, column * width, height, width))


def _some_layers(look: xr.Dataset) -> list[int]:
    """A few layers, the first and last whose tokens have colours among them; none where none has."""
    present = np.flatnonzero(np.isfinite(look["token_colour_share"].to_numpy()))
    if not len(present):
        return []
    return [int(present[at]) for at in np.unique(np.linspace(0, len(present) - 1, N_LAYERS).round().astype(int))]


def _colour_first(views: xr.DataArray) -> Sequence[Float[np.ndarray, "channel row column"]]:
    return list(np.moveaxis(views.to_numpy(), -1, 1))
