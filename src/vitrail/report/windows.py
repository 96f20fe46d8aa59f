"""The windows of a WinT's study: how large they are, whether attention agrees with them, what they look like."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from vitrail.figures import wint as figures
from vitrail.report.parts import Drawing, Part, Section, Studied, Text, percent, readings

__all__ = ["windows"]

N_PICTURES = 2


def windows(study: Studied) -> Section | None:
    """Areas, agreement and pictures of predicted windows, if the study holds them."""
    held = study.held("windows")
    if not held:
        return None
    return Section("windows", "Windows of the model", tuple(_findings(study, held)), tuple(_parts(study, held)))


def _findings(study: Studied, held: list[str]) -> Iterator[str]:
    means = {name: study.sample[name].mean(("image", "head")).to_numpy() for name in held if name != "predicted_window"}
    if "predicted_area" in means:
        area = means["predicted_area"]
        low, high = int(np.nanargmin(area)), int(np.nanargmax(area))
        yield (
            f"A patch may see {percent(float(np.nanmean(area)))} of the image on average: "
            f"{percent(float(area[low]))} in L{low}, the least, {percent(float(area[high]))} in L{high}, the most."
        )
    if "predicted_window" in held:
        sides = study.sample["predicted_window"].to_numpy().astype(np.float64)
        known = np.where(sides < 0, np.nan, sides)
        inner = (slice(None),) * 3 + (_inner(study),)
        yield (
            f"Between images the sides of one patch's window differ by {np.nanmean(np.nanstd(known, 0)):.2f} patches "
            f"(standard deviation), between inner patches of one image by {np.nanmean(np.nanstd(known[inner], 3)):.2f}."
        )
    if {"predicted_overlap_open", "predicted_overlap_moved"} <= means.keys():
        own, moved = (float(np.nanmean(means[f"predicted_overlap_{name}"])) for name in ("open", "moved"))
        yield (
            f"Windows overlap by {own:.2f} (intersection over union) with where queries would look without them, by "
            f"{moved:.2f} if these places are moved at random."
        )


def _inner(study: Studied) -> np.ndarray:
    """Patches away from the border, which cuts windows."""
    rows, columns = _grid(study)
    row, column = np.divmod(np.arange(rows * columns), columns)
    margin = min(rows, columns) // 4
    away = (np.minimum(row, rows - 1 - row) >= margin) & (np.minimum(column, columns - 1 - column) >= margin)
    return np.flatnonzero(away)


def _grid(study: Studied) -> tuple[int, int]:
    rows, columns = next(grid for grid in study.plan.grids if grid is not None)
    return int(rows), int(columns)


def _parts(study: Studied, held: list[str]) -> Iterator[Part]:
    if study.sample_words:
        yield Text(study.sample_words)
    for _, figure in figures.figures_of(study.sample):
        yield Drawing(figure)
    if "predicted_window" in held:
        grid = _grid(study)
        for index in np.unique(np.linspace(0, study.n_images - 1, N_PICTURES + 2).astype(int)[1:-1]).tolist():
            image = study.data.isel(image=index)
            photo = Image.fromarray(image["thumbnail"].to_numpy())
            sides = image["predicted_window"].to_numpy().astype(np.float64)
            middle = (grid[0] // 2) * grid[1] + grid[1] // 2
            yield Drawing(figures.windows_by_layer(sides, grid, middle, photo), f"{study.manifest.images[index].id}.")
            yield Drawing(figures.summed_masks(sides, grid, figures.spread_patches(grid), photo))
    yield readings(study, held)
