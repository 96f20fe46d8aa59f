"""The responsive field of a patch: which way its interactions pull (tendency), how far they reach, how much they cover.

Our construction, after Ma et al. 2022 (arXiv 2203.05922), who show it as arrows and as optical-flow pictures.
"""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitrail import grid as grids
from vitrail.grid import Grid
from vitrail.patches.integral import ROUNDING

__all__ = [
    "agreement",
    "interaction_distance",
    "interior",
    "shuffle_rows",
    "strongest_share",
    "tendency",
    "xy_positions",
]


def tendency(
    indicator: Float[Tensor, "*batch patch other"], mask: Bool[Tensor, "*#batch patch other"], grid: Grid
) -> Float[Tensor, "*batch patch xy"]:
    """From each patch to the centre of its interactions inside its window.

    Short: the patch interacts evenly around itself, or with itself alone. Long: it is pulled to one side. Patches near
    the border can only be pulled inward.

    Args:
        indicator: Rows of interactions, zero or more.
        mask: True inside the window of each patch.
        grid: (rows, columns) of patches.

    Returns:
        (x to the right, y down) in patches; NaN where the window holds no interaction.
    """
    inside = indicator * mask
    moments = inside @ _moments(grid, indicator)
    return moments[..., 1:] / torch.where(moments[..., :1] > 0, moments[..., :1], torch.nan) - xy_positions(grid).to(
        moments
    )


def strongest_share(indicator: Float[Tensor, "*batch patch other"], share: float) -> Float[Tensor, "*batch patch"]:
    """Share of the grid that the strongest patches take which together hold `share` of each query's row.

    Exact, and no matter where these patches lie: a lower bound for the area of any window that holds as much.

    Args:
        indicator: rows of interactions, zero or more.
        share: of each row's sum, above 0 and at most 1.

    Returns:
        1/N for a row that one patch dominates, up to 1; NaN for rows without mass.
    """
    upto = _sort_rows(indicator).flip(-1).cumsum(-1)
    total = upto[..., -1:]
    count = 1 + (upto < share * total - ROUNDING).sum(-1)
    return torch.where(total[..., 0] > 0, count / indicator.shape[-1], torch.nan)


def _sort_rows(rows: Float[Tensor, "*batch other"]) -> Float[Tensor, "*batch other"]:
    """Each row in growing order; on a CPU by NumPy, whose vectorised sort takes a tenth of the time."""
    return torch.from_numpy(np.sort(rows.detach().numpy())) if rows.device.type == "cpu" else rows.sort(-1).values


def interaction_distance(indicator: Float[Tensor, "*batch patch other"], grid: Grid) -> Float[Tensor, "*batch patch"]:
    """Mean distance from each patch to those it interacts with, weighted by the indicator.

    Args:
        indicator: Rows of interactions that sum to 1.
        grid: (rows, columns) of patches.

    Returns:
        Euclidean distance in patches, 0 to the diagonal of the grid; 0 for rows without mass.
    """
    distance = torch.from_numpy(grids.distances(grid)).to(indicator)
    return (indicator * distance).sum(-1)


def agreement(tendencies: Float[Tensor, "*batch patch xy"]) -> Float[Tensor, "*batch"]:
    """How much the directions of a layer's tendencies agree: length of the mean unit vector.

    Args:
        tendencies: (x, y) of each patch; those without length or undefined do not count.

    Returns:
        0 (every way) to 1 (one way). For n directions at random expect about sqrt(pi / 4n).
    """
    length = torch.linalg.vector_norm(tendencies, dim=-1, keepdim=True)
    unit = torch.where(length > 0, tendencies / length, torch.nan)
    length_of_mean: Tensor = torch.linalg.vector_norm(unit.nanmean(-2), dim=-1)
    return length_of_mean


def interior(grid: Grid, margin: int) -> Bool[Tensor, "patch"]:
    """The patches that are free to point outward, because the border is far enough.

    Args:
        grid: (rows, columns) of patches.
        margin: Least number of patches between a patch and the border.

    Returns:
        True for patches in the interior.
    """
    x, y = xy_positions(grid).unbind(-1)
    return (x >= margin) & (x < grid[1] - margin) & (y >= margin) & (y < grid[0] - margin)


def shuffle_rows(
    indicator: Float[Tensor, "*batch patch other"], generator: torch.Generator
) -> Float[Tensor, "*batch patch other"]:
    """The null of every measure of position: the values of each row in random order, the diagonal zero as before.

    Args:
        indicator: Rows of interactions with a zero diagonal.
        generator: On the CPU, so that every device draws the same order.

    Returns:
        A new indicator whose rows have the same values in other columns.
    """
    n_patches = indicator.shape[-1]
    order = torch.rand((*indicator.shape[:-1], n_patches - 1), generator=generator).argsort(-1).to(indicator.device)
    moved = _off_diagonal(indicator).gather(-1, order)
    result = torch.zeros_like(indicator)
    result.flatten(-2)[..., 1:].unflatten(-1, (n_patches - 1, n_patches + 1))[..., :-1] = moved.flatten(-2).unflatten(
        -1, (n_patches - 1, n_patches)
    )
    return result


def _off_diagonal(matrix: Float[Tensor, "*batch patch other"]) -> Float[Tensor, "*batch patch rest"]:
    """Each row without its diagonal element: drop the first element, and every (N + 1)-th after it."""
    n = matrix.shape[-1]
    rest = matrix.flatten(-2)[..., 1:].unflatten(-1, (n - 1, n + 1))[..., :-1]
    matrix_rest: Tensor = rest.flatten(-2).unflatten(-1, (n, n - 1))
    return matrix_rest


@lru_cache(maxsize=8)
def xy_positions(grid: Grid) -> Float[Tensor, "patch xy"]:
    """Position of each patch.

    Args:
        grid: (rows, columns) of patches.

    Returns:
        Column (x) and row (y) of each patch, row by row, as float32.
    """
    row, column = grids.positions(grid, torch.arange)
    return torch.stack([column, row], -1).float()


def _moments(grid: Grid, like: Tensor) -> Float[Tensor, "patch number"]:
    xy = xy_positions(grid).to(like)
    return torch.cat([torch.ones_like(xy[:, :1]), xy], 1)
