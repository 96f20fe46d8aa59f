"""Every figure of a whole study, from whichever rooms it has numbers."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import xarray as xr

from vitrail.figures import heads, neurons, patches, patterns, wint
from vitrail.figures.style import save
from vitrail.measure import ROOMS

__all__ = ["figures_of"]

SUMMED = 64
"""Images whose windows are summed up."""


def figures_of(study: xr.Dataset, folder: str | Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Draws into `folder` what the study has the numbers for; the files written, none if nothing can be drawn.

    Raises `UsageError` for an unknown format.
    """
    heads.refuse_formats(formats)
    written: list[Path] = []
    if set(ROOMS["heads"]) & set(map(str, study)):
        written += heads.figures_of(study, folder, formats)
    written += patterns.figures_of(study, folder, formats)
    for name, figure in (*_of_patches(study), *wint.figures_of(study), *_of_neurons(study)):
        written += [save(figure, Path(folder) / f"{name}.{kind}") for kind in formats]
    return written


def _of_patches(study: xr.Dataset) -> Iterator[tuple[str, Any]]:
    if "window" in study:
        yield "window_coverage", patches.window_coverage(study.isel(image=slice(SUMMED)), None)
    if "tendency" in study:
        yield "tendency_flow", patches.tendency_flow(study)
    if "hub" in study and bool(study["hub"].any()):
        yield "hub_map", patches.hub_map(study, None)


def _of_neurons(study: xr.Dataset) -> Iterator[tuple[str, Any]]:
    held = [str(name) for name in study]
    if "token_norm" in held:
        yield "norms_by_layer", neurons.norms_by_layer(study)
    if any(name.startswith("grouping_") for name in held):
        yield "grouping_by_layer", neurons.grouping_by_layer(study)
    if any(name.startswith(("occlusion_", "shuffle_")) for name in held):
        yield "survival", neurons.survival(study)
