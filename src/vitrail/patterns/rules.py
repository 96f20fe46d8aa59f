"""The numbers that patterns are named from, read off attention maps; what they mean is in `vitrail.patterns.names`."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.patterns.names import LOCAL_HOPS, RULES, TOP_KEYS

__all__ = ["rule_values", "step_mass"]


def rule_values(
    block: Float[Tensor, "*map query key"], grid: tuple[int, int], class_mass: Float[Tensor, "*map"] | None = None
) -> Float[Tensor, "*map rule"]:
    """The numbers that patterns are named from.

    Rows are scaled to sum to 1 first, so that what a head parks on prefix tokens does not make it look less local; a
    row of zeros counts with the others as giving nothing. Our construction.

    Args:
        block: Attention between patches.
        grid: (rows, columns) of patches.
        class_mass: What patches give the class token, which is passed on; None: NaN.

    Returns:
        In the order of `RULES`, each 0 to 1 but for the steps, in patches; NaN for a map of zeros.
    """
    maps = block.reshape(-1, *block.shape[-2:]).float()
    mass = maps.sum(-1, keepdim=True)
    share = maps / torch.where(mass > 0, mass, 1.0)
    share = torch.where((mass > 0).any(-2, keepdim=True), share, torch.nan)
    steps = step_mass(share, grid)
    numbers = dict(zip(("shift_mass", "shift_x", "shift_y"), _best_step(steps, grid), strict=True))
    n_patches = maps.shape[-1]
    down, across = grid[0] - 1, grid[1] - 1  # where step (0, 0) lies
    near = steps[:, max(0, down - LOCAL_HOPS) : down + LOCAL_HOPS + 1, max(0, across - LOCAL_HOPS) :]
    numbers["self"] = steps[:, down, across]
    numbers["row"] = steps[:, down].sum(-1)
    numbers["column"] = steps[:, :, across].sum(-1)
    numbers["local"] = near[:, :, : min(across, LOCAL_HOPS) + LOCAL_HOPS + 1].sum((-2, -1))
    numbers["sink"] = share.mean(-2).topk(min(TOP_KEYS, n_patches)).values.sum(-1)
    entropy = torch.special.entr(share).sum(-1).mean(-1)
    numbers["uniformity"] = entropy / math.log(n_patches) if n_patches > 1 else torch.full_like(entropy, torch.nan)
    numbers["class_mass"] = torch.full_like(entropy, torch.nan) if class_mass is None else class_mass.flatten()
    return torch.stack([numbers[rule] for rule in RULES], -1).view(*block.shape[:-2], len(RULES))


def step_mass(share: Float[Tensor, "map query key"], grid: tuple[int, int]) -> Float[Tensor, "map down across"]:
    """What patches give to the patch at each step, as a mean over all patches.

    Args:
        share: Attention between patches whose rows sum to 1.
        grid: (rows, columns) of patches.

    Returns:
        0 to 1, in sum 1; steps go from -(rows - 1) to rows - 1 down, and so across.
    """
    rows, columns = grid
    maps = share.view(len(share), rows, columns, rows, columns)
    by_row = torch.stack([maps.diagonal(down, 1, 3).sum(-1) for down in range(1 - rows, rows)], 1)
    both = [by_row.diagonal(across, 2, 3).sum(-1) for across in range(1 - columns, columns)]
    return torch.stack(both, -1) / (rows * columns)


def _best_step(steps: Float[Tensor, "map down across"], grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """The step other than (0, 0) with the most attention per patch that can take it, among those that half of them
    can: its mass, and how far it goes across and down. 0 where there is no step, NaN for a map of zeros."""
    rows, columns = grid
    down, across = torch.arange(1 - rows, rows), torch.arange(1 - columns, columns)
    takers = (rows - down.abs())[:, None] * (columns - across.abs())
    candidates = (2 * takers >= rows * columns) & ~((down == 0)[:, None] & (across == 0))
    mass = torch.where(candidates.to(steps.device), steps * (rows * columns) / takers.to(steps.device), -1.0).flatten(1)
    best, at = mass.max(-1)
    x, y = (axis.to(at.device)[index] for axis, index in ((across, at % len(across)), (down, at // len(across))))
    numbers = [best, x, y] if candidates.any() else [torch.zeros_like(best)] * 3
    shift, shift_x, shift_y = (torch.where(steps[:, 0, 0].isnan(), torch.nan, each.float()) for each in numbers)
    return shift, shift_x, shift_y
