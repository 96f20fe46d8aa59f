"""What a measure is, the words for its dimensions, and the register of all measures.

A measure is declared once, here in data that needs no torch, and computed in the module of its room. Whatever reads a
study (figures, the application, a notebook) finds title, unit, source and how to read it in the declaration, which the
store also writes beside the numbers.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from vitrail.errors import UsageError

__all__ = ["DIMENSIONS", "MEASURES", "ROOMS", "Measure", "measures_named"]

DIMENSIONS = (
    "image",
    "layer",
    "head",
    "query",
    "key",
    "token",
    "patch",
    "hop",
    "channel",
    "class",
    "xy",
    "side",
    "row",
    "column",
    "amount",
    "cells",
    "mode",
    "rule",
    "cluster",
    "cls_cluster",
    "cell",
)
"""The closed list of dimension words: types, store, JSON and TypeScript use these and no others."""

FROM_LI = "Li et al. 2023 (arXiv 2303.13731)"


@dataclass(frozen=True)
class Measure:
    """One quantity that a study holds for every image.

    `dims` are words of `DIMENSIONS`; `low` and `high` say what a low and a high value mean; `source` names the paper or
    says that the construction is ours; `limits` says what the measure cannot tell. `needs` names what a model or data
    set must have: "classifier", "class_token", "grid". Raise `version` whenever the numbers change: a study begun with
    another version is then refused instead of mixed. What is `derived` needs all images: the study computes it after
    the last of them.
    """

    name: str
    title: str
    dims: tuple[str, ...]
    unit: str
    low: str
    high: str
    source: str
    limits: str
    room: str
    needs: frozenset[str] = frozenset()
    dtype: str = "float32"
    version: int = 1
    derived: bool = False

    def __post_init__(self) -> None:
        unknown = set(self.dims) - set(DIMENSIONS)
        assert not unknown, f"{self.name} uses dimension words outside the list: {sorted(unknown)}"

    def attributes(self) -> dict[str, str | int]:
        """The declaration as the store writes it beside the array."""
        return {
            "title": self.title,
            "unit": self.unit,
            "low": self.low,
            "high": self.high,
            "source": self.source,
            "limits": self.limits,
            "room": self.room,
            "version": self.version,
        }


PRUNING_LIMITS = (
    "Heads are removed one at a time, set to zero (to their mean over the images where the plan's option `ablation` says "
    "so): two heads that stand in for each other both look unimportant."
)
NEIGHBOUR_LIMITS = "Distance on the grid of patches, without looking at what the patches show."
OURS_AFTER_MA = "our construction, after Ma et al. 2022 (arXiv 2203.05922)"
INTERACTION_LIMITS = "Attention between patches, averaged over heads: heads that look elsewhere are outvoted."

_BASE = (
    Measure(
        "label", "label", ("image",), "class", "", "",
        "the data set's label, else the model's own top-1 prediction",
        "With the model's own prediction as label, accuracy means nothing.",
        "base", dtype="int32",
    ),
    Measure(
        "prediction", "prediction", ("image",), "class", "", "", "argmax of the logits, nothing pruned",
        "Ties go to the first class.", "base", frozenset({"classifier"}), "int32",
    ),
    Measure(
        "probability", "probability of the label", ("image",), "1",
        "the model does not see the label in this image", "the model is sure of the label",
        "softmax of the logits, nothing pruned", "Softmax probabilities are seldom calibrated.",
        "base", frozenset({"classifier"}),
    ),
)  # fmt: skip

_HEADS = (
    Measure(
        "head_probability", "probability of the label without this head", ("image", "layer", "head"), "1",
        "the answer for this image hangs on this head", "the head can go: the label keeps its probability",
        f"{FROM_LI}, model and local impact", PRUNING_LIMITS, "heads", frozenset({"classifier"}),
    ),
    Measure(
        "head_divergence", "Jensen-Shannon divergence of the predictions", ("image", "layer", "head"), "bits",
        "0: pruning the head changes no class probability", "1: the predictions share nothing",
        f"our construction, after {FROM_LI}, model and global impact; for a model without classifier 1 - cosine of its output",
        PRUNING_LIMITS, "heads",
    ),
    Measure(
        "head_loss_change", "change of the loss without this head", ("image", "layer", "head"), "nats",
        "negative: the label gets likelier without the head", "the head carries evidence for the label",
        "cross-entropy after pruning minus before; our construction", PRUNING_LIMITS, "heads", frozenset({"classifier"}),
    ),
    Measure(
        "head_flip", "top-1 changes without this head", ("image", "layer", "head"), "bool",
        "0: the same prediction", "1: another prediction", "our construction", PRUNING_LIMITS, "heads",
        frozenset({"classifier"}), "bool",
    ),
    Measure(
        "head_prediction", "prediction without this head", ("image", "layer", "head"), "class", "", "",
        "argmax of the logits after pruning", PRUNING_LIMITS, "heads", frozenset({"classifier"}), "int32",
    ),
    Measure(
        "head_cls_shift", "shift of the class token", ("image", "layer", "head"), "1 - cosine",
        "0: the class token leaves the layer's attention as before", "the head writes much of the class token here",
        f"our construction, after {FROM_LI}, layer and local impact; read after attention and residual",
        "Local: says nothing of whether later layers use it.", "heads", frozenset({"class_token"}),
    ),
    Measure(
        "head_token_shift", "mean shift of all tokens", ("image", "layer", "head"), "1 - cosine",
        "0: no token changes its direction", "the head writes much of every token here",
        f"our construction, after {FROM_LI}, layer and global impact; read after attention and residual",
        "Local: says nothing of whether later layers use it.", "heads",
    ),
    Measure(
        "head_cls_shift_l2", "relative change of the class token", ("image", "layer", "head"), "L2 / L2",
        "0: unchanged", "the change is as long as the token itself", "our construction, beside head_cls_shift",
        "Sees length as well as direction; layer norms later remove part of it.", "heads", frozenset({"class_token"}),
    ),
    Measure(
        "head_token_shift_l2", "mean relative change of all tokens", ("image", "layer", "head"), "L2 / L2",
        "0: unchanged", "the changes are as long as the tokens themselves", "our construction, beside head_token_shift",
        "Sees length as well as direction; layer norms later remove part of it.", "heads",
    ),
    Measure(
        "attention_strength", "attention strength", ("image", "layer", "head", "hop"), "mean attention weight per neighbour",
        "patches look little at neighbours this many hops away", "patches look much at neighbours this many hops away",
        f"{FROM_LI}, verified against its published figure; hops are Chebyshev distance", NEIGHBOUR_LIMITS,
        "heads", frozenset({"grid"}),
    ),
    Measure(
        "strength_entropy", "entropy of attention strength", ("image", "layer", "head"), "nats",
        "0: all strength at one distance", "ln(number of hops): every distance alike", f"{FROM_LI}, verified against its published figure",
        NEIGHBOUR_LIMITS, "heads", frozenset({"grid"}),
    ),
    Measure(
        "attention_distance", "mean attention distance", ("image", "layer", "head"), "patches",
        "the head looks near the query", "the head looks across the image",
        "Dosovitskiy et al. 2021 (arXiv 2010.11929), figure 7: Euclidean, weighted by attention between patches",
        NEIGHBOUR_LIMITS, "heads", frozenset({"grid"}),
    ),
    Measure(
        "prefix_share", "share of attention that goes to prefix tokens", ("image", "layer", "head"), "1",
        "patches look at patches", "patches park their attention on class or register tokens",
        "our construction, beside attention strength", "High shares are often a sink without content.",
        "heads", frozenset({"grid"}),
    ),
)  # fmt: skip

_PATCHES = (
    Measure(
        "window", "window of a patch", ("image", "layer", "patch", "side"), "patches left, top, right, bottom of the query",
        "negative: the window ends before it reaches the query on this side", "the window reaches far on this side",
        f"{OURS_AFTER_MA}: the box of a quarter of the grid that holds most of the patch's interactions, mean over heads",
        INTERACTION_LIMITS, "patches", frozenset({"grid"}),
    ),
    Measure(
        "tendency", "tendency of the responsive field", ("image", "layer", "patch", "xy"), "patches, x to the right, y down",
        "(0, 0): the interactions lie evenly around the patch", "long: the patch is pulled that way",
        f"{OURS_AFTER_MA}: centre of the interactions in the window, seen from the patch",
        "Patches near the border can only be pulled inward; compare with interior patches.", "patches", frozenset({"grid"}),
    ),
    Measure(
        "field_size", "size of the responsive field", ("image", "layer", "patch"), "share of the grid",
        "half of the patch's interactions fit in a small box", "the interactions are spread over the image",
        f"{OURS_AFTER_MA}: area of the smallest box about square with half of the interactions, interpolated",
        INTERACTION_LIMITS, "patches", frozenset({"grid"}),
    ),
    Measure(
        "interaction_distance", "mean distance of interactions", ("image", "layer", "patch"), "patches",
        "the patch takes from its neighbours", "the patch takes from far away",
        f"{OURS_AFTER_MA}: Euclidean, weighted by the indicator", NEIGHBOUR_LIMITS, "patches", frozenset({"grid"}),
    ),
    Measure(
        "hub", "indiscriminative patch (hub)", ("image", "layer", "patch"), "bool",
        "0: those who keep this patch have their reasons", "1: nearly every patch keeps it, whatever it looks for",
        f"{OURS_AFTER_MA}; related to attention sinks and high-norm tokens",
        "A hub may carry information: removing it is no clean-up.", "patches", frozenset({"grid"}), "bool",
    ),
)  # fmt: skip

FROM_NGUYEN = "Nguyen et al. 2022 (arXiv 2210.07646)"
GROUPING_LIMITS = (
    "Only patches of objects enter, of images with at least two objects of 2 % of the view and 3 patches each; others "
    "are NaN. The radius of DBSCAN decides much: see the plan's option `radius`."
)
OCCLUSION_LIMITS = (
    "Along `amount`: 25, 50 and 75 % of the patches are lost, in the way of the plan's option `lost_patches`. Edited "
    "images lie outside of what the model was trained on."
)
SHUFFLE_LIMITS = (
    "Along `cells`: those of 2 x 2, 4 x 4, 7 x 7 and 14 x 14 cells that divide the grid. Cut edges are new to it."
)


def _grouping(name: str, title: str, low: str, high: str, source: str) -> Measure:
    return Measure(
        f"grouping_{name}", title, ("image", "layer"), "1", low, high, source, GROUPING_LIMITS, "neurons",
        frozenset({"grid"}),
    )  # fmt: skip


def _occlusion(name: str, title: str, high: str) -> Measure:
    return Measure(
        f"occlusion_{name}", title, ("image", "amount"), "1", "the label is lost with these patches", high,
        f"{FROM_NGUYEN}, in matched amounts; salient by objects where the image has a mask, else by rollout",
        OCCLUSION_LIMITS, "neurons", frozenset({"classifier", "grid"}),
    )  # fmt: skip


_NEURONS = (
    Measure(
        "token_norm", "length of tokens", ("image", "layer", "token"), "L2 norm",
        "the token has been given little", "far above the others: an artefact that carries no local content",
        "what the layer returns; outliers after Darcet et al. 2023 (arXiv 2309.16588)",
        "Lengths grow from layer to layer in most models; compare tokens of one layer.", "neurons",
    ),
    _grouping(
        "silhouette", "silhouette of token clusters", "clusters run into each other (0: one cluster, -1: none)",
        "clusters are tight and far apart", f"{FROM_NGUYEN}: DBSCAN on object tokens, cosine silhouette",
    ),
    _grouping(
        "purity", "purity of token clusters", "tokens are in no cluster, or in one of another object",
        "every token is in a cluster of its own object", f"{FROM_NGUYEN}: share of all object tokens",
    ),
    _grouping(
        "in_cluster", "cosine within clusters", "tokens of a cluster differ", "tokens of a cluster are alike",
        f"{FROM_NGUYEN}: mean over pairs of tokens, then over clusters",
    ),
    _grouping(
        "in_object", "cosine within objects", "tokens of an object differ", "tokens of an object are alike",
        f"{FROM_NGUYEN}: mean over pairs of tokens, then over objects; needs no clusters",
    ),
    _grouping(
        "clusters", "clusters per object", "objects share clusters", "objects fall into several clusters", FROM_NGUYEN,
    ),
    _grouping(
        "unique_label", "share of objects with a cluster of their own", "objects drown in clusters of others",
        "each object dominates a cluster", f"{FROM_NGUYEN}, who count class labels; a study knows objects only",
    ),
    _occlusion("random", "probability of the label without random patches", "any patches can go"),
    _occlusion("salient", "probability of the label without salient patches", "the label rests on others"),
    _occlusion("non_salient", "probability of the label without non-salient patches", "the label rests on the others"),
    Measure(
        "occlusion_drift", "drift of tokens without random patches", ("image", "layer", "amount"), "1 - cosine",
        "0: the patches that are left do not notice", "the patches that are left turn elsewhere",
        "our construction: mean over the patches that are left, against the intact image", OCCLUSION_LIMITS, "neurons",
        frozenset({"classifier", "grid"}),
    ),
    Measure(
        "shuffle_probability", "probability of the label with shuffled cells", ("image", "cells"), "1",
        "the label needs the order of the cells", "the label does not need the order of the cells",
        f"{FROM_NGUYEN}, on the model's own grid", SHUFFLE_LIMITS, "neurons", frozenset({"classifier", "grid"}),
    ),
    Measure(
        "shuffle_drift", "drift of tokens with shuffled cells", ("image", "layer", "cells"), "1 - cosine",
        "0: a patch's token is the same wherever the patch lies", "a patch's token depends on its place and company",
        "our construction: mean over patches, each against itself in the intact image", SHUFFLE_LIMITS, "neurons",
        frozenset({"classifier", "grid"}),
    ),
)  # fmt: skip

_REGIONS = (
    Measure(
        "head_region_probability", "probability of the label without a part of this head", ("image", "layer", "head", "mode"),
        "1", "the answer hangs on this part of the head", "this part can go: the label keeps its probability",
        f"{FROM_LI}, region modes 3 and 4, in the order of `mode`: class rows and columns, patches to patches",
        f"{PRUNING_LIMITS} The two parts need not add up to the head.", "regions", frozenset({"classifier", "class_token", "grid"}),
    ),
)  # fmt: skip

WINDOW_LIMITS = "Between patches only: class tokens and registers see everything and are seen by all."

_WINDOWS = (
    Measure(
        "predicted_window", "window that a patch may see", ("image", "layer", "head", "patch", "side"),
        "patches left, top, right, bottom of the query", "0: the window ends at the patch",
        "the window reaches far on this side", f"WinT, {OURS_AFTER_MA}: sides in evaluation, cut at the border",
        WINDOW_LIMITS, "windows", frozenset({"grid"}), "int16",
    ),
    Measure(
        "predicted_area", "area of windows", ("image", "layer", "head"), "share of the grid",
        "patches see their neighbourhood", "1: full attention", f"WinT, {OURS_AFTER_MA}: mean over patches", WINDOW_LIMITS,
        "windows", frozenset({"grid"}),
    ),
    Measure(
        "predicted_overlap", "predicted windows against the head's attention", ("image", "layer", "head"),
        "intersection over union", "0: attention lies elsewhere", "1: windows are where the attention lies",
        "our construction: against boxes of the same mean area that hold most of the attention",
        "The mask all but forces it: nothing outside can be attended to. Compare predicted_overlap_open.", "windows",
        frozenset({"grid"}),
    ),
    Measure(
        "predicted_overlap_open", "predicted windows against open attention", ("image", "layer", "head"),
        "intersection over union", "0: queries would look elsewhere", "1: windows are where queries would look anyway",
        "our construction: as predicted_overlap, of the layer's queries and keys without the mask",
        "Whether a window that forbids what its query asks for helps. Compare with predicted_overlap_moved.", "windows",
        frozenset({"grid"}),
    ),
    Measure(
        "predicted_overlap_moved", "the same, with the measured windows moved", ("image", "layer", "head"),
        "intersection over union", "what chance gives", "windows are so large that any place will do",
        "our construction: boxes of predicted_overlap_open given to other queries at random",
        "Anything of the model alone; it is what predicted_overlap_open is compared with.", "windows",
        frozenset({"grid"}),
    ),
)  # fmt: skip

MAP_LIMITS = (
    "A layout: near means alike; distances between far groups and sizes of groups mean nothing. Every head is placed "
    "by the same rule on a map fitted to a bounded sample."
)
CLUSTER_LIMITS = (
    "Clusters are dense places of the latents, not kinds that must exist; a head takes the cluster of the nearest head "
    "of a bounded sample."
)


def _pattern_map(kind: str, what: str, needs: frozenset[str]) -> tuple[Measure, ...]:
    return (
        Measure(
            f"pattern_{kind}_xy", f"place on the map of {what} patterns", ("image", "layer", "head", "xy"), "layout units",
            "", "", f"after {FROM_LI}: t-SNE of an autoencoder's latents, or of principal components where these describe "
            "held-out images better", MAP_LIMITS, "patterns", needs, derived=True,
        ),
        Measure(
            f"pattern_{kind}_cluster", f"cluster of {what} patterns", ("image", "layer", "head"), "number from 0, -1 for none",
            "large clusters", "small clusters", f"our construction, after {FROM_LI}: HDBSCAN on the latents",
            CLUSTER_LIMITS, "patterns", needs, "int32", derived=True,
        ),
    )  # fmt: skip


_PATTERNS = (
    Measure(
        "pattern_rule", "numbers that patterns are named from", ("image", "layer", "head", "rule"), "share, steps in patches",
        "as even attention", "the rule's pattern", "our construction: shares of attention between patches, in the order of "
        "`rule` (vitrail.heads.pattern_names.RULES)", "Means over patches: a head that mixes patterns looks like neither.",
        "patterns", frozenset({"grid"}),
    ),
    Measure(
        "image_dependence", "image dependence", ("layer", "head"), "1 - mean correlation",
        "0: the same map for all images", "1: maps of two images have nothing in common", "our construction: over all pairs "
        "of images, cells of the map of attention between patches", "Linear correlation, which single strong cells rule. Maps that do not "
        "vary are left out.", "patterns", frozenset({"grid"}), derived=True,
    ),
    *_pattern_map("patch", "patch", frozenset({"grid"})),
    *_pattern_map("cls", "class-token", frozenset({"grid", "class_token"})),
)  # fmt: skip

MEASURES: dict[str, Measure] = {
    measure.name: measure for measure in (*_BASE, *_HEADS, *_PATCHES, *_NEURONS, *_REGIONS, *_PATTERNS, *_WINDOWS)
}
"""Every measure by its name in the store. These names are the public contract: add, don't rename."""

ROOMS: dict[str, tuple[str, ...]] = {
    "heads": tuple(measure.name for measure in _HEADS),
    "patches": tuple(measure.name for measure in _PATCHES),
    "neurons": tuple(measure.name for measure in _NEURONS),
    "regions": tuple(measure.name for measure in _REGIONS),
    "patterns": tuple(measure.name for measure in _PATTERNS),
    "windows": tuple(measure.name for measure in _WINDOWS),
}
"""The measures that a room's name stands for in `--measures`."""


def measures_named(names: str | Iterable[str]) -> tuple[Measure, ...]:
    """The measures that `names` asks for: a room, measure names, or a comma-separated mix; base measures come along.

    Raises `UsageError` for a name that is neither.
    """
    asked = names.split(",") if isinstance(names, str) else list(names)
    wanted: list[str] = [measure.name for measure in _BASE]
    for name in (item.strip() for item in asked):
        if name not in ROOMS and name not in MEASURES:
            raise UsageError(
                f"There is no measure called {name!r}. Rooms: {', '.join(ROOMS)}. Measures: {', '.join(MEASURES)}."
            )
        wanted.extend(ROOMS.get(name, (name,)))
    return tuple(MEASURES[name] for name in dict.fromkeys(wanted))
