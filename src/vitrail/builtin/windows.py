"""Which windows a WinT predicts."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vitrail.analysis import Analysis, Collector, Figure, Need
from vitrail.builtin.sources import OURS_AFTER_MA, PAPER_MA
from vitrail.measure import Measure

if TYPE_CHECKING:
    from vitrail.models.open import Vit

__all__ = ["WINDOWS"]

WINDOW_LIMITS = "Between patches only: class tokens and registers see everything and are seen by all."

MEASURES = (
    Measure(
        name="predicted_window",
        title="window that a patch may see",
        dims=("image", "layer", "head", "patch", "side"),
        unit="patches left, top, right, bottom of the query",
        low="0: the window ends at the patch",
        high="the window reaches far on this side",
        source=(f"WinT, {OURS_AFTER_MA}: sides in evaluation, cut at the border"),
        limits=WINDOW_LIMITS,
        needs=("predicted_windows",),
        dtype="int16",
        depends_on=(),
    ),
    Measure(
        name="predicted_area",
        title="area of windows",
        dims=("image", "layer", "head"),
        unit="share of the grid",
        low="patches see their neighbourhood",
        high="1: full attention",
        source=(f"WinT, {OURS_AFTER_MA}: mean over patches"),
        limits=WINDOW_LIMITS,
        needs=("predicted_windows",),
        depends_on=(),
    ),
    Measure(
        name="predicted_overlap",
        title="predicted windows against the head's attention",
        dims=("image", "layer", "head"),
        unit="intersection over union",
        low="0: attention lies elsewhere",
        high="1: windows are where the attention lies",
        source="our construction: against boxes of the same mean area that hold most of the attention",
        limits="The mask all but forces it: nothing outside can be attended to. Compare predicted_overlap_open.",
        needs=("predicted_windows",),
        depends_on=(),
    ),
    Measure(
        name="predicted_overlap_open",
        title="predicted windows against open attention",
        dims=("image", "layer", "head"),
        unit="intersection over union",
        low="0: queries would look elsewhere",
        high="1: windows are where queries would look anyway",
        source="our construction: as predicted_overlap, of the layer's queries and keys without the mask",
        limits="Whether a window that forbids what its query asks for helps. Compare with predicted_overlap_moved.",
        needs=("predicted_windows",),
        depends_on=(),
    ),
    Measure(
        name="predicted_overlap_moved",
        title="the same, with the measured windows moved",
        dims=("image", "layer", "head"),
        unit="intersection over union",
        low="what chance gives",
        high="windows are so large that any place will do",
        source="our construction: boxes of predicted_overlap_open given to other queries at random",
        limits="Anything of the model alone; it is what predicted_overlap_open is compared with.",
        needs=("predicted_windows",),
        depends_on=(),
    ),
)


def _no_predicted_windows(vit: "Vit", options: Mapping[str, str], measure: Measure) -> str:
    from vitrail.wint.model import window_heads

    return "" if window_heads(vit.model) else "the model has no windows of its own (a WinT has)"


def _collectors(vit: "Vit", names: Sequence[str], options: Mapping[str, str]) -> "list[Collector]":
    from vitrail.windows.collect import WindowCollector

    return [WindowCollector(vit, names)]


def _figures() -> Sequence[Figure]:
    from vitrail.figures.one_image import WINDOW_FIGURES
    from vitrail.figures.wint import FIGURES

    return *(Figure(*each) for each in FIGURES), *(Figure(*each, one_image=True) for each in WINDOW_FIGURES)


def _sections() -> Sequence[Any]:
    from vitrail.report.windows import windows

    return (windows,)


WINDOWS = Analysis(
    name="windows",
    title="Predicted windows",
    question="Which windows does a WinT predict, and does its attention agree?",
    measures=MEASURES,
    collectors=_collectors,
    needs=(Need("predicted_windows", "a model that predicts windows (a WinT)", _no_predicted_windows),),
    figures=_figures,
    sections=_sections,
    paper=PAPER_MA,
    only_for="a WinT",
)
