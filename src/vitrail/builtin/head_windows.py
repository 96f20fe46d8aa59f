"""How few patches each head needs, and whether the prediction lives on them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vitrail.analysis import Analysis, Collector, Figure, Need, Option
from vitrail.builtin.sources import OURS_AFTER_MA, PAPER_MA
from vitrail.measure import Measure

if TYPE_CHECKING:
    from vitrail.models.open import Vit

__all__ = ["HEAD_WINDOWS"]

RULE = (
    "each patch of each head sees one box of patches, itself and the prefix tokens. Boxes are chosen so that the sum "
    "of what they cost is least while their mean area over the patches, heads and layers of an image keeps to "
    "`window_budget`: squared change of the head's output, times what a change of that head costs the prediction "
    "(measured once on the built-in photographs), times how much the prediction depends on the patch's token"
)
EQUAL = "every head of every layer has boxes of that same area, each where it holds most of the head's attention"
LIMITS = (
    "The rule is greedy: it cannot see that the changes of several heads may cancel or add up. Labels play no part."
)
NEEDS = ("common_grid", "grid", "shares", "gradients", "photographs")

WINDOW_BUDGET = Option(
    "window_budget",
    ("25", "10", "15", "20", "36", "44", "60"),
    "Mean area of the windows of all heads, in percent of the grid.",
)


def _effects(suffix: str, words: str, source: str) -> tuple[Measure, ...]:
    return (
        Measure(
            name=f"head_window_divergence{suffix}",
            title=f"Jensen-Shannon divergence of the prediction under {words}",
            dims=("image",),
            unit="bits",
            low="0: the prediction stays the same",
            high="1: the predictions share nothing",
            source=f"{OURS_AFTER_MA}: {source}",
            limits=LIMITS,
            needs=("classifier", *NEEDS),
        ),
        Measure(
            name=f"head_window_flip{suffix}",
            title=f"top-1 changes under {words}",
            dims=("image",),
            unit="bool",
            low="0: the most probable class stays",
            high="1: another class is the most probable one",
            source=f"{OURS_AFTER_MA}: {source}",
            limits=LIMITS,
            needs=("classifier", *NEEDS),
            dtype="bool",
        ),
        Measure(
            name=f"head_window_output_shift{suffix}",
            title=f"shift of the output under {words}",
            dims=("image",),
            unit="1 - cosine",
            low="0: the feature vector keeps its direction",
            high="the feature vector is another one",
            source=f"{OURS_AFTER_MA}: {source}",
            limits=LIMITS,
            needs=("embedding", *NEEDS),
        ),
    )


MEASURES = (
    Measure(
        name="head_window_area",
        title="area of a head's windows under one budget",
        dims=("image", "layer", "head"),
        unit="share of the grid",
        value_range=(0.0, 1.0),
        low="0: its patches can be left with themselves and the prefix tokens",
        high="1: its patches need the whole grid",
        source=f"{OURS_AFTER_MA}: mean over patches; {RULE}",
        limits=LIMITS,
        needs=NEEDS,
    ),
    *_effects("", "windows that share one budget", RULE),
    *_effects("_equal", "windows of one area", f"as without _equal, but {EQUAL}"),
)


def _no_common_grid(vit: "Vit", options: Mapping[str, str], measure: Measure) -> str:
    from vitrail.patches.head_windows import reason_against_common_grid

    return reason_against_common_grid(vit)


def _no_gradients(vit: "Vit", options: Mapping[str, str], measure: Measure) -> str:
    from vitrail.models.gradients import reason_against_gradients

    return reason_against_gradients(vit)


def _no_photographs(vit: "Vit", options: Mapping[str, str], measure: Measure) -> str:
    if vit.n_channels in (1, 3):
        return ""
    return (
        "what a change of a head costs is measured on the built-in photographs, and this model takes images of "
        f"{vit.n_channels} channels"
    )


def _collectors(vit: "Vit", names: Sequence[str], options: Mapping[str, str]) -> "list[Collector]":
    from vitrail.windows.collect_head_windows import HeadWindowCollector

    return [HeadWindowCollector(vit, names, int(options[WINDOW_BUDGET.name]) / 100)]


def _figures() -> Sequence[Figure]:
    from vitrail.figures.head_windows import FIGURES

    return tuple(Figure(*each) for each in FIGURES)


def _sections() -> Sequence[Any]:
    from vitrail.report.head_windows import head_windows

    return (head_windows,)


HEAD_WINDOWS = Analysis(
    name="head_windows",
    title="Windows of heads",
    question="How few patches does each head need?",
    measures=MEASURES,
    collectors=_collectors,
    options=(WINDOW_BUDGET,),
    needs=(
        Need("common_grid", "one grid of patches in all layers", _no_common_grid),
        Need("gradients", "a gradient of the output that reaches the image", _no_gradients),
        Need("photographs", "images of one or three channels, as photographs have", _no_photographs),
    ),
    figures=_figures,
    sections=_sections,
    paper=PAPER_MA,
)
