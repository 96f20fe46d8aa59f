"""The sections of a report in their order, and the report itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import track

from vitrail.errors import UsageError
from vitrail.report.heads import heads
from vitrail.report.neurons import neurons
from vitrail.report.opening import citations, main_findings, studied
from vitrail.report.page import page
from vitrail.report.parts import Section, Studied
from vitrail.report.patches import patches
from vitrail.report.patterns import patterns
from vitrail.report.why import why
from vitrail.report.windows import windows

__all__ = ["SECTIONS", "write_report"]

SECTIONS: tuple[Callable[[Studied], Section | None], ...] = (heads, why, patterns, patches, windows, neurons)
"""A section each, or None where the study holds nothing for it. Add a function here and it is in the report."""


def write_report(study: str | Path, out: str | Path | None = None, *, progress: bool = False) -> Path:
    """Writes a finished study as one HTML file, by default `report.html` in its folder; the file written.

    The same study gives the same bytes. Raises `StudyError` if the folder is no finished study, `UsageError` if the
    file cannot be written.
    """
    read = Studied.of(study)
    target = Path(out) if out is not None else read.folder / "report.html"
    if target.is_dir():
        raise UsageError(f"{target} is a folder; name the file to write, such as {target / 'report.html'}.")
    with _refusals(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    steps = track(SECTIONS, "drawing", console=console, transient=True, disable=not progress)
    found = [section for make in steps if (section := make(read)) is not None]
    html = page(
        f"{read.plan.model}, {read.n_images:,} image{'s' if read.n_images != 1 else ''}",
        "A study by Vitrail: which heads matter, which patches interact, what tokens carry.",
        [main_findings(read, found), studied(read), *found, citations(read)],
    )
    with _refusals(target):
        target.write_text(html, encoding="utf-8")
    return target


@contextmanager
def _refusals(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"The report cannot be written to {target}: {error.strerror}; name another place.") from error
