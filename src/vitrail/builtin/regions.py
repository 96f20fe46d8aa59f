"""Which part of a head matters."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vitrail.analysis import Analysis, Collector, Need
from vitrail.builtin.heads import PRUNING_LIMITS
from vitrail.builtin.sources import FROM_LI, PAPER_LI
from vitrail.measure import Measure

if TYPE_CHECKING:
    from vitrail.models.open import Vit

__all__ = ["REGIONS"]


MEASURES = (
    Measure(
        name="head_region_probability",
        title="probability of the label without a part of this head",
        dims=("image", "layer", "head", "mode"),
        unit="1",
        baseline="probability",
        value_range=(0.0, 1.0),
        low="the answer hangs on this part of the head",
        high="this part can go: the label keeps its probability",
        source=(f"{FROM_LI}, region modes 3 and 4, in the order of `mode`: class rows and columns, patches to patches"),
        limits=(f"{PRUNING_LIMITS} The two parts need not add up to the head."),
        needs=(
            "classifier",
            "class_token",
            "grid",
            "class_rows",
        ),
        depends_on=("label",),
    ),
)


def _no_class_rows(vit: "Vit", options: Mapping[str, str], measure: Measure) -> str:
    from vitrail.heads.regions import Mode, modes_offered, why_not_all_modes

    layers = range(vit.n_layers)
    if any(Mode.CROSS in modes_offered(vit.anatomy, layer) for layer in layers):
        return ""
    return f"no layer has a map with a row and a column of a class token. {why_not_all_modes(vit.anatomy, 0)}"


def _collectors(vit: "Vit", names: Sequence[str], options: Mapping[str, str]) -> "list[Collector]":
    from vitrail.heads.collect import region_collectors

    return region_collectors(vit)


REGIONS = Analysis(
    name="regions",
    title="Regions of heads",
    question="Which part of a head matters?",
    measures=MEASURES,
    collectors=_collectors,
    needs=(Need("class_rows", "a map with a row and a column of a class token", _no_class_rows),),
    paper=PAPER_LI,
    places=lambda study: {"mode": ("class token", "patches")},
)
