"""What tokens carry, how they group, and what they survive."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vitrail.analysis import Analysis, Collector, Figure, LookParts, Need, Option
from vitrail.builtin.base import MASKS
from vitrail.builtin.sources import FROM_NGUYEN, PAPER_NGUYEN
from vitrail.measure import Measure

if TYPE_CHECKING:
    from vitrail.models.open import Vit

__all__ = ["TOKENS"]

GROUPING_LIMITS = (
    "Only patches of objects enter, of images with at least two objects of 2 % of the view and 3 patches each; "
    "others are NaN. A patch belongs to the object that covers most of it, if that is 40 % or more. DBSCAN "
    "(Euclidean distances of tokens, at least 3 members, a token counts itself) has the radius of the plan's option "
    "`radius`, which decides much: k-distance, the default, sorts the distances of all tokens to their third "
    "neighbour and takes the value that lies farthest below the straight line from the first to the last; oracle "
    "averages the distances between tokens that follow each other in an object, row by row, over each object and "
    "then over objects."
)
OCCLUSION_LIMITS = (
    "Along `amount`: 25, 50 and 75 % of the patches are lost, in the way of the plan's option `lost_patches`: mean, "
    "the default, paints them in the mean of the image's prepared pixels, per channel, black in black before "
    "normalisation, removed takes their tokens out. Random patches, and the order of equal salience, follow "
    "numpy.random.default_rng((0, c)).random(n patches), smallest first, where c is the CRC-32 of the prepared "
    "image's float32 bytes. Edited images lie outside of what the model was trained on."
)
SHUFFLE_LIMITS = (
    "Along `cells`: those of 2 x 2, 4 x 4, 7 x 7 and 14 x 14 cells that divide the grid. For k x k cells, place i "
    "shows the cell numpy.random.default_rng((0, c, k)).permutation(k * k)[i], row by row, where c is the CRC-32 of "
    "the prepared image's float32 bytes. Cut edges are new to the model."
)


def _grouping(name: str, title: str, low: str, high: str, source: str, unit: str = "1") -> Measure:
    return Measure(
        name=f"grouping_{name}",
        title=title,
        dims=("image", "layer"),
        unit=unit,
        low=low,
        high=high,
        source=source,
        limits=GROUPING_LIMITS,
        needs=("token_grid", "masks", "grid_output"),
        depends_on=("radius", "masks"),
    )


def _occlusion(name: str, title: str, high: str, *depends_on: str) -> Measure:
    return Measure(
        name=f"occlusion_{name}",
        title=title,
        dims=("image", "amount"),
        unit="1",
        baseline="probability",
        value_range=(0.0, 1.0),
        low="the label is lost with these patches",
        high=high,
        source=f"{FROM_NGUYEN}, in matched amounts; salient by objects where the image has a mask, else by rollout",
        limits=OCCLUSION_LIMITS,
        needs=("classifier", "token_grid", "whole_maps", "removable"),
        depends_on=("lost_patches", "label", *depends_on),
    )


MEASURES = (
    Measure(
        name="token_norm",
        title="length of tokens",
        dims=("image", "layer", "token"),
        unit="L2 norm",
        low="the token has been given little",
        high="far above the others: an artefact that carries no local content",
        source="what the layer returns; outliers after Darcet et al. 2023 (arXiv 2309.16588)",
        limits="Lengths grow from layer to layer in most models; compare tokens of one layer.",
        depends_on=(),
    ),
    Measure(
        name="image_embedding",
        title="embedding of the image",
        dims=("image", "feature"),
        unit="standard deviations over features",
        low="",
        high="",
        source="what the last layer returns for the class token, or without one the mean of its patch tokens; less its "
        "mean and divided by its standard deviation over features, as a final norm without gains does",
        limits="A single feature has no meaning of its own; near images are alike to the model, not to a person.",
        depends_on=(),
    ),
    _grouping(
        "silhouette",
        "silhouette of token clusters",
        "clusters run into each other (0: one cluster, -1: none)",
        "clusters are tight and far apart",
        f"{FROM_NGUYEN}: DBSCAN on object tokens, cosine silhouette",
        unit="-1 to 1",
    ),
    _grouping(
        "purity",
        "purity of token clusters",
        "tokens are in no cluster, or in one of another object",
        "every token is in a cluster of its own object",
        f"{FROM_NGUYEN}: share of all object tokens",
    ),
    _grouping(
        "in_cluster",
        "cosine within clusters",
        "tokens of a cluster differ",
        "tokens of a cluster are alike",
        f"{FROM_NGUYEN}: mean over pairs of tokens, then over clusters",
        unit="cosine",
    ),
    _grouping(
        "in_object",
        "cosine within objects",
        "tokens of an object differ",
        "tokens of an object are alike",
        f"{FROM_NGUYEN}: mean over pairs of tokens, then over objects; needs no clusters",
        unit="cosine",
    ),
    _grouping(
        "clusters",
        "clusters per object",
        "objects share clusters",
        "objects fall into several clusters",
        FROM_NGUYEN,
        unit="clusters per object",
    ),
    _grouping(
        "unique_label",
        "share of objects with a cluster of their own",
        "objects drown in clusters of others",
        "each object dominates a cluster",
        f"{FROM_NGUYEN}, who count class labels; a study knows objects only",
    ),
    _occlusion("random", "probability of the label without random patches", "any patches can go"),
    _occlusion("salient", "probability of the label without salient patches", "the label rests on others", "masks"),
    _occlusion(
        "non_salient", "probability of the label without non-salient patches", "the label rests on the others", "masks"
    ),
    Measure(
        name="occlusion_drift",
        title="drift of tokens without random patches",
        dims=("image", "layer", "amount"),
        unit="1 - cosine",
        low="0: the patches that are left do not notice",
        high="the patches that are left turn elsewhere",
        source="our construction: mean over the patches that are left, against the intact image",
        limits=OCCLUSION_LIMITS,
        needs=("classifier", "token_grid", "whole_maps", "removable", "grid_output"),
        depends_on=("lost_patches",),
    ),
    Measure(
        name="shuffle_probability",
        title="probability of the label with shuffled cells",
        dims=("image", "cells"),
        unit="1",
        baseline="probability",
        value_range=(0.0, 1.0),
        low="the label needs the order of the cells",
        high="the label does not need the order of the cells",
        source=(f"{FROM_NGUYEN}, on the model's own grid"),
        limits=SHUFFLE_LIMITS,
        needs=("classifier", "token_grid", "cells"),
        depends_on=("label",),
    ),
    Measure(
        name="shuffle_drift",
        title="drift of tokens with shuffled cells",
        dims=("image", "layer", "cells"),
        unit="1 - cosine",
        low="0: a patch's token is the same wherever the patch lies",
        high="a patch's token depends on its place and company",
        source=(
            "our construction: mean over the patches of the layer's grid, each against the patch with the same content "
            "in the intact image"
        ),
        limits=f"{SHUFFLE_LIMITS} Layers whose grid the cells do not divide are NaN.",
        needs=("classifier", "token_grid", "cells", "cells_returned"),
        version=2,
        depends_on=(),
    ),
)

CHANNELS_LIMITS = "A direction of the largest variance has no meaning of its own; its sign is arbitrary."

IMAGE_MEASURES = (
    Measure(
        name="token_colour",
        title="patch tokens as colours",
        dims=("layer", "patch", "channel"),
        unit="red, green, blue from 0 to 1",
        low="",
        high="",
        source="the first three principal components of the layer's patch tokens, those of outlying length aside, from "
        "the 1 % to the 99 % quantile; as DINOv2 (Oquab et al. 2023, arXiv 2304.07193) is shown",
        limits=f"{CHANNELS_LIMITS} Colours of two layers cannot be compared. Layers with fewer than 4 patches of usual "
        "length have none.",
        needs=("token_grid",),
        depends_on=(),
        is_quantity=False,
    ),
    Measure(
        name="token_colour_share",
        title="variance that the three colours hold",
        dims=("layer",),
        unit="1",
        value_range=(0.0, 1.0),
        low="colours leave most out",
        high="colours say nearly all",
        source="the share of the variance of the tokens that are coloured",
        limits=CHANNELS_LIMITS,
        needs=("token_grid",),
        depends_on=(),
    ),
    Measure(
        name="token_outlier",
        title="patch tokens of outlying length",
        dims=("layer", "patch"),
        unit="bool",
        low="0: a length like the others'",
        high="1: an artefact that carries no local content",
        source="more than 6 robust standard deviations above the median of the layer's patches; after Darcet et al. "
        "2023 (arXiv 2309.16588)",
        limits="A layer in which most tokens are long has no outliers.",
        needs=("token_grid",),
        dtype="bool",
        depends_on=(),
    ),
    Measure(
        name="token_similarity",
        title="similarity to the chosen patch",
        dims=("layer", "patch"),
        unit="cosine",
        low="the tokens have little in common",
        high="1: the same direction",
        source="cosine of the patch's token with every patch token of the layer",
        limits="Where all tokens share one strong direction, all cosines are near 1.",
        needs=("token_grid",),
        depends_on=("patch",),
    ),
    Measure(
        name="relevance",
        title="relevance of patches for the prediction",
        dims=("relevance_method", "patch"),
        unit="each method's own",
        low="the prediction does not rest on this patch",
        high="the prediction rests on this patch",
        source="raw: attention of the last layer; rollout: Abnar and Zuidema 2020 (arXiv 2005.00928); gradient: Chefer "
        "et al. 2021 (arXiv 2103.15679) for the predicted class; grad_sam: our construction after Barkan et al. 2021 "
        "(arXiv 2204.11073) for the predicted class; lrp: layer-wise relevance propagation with attention, norms and "
        "gains of activations held still, after Ali et al. 2022 (arXiv 2202.07304), in logits of the predicted class "
        "beyond the image's mean colour; self_similarity and prototype_similarity: our construction, the "
        "cosine of the last layer's tokens, after the final norm, with the image's own embedding and with a prototype "
        "(mean embedding of other images, after Snell et al. 2017, arXiv 1703.05175), without a label; beside random "
        "scores. Hierarchies have raw and grad_sam, what keys are given, where the keys lie, on the first grid; "
        "lrp; and the similarities, of the last grid",
        limits="Methods disagree; `relevance_deletion` and `relevance_insertion` say which to believe.",
        needs=("token_grid",),
        depends_on=(),
    ),
    Measure(
        name="relevance_deletion",
        title="probability of the prediction as the most relevant patches go",
        dims=("relevance_method", "step"),
        unit="1",
        value_range=(0.0, 1.0),
        low="the method found what the prediction rests on",
        high="the prediction does not rest on what the method found",
        source="Petsiuk et al. 2018 (arXiv 1806.07421) on patches: painted in the image's mean colour",
        limits="One image decides nothing about a method. Edited images lie outside of what the model was trained on.",
        needs=("classifier", "token_grid"),
        depends_on=(),
    ),
    Measure(
        name="relevance_insertion",
        title="probability of the prediction as the most relevant patches come",
        dims=("relevance_method", "step"),
        unit="1",
        value_range=(0.0, 1.0),
        low="the method found what the prediction does not rest on",
        high="a few patches suffice for the prediction",
        source="Petsiuk et al. 2018 (arXiv 1806.07421) on patches: the others painted in the image's mean colour",
        limits="One image decides nothing about a method. Edited images lie outside of what the model was trained on.",
        needs=("classifier", "token_grid"),
        depends_on=(),
    ),
    Measure(
        name="patch_salient",
        title="patches that objects are taken to cover",
        dims=("patch",),
        unit="bool",
        low="0: background",
        high="1: under an object of the mask; without a mask among the quarter with the highest rollout",
        source="our construction",
        limits="Without a mask it is what attention favours, which need not be an object.",
        needs=("token_grid",),
        dtype="bool",
        depends_on=("masks",),
    ),
    Measure(
        name="filter_auroc",
        title="how far a filter lets salient patches stand out",
        dims=("filter",),
        unit="area under the ROC curve",
        low="0: salient patches have the least energy",
        high="1: salient patches have the most energy; 0.5: no better than chance",
        source=f"{FROM_NGUYEN}: energy of each patch under each filter of the patch embedding",
        limits="Energy, not sign: bright and dark count alike.",
        needs=("token_grid",),
        depends_on=("masks",),
    ),
    Measure(
        name="filter_view",
        title="the image through a filter of the patch embedding",
        dims=("rank", "row", "column", "channel"),
        unit="weight times pixel",
        low="",
        high="",
        source=f"{FROM_NGUYEN}: global view of level 0, of the filters with the highest and the lowest `filter_auroc`",
        limits="Each picture has its own scale.",
        needs=("token_grid",),
        depends_on=("masks",),
    ),
    Measure(
        name="neuron_global_view",
        title="global view of the chosen neuron at level 0",
        dims=("row", "column", "channel"),
        unit="weight times pixel",
        low="",
        high="",
        source=FROM_NGUYEN,
        limits="Level 0 is the patch embedding alone.",
        needs=("token_grid",),
        depends_on=("masks", "channel"),
    ),
    Measure(
        name="neuron_view",
        title="what the chosen neuron of the chosen patch sees, as published",
        dims=("view_level", "row", "column", "channel"),
        unit="weight times pixel",
        low="",
        high="",
        source=f"{FROM_NGUYEN}: attention as a flow between tokens, without values and MLPs",
        limits="`neuron_view_agreement` says how far it is from what the neuron depends on.",
        needs=("token_grid",),
        depends_on=("masks", "patch", "channel"),
    ),
    Measure(
        name="neuron_view_faithful",
        title="what each pixel adds to the chosen neuron",
        dims=("view_level", "row", "column", "channel"),
        unit="of the neuron's own value",
        low="",
        high="",
        source="our construction, after Nguyen et al. 2022: the model's linear path with attention, norms and gains "
        "held still (path frozen; complete), or gradient times input (path gradient)",
        limits="Attention is held still: what would change it is not seen.",
        needs=("token_grid",),
        depends_on=("masks", "patch", "channel"),
    ),
    Measure(
        name="neuron_view_agreement",
        title="agreement of the two views",
        dims=("view_level",),
        unit="cosine over pixels and colours",
        low="0: the published view shows something else; below, the opposite",
        high="1: both views are alike, up to a factor",
        source="our construction",
        limits="Where both agree, both may still leave out what attention depends on.",
        needs=("token_grid",),
        depends_on=("masks", "patch", "channel"),
    ),
    Measure(
        name="token_xy",
        title="patch tokens laid out by t-SNE",
        dims=("layer", "patch", "xy"),
        unit="layout units",
        low="",
        high="",
        source="after Nguyen et al. 2022: t-SNE with cosine distance and seed 0, of the patch tokens and the class "
        "token together, of the first, a middle and the last layer on the first grid",
        limits="Distances between far groups and sizes of groups mean nothing.",
        needs=("token_grid", "masks"),
        depends_on=("masks",),
        is_quantity=False,
    ),
    Measure(
        name="class_token_xy",
        title="the class token in the layout of the patch tokens",
        dims=("layer", "xy"),
        unit="layout units",
        low="",
        high="",
        source="after Nguyen et al. 2022: its place in the layout of `token_xy`",
        limits="Distances between far groups mean nothing.",
        needs=("token_grid", "masks", "class_token"),
        depends_on=("masks",),
        is_quantity=False,
    ),
    Measure(
        name="patch_object",
        title="object of a patch",
        dims=("patch",),
        unit="instance id, 0 for background",
        low="",
        high="",
        source="the object of the mask that covers most of the patch, of objects of at least 2 % of the view and 3 "
        "patches",
        limits="A patch on a border has one object.",
        needs=("token_grid", "masks"),
        dtype="int32",
        depends_on=("masks",),
        is_quantity=False,
    ),
)

RADIUS = Option("radius", ("k-distance", "oracle"), "Radius of DBSCAN for grouping: from the data, or the best one.")
LOST_PATCHES = Option("lost_patches", ("mean", "black", "removed"), "How occlusion loses patches.")


def _no_whole_maps(vit: "Vit", options: Mapping[str, str], measure: Measure) -> str:
    """Occlusion ranks patches by rollout, which needs one set of tokens through all layers."""
    from vitrail.errors import Unsupported
    from vitrail.tokens.levels import require_one_grid

    try:
        require_one_grid(vit.anatomy)
    except Unsupported as error:
        return str(error)
    return "" if all(block.kind == "token" for block in vit.anatomy.blocks) else "the model attends within windows"


def _no_grid_output(vit: "Vit", options: Mapping[str, str], measure: Measure) -> str:
    from vitrail.tokens.levels import layers_of_own_grid

    return "" if layers_of_own_grid(vit) else "no layer returns the patches that it was given: each puts them together"


def _not_removable(vit: "Vit", options: Mapping[str, str], measure: Measure) -> str:
    if options["lost_patches"] != "removed":
        return ""
    from vitrail.tokens.robustness import why_not_removable

    reason = why_not_removable(vit)
    return f"lost_patches=removed: {reason}" if reason else ""


def _no_cells(vit: "Vit", options: Mapping[str, str], measure: Measure) -> str:
    from vitrail.tokens.amounts import cells_that_divide

    grid = vit.anatomy.blocks[0].grid
    return "" if grid is not None and cells_that_divide(grid) else f"no cells divide its grid {grid}"


def _no_cells_returned(vit: "Vit", options: Mapping[str, str], measure: Measure) -> str:
    """The drift of a patch is told where a layer returns patches on a grid that the cells divide."""
    from vitrail.tokens.amounts import cells_that_divide
    from vitrail.tokens.levels import grids_returned

    first, grids = vit.anatomy.blocks[0].grid, grids_returned(vit)
    cells = cells_that_divide(first) if first is not None else []
    if any(cells_that_divide(grid, cells) for grid in grids):
        return ""
    if not grids:
        return "no layer returns patches on a grid, so none can be compared with the patch of the same content"
    returned = ", ".join(map(str, sorted(grids, reverse=True)))
    return f"the cells that divide its first grid {first} divide none that a layer returns: {returned}"


def _collectors(vit: "Vit", names: Sequence[str], options: Mapping[str, str]) -> "list[Collector]":
    from vitrail.tokens.collect import token_collectors

    return token_collectors(vit, names, options)


def _look_parts() -> LookParts:
    from vitrail.tokens.one_image import PARTS

    return PARTS


def _figures() -> Sequence[Figure]:
    from vitrail.figures.one_image import TOKEN_FIGURES
    from vitrail.figures.tokens import FIGURES

    return *(Figure(*each) for each in FIGURES), *(Figure(*each, one_image=True) for each in TOKEN_FIGURES)


def _sections() -> Sequence[Any]:
    from vitrail.report.tokens import tokens

    return (tokens,)


def _places(study: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    from vitrail.tokens.amounts import AMOUNTS, cells_that_divide

    grids = study.get("grids") or [None]
    return {"amount": AMOUNTS} | ({"cells": cells_that_divide(tuple(grids[0]))} if grids[0] else {})


TOKENS = Analysis(
    name="tokens",
    title="Tokens and neurons",
    question="What do tokens carry, and what do they survive?",
    measures=MEASURES,
    collectors=_collectors,
    image_measures=IMAGE_MEASURES,
    look_parts=_look_parts,
    places=_places,
    options=(MASKS, RADIUS, LOST_PATCHES),
    needs=(
        Need("whole_maps", "the same tokens in all layers", _no_whole_maps),
        Need("grid_output", "a layer that returns the patches it was given", _no_grid_output),
        Need("removable", "patches that can be lost as `lost_patches` asks", _not_removable),
        Need("cells", "a grid that cells of 2 x 2, 4 x 4, 7 x 7 or 14 x 14 divide", _no_cells),
        Need("cells_returned", "a layer that returns patches on a grid that these cells divide", _no_cells_returned),
    ),
    figures=_figures,
    sections=_sections,
    paper=PAPER_NGUYEN,
    aliases=("neurons",),
)
