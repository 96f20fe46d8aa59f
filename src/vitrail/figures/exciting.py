"""Figures of what excites neurons: the photographs of a study with the patch, and images made for one neuron."""

import xarray as xr
from PIL import Image

from vitrail.figures.photo_grid import grid_extent, mark_patch
from vitrail.figures.style import Figure, FigureTable, blank, explain, styled, when
from vitrail.tokens.peaks import peak_images, peak_layer, selective_neurons

__all__ = ["FIGURES", "ONE_IMAGE_FIGURES", "exciting_photographs", "made_images"]

N_NEURONS, N_PHOTOGRAPHS = 6, 6
PANEL_INCHES = 1.15


@styled
def exciting_photographs(study: xr.Dataset) -> Figure:
    """The photographs that excite the most selective neurons most, each with the patch that does it.

    Args:
        study: A study that holds `neuron_peak`, `neuron_peak_patch` and thumbnails.

    Returns:
        The figure.
    """
    neurons = selective_neurons(study)[:N_NEURONS]
    columns = min(N_PHOTOGRAPHS, study.sizes["image"])
    figure = blank(columns * PANEL_INCHES + 0.8, len(neurons) * (PANEL_INCHES + 0.12) + 0.9, "What excites neurons")
    layer = peak_layer(study)
    axes = figure.subplots(len(neurons), columns, squeeze=False)
    for row, neuron in zip(axes, neurons, strict=True):
        for panel, image in zip(row, peak_images(study, neuron)[:columns], strict=True):
            photo = Image.fromarray(study["thumbnail"][image].to_numpy())
            panel.imshow(photo, extent=grid_extent(layer.view or (1, 1)), aspect="auto")
            if layer.grid is not None:
                mark_patch(panel, *divmod(int(study["neuron_peak_patch"][image, neuron]), layer.grid[1]))
            panel.set(xticks=[], yticks=[])
            panel.set_aspect("equal")
            panel.set_title(f"{float(study['neuron_peak'][image, neuron]):.1f}", fontsize=6.5, pad=2)
        row[0].set_ylabel(f"neuron {neuron}", fontsize=7)
    explain(
        figure,
        f"Neurons of {layer.name} whose strongest photographs stand out most from the others.",
        "Square: the patch whose token has the value above the photograph."
        if layer.grid is not None
        else "Above each the highest value of its patches; a study made anew says which patch has it.",
    )
    return figure


@styled
def made_images(look: xr.Dataset) -> Figure:
    """Images that were made to excite one neuron.

    Args:
        look: One image, as `vitrail.look` gives it, with `exciting_image`.

    Returns:
        The figure.
    """
    levels, neuron = look["excited_level"].to_numpy(), int(look["excited_neuron"])
    figure = blank(2.3 * len(levels) + 0.2, 3.1, f"Made to excite neuron {neuron}")
    for axes, level, pixels in zip(
        figure.subplots(1, len(levels), squeeze=False)[0], levels, look["exciting_image"].to_numpy(), strict=True
    ):
        axes.imshow(pixels)
        axes.set_axis_off()
        axes.set_title(f"after L{level - 1}", fontsize=7.5)
    explain(figure, "Gradient ascent from faint noise on the mean over patches; after Olah et al. 2017 (distill.pub).")
    return figure


FIGURES: FigureTable = (
    (
        "exciting_photographs",
        when(
            lambda study: {"neuron_peak", "neuron_peak_patch", "thumbnail"} <= set(study) and study.sizes["image"] > 1,
            exciting_photographs,
        ),
    ),
)
ONE_IMAGE_FIGURES: FigureTable = (("made_images", when(lambda look: "exciting_image" in look, made_images)),)
