"""The responsive field of a patch: which way its interactions pull (tendency), how far they reach, how much they cover.

Our construction, after Ma et al. 2022 (arXiv 2203.05922), who show it as arrows and as optical-flow pictures.
"""

from functools import lru_cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["agreement", "field_size", "interaction_distance", "interior", "positions", "shuffled", "tendency"]

Grid = tuple[int, int]
"""(rows, columns)"""


def tendency(
    indicator: Float[Tensor, "*batch patch other"], mask: Bool[Tensor, "*#batch patch other"], grid: Grid
) -> Float[Tensor, "*batch patch xy"]:
    """From each patch to the centre of its interactions inside its window, in patches: x to the right, y down.

    Short: the patch interacts evenly around itself, or with itself alone. Long: it is pulled to one side. Patches near
    the border can only be pulled inward. NaN where the window holds no interaction.
    """
    inside = indicator * mask
    moments = inside @ _moments(grid, indicator)
    return moments[..., 1:] / torch.where(moments[..., :1] > 0, moments[..., :1], torch.nan) - positions(grid).to(
        moments
    )


def field_size(mask: Bool[Tensor, "*batch patch other"]) -> Float[Tensor, "*batch patch"]:
    """The share of the grid that each query's window covers, 1/N .. 1."""
    return mask.sum(-1) / mask.shape[-1]


def interaction_distance(indicator: Float[Tensor, "*batch patch other"], grid: Grid) -> Float[Tensor, "*batch patch"]:
    """Mean Euclidean distance, in patches, from each patch to those it interacts with, weighted by the indicator."""
    place = positions(grid).to(indicator)
    distance: Tensor = torch.cdist(place, place)
    return (indicator * distance).sum(-1)


def agreement(tendencies: Float[Tensor, "*batch patch xy"]) -> Float[Tensor, "*batch"]:
    """How much the directions of a layer's tendencies agree: length of the mean unit vector, 0 (every way) .. 1 (one).

    Tendencies without length or undefined do not count. For n directions at random expect about sqrt(pi / 4n).
    """
    length = torch.linalg.vector_norm(tendencies, dim=-1, keepdim=True)
    unit = torch.where(length > 0, tendencies / length, torch.nan)
    agreed: Tensor = torch.linalg.vector_norm(unit.nanmean(-2), dim=-1)
    return agreed


def interior(grid: Grid, margin: int) -> Bool[Tensor, "patch"]:
    """Patches at least `margin` patches away from the border, which alone are free to point outward."""
    x, y = positions(grid).unbind(-1)
    return (x >= margin) & (x < grid[1] - margin) & (y >= margin) & (y < grid[0] - margin)


def shuffled(
    indicator: Float[Tensor, "*batch patch other"], generator: torch.Generator
) -> Float[Tensor, "*batch patch other"]:
    """The null: each row's values dealt out anew among the other patches; the diagonal stays zero."""
    n_patches = indicator.shape[-1]
    order = torch.rand((*indicator.shape[:-1], n_patches - 1), generator=generator).argsort(-1).to(indicator.device)
    dealt = _off_diagonal(indicator).gather(-1, order)
    result = torch.zeros_like(indicator)
    result.flatten(-2)[..., 1:].unflatten(-1, (n_patches - 1, n_patches + 1))[..., :-1] = dealt.flatten(-2).unflatten(
        -1, (n_patches - 1, n_patches)
    )
    return result


def _off_diagonal(matrix: Float[Tensor, "*batch patch other"]) -> Float[Tensor, "*batch patch rest"]:
    """Each row without its diagonal element: drop the first element, and every (N + 1)-th after it."""
    n = matrix.shape[-1]
    rest = matrix.flatten(-2)[..., 1:].unflatten(-1, (n - 1, n + 1))[..., :-1]
    whole: Tensor = rest.flatten(-2).unflatten(-1, (n, n - 1))
    return whole


@lru_cache(maxsize=8)
def positions(grid: Grid) -> Float[Tensor, "patch xy"]:
    """Column (x) and row (y) of each patch, row-major."""
    patch = torch.arange(grid[0] * grid[1])
    return torch.stack([patch % grid[1], patch // grid[1]], -1).float()


def _moments(grid: Grid, like: Tensor) -> Float[Tensor, "patch number"]:
    place = positions(grid).to(like)
    return torch.cat([torch.ones_like(place[:, :1]), place], 1)
