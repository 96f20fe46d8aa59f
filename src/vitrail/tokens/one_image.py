"""Tokens and neurons of one image as arrays: colours, likeness, relevance, filters, views of a neuron, t-SNE by object.

The declarations of these arrays are those of the analysis of tokens (`vitrail.builtin.tokens`).
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float

from vitrail.analysis import LookParts
from vitrail.errors import Unsupported, UsageError
from vitrail.models.objects import patch_objects
from vitrail.tokens.embedding import Embedding, find_embedding
from vitrail.tokens.filters import auroc, filter_energy, salient_patches
from vitrail.tokens.grouping import tsne
from vitrail.tokens.levels import read_levels, require_one_grid
from vitrail.tokens.outliers import norm_outliers
from vitrail.tokens.pictures import as_picture
from vitrail.tokens.relevance import PROTOTYPE_METHODS, deletion_and_insertion, relevance, unavailable_methods
from vitrail.tokens.vectors import N_FOR_COLOURS, colour_basis, similarity
from vitrail.tokens.views import Faithful, agreement, faithful_view, global_view, neuron_view

if TYPE_CHECKING:
    from vitrail.one_image import OneImage

__all__ = ["PARTS", "most_relevant_patch"]

LOOK_METHODS = ("raw", "rollout", "gradient", "grad_sam", "lrp", "self_similarity", "prototype_similarity")
"""Of relevance, as far as the model has them; those of `PROTOTYPE_METHODS` where a prototype is given."""

BY_PREFERENCE = ("gradient", "lrp", "grad_sam", "rollout", "raw", "self_similarity")
"""By how far deletion and insertion favour them (docs/tokens/relevance.md); hierarchies lack some."""

N_RANDOM = 5
"""Random orders of patches that relevance is compared with: enough for a band, few enough for one batch."""

N_STEPS = 8
"""Steps of deletion and insertion."""

RANKS = (0, 1, 2, -2, -1)
"""Filters whose views are computed: the three best and the two worst by AUROC."""

N_VIEW_LEVELS = 4
"""Levels that one neuron is viewed at: a view is a pass of its own."""

N_LAYOUTS = 3
"""Layers whose tokens are laid out by t-SNE: the first, a middle one, the last."""

Arrays = dict[str, "np.ndarray | xr.DataArray"]


def most_relevant_patch(one: "OneImage") -> tuple[int, int]:
    """The patch that the prediction rests on most, those of outlying length aside, which are sinks of attention.

    Args:
        one: the image with its plain pass.

    Returns:
        Row and column; the middle of the grid where relevance cannot be computed.

    Raises:
        Unsupported: the tokens lie on no grid.
    """
    rows, columns = one.grid
    try:
        by_method = _relevance_by_method(one)
        scores = next(by_method[method] for method in BY_PREFERENCE if method in by_method).copy()
    except Unsupported:
        return rows // 2, columns // 2
    for tokens in _patch_tokens(one):
        if tokens is not None and len(tokens) == len(scores):
            scores[norm_outliers(np.linalg.norm(tokens, axis=-1))] = -np.inf
    row, column = divmod(int(scores.argmax()), columns)
    return row, column


# --- tokens of every layer -------------------------------------------------------------------------------------------


def _patch_tokens(one: "OneImage") -> list[Float[np.ndarray, "patch channel"] | None]:
    """The patch tokens that each layer returns; None where they lie on no grid."""
    levels = one.once("levels", lambda: read_levels(one.vit.tap(), one.pixels).tokens)[1:]
    return [
        tokens[0, block.prefix :].float().cpu().numpy() if block.grid and tokens.shape[1] == block.tokens else None
        for tokens, block in zip(levels, one.vit.anatomy.blocks, strict=True)
    ]


def _class_tokens(one: "OneImage") -> list[Float[np.ndarray, "channel"] | None]:
    """The class token that each layer returns; None where it has none, or returns other tokens than it takes."""
    anatomy = one.vit.anatomy
    levels = one.once("levels", lambda: read_levels(one.vit.tap(), one.pixels).tokens)[1:]
    indices = [anatomy.class_index(layer) for layer in range(len(anatomy.blocks))]
    return [
        tokens[0, index].float().cpu().numpy() if index is not None and tokens.shape[1] == block.tokens else None
        for tokens, index, block in zip(levels, indices, anatomy.blocks, strict=True)
    ]


def _tokens(one: "OneImage") -> Arrays:
    by_layer = _patch_tokens(one)
    on_grid = {layer: tokens for layer, tokens in enumerate(by_layer) if tokens is not None}
    if not on_grid:
        raise Unsupported(f"The tokens of {one.vit.name} lie on no grid in any layer.")
    n_layers, n_patches = len(by_layer), max(len(tokens) for tokens in on_grid.values())
    colour = np.full((n_layers, n_patches, 3), np.nan, np.float32)
    share = np.full(n_layers, np.nan, np.float32)
    outlier = np.zeros((n_layers, n_patches), dtype=bool)
    likeness = np.full((n_layers, n_patches), np.nan, np.float32)
    for layer, tokens in on_grid.items():
        n_here = len(tokens)
        outlier[layer, :n_here] = norm_outliers(np.linalg.norm(tokens, axis=-1))
        usual = ~outlier[layer, :n_here]
        if usual.sum() >= N_FOR_COLOURS:
            basis = colour_basis(tokens[None], weights=usual[None])
            colour[layer, :n_here], share[layer] = basis.colours(tokens), basis.shares.sum()
        patch = _patch_in_layer(one, layer)
        likeness[layer, :n_here] = similarity(torch.as_tensor(tokens)[None], patch)[0].numpy()
    return {
        "token_colour": colour,
        "token_colour_share": share,
        "token_outlier": outlier,
        "token_similarity": likeness,
    }


def _patch_in_layer(one: "OneImage", layer: int) -> int:
    """The patch of this layer's grid that holds the patch to look at."""
    grid = one.vit.anatomy.blocks[layer].grid
    assert grid is not None
    row, column = (one.patch[axis] * grid[axis] // one.grid[axis] for axis in (0, 1))
    return row * grid[1] + column


# --- relevance -------------------------------------------------------------------------------------------------------


def _relevance_by_method(one: "OneImage") -> dict[str, Float[np.ndarray, "patch"]]:
    reasons = one.once("relevance_reasons", lambda: unavailable_methods(one.vit))
    without = PROTOTYPE_METHODS if one.prototype is None else ()
    methods = [method for method in LOOK_METHODS if method not in reasons and method not in without]
    if not methods:
        raise Unsupported(reasons["raw"])
    label = np.array([one.label if one.vit.n_classes is not None else 0])

    def by_method() -> dict[str, np.ndarray]:
        try:
            return relevance(one.vit, one.pixels, label, methods, prototype=one.prototype)
        except Unsupported:  # of one of them: it costs itself alone
            return _relevance_one_by_one(one, label, methods)

    scores: dict[str, np.ndarray] = one.once("relevance", by_method)
    return {name: of_image[0] for name, of_image in scores.items()}


def _relevance_one_by_one(one: "OneImage", label: np.ndarray, methods: list[str]) -> dict[str, np.ndarray]:
    scores: dict[str, np.ndarray] = {}
    reasons: list[Unsupported] = []
    for method in methods:
        try:
            scores |= relevance(one.vit, one.pixels, label, [method], prototype=one.prototype)
        except Unsupported as reason:
            reasons.append(reason)
    if not scores:
        raise reasons[0]
    return scores


def _relevance(one: "OneImage") -> Arrays:
    by_method = _relevance_by_method(one)
    random = np.random.default_rng(0).random((N_RANDOM, len(next(iter(by_method.values())))))
    scores = np.concatenate([np.stack(list(by_method.values())), random])
    names = [*by_method, *(f"random {draw + 1}" for draw in range(N_RANDOM))]
    return {
        "relevance": xr.DataArray(
            scores.astype(np.float32), dims=("relevance_method", "patch"), coords={"relevance_method": names}
        )
    }


def _relevance_curves(one: "OneImage") -> Arrays:
    scores = _relevance(one)["relevance"].to_numpy()  # type: ignore[union-attr]
    n = len(scores)
    repeated = one.pixels.repeat(n, 1, 1, 1)
    curves = deletion_and_insertion(one.vit, repeated, np.full(n, one.label), scores, N_STEPS)
    coordinates = {"step": curves.amounts.astype(np.float32)}
    return {
        name: xr.DataArray(values.astype(np.float32), dims=("relevance_method", "step"), coords=coordinates)
        for name, values in (("relevance_deletion", curves.deletion), ("relevance_insertion", curves.insertion))
    }


# --- filters and neurons ---------------------------------------------------------------------------------------------


def _salient(one: "OneImage") -> tuple[Bool[np.ndarray, "patch"], str]:
    """Patches under objects of the mask, else the quarter with the highest rollout; and which of these they are."""
    if one.instance_ids is not None:
        step = one.vit.anatomy.blocks[0].patch_step
        owner = patch_objects(one.instance_ids, one.grid, step, min_area=0.0, min_patches=1)
        if (owner > 0).any():
            return np.asarray(owner > 0), "under objects of the mask"
    by_method = _relevance_by_method(one)
    if "rollout" not in by_method:
        require_one_grid(one.vit.anatomy)
    return np.asarray(salient_patches(by_method["rollout"][None])[0]), "the quarter with the highest rollout"


def _filter_scores(
    one: "OneImage", embedding: Embedding, salient: Bool[np.ndarray, "patch"]
) -> Float[np.ndarray, "filter"]:
    energy = filter_energy(one.pixels, embedding.filters).cpu().numpy()
    return np.asarray(np.nan_to_num(auroc(energy, np.broadcast_to(salient, energy.shape))[0], nan=0.5))


def _filters(one: "OneImage") -> Arrays:
    embedding, (salient, selection) = find_embedding(one.vit), _salient(one)
    scores = _filter_scores(one, embedding, salient)
    order = np.argsort(-scores, kind="stable")
    ranked = [int(order[rank]) for rank in RANKS if -len(order) <= rank < len(order)]
    views = [as_picture(global_view(one.pixels, embedding.filters[each], embedding.grid)) for each in ranked]
    coordinates = {"rank": np.asarray(ranked, dtype=np.int32)}
    dims = ("rank", "row", "column", "channel")
    return {
        "patch_salient": xr.DataArray(salient, dims=("patch",), attrs={"selection": selection}),
        "filter_auroc": scores.astype(np.float32),
        "filter_view": xr.DataArray(np.stack(views), dims=dims, coords=coordinates),
    }


def _views(one: "OneImage") -> Arrays:
    """One neuron through the levels: plain as published, and faithful."""
    embedding = find_embedding(one.vit)
    channel, levels = _channel(one, embedding), _view_levels(one, embedding)
    token = embedding.prefix + one.patch[0] * embedding.grid[1] + one.patch[1]
    plain = [neuron_view(one.vit, one.pixels, level, token, channel, embedding=embedding)[0] for level in levels]
    faithful = [_faithful(one, level, token, channel) for level in levels]
    cosines = [
        agreement(view, each.pixels, embedding.grid).cosine for view, (each, _) in zip(plain, faithful, strict=True)
    ]
    coordinates = {"view_level": levels, "view_path": ("view_level", [path for _, path in faithful])}
    pictures, dims = ("row", "column", "channel"), ("view_level", "row", "column", "channel")
    return {
        "neuron_global_view": xr.DataArray(
            as_picture(global_view(one.pixels, embedding.filters[channel], embedding.grid)),
            dims=pictures,
            coords={"neuron": channel},
        ),
        "neuron_view": xr.DataArray(np.stack([as_picture(each) for each in plain]), dims=dims, coords=coordinates),
        "neuron_view_faithful": xr.DataArray(np.stack([as_picture(each.pixels) for each, _ in faithful]), dims=dims),
        "neuron_view_agreement": np.asarray(cosines, dtype=np.float32),
    }


def _channel(one: "OneImage", embedding: Embedding) -> int:
    n_channels = len(embedding.filters)
    if one.asked_channel is not None:
        if not 0 <= one.asked_channel < n_channels:
            raise UsageError(
                f"Channel {one.asked_channel} was asked for; this model has channels 0 to {n_channels - 1}."
            )
        return one.asked_channel
    try:
        return int(_filter_scores(one, embedding, _salient(one)[0]).argmax())
    except Unsupported:  # no rollout: the filter that the patch itself excites most
        patch = one.patch[0] * embedding.grid[1] + one.patch[1]
        return int(filter_energy(one.pixels, embedding.filters)[0, :, patch].argmax())


def _view_levels(one: "OneImage", embedding: Embedding) -> list[int]:
    """A few levels up to the last to which tokens can be followed; level 0 where it is a sum of pixels."""
    deepest = 0
    for level in range(1, one.vit.n_layers + 1):
        try:
            require_one_grid(one.vit.anatomy, level)
        except Unsupported:
            break
        deepest = level
    candidates = {1, *np.linspace(0, deepest, N_VIEW_LEVELS).round().astype(int).tolist()}
    least = 0 if embedding.position is not None else 1
    levels = sorted(level for level in candidates if least <= level <= deepest)
    if not levels:
        raise Unsupported(f"The tokens of {one.vit.name} cannot be followed through its first layer.")
    return levels


def _faithful(one: "OneImage", level: int, token: int, channel: int) -> tuple[Faithful, str]:
    """The faithful view and the path it was computed by."""
    try:
        return faithful_view(one.vit, one.pixels, level, token, channel, path="frozen"), "frozen"
    except Unsupported:
        return faithful_view(one.vit, one.pixels, level, token, channel), "gradient"


# --- objects ---------------------------------------------------------------------------------------------------------


def _objects(one: "OneImage") -> Arrays:
    """Tokens of a few layers laid out, and the object of each patch; nothing without a mask."""
    if one.instance_ids is None:
        return {}
    owner = patch_objects(one.instance_ids, one.grid, one.vit.anatomy.blocks[0].patch_step)
    if not (owner > 0).any():
        raise Unsupported("The mask has no object of 2 % of the view and 3 patches, so there is nothing to colour.")
    by_layer, class_tokens, blocks = _patch_tokens(one), _class_tokens(one), one.vit.anatomy.blocks
    layers = [layer for layer, tokens in enumerate(by_layer) if tokens is not None and blocks[layer].grid == one.grid]
    if not layers:
        raise Unsupported(f"No layer of {one.vit.name} has the grid of the first.")
    xy = np.full((len(by_layer), len(owner), 2), np.nan, np.float32)
    class_xy = np.full((len(by_layer), 2), np.nan, np.float32)
    for at in np.unique(np.linspace(0, len(layers) - 1, N_LAYOUTS).round().astype(int)):
        layer = layers[at]
        tokens, class_token = by_layer[layer], class_tokens[layer]
        assert tokens is not None
        if class_token is None:
            xy[layer] = tsne(tokens)
        else:
            layout = tsne(np.concatenate([tokens, class_token[None]]))
            xy[layer], class_xy[layer] = layout[:-1], layout[-1]
    arrays: Arrays = {"token_xy": xy, "patch_object": owner.astype(np.int32)}
    if np.isfinite(class_xy).any():
        return {**arrays, "class_token_xy": class_xy}
    one.leave_out(["class_token_xy"], "the layers that were laid out have no class token")
    return arrays


PARTS: LookParts = {
    ("token_colour", "token_colour_share", "token_outlier", "token_similarity"): _tokens,
    ("relevance",): _relevance,
    ("relevance_deletion", "relevance_insertion"): _relevance_curves,
    ("patch_salient", "filter_auroc", "filter_view"): _filters,
    ("neuron_global_view", "neuron_view", "neuron_view_faithful", "neuron_view_agreement"): _views,
    ("token_xy", "class_token_xy", "patch_object"): _objects,
}
"""What is computed together, and left out together (`Analysis.look_parts`)."""
