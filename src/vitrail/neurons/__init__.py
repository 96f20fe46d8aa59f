"""The neurons room: what filters, neurons and tokens see, how tokens group, and what they survive.

levels      the tokens of a model level by level
embedding   level 0: the patch embedding as filters over pixels
flow        attention as a flow between tokens, and rollout
views       what one neuron sees, plain and faithful, and how far the two agree
display     how views are shown as pictures (no torch)
filters     which filters let objects stand out
excite      the images that excite a neuron, and one made to
robustness  occlusion and shuffling
amounts     how many patches are lost, how many cells are shuffled (no torch)
objects     instance ids on the grid of patches
grouping    do tokens of one object find together
tokens      principal components as colour, norms, similarity
outliers    tokens of outlying norm (no torch)
relevance   which patches an answer rests on, and curves that judge the methods
collect     token norms, grouping and robustness as collectors of a study (this page needs no torch)

After Nguyen et al. 2022 (arXiv 2210.07646); `docs/neurons.md` has the experiments, and what is ours.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vitrail.errors import UsageError
from vitrail.measure import MEASURES, ROOMS
from vitrail.neurons.amounts import cells_that_divide

if TYPE_CHECKING:
    from vitrail.neurons.collect import GroupingCollector, NormCollector, RobustnessCollector
    from vitrail.vit.open import Vit

__all__ = ["OPTIONS", "collectors", "skipped"]

OPTIONS: Mapping[str, tuple[str, ...]] = {
    "masks": ("none", "given"),
    "radius": ("k-distance", "oracle"),
    "lost_patches": ("mean", "black", "removed"),
}
"""Options of `collectors` and their values, the default first. `masks`: whether `take_masks` will be called before each
batch; `radius`: DBSCAN's, for grouping; `lost_patches`: how occlusion loses them."""


def collectors(
    vit: "Vit", names: Sequence[str], options: Mapping[str, str] | None = None
) -> "list[NormCollector | GroupingCollector | RobustnessCollector]":
    """What computes those of the measures `names` that belong to this room and that the model and options have.

    Measures left out are named, with the reason, by `skipped`. Raises `UsageError` for an unknown option.
    """
    from vitrail.neurons.collect import GroupingCollector, NormCollector, RobustnessCollector

    left_out = skipped(vit, names, options)
    wanted = [name for name in dict.fromkeys(names) if name in ROOMS["neurons"] and name not in left_out]
    norms = [name for name in wanted if name == "token_norm"]
    grouped = [name for name in wanted if name.startswith("grouping_")]
    tried = [name for name in wanted if name.startswith(("occlusion_", "shuffle_"))]
    found: list[NormCollector | GroupingCollector | RobustnessCollector] = []
    if norms:
        found.append(NormCollector(vit))
    if grouped:
        found.append(GroupingCollector(vit, grouped, _option(options, "radius")))
    if tried:
        found.append(
            RobustnessCollector(vit, tried, _option(options, "lost_patches"), _option(options, "masks") == "given")
        )
    return found


def skipped(vit: "Vit", names: Sequence[str], options: Mapping[str, str] | None = None) -> dict[str, str]:
    """Measures among `names` that this model or these options cannot give, each with the reason."""
    lacks = {
        "classifier": ""
        if vit.n_classes is not None
        else "the model has no classifier, its output is a feature vector",
        "grid": _no_grid(vit),
        "masks": ""
        if _option(options, "masks") == "given"
        else "it needs objects: give a folder of instance ids (masks=FOLDER)",
        "whole_maps": _no_whole_maps(vit),
        "shuffled_cells": _no_cells(vit),
    }
    reasons = {}
    for name in names:
        if name in ROOMS["neurons"]:
            needs = [*sorted(MEASURES[name].needs), *_further_needs(name)]
            why = next((lacks[need] for need in needs if lacks.get(need)), "")
            if why:
                reasons[name] = why
    return reasons


def _further_needs(name: str) -> tuple[str, ...]:
    """Needs that only this room knows."""
    if name.startswith("grouping_"):
        return ("masks",)
    if name.startswith("occlusion_"):
        return ("whole_maps",)
    return ("shuffled_cells",) if name.startswith("shuffle_") else ()


def _no_grid(vit: "Vit") -> str:
    return "" if vit.anatomy.blocks[0].grid else "the model's patches lie on no grid that could be found"


def _no_whole_maps(vit: "Vit") -> str:
    """Occlusion ranks patches by rollout, which needs one set of tokens through all layers."""
    from vitrail.errors import Unsupported
    from vitrail.neurons.levels import refuse_regrouped

    try:
        refuse_regrouped(vit.anatomy)
    except Unsupported as error:
        return str(error)
    return "" if all(block.kind == "token" for block in vit.anatomy.blocks) else "the model attends within windows"


def _no_cells(vit: "Vit") -> str:
    grid = vit.anatomy.blocks[0].grid
    if grid is None:
        return _no_grid(vit)
    return "" if cells_that_divide(grid) else f"no cells divide its grid {grid}"


def _option(options: Mapping[str, str] | None, name: str) -> str:
    """The value of an option; all of them are checked."""
    options = options or {}
    for option, value in options.items():
        if option not in OPTIONS or value not in OPTIONS[option]:
            valid = "; ".join(f"{known}: {', '.join(values)}" for known, values in OPTIONS.items())
            raise UsageError(f"Neurons have no option {option}={value!r}. Options: {valid}.")
    return options.get(name, OPTIONS[name][0])
