"""Which head's attention finds the objects."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vitrail.analysis import Analysis, Collector, Figure
from vitrail.builtin.base import MASKS
from vitrail.measure import Measure

if TYPE_CHECKING:
    from vitrail.models.open import Vit

__all__ = ["OBJECTS"]

MAPS = {
    "": "the class token's map of each head (mean over queries where a layer has no class token) against all objects",
    "patch": "the map of each patch of an object, in each head, against the other patches of that object; mean over "
    "these patches",
    "layer": "the class token's map (mean over queries where there is none), mean over the heads of a layer, against "
    "all objects",
    "centre": "a blob in the middle of the view, nearest patches first, against all objects; nothing of the model",
}
"""Whose map is scored, by the word in the measure's name."""

TITLES = {"": "attention", "patch": "attention of object patches", "layer": "mean attention of a layer", "centre": ""}

SCORES = {
    "pointing": (
        "pointing accuracy",
        "share of maps whose strongest patch lies on the object",
        "0: the strongest patch lies on background",
        "1: the strongest patch lies on the object",
    ),
    "iou": (
        "overlap",
        "intersection over union of the object and as many strongest patches as it has",
        "0: none of the strongest patches lies on the object",
        "1: the strongest patches are the object",
    ),
    "auroc": (
        "AUROC",
        "area under the ROC curve",
        "0.5: patches of the object are no stronger than others; below, they are weaker",
        "1: every patch of the object is stronger than every other",
    ),
}

LIMITS = (
    "Where a head looks is not what it passes on. A patch counts as of an object if objects cover half of it; for maps "
    "of object patches if its object covers 40 % of it and has 2 % of the view and 3 patches. NaN without a mask or "
    "without objects. Of equal weights the order counts as drawn at random."
)
NULL_LIMITS = (
    "Against the objects of up to four images before this one in its batch, at the places where those lie; NaN for the "
    "first image of a batch."
)


def _measure(kind: str, score: str, null: bool = False) -> Measure:
    title, what, low, high = SCORES[score]
    of = "a blob in the middle" if kind == "centre" else TITLES[kind]
    return Measure(
        name="_".join(["object", *([kind] if kind else []), score, *(["null"] if null else [])]),
        title=f"{title} of {of}" + (" against other images' objects" if null else " against objects"),
        dims={"layer": ("image", "layer"), "centre": ("image",)}.get(kind, ("image", "layer", "head")),
        unit="1",
        value_range=(0.0, 1.0),
        low=low,
        high=high,
        source=f"our construction: {what}; {MAPS[kind]}",
        limits=f"{LIMITS} {NULL_LIMITS}" if null else LIMITS,
        needs=("token_grid", "grid", "masks"),
    )


MEASURES = (
    *(_measure(kind, score) for kind in ("", "patch", "layer") for score in SCORES),
    *(_measure(kind, score, null=True) for kind in ("", "patch", "layer") for score in SCORES),
    *(_measure("centre", score) for score in SCORES),
    Measure(
        name="object_map",
        title="map of each head over the patches, of example images",
        dims=("image", "layer", "head", "patch"),
        unit="attention weight",
        low="the class token (the mean query) does not look here",
        high="the class token (the mean query) looks here",
        source="the class token's row (the mean over the rows of patches, without their own), without prefix tokens",
        limits="Of one image in eight, drawn by its pixels, among those with objects; NaN for all others.",
        needs=("token_grid", "grid", "masks"),
        is_quantity=False,
    ),
)

IMAGE_MEASURES = (
    Measure(
        name="head_map",
        title="map of each head over the patches",
        dims=("layer", "head", "patch"),
        unit="attention weight",
        low="the class token (the mean query) does not look here",
        high="the class token (the mean query) looks here",
        source="the class token's row (the mean over the rows of patches, without their own), without prefix tokens",
        limits="Where a head looks is not what it passes on.",
        needs=("token_grid", "grid", "masks"),
        depends_on=(),
    ),
)


def _collectors(vit: "Vit", names: Sequence[str], options: Mapping[str, str]) -> "list[Collector]":
    from vitrail.heads.objects import object_collectors

    return object_collectors(vit, names, options)


def _look(one: Any) -> Mapping[str, Any]:
    from vitrail.heads.objects import head_maps

    return head_maps(one)


def _figures() -> Sequence[Figure]:
    from vitrail.figures.objects import BOTH, FIGURES, ONE_IMAGE_FIGURES

    return (
        *(Figure(*each) for each in FIGURES),
        *(Figure(*each, both=True) for each in BOTH),
        *(Figure(*each, one_image=True) for each in ONE_IMAGE_FIGURES),
    )


def _sections() -> Sequence[Any]:
    from vitrail.report.objects import objects

    return (objects,)


OBJECTS = Analysis(
    name="objects",
    title="Heads and objects",
    question="Which head's attention finds the objects?",
    measures=MEASURES,
    collectors=_collectors,
    image_measures=IMAGE_MEASURES,
    look=_look,
    options=(MASKS,),
    figures=_figures,
    sections=_sections,
)
