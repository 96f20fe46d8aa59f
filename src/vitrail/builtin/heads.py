"""Which heads matter, and how far they look."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vitrail.analysis import Analysis, Collector, Figure, Need, Option
from vitrail.builtin.sources import FROM_LI, PAPER_LI
from vitrail.heads.exact_names import EXACT_VALUES
from vitrail.measure import Measure

if TYPE_CHECKING:
    from vitrail.models.open import Vit

__all__ = ["HEADS", "MAPS", "PRUNING_LIMITS"]

PRUNING_LIMITS = (
    "Heads are removed one at a time, set to zero (to their mean over the images where the plan's option `ablation` "
    "says so): two heads that stand in for each other both look unimportant."
)
PRUNED_HEAD = ("importance", "ablation")
"""The options that the answer without a head depends on."""

NO_RESIDUAL = (
    "is seen to add its attention to the tokens that it was given: something comes in between, such as a convolution, "
    "one operation does both, or the sum is outside the layer"
)
"""Why shifts of tokens are left out, after the layers that are meant."""

EXACT_LIMITS = (
    "NaN on the images that were not swept, three in four. Its mean is of the sample alone; that of all images is the "
    "mean of the estimate, corrected by it (`vitrail.heads.summary.head_table`)."
)

NEIGHBOUR_LIMITS = "Distance on the grid of patches, without looking at what the patches show."

PRUNED_AND_READ = (
    Measure(
        name="head_probability",
        title="probability of the label without this head",
        dims=("image", "layer", "head"),
        unit="1",
        baseline="probability",
        value_range=(0.0, 1.0),
        low="the answer hangs on this head",
        high="the head can go: the label keeps its probability",
        source=(f"{FROM_LI}, model and local impact"),
        limits=PRUNING_LIMITS,
        needs=("classifier", "estimable"),
        depends_on=(*PRUNED_HEAD, "label"),
    ),
    Measure(
        name="head_divergence",
        title="Jensen-Shannon divergence of the predictions",
        dims=("image", "layer", "head"),
        unit="bits",
        low="0: pruning the head changes no class probability",
        high="1: the predictions share nothing",
        source=(
            f"our construction, after {FROM_LI}, model and global impact; of independent labels the mean over labels "
            "of the divergence of yes and no"
        ),
        limits=PRUNING_LIMITS,
        needs=("classifier", "estimable"),
        depends_on=PRUNED_HEAD,
    ),
    Measure(
        name="head_output_shift",
        title="shift of the output without this head",
        dims=("image", "layer", "head"),
        unit="1 - cosine",
        low="0: the feature vector keeps its direction",
        high="the head decides much of the feature vector",
        source="our construction, for a model whose output is a feature vector",
        limits=PRUNING_LIMITS,
        needs=("embedding", "estimable"),
        depends_on=PRUNED_HEAD,
    ),
    Measure(
        name="head_value",
        title="value without this head",
        dims=("image", "layer", "head"),
        unit="unit of the output",
        baseline="value",
        low="",
        high="",
        source="our construction: `value` with the head pruned",
        limits=PRUNING_LIMITS,
        needs=("value", "estimable"),
        depends_on=PRUNED_HEAD,
    ),
    Measure(
        name="head_value_change",
        title="size of the change of the value without this head",
        dims=("image", "layer", "head"),
        unit="unit of the output",
        low="0: the value stays",
        high="the head decides much of the value",
        source=(
            "our construction: absolute difference of `head_value` and `value`; of several outputs of a regression the "
            "Euclidean length of their change"
        ),
        limits=f"{PRUNING_LIMITS} Without a sign; `head_value` has it.",
        needs=("values", "estimable"),
        depends_on=PRUNED_HEAD,
    ),
    Measure(
        name="head_loss_change",
        title="change of the loss without this head",
        dims=("image", "layer", "head"),
        unit="nats",
        low="negative: the label gets likelier without the head",
        high="the head carries evidence for the label",
        source=(
            "cross-entropy (of independent labels the label's own, binary) after pruning minus before; our construction"
        ),
        limits=PRUNING_LIMITS,
        needs=("classifier", "estimable"),
        depends_on=(*PRUNED_HEAD, "label"),
    ),
    Measure(
        name="head_flip",
        title="top-1 changes without this head",
        dims=("image", "layer", "head"),
        unit="bool",
        low="0: the same prediction",
        high="1: another prediction",
        source="our construction",
        limits=PRUNING_LIMITS,
        needs=("classifier", "estimable"),
        dtype="bool",
        depends_on=PRUNED_HEAD,
    ),
    Measure(
        name="head_prediction",
        title="prediction without this head",
        dims=("image", "layer", "head"),
        unit="class",
        low="",
        high="",
        source="argmax of the logits after pruning",
        limits=PRUNING_LIMITS,
        needs=("classifier", "estimable"),
        dtype="int32",
        depends_on=PRUNED_HEAD,
        is_quantity=False,
    ),
    Measure(
        name="head_cls_shift",
        title="shift of the class token",
        dims=("image", "layer", "head"),
        unit="1 - cosine",
        value_range=(0.0, 2.0),
        low="0: the class token leaves the layer's attention as before",
        high="the head writes much of the class token here",
        source=(f"our construction, after {FROM_LI}, layer and local impact; read after attention and residual"),
        limits="Local: says nothing of whether later layers use it.",
        needs=("class_token", "residual"),
        depends_on=("ablation",),
    ),
    Measure(
        name="head_token_shift",
        title="mean shift of all tokens",
        dims=("image", "layer", "head"),
        unit="1 - cosine",
        value_range=(0.0, 2.0),
        low="0: no token changes its direction",
        high="the head writes much of every token here",
        source=(f"our construction, after {FROM_LI}, layer and global impact; read after attention and residual"),
        limits="Local: says nothing of whether later layers use it.",
        needs=("residual",),
        depends_on=("ablation",),
    ),
    Measure(
        name="head_cls_shift_l2",
        title="relative change of the class token",
        dims=("image", "layer", "head"),
        unit="L2 / L2",
        low="0: unchanged",
        high="the change is as long as the token itself",
        source="our construction, beside head_cls_shift",
        limits="Sees length as well as direction; layer norms later remove part of it.",
        needs=("class_token", "residual"),
        depends_on=("ablation",),
    ),
    Measure(
        name="head_token_shift_l2",
        title="mean relative change of all tokens",
        dims=("image", "layer", "head"),
        unit="L2 / L2",
        low="0: unchanged",
        high="the changes are as long as the tokens themselves",
        source="our construction, beside head_token_shift",
        limits="Sees length as well as direction; layer norms later remove part of it.",
        needs=("residual",),
        depends_on=("ablation",),
    ),
    Measure(
        name="attention_strength",
        title="attention strength",
        dims=("image", "layer", "head", "hop"),
        unit="mean attention weight per neighbour",
        low="patches look little at neighbours this many hops away",
        high="patches look much at neighbours this many hops away",
        source=(f"{FROM_LI}, verified against its published figure; hops are Chebyshev distance"),
        limits=NEIGHBOUR_LIMITS,
        needs=("grid",),
        depends_on=("maps",),
    ),
    Measure(
        name="strength_entropy",
        title="entropy of attention strength",
        dims=("image", "layer", "head"),
        unit="nats",
        low="0: all strength at one distance",
        high="ln(number of hops): every distance alike",
        source=(f"{FROM_LI}, verified against its published figure"),
        limits=NEIGHBOUR_LIMITS,
        needs=("grid", "shares"),
        depends_on=("maps",),
    ),
    Measure(
        name="attention_distance",
        title="mean attention distance",
        dims=("image", "layer", "head"),
        unit="patches",
        low="the head looks near the query",
        high="the head looks across the image",
        source="Dosovitskiy et al. 2021 (arXiv 2010.11929), figure 7: Euclidean, weighted by attention between patches",
        limits=NEIGHBOUR_LIMITS,
        needs=("grid", "shares"),
        depends_on=("maps",),
    ),
    Measure(
        name="prefix_share",
        title="share of attention that goes to prefix tokens",
        dims=("image", "layer", "head"),
        unit="1",
        low="patches look at patches",
        high="patches park their attention on class or register tokens",
        source="our construction, beside attention strength",
        limits="High shares are often a sink without content.",
        needs=("grid", "shares"),
        depends_on=("maps",),
    ),
)

IMAGE_MEASURES = (
    Measure(
        name="class_attention",
        title="attention of the class token",
        dims=("layer", "head", "token"),
        unit="attention weight",
        low="the class token does not look here",
        high="the class token looks here",
        source="the class token's row of the head's map, prefix tokens first",
        limits="Where a head looks is not what it passes on.",
        needs=("grid", "class_token"),
        depends_on=(),
    ),
    Measure(
        name="class_received",
        title="attention to the class token",
        dims=("layer", "head", "token"),
        unit="attention weight",
        low="the token does not look at the class token",
        high="the token looks at the class token",
        source="the class token's column of the head's map, prefix tokens first",
        limits="Where a head looks is not what it passes on.",
        needs=("grid", "class_token"),
        depends_on=(),
    ),
    Measure(
        name="peak_patch",
        title="the patch that other patches look at most",
        dims=("layer", "head"),
        unit="patch, counted in raster order",
        low="",
        high="",
        source="our construction: the patch that receives most attention from the other patches",
        limits="Often a sink without content.",
        needs=("grid",),
        dtype="int32",
        depends_on=(),
        is_quantity=False,
    ),
    Measure(
        name="peak_attention",
        title="attention of the patch that others look at most",
        dims=("layer", "head", "token"),
        unit="attention weight",
        low="the patch does not look here",
        high="the patch looks here",
        source="the row of `peak_patch` in the head's map, prefix tokens first",
        limits="Where a head looks is not what it passes on.",
        needs=("grid",),
        depends_on=(),
    ),
    Measure(
        name="peak_received",
        title="attention to the patch that others look at most",
        dims=("layer", "head", "token"),
        unit="attention weight",
        low="the token does not look at the patch",
        high="the token looks at the patch",
        source="the column of `peak_patch` in the head's map, prefix tokens first",
        limits="Where a head looks is not what it passes on.",
        needs=("grid",),
        depends_on=(),
    ),
)


def _exact(measure: Measure) -> Measure:
    """The same by pruning, on the images that are swept where it is estimated on all."""
    return replace(
        measure,
        name=EXACT_VALUES[measure.name],
        title=f"{measure.title}, exact on a sample",
        source=f"{measure.source}; the head pruned on one image in four, chosen by its place",
        limits=EXACT_LIMITS,
        needs=("classifier", "sampled"),
    )


MEASURES = (*PRUNED_AND_READ, *(_exact(each) for each in PRUNED_AND_READ if each.name in EXACT_VALUES))

IMPORTANCE = Option(
    "importance",
    ("exact", "estimate", "corrected"),
    "Prune every head in turn, or estimate all of them from one backward pass, or estimate and correct the means by "
    "pruning every head on one image in four (100 images or more).",
)
ABLATION = Option("ablation", ("zero", "mean"), "What a pruned head gives: zero, or its mean output over the images.")
MAPS = Option("maps", ("model", "bfloat16"), "Number format of attention maps while they are read.")


NOT_TO_THE_MEAN = (
    "the estimate turns heads down to zero, not to their mean; use --importance exact or --ablation zero (in Python "
    'options={"importance": "exact"})'
)


def _not_estimable(vit: "Vit", options: Mapping[str, str], measure: Measure) -> str:
    if options["importance"] == "exact":
        return ""
    from vitrail.heads.estimate import ESTIMATED, NOT_ESTIMATED
    from vitrail.models.gradients import reason_against_gradients

    if measure.name in ESTIMATED:
        return reason_against_gradients(vit) if options["ablation"] == "zero" else NOT_TO_THE_MEAN
    use = 'use --importance exact (in Python options={"importance": "exact"})'
    return f"no estimate: {NOT_ESTIMATED[measure.name]}; {use}"


def _not_sampled(vit: "Vit", options: Mapping[str, str], measure: Measure) -> str:
    if options["importance"] != "corrected":
        return (
            "it corrects estimates by a sample of the images; use --importance corrected (in Python "
            'options={"importance": "corrected"})'
        )
    return "" if options["ablation"] == "zero" else NOT_TO_THE_MEAN


def _no_residual(vit: "Vit", options: Mapping[str, str], measure: Measure) -> str:
    from vitrail.heads.importance import visible_residuals

    layers = visible_residuals(vit)
    if "class_token" in measure.needs:
        layers = frozenset(layer for layer in layers if vit.anatomy.class_index(layer) is not None)
        return "" if layers else f"no layer with a class token {NO_RESIDUAL}"
    return "" if layers else f"no layer {NO_RESIDUAL}"


def _collectors(vit: "Vit", names: Sequence[str], options: Mapping[str, str]) -> "list[Collector]":
    from vitrail.heads.collect import head_collectors

    return head_collectors(vit, names, options)


def _look(one: Any) -> Mapping[str, Any]:
    from vitrail.heads.one_image import head_look

    return head_look(one)


def _figures() -> Sequence[Figure]:
    from vitrail.figures.heads import FIGURES
    from vitrail.figures.one_image import HEAD_FIGURES

    return *(Figure(*each) for each in FIGURES), *(Figure(*each, one_image=True) for each in HEAD_FIGURES)


def _sections() -> Sequence[Any]:
    from vitrail.report.classes import classes
    from vitrail.report.heads import heads
    from vitrail.report.why import why

    return heads, why, classes


HEADS = Analysis(
    name="heads",
    title="Heads",
    question="Which heads matter, and how far do they look?",
    measures=MEASURES,
    collectors=_collectors,
    image_measures=IMAGE_MEASURES,
    look=_look,
    options=(IMPORTANCE, ABLATION, MAPS),
    needs=(
        Need("estimable", "exact importance, or an estimate of this measure", _not_estimable),
        Need(
            "sampled",
            "estimates that are corrected by a sample (`--importance corrected`)",
            _not_sampled,
            of_other_models=True,
        ),
        Need("residual", "a layer that adds attention to the tokens it was given", _no_residual),
    ),
    figures=_figures,
    sections=_sections,
    paper=PAPER_LI,
)
