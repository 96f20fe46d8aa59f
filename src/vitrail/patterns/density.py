"""The standing map of attention patterns as a landscape: how densely its maps lie, and where clusters are. No torch."""

from typing import NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from vitrail.errors import UsageError

__all__ = ["KINDS", "PatternDensity", "pattern_clusters_at", "pattern_density", "pattern_positions"]

KINDS = {"patch": "patch", "cls": "class-token"}
"""Kinds of standing maps, with the words for them."""

N_CELLS = 120
"""Cells of the landscape along a side: smaller than a dot of the figure, larger than the steps between maps."""

BLUR_CELLS = 1.6
"""Standard deviation of the Gaussian that smooths the counts: single maps melt, clusters stay apart."""

MARGIN = 0.06
"""Free border around all maps, as a share of the longer side."""


class PatternDensity(NamedTuple):
    """How densely maps lie, on a square that holds them all.

    Attributes:
        x: Middles of the cells along x, in layout units.
        y: Middles of the cells along y.
        height: Square root of the smoothed count of maps in each cell, [x y].
        n_maps: Maps in all.
    """

    x: Float[np.ndarray, "cell"]
    y: Float[np.ndarray, "cell"]
    height: Float[np.ndarray, "x y"]
    n_maps: int


def pattern_positions(study: xr.Dataset, kind: str) -> Float[np.ndarray, "image layer head xy"]:
    """Positions of all maps on the standing map.

    Args:
        study: A study with patterns.
        kind: "patch" or "cls".

    Returns:
        Positions in layout units; NaN for heads that have none.

    Raises:
        UsageError: There is no such kind, or the study has no map of it.
    """
    if kind not in KINDS:
        raise UsageError(f"A map of {kind!r} patterns was asked for; there are patch and cls.")
    name = f"pattern_{kind}_xy"
    if name not in study:
        reason = study.attrs.get("left_out", {}).get(name, "study it with --measures patterns")
        raise UsageError(f"A map of {KINDS[kind]} patterns was asked for; this study has none: {reason}.")
    return study[name].to_numpy().astype(np.float64)


def pattern_density(xy: Float[np.ndarray, "*lead xy"]) -> PatternDensity:
    """Counts of maps on a square, smoothed; their square root, so that thin places still show.

    Args:
        xy: Positions; NaN is left out.

    Returns:
        The landscape.
    """
    from scipy.ndimage import gaussian_filter

    points = xy.reshape(-1, 2)
    points = points[~np.isnan(points[:, 0])]
    low, high = points.min(0), points.max(0)
    side = float((high - low).max())
    half = side / 2 + MARGIN * max(side, 1e-6)  # a single point still has an area
    edges = [np.linspace(middle - half, middle + half, N_CELLS + 1) for middle in (low + high) / 2]
    counts, _, _ = np.histogram2d(points[:, 0], points[:, 1], bins=edges)
    middles = [(edge[1:] + edge[:-1]) / 2 for edge in edges]
    return PatternDensity(middles[0], middles[1], np.sqrt(gaussian_filter(counts, BLUR_CELLS)), len(points))


def pattern_clusters_at(
    xy: Float[np.ndarray, "image layer head xy"], cluster: Int[np.ndarray, "image layer head"]
) -> dict[int, tuple[float, float]]:
    """Where to write the number of each cluster: at the member that is nearest to the median of its members.

    Args:
        xy: Positions of all maps.
        cluster: Number of each map's cluster, -1 for none.

    Returns:
        Position by number of the cluster, of those that have members.
    """
    positions: dict[int, tuple[float, float]] = {}
    for number in range(int(cluster.max(initial=-1)) + 1):
        members = xy[cluster == number]
        if len(members):
            distance = np.linalg.norm(members - np.median(members, axis=0), axis=1)
            x, y = members[distance.argmin()]
            positions[number] = float(x), float(y)
    return positions
