"""Which patches interact, in which windows, and which way they are pulled."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vitrail.analysis import Analysis, Collector, Figure, Option
from vitrail.builtin.sources import OURS_AFTER_MA, PAPER_MA
from vitrail.measure import Measure

if TYPE_CHECKING:
    from vitrail.models.open import Vit

__all__ = ["PATCHES"]

INTERACTION_LIMITS = (
    "Interactions are attention between patches: each head's rows without prefix tokens, scaled to sum to 1, their "
    "mean over heads, the diagonal set to 0, rows scaled to sum to 1 again. Heads that look elsewhere are outvoted."
)
HUB_RULE = (
    "A query keeps the keys whose interactions are at least the mean of its row plus one standard deviation; a patch "
    "is one if more than half of the queries keep it, and more than the mean over patches plus two standard deviations."
)
NEIGHBOUR_LIMITS = "Distance on the grid of patches, without looking at what the patches show."

MEASURES = (
    Measure(
        name="window",
        title="window of a patch",
        dims=("image", "layer", "patch", "side"),
        unit="patches left, top, right, bottom of the query",
        low="negative: the window ends before it reaches the query on this side",
        high="the window reaches far on this side",
        source=(
            f"{OURS_AFTER_MA}: the box of a quarter of the grid (option `window_area`) that holds most of the patch's "
            "interactions, mean over heads"
        ),
        limits=f"{INTERACTION_LIMITS} NaN for a patch that interacts with no other.",
        needs=("grid", "shares"),
        depends_on=("window_area",),
    ),
    Measure(
        name="window_object_share",
        title="share of a patch's window that objects cover",
        dims=("image", "layer", "patch"),
        unit="1",
        value_range=(0.0, 1.0),
        low="0: the window lies on background",
        high="1: the window lies wholly on objects",
        source=f"{OURS_AFTER_MA}: mean over the patches of `window` of the share that objects cover of each",
        limits=(
            "Windows have one area, objects have not, and patches near an object have it in their window by nearness: "
            "compare with the windows of another image at the same places, as the report does."
        ),
        needs=("grid", "shares", "masks"),
    ),
    Measure(
        name="tendency",
        title="tendency of the responsive field",
        dims=("image", "layer", "patch", "xy"),
        unit="patches, x to the right, y down",
        low="(0, 0): the interactions lie evenly around the patch",
        high="long: the patch is pulled that way",
        source=(f"{OURS_AFTER_MA}: centre of the interactions in the window, seen from the patch"),
        limits="Patches near the border can only be pulled inward; compare with interior patches.",
        needs=("grid", "shares"),
        depends_on=("window_area",),
    ),
    Measure(
        name="field_size",
        title="size of the responsive field",
        dims=("image", "layer", "patch"),
        unit="share of the grid",
        low="half of the patch's interactions fit in a small box",
        high="any box with half of the interactions is large",
        source=(
            f"{OURS_AFTER_MA}: area of the smallest box of patches, of any shape at any place, that holds half of the "
            "interactions; exact"
        ),
        limits=(
            f"{INTERACTION_LIMITS} A box that has to join a few far sinks is large although few patches hold half: "
            "compare with the share of the strongest patches."
        ),
        needs=("grid", "shares"),
        version=2,
        depends_on=(),
    ),
    Measure(
        name="strongest_share",
        title="share of the strongest patches that hold half of the interactions",
        dims=("image", "layer", "patch"),
        unit="share of the grid",
        low="a few patches hold half of what the patch takes, wherever they lie",
        high="0.5: all patches hold the same",
        source=(
            f"{OURS_AFTER_MA}: number of strongest keys whose interactions sum to half of the row, divided by the "
            "number of patches; exact"
        ),
        limits=f"{INTERACTION_LIMITS} It does not say where these patches lie: field_size does.",
        needs=("grid", "shares"),
        depends_on=(),
    ),
    Measure(
        name="interaction_distance",
        title="mean distance of interactions",
        dims=("image", "layer", "patch"),
        unit="patches",
        low="the patch takes from its neighbours",
        high="the patch takes from far away",
        source=(f"{OURS_AFTER_MA}: Euclidean, weighted by the indicator"),
        limits=NEIGHBOUR_LIMITS,
        needs=("grid", "shares"),
        depends_on=(),
    ),
    Measure(
        name="hub",
        title="indiscriminative patch (hub)",
        dims=("image", "layer", "patch"),
        unit="bool",
        low="0: few queries keep this patch, or no more than keep others",
        high="1: more than half of the queries keep it, in this round or in one of the rounds before",
        source=(
            f"{OURS_AFTER_MA}. {HUB_RULE} Then the hubs' columns are set to zero and the rule is applied again to the "
            "patches that are left, until there are none, at most 5 times. Related to attention sinks and high-norm "
            "tokens"
        ),
        limits=(
            "A hub may carry information: removing it is no clean-up. Hubs that are no sinks stand out only once the "
            "sinks are taken away; before, fewer than half of the queries keep most of them."
        ),
        needs=("grid", "shares"),
        dtype="bool",
        depends_on=(),
    ),
    Measure(
        name="sink",
        title="sink (hub of the first round)",
        dims=("image", "layer", "patch"),
        unit="bool",
        low="0: at most half of the queries keep this patch, or no more than keep others",
        high="1: more than half of the queries keep it, whatever they look for",
        source=f"{OURS_AFTER_MA}. {HUB_RULE} Related to attention sinks and high-norm tokens",
        limits="A sink may carry information: removing it is no clean-up.",
        needs=("grid", "shares"),
        dtype="bool",
        depends_on=(),
    ),
    Measure(
        name="sink_share",
        title="share of the interactions that sinks take",
        dims=("image", "layer"),
        unit="1",
        low="0: no sinks, or sinks that take nothing",
        high="1: patches interact with sinks alone",
        source=f"{OURS_AFTER_MA}: sum of the interactions with sinks, divided by the sum of all",
        limits="Attention between patches: what prefix tokens take is left out.",
        needs=("grid", "shares"),
        depends_on=(),
    ),
)

WINDOW_AREA = Option(
    "window_area",
    ("25", "10", "15", "20", "36", "44", "60"),
    "Area of attention windows, in percent of the grid.",
)


def _collectors(vit: "Vit", names: Sequence[str], options: Mapping[str, str]) -> "list[Collector]":
    from vitrail.patches.collect import patch_collectors

    return patch_collectors(vit, names, options)


def _figures() -> Sequence[Figure]:
    from vitrail.figures.one_image import PATCH_FIGURES
    from vitrail.figures.patches import BOTH, FIGURES

    return (
        *(Figure(*each) for each in FIGURES),
        *(Figure(*each, both=True) for each in BOTH),
        *(Figure(*each, one_image=True) for each in PATCH_FIGURES),
    )


def _sections() -> Sequence[Any]:
    from vitrail.report.patches import patches

    return (patches,)


PATCHES = Analysis(
    name="patches",
    title="Patches",
    question="Which patches interact, and how far?",
    measures=MEASURES,
    collectors=_collectors,
    options=(WINDOW_AREA,),
    figures=_figures,
    sections=_sections,
    paper=PAPER_MA,
)
