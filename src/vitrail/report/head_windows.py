"""Windows of heads in the report: who needs much of the image, and what is lost without the rest."""

from collections.abc import Iterator

import numpy as np

from vitrail.analysis import all_options
from vitrail.figures.head_windows import head_window_areas
from vitrail.figures.style import head_name
from vitrail.report.parts import Drawing, Part, ReportData, Section, readings
from vitrail.sentence import Sentence, percent
from vitrail.stats import mean_interval, share_interval

__all__ = ["head_windows"]

EFFECTS = {"head_window_divergence": "bits of divergence", "head_window_output_shift": "1 - cosine"}


def head_windows(study: ReportData) -> Section | None:
    """Areas of the windows of heads under one budget, if the study holds them.

    Args:
        study: The study that is reported.

    Returns:
        The section; None where the study holds nothing for it.
    """
    names = study.measures_of("head_windows")
    if not names:
        return None
    return Section("head_windows", "Windows of heads", tuple(_findings(study, names)), lambda: _parts(study, names))


def _findings(study: ReportData, names: list[str]) -> Iterator[Sentence]:
    budget = study.plan.options.get("window_budget", all_options()["window_budget"].default)
    if "head_window_area" in names:
        area = study.data["head_window_area"].mean("image").to_numpy()
        most, least = (np.unravel_index(int(at), area.shape) for at in (np.nanargmax(area), np.nanargmin(area)))
        layers = np.nanmean(area, 1)
        widest = int(layers.argmax())
        yield Sentence(
            f"Where all heads share windows of {budget} % of the grid, {head_name(*map(int, most))} needs the most of "
            f"it ({percent(float(area[most]))} a patch), {head_name(*map(int, least))} the least "
            f"({percent(float(area[least]))}); of the layers L{widest} needs most ({percent(float(layers[widest]))}).",
            measure="head_window_area",
            layer=int(most[0]),
            head=int(most[1]),
        )
    if "head_window_flip" in names:
        yield Sentence(
            f"Under these windows the most probable class stays for {_stays(study, 'head_window_flip')} of the images"
            + (
                f"; under windows of one area for {_stays(study, 'head_window_flip_equal')}."
                if "head_window_flip_equal" in names
                else "."
            ),
            measure="head_window_flip",
        )
    for name, unit in EFFECTS.items():
        if {name, f"{name}_equal"} <= set(names):
            yield _shared_against_equal(study, name, unit)


def _stays(study: ReportData, name: str) -> str:
    kept = study.data[name].to_numpy() == 0
    low, high, reason = share_interval(kept)
    interval = "" if reason else f" (95 % interval {percent(float(low))} to {percent(float(high))})"
    return f"{percent(float(kept.mean()))}{interval}"


def _shared_against_equal(study: ReportData, name: str, unit: str) -> Sentence:
    shared, equal = (study.data[each].to_numpy().astype(np.float64) for each in (name, f"{name}_equal"))
    low, high, reason = mean_interval(equal - shared)
    difference = float((equal - shared).mean())
    interval = "" if reason else f" (95 % interval of the difference {float(low):z.3f} to {float(high):z.3f})"
    verdict = (
        "sharing the budget between heads keeps more of the prediction"
        if not reason and low > 0
        else "sharing the budget between heads keeps less of the prediction"
        if not reason and high < 0
        else "no difference is shown"
    )
    return Sentence(
        f"They change the output by {shared.mean():z.3f} {unit}, windows of one area by {equal.mean():z.3f}: "
        f"{difference:+z.3f}{interval}; {verdict}.",
        measure=name,
        evidence=[(f"{equal.mean():z.3f}", f"{name}_equal")],
    )


def _parts(study: ReportData, names: list[str]) -> Iterator[Part]:
    if "head_window_area" in names:
        yield Drawing(head_window_areas(study.data))
    yield readings(study, names)
