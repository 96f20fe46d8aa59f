"""One image as one HTML file, of the same parts as a report: what the model says of it, and every figure of it."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import xarray as xr

from vitrail.analysis import BASE, Analysis, analyses
from vitrail.errors import UsageError
from vitrail.figures.whole import WholeFigure, draw_all
from vitrail.report.page import page
from vitrail.report.parts import Drawing, Part, Photographs, ReportData, Section, Table, Text
from vitrail.report.sections import SIGN, write_page

__all__ = ["look_page", "write_look"]


def write_look(look: xr.Dataset, out: str | Path, figures: Sequence[WholeFigure] | None = None) -> Path:
    """Writes one image as one HTML file.

    Args:
        look: The image, as `vitrail.look` gives it.
        out: The file; only pages of Vitrail's are overwritten.
        figures: Those of the image, drawn already, whose titles become text of the page; None draws them.

    Returns:
        The file.

    Raises:
        UsageError: The file cannot be written, or is somebody else's.
    """
    return write_page(out, lambda: look_page(look, figures))


def look_page(look: xr.Dataset, figures: Sequence[WholeFigure] | None = None) -> str:
    """One image as HTML that needs nothing else.

    Args:
        look: The image, as `vitrail.look` gives it.
        figures: Those of the image, drawn already, whose titles become text of the page; None draws them.

    Returns:
        The page.

    Raises:
        UsageError: The dataset is not of one image.
    """
    if "view" not in look or look.sizes.get("image") != 1:
        raise UsageError(
            "A page of one image was asked for, and the dataset is not one that `vitrail.look(vit, image)` gives; of a "
            "study, `vitrail.show(FOLDER)` has the page and `vitrail report FOLDER` the report."
        )
    study = ReportData.of_look(look)
    drawn = tuple(draw_all(look, one_image=True)) if figures is None else figures
    sections = [
        _photograph(study),
        *(_section(study, each, drawn) for each in analyses().values() if each.name != BASE),
    ]
    name = str(look["image"].to_numpy()[0])
    lead = f"{SIGN.decode()} of one image, {name}: which heads matter, which patches interact, what tokens carry."
    return page(f"{name} through {study.plan.model}", lead, [*filter(None, sections), *_left_out(look)])


def _photograph(study: ReportData) -> Section:
    look = study.data
    view = look["view"].to_numpy()
    parts: list[Part] = [Photographs("", [view], ["what the model sees"])]
    if "top_class" in look:
        classes, odds = (look[name].to_numpy()[0] for name in ("top_class", "top_probability"))
        rows = [[study.class_name(int(each)), f"{float(p):.3f}"] for each, p in zip(classes, odds, strict=True)]
        parts.append(Table("What the model says", ("class", "probability"), rows))
    return Section("photograph", "The photograph", (), tuple(parts))


def _section(study: ReportData, analysis: Analysis, figures: Sequence[WholeFigure]) -> Section | None:
    """The sentences of an analysis and its figures of one image; None where the look holds nothing of it."""
    sections = [section for make in analysis.all_sections() if (section := make(study)) is not None]
    findings = [sentence for section in sections for sentence in section.findings]
    drawings = [Drawing(each.figure) for each in figures if each.analysis == analysis.name]
    return Section(analysis.name, analysis.title, findings, tuple(drawings)) if findings or drawings else None


def _left_out(look: xr.Dataset) -> Iterator[Section]:
    reasons: dict[str, list[str]] = {}
    for name, reason in look.attrs["left_out"].items():
        reasons.setdefault(reason, []).append(name)
    rows = [[", ".join(names), reason] for reason, names in reasons.items()]
    parts: list[Part] = [Table("", ("measures", "reason"), rows, words=(0, 1))] if rows else []
    parts += [
        Text("The same is made again by:"),
        Text(f"vitrail look {look.attrs['model']} IMAGE --out FOLDER", code=True),
    ]
    yield Section("left-out", "What was left out, and how this was made", (), tuple(parts))
