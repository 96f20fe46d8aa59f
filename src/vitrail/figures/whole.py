"""Every figure of a study, or of one image, that its analyses have and that it holds the numbers for."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xarray as xr

from vitrail.analysis import Analysis, analyses
from vitrail.errors import UsageError
from vitrail.figures.style import Figure, refuse_formats, save
from vitrail.outputs import local_folder

__all__ = ["WholeFigure", "draw_all", "draw_figure", "draw_figures", "save_figures"]


def draw_figures(
    study: xr.Dataset,
    folder: str | Path,
    formats: Sequence[str] = ("png",),
    *,
    only: Sequence[str] = (),
    one_image: bool = False,
) -> list[Path]:
    """Draws into a folder what the study has the numbers for.

    Args:
        study: A study as `open_study` gives it, or one image as `look` gives it.
        folder: Where to write; it is made.
        formats: Endings of the files: png, svg, pdf.
        only: Names of the analyses whose figures are drawn; empty for all.
        one_image: Draws the figures of one image.

    Returns:
        The files written, none if nothing can be drawn.

    Raises:
        UsageError: A format is unknown, or a file is where the folder has to be.
    """
    refuse_formats(formats)
    folder = local_folder(folder)
    return save_figures(draw_all(study, only=only, one_image=one_image), folder, formats)


def draw_figure(study: xr.Dataset, stem: str, *, one_image: bool = False) -> Figure:
    """Draws one figure, by the name that its file has in `vitrail figures` and `vitrail look`.

    Args:
        study: A study as `open_study` gives it, or one image as `look` gives it.
        stem: Such as "overview" or "hub_map"; the gallery in the documentation shows all.
        one_image: Draws the figure of one image.

    Returns:
        The figure; `.savefig("hub_map.pdf")` writes it.

    Raises:
        UsageError: No analysis has such a figure, the study does not hold its numbers, or it is no study.

    Example:
        >>> vitrail.draw_figure(study, "overview").savefig("overview.pdf")
    """
    _refuse_other(study)
    named = {
        each.stem: (name, each)
        for name, analysis in analyses().items()
        for each in analysis.all_figures()
        if each.both or each.one_image == one_image
    }
    if stem not in named:
        of = "one image" if one_image else "a study"
        raise UsageError(f"There is no figure {stem!r} of {of}; there are {', '.join(named)}.")
    name, figure = named[stem]
    drawing = figure.draw(study) if _holds(study, analyses()[name]) else None
    if drawing is None:
        raise UsageError(f"Figure {stem!r} needs numbers that are not here: measure them with `--measures {name}`.")
    assert isinstance(drawing, Figure)
    return drawing


class WholeFigure(NamedTuple):
    """A figure that was drawn.

    Attributes:
        analysis: The name of its analysis.
        stem: Its file's name without the ending.
        figure: The figure.
    """

    analysis: str
    stem: str
    figure: Figure


def draw_all(study: xr.Dataset, *, only: Sequence[str] = (), one_image: bool = False) -> Iterator[WholeFigure]:
    """Draws one figure after the other that the study has the numbers for.

    Args:
        study: A study as `open_study` gives it, or one image as `look` gives it.
        only: Names of the analyses whose figures are drawn; empty for all.
        one_image: Draws the figures of one image.

    Yields:
        Figures, analysis by analysis.

    Raises:
        UsageError: It is neither a study nor a look.
    """
    _refuse_other(study)
    for name, analysis in analyses().items():
        if (only and name not in only) or not _holds(study, analysis):
            continue
        for each in analysis.all_figures():
            drawing = each.draw(study) if each.both or each.one_image == one_image else None
            if drawing is not None:
                yield WholeFigure(name, each.stem, drawing)


def save_figures(figures: Iterable[WholeFigure], folder: str | Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Writes figures into a folder.

    Args:
        figures: What `draw_all` gives.
        folder: Where to write; it is made.
        formats: Endings of the files: png, svg, pdf.

    Returns:
        The files written.
    """
    return [save(each.figure, Path(folder) / f"{each.stem}.{ending}") for each in figures for ending in formats]


def _refuse_other(study: Any) -> None:
    if not isinstance(study, xr.Dataset):
        raise UsageError(
            f"Figures are drawn of a study or a look, and a {type(study).__name__} was given: "
            "vitrail.draw_figure(vitrail.open_study(FOLDER), NAME)."
        )
    if study.data_vars and "image" not in study.dims:
        raise UsageError(
            "Figures are drawn over images, and these numbers have none any more (as after mean or isel): give the "
            "study, or isel(image=[0]) for one image of it."
        )


def _holds(study: xr.Dataset, analysis: Analysis) -> bool:
    return any(each.name in study for each in (*analysis.measures, *analysis.accompanying, *analysis.image_measures))
