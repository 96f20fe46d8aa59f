"""What maps look alike."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vitrail.analysis import Analysis, Collector, Figure, Need
from vitrail.builtin.heads import MAPS
from vitrail.builtin.sources import FROM_LI, PAPER_LI
from vitrail.measure import Measure

if TYPE_CHECKING:
    from vitrail.models.open import Vit

__all__ = ["PATTERNS"]

MAP_LIMITS = (
    "A layout: near means alike; distances between far groups and sizes of groups mean nothing. Every head is placed "
    "by the same rule on a map fitted to a bounded sample."
)
CLUSTER_LIMITS = (
    "Clusters are dense places of the latents, not kinds that must exist; a head takes the cluster of the nearest head "
    "of a bounded sample."
)


def _standing_map(kind: str, what: str, needs: tuple[str, ...]) -> tuple[Measure, ...]:
    return (
        Measure(
            name=f"pattern_{kind}_xy",
            title=f"place on the map of {what} patterns",
            dims=("image", "layer", "head", "xy"),
            unit="layout units",
            low="",
            high="",
            source=f"after {FROM_LI}: t-SNE of an autoencoder's latents, or of principal components where these "
            "describe held-out images better",
            limits=MAP_LIMITS,
            needs=needs,
            derived=True,
            is_quantity=False,
        ),
        Measure(
            name=f"pattern_{kind}_cluster",
            title=f"cluster of {what} patterns",
            dims=("image", "layer", "head"),
            unit="number from 0, -1 for none",
            low="large clusters",
            high="small clusters",
            source=f"our construction, after {FROM_LI}: HDBSCAN on the latents",
            limits=CLUSTER_LIMITS,
            needs=needs,
            dtype="int32",
            derived=True,
            is_quantity=False,
        ),
    )


MEASURES = (
    Measure(
        name="pattern_rule",
        title="numbers that patterns are named from",
        dims=("image", "layer", "head", "rule"),
        unit="share, steps in patches",
        low="as even attention",
        high="the rule's pattern",
        source=(
            "our construction: shares of attention between patches, in the order of "
            "`rule` (vitrail.patterns.names.RULES)"
        ),
        limits="Means over patches: a head that mixes patterns looks like neither.",
        needs=("grid", "comparable_maps"),
    ),
    Measure(
        name="image_dependence",
        title="image dependence",
        dims=("layer", "head"),
        unit="1 - mean correlation",
        low="0: the same map for all images",
        high="1: maps of two images have nothing in common",
        source=("our construction: over all pairs of images, cells of the map of attention between patches"),
        limits=("Linear correlation, which single strong cells rule. Maps that do not vary are left out."),
        needs=("grid", "comparable_maps"),
        derived=True,
    ),
    *_standing_map("patch", "patch", ("grid", "comparable_maps")),
    *_standing_map("cls", "class-token", ("grid", "class_token", "comparable_maps", "comparable_class_maps")),
)
ACCOMPANYING = (
    Measure(
        name="patch_cluster_map",
        title="mean map of a cluster",
        dims=("cluster", "query", "key"),
        unit="mean attention weight",
        low="",
        high="",
        source="mean over all heads in the cluster, on the common grid of patches",
        limits="A mean: no head need look like it.",
        needs=("grid",),
    ),
    Measure(
        name="cls_cluster_map",
        title="mean class row and column of a cluster",
        dims=("cls_cluster", "cell"),
        unit="mean attention weight",
        low="",
        high="",
        source=(
            "mean over all heads in the cluster: what the class token gives to each "
            "token, then what each other token gives to it"
        ),
        limits="A mean: no head need look like it.",
        needs=(
            "grid",
            "class_token",
        ),
    ),
)


def _no_comparable_maps(vit: "Vit", options: Mapping[str, str], measure: Measure) -> str:
    from vitrail.patterns.maps import comparable_layers

    layers = comparable_layers(vit)
    return "" if layers.grids else f"no layer has maps to compare: {next(iter(layers.refused.values()))}"


def _no_comparable_class_maps(vit: "Vit", options: Mapping[str, str], measure: Measure) -> str:
    from vitrail.patterns.maps import comparable_layers

    comparable = comparable_layers(vit)
    if comparable.class_index is not None:
        return ""
    first = next(iter(comparable.grids))
    return f"the maps that can be compared have no class token among their tokens: L{first} has none"


def _collectors(vit: "Vit", names: Sequence[str], options: Mapping[str, str]) -> "list[Collector]":
    from vitrail.heads.collect import rule_collectors

    return rule_collectors(vit, options)


def _derive(run: Any) -> None:
    from vitrail.study.patterns import derive_patterns

    derive_patterns(run)


def _figures() -> Sequence[Figure]:
    from vitrail.figures.patterns import FIGURES

    return (*(Figure(*each) for each in FIGURES),)


def _sections() -> Sequence[Any]:
    from vitrail.report.patterns import patterns

    return (patterns,)


def _places(study: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    from vitrail.patterns.names import RULES

    return {"rule": RULES}


PATTERNS = Analysis(
    name="patterns",
    title="Attention patterns",
    question="What do heads look like, and which are alike?",
    measures=MEASURES,
    accompanying=ACCOMPANYING,
    places=_places,
    collectors=_collectors,
    options=(MAPS,),
    needs=(
        Need("comparable_maps", "maps that can be compared between layers", _no_comparable_maps),
        Need("comparable_class_maps", "such maps with a class token among their tokens", _no_comparable_class_maps),
    ),
    derive=_derive,
    figures=_figures,
    sections=_sections,
    paper=PAPER_LI,
)
