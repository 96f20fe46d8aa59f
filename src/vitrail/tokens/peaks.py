"""Which photographs of a study excite a neuron most, and which neurons answer to few of them; no torch."""

from typing import NamedTuple

import numpy as np
import xarray as xr

from vitrail.grid import Grid, Sides, view_in_patches

__all__ = ["PeakLayer", "peak_images", "peak_layer", "selective_neurons", "selectivity"]

TOP_SHARE = 0.05
"""Share of the photographs that count as a neuron's strongest; at least one."""


class PeakLayer(NamedTuple):
    """The layer whose tokens `neuron_peak` is read from, as far as a study says which it is.

    Attributes:
        name: "L5", or what is true of it.
        grid: (rows, columns) of its patches; None where it is not known.
        view: How many of them long the sides of what the model sees are; None where the grid is not known.
    """

    name: str
    grid: Grid | None
    view: Sides | None


def peak_layer(study: xr.Dataset) -> PeakLayer:
    """The last layer that returns the patches that it was given.

    Args:
        study: A study that holds `neuron_peak`.

    Returns:
        The layer; of a study of an older version, the grid alone, and only if all layers share one.
    """
    grids, layers = study.attrs["grids"], study.attrs.get("own_grid_layers")
    layer = max(layers) if layers else 0
    grid = grids[layer] if layers or all(each == grids[0] for each in grids) else None
    name = f"L{layer}" if layers else "the last layer that returns the patches it is given"
    if grid is None:
        return PeakLayer(name, None, None)
    return PeakLayer(name, (int(grid[0]), int(grid[1])), view_in_patches(study.attrs, layer))


def peak_images(study: xr.Dataset, neuron: int) -> list[int]:
    """Photographs in falling order of what their strongest patch gives a neuron.

    Args:
        study: A study that holds `neuron_peak`.
        neuron: Index of the neuron.

    Returns:
        Positions in the study.
    """
    return [int(at) for at in np.argsort(-study["neuron_peak"][:, neuron].to_numpy(), kind="stable")]


def selectivity(study: xr.Dataset) -> np.ndarray:
    """How far a neuron's strongest photographs stand out.

    Args:
        study: A study that holds `neuron_peak`.

    Returns:
        Mean of the strongest twentieth of the photographs minus the median, in standard deviations over photographs,
        by neuron; 0 for a neuron that never changes.
    """
    peaks = study["neuron_peak"].to_numpy().astype(np.float64)
    n_top = max(1, round(TOP_SHARE * len(peaks)))
    top = np.sort(peaks, axis=0)[-n_top:].mean(0)
    spread = peaks.std(0)
    selective: np.ndarray = np.divide(
        top - np.median(peaks, axis=0), spread, out=np.zeros_like(spread), where=spread > 0
    )
    return selective


def selective_neurons(study: xr.Dataset) -> list[int]:
    """Neurons in falling order of `selectivity`.

    Args:
        study: A study that holds `neuron_peak`.

    Returns:
        Their indices.
    """
    return [int(at) for at in np.argsort(-selectivity(study), kind="stable")]
