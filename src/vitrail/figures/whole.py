"""Every figure of a whole study, from whichever rooms it has numbers."""

from collections.abc import Sequence
from pathlib import Path

import xarray as xr

from vitrail.figures import heads, neurons, patterns
from vitrail.figures.style import save
from vitrail.measure import ROOMS

__all__ = ["figures_of"]


def figures_of(study: xr.Dataset, folder: str | Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Draws into `folder` what the study has the numbers for; the files written, none if nothing can be drawn.

    Raises `UsageError` for an unknown format.
    """
    heads.refuse_formats(formats)
    written: list[Path] = []
    if set(ROOMS["heads"]) & set(map(str, study)):
        written += heads.figures_of(study, folder, formats)
    written += patterns.figures_of(study, folder, formats)
    if any(str(name).startswith("grouping_") for name in study):
        figure = neurons.grouping_by_layer(study)
        written += [save(figure, Path(folder) / f"grouping_by_layer.{kind}") for kind in formats]
    return written
