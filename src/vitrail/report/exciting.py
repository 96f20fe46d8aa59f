"""What excites neurons, in the report: the neurons that answer to few photographs, and these."""

from collections.abc import Iterator

from vitrail.figures.exciting import exciting_photographs
from vitrail.report.parts import Drawing, Part, ReportData, Section, readings
from vitrail.sentence import Sentence
from vitrail.tokens.peaks import peak_images, peak_layer, selective_neurons, selectivity

__all__ = ["exciting"]


def exciting(study: ReportData) -> Section | None:
    """The most selective neurons and their photographs, if the study holds them.

    Args:
        study: The study that is reported.

    Returns:
        The section; None where the study holds nothing for it.
    """
    names = study.measures_of("exciting")
    if "neuron_peak" not in names or study.n_images < 2:
        return None
    return Section("exciting", "What excites neurons", tuple(_findings(study)), lambda: _parts(study, names))


def _findings(study: ReportData) -> Iterator[Sentence]:
    neuron = selective_neurons(study.data)[0]
    image, beyond = peak_images(study.data, neuron)[0], selectivity(study.data)[neuron]
    yield Sentence(
        f"Of {study.data.sizes['token_channel']:,} neurons of {peak_layer(study.data).name}, number {neuron} singles "
        f"photographs out most: its strongest lie {beyond:.1f} standard deviations above the median; "
        f"first of all {study.data.indexes['image'][image]}.",
        measure="neuron_peak",
        images=[(image, "strongest")],
        caption="what it answers to most",
    )


def _parts(study: ReportData, names: list[str]) -> Iterator[Part]:
    if {"neuron_peak_patch", "thumbnail"} <= set(study.data):
        yield Drawing(exciting_photographs(study.data))
    yield readings(study, names)
