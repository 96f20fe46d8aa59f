"""The sections of a report in their order, and the report itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xarray as xr
from rich.console import Console
from rich.progress import track

from vitrail.analysis import analyses
from vitrail.errors import UsageError
from vitrail.outputs import local_path, refuse_foreign_file, write_atomically
from vitrail.report.opening import PER_SECTION, citations, main_findings, studied
from vitrail.report.page import page
from vitrail.report.parts import ReportData
from vitrail.sentence import Sentence

__all__ = ["SIGN", "findings_of", "study_findings", "write_page", "write_report"]

SIGN = b"A study by Vitrail"
"""Words in every report: only reports are overwritten."""


def write_report(study: str | Path, out: str | Path | None = None, *, progress: bool = False) -> Path:
    """Writes a finished study as one HTML file; the same study gives the same bytes.

    Args:
        study: The folder of the study.
        out: The file; None: `report.html` in the folder.
        progress: Shows how many sections are drawn.

    Returns:
        The file.

    Raises:
        StudyError: The folder is no finished study.
        UsageError: The file cannot be written.
    """
    read = ReportData.of(study)
    console = Console(stderr=True)
    sections = [make for analysis in analyses().values() for make in analysis.all_sections()]
    steps = track(sections, "drawing", console=console, transient=True, disable=not progress)

    def html() -> str:
        drawn = [section for make in steps if (section := make(read)) is not None]
        return page(
            f"{read.plan.model}, {read.n_images:,} image{'s' if read.n_images != 1 else ''}",
            f"{SIGN.decode()}: which heads matter, which patches interact, what tokens carry.",
            [main_findings(read, drawn), studied(read), *drawn, citations(read)],
            read.thumbnail,
        )

    return write_page(read.folder / "report.html" if out is None else out, html)


def write_page(out: str | Path, html: Callable[[], str]) -> Path:
    """Writes a page of Vitrail's, once it is known that it can be written.

    Args:
        out: The file; only pages of Vitrail's are overwritten.
        html: Makes the page, which has the words of `SIGN`.

    Returns:
        The file.

    Raises:
        UsageError: The file cannot be written, or is somebody else's.
    """
    target = local_path(out)
    if target.is_dir():
        raise UsageError(f"{target} is a folder; name the file to write, such as {target / 'report.html'}.")
    refuse_foreign_file(target, SIGN)
    with _refusals(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    text = html()
    with _refusals(target):
        write_atomically(target, lambda beside: beside.write_text(text, encoding="utf-8"))
    return target


@contextmanager
def _refusals(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"The report cannot be written to {target}: {error.strerror}; name another place.") from error


def study_findings(study: str | Path) -> list[dict[str, Any]]:
    """The sentences of a study's report, for a machine; no figure is drawn into a file.

    Args:
        study: The folder of a finished study.

    Returns:
        For each sentence its `section`, and `text`, `measure`, `layer`, `head`, `images`, `evidence` (`Sentence`).

    Raises:
        StudyError: The folder is no finished study.
    """
    read = ReportData.of(study)
    makers = [make for analysis in analyses().values() for make in analysis.all_sections()]
    sections = [section for make in makers if (section := make(read)) is not None]
    return [
        {"section": section.title, **Sentence.of(sentence).to_json()}
        for section in sections
        for sentence in section.findings
    ]


def findings_of(look: xr.Dataset) -> list[str]:
    """The sentences that a report would begin with, of one image.

    Args:
        look: one image, as `vitrail.look` gives it.

    Returns:
        Sentences with numbers, at most four of each section.
    """
    study = ReportData.of_look(look)
    makers = [make for analysis in analyses().values() for make in analysis.all_sections()]
    sections = [section for make in makers if (section := make(study)) is not None]
    return [sentence for section in sections for sentence in section.findings[:PER_SECTION]]
