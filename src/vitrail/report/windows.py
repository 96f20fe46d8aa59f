"""The windows of a WinT's study: how large they are, whether attention agrees with them, what they look like."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from vitrail.figures import wint as figures
from vitrail.report.parts import Drawing, Part, ReportData, Section, Text, readings
from vitrail.sentence import Sentence, percent
from vitrail.windows.window_maps import inner_patches, window_grid

__all__ = ["windows"]

N_PICTURES = 2


def windows(study: ReportData) -> Section | None:
    """Areas, agreement and pictures of predicted windows, if the study holds them.

    Args:
        study: The study.

    Returns:
        The section; None where the study holds nothing for it.
    """
    names = study.measures_of("windows")
    if not names:
        return None
    return Section("windows", "Windows of the model", tuple(_findings(study, names)), lambda: _parts(study, names))


def _findings(study: ReportData, names: list[str]) -> Iterator[str]:
    means = {
        name: study.sample[name].mean(("image", "head")).to_numpy() for name in names if name != "predicted_window"
    }
    if "predicted_area" in means:
        area = means["predicted_area"]
        low, high = int(np.nanargmin(area)), int(np.nanargmax(area))
        yield Sentence(
            f"A patch may see {percent(float(np.nanmean(area)))} of the image on average: "
            f"{percent(float(area[low]))} in L{low}, the least, {percent(float(area[high]))} in L{high}, the most.",
            measure="predicted_area",
            layer=high,
        )
    if "predicted_window" in names:
        sides = study.sample["predicted_window"].to_numpy().astype(np.float64)
        sides = np.where(sides < 0, np.nan, sides)
        inner = (slice(None),) * 3 + (inner_patches(window_grid(study.sample)),)
        within = f"{np.nanmean(np.nanstd(sides[inner], 3)):z.2f}"
        yield Sentence(
            f"Between images the sides of one patch's window differ by {np.nanmean(np.nanstd(sides, 0)):z.2f} patches "
            f"(standard deviation), between inner patches of one image by {within}."
            if study.n_images > 1
            else f"Between inner patches the sides of windows differ by {within} patches (standard deviation).",
            measure="predicted_window",
        )
    if {"predicted_overlap_open", "predicted_overlap_moved"} <= means.keys():
        own, moved = (float(np.nanmean(means[f"predicted_overlap_{name}"])) for name in ("open", "moved"))
        yield Sentence(
            f"Windows overlap by {own:z.2f} (intersection over union) with where queries would look without them, by "
            f"{moved:z.2f} if these places are moved at random.",
            measure="predicted_overlap_open",
            evidence=[(f"{moved:z.2f}", "predicted_overlap_moved")],
        )


def _parts(study: ReportData, names: list[str]) -> Iterator[Part]:
    if study.sample_words:
        yield Text(study.sample_words)
    for _, draw in figures.FIGURES:
        figure = draw(study.sample)
        if figure is not None:
            yield Drawing(figure)
    if "predicted_window" in names:
        for index in np.unique(np.linspace(0, study.n_images - 1, N_PICTURES + 2).astype(int)[1:-1]).tolist():
            photo = Image.fromarray(study.data["thumbnail"][index].to_numpy())
            image_id = f"{study.data.indexes['image'][index]}."
            yield Drawing(figures.windows_by_layer(study.data, None, index, photo), image_id)
            yield Drawing(figures.summed_windows(study.data, None, index, photo))
    yield readings(study, names)
