"""What excites neurons: the photographs of a study, and images made for it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vitrail.analysis import Analysis, Collector, Figure
from vitrail.measure import Measure

if TYPE_CHECKING:
    from vitrail.models.open import Vit

__all__ = ["EXCITING"]

NEURON = "A neuron is a channel of the patches' tokens after the last layer that returns the patches it was given"

MEASURES = (
    Measure(
        name="neuron_peak",
        title="highest activation of each neuron",
        dims=("image", "token_channel"),
        unit="activation",
        low="no patch of this photograph excites the neuron",
        high="some patch excites it",
        source=f"our construction: highest value over patches. {NEURON}",
        limits="Neurons mix features; their axes need not be the directions that mean something.",
        needs=("token_grid", "grid_output"),
    ),
    Measure(
        name="neuron_peak_patch",
        title="patch that excites each neuron most",
        dims=("image", "token_channel"),
        unit="patch",
        low="",
        high="",
        source="our construction: index of the patch whose value is `neuron_peak`, row by row",
        limits="The token of a patch has gathered from others; what excites it may lie elsewhere.",
        needs=("token_grid", "grid_output"),
        dtype="int16",
        is_quantity=False,
    ),
)

IMAGE_MEASURES = (
    Measure(
        name="exciting_image",
        title="image made to excite the chosen neuron",
        dims=("excited_level", "row", "column", "channel"),
        unit="1",
        value_range=(0.0, 1.0),
        low="dark",
        high="bright",
        source="gradient ascent from faint noise: a spectrum that falls with frequency, random shifts; after Olah et "
        "al. 2017 (distill.pub)",
        limits="What the neuron answers to among all images, not among photographs.",
        needs=("token_grid", "grid_output"),
        depends_on=("channel",),
    ),
)


def _collectors(vit: "Vit", names: Sequence[str], options: Mapping[str, str]) -> "list[Collector]":
    from vitrail.tokens.excite import PeakCollector

    return [PeakCollector(vit, names)]


def _look(one: Any) -> Mapping[str, Any]:
    from vitrail.tokens.excite import exciting_images

    return exciting_images(one)


def _figures() -> Sequence[Figure]:
    from vitrail.figures.exciting import FIGURES, ONE_IMAGE_FIGURES

    return (
        *(Figure(*each) for each in FIGURES),
        *(Figure(*each, one_image=True) for each in ONE_IMAGE_FIGURES),
    )


def _sections() -> Sequence[Any]:
    from vitrail.report.exciting import exciting

    return (exciting,)


EXCITING = Analysis(
    name="exciting",
    title="What excites neurons",
    question="Which photographs, and which patches of them, excite a neuron most?",
    measures=MEASURES,
    collectors=_collectors,
    image_measures=IMAGE_MEASURES,
    look=_look,
    figures=_figures,
    sections=_sections,
)
