"""The numbers that patterns are named from, read off attention maps; what they mean is in `heads.pattern_names`."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.heads.pattern_names import LOCAL_HOPS, RULES, TOP_KEYS

__all__ = ["rule_values", "step_mass"]


def rule_values(
    block: Float[Tensor, "*map query key"], grid: tuple[int, int], class_mass: Float[Tensor, "*map"] | None = None
) -> Float[Tensor, "*map rule"]:
    """The numbers of `RULES` for each map of attention between patches, each 0 .. 1 but for the steps, in patches.

    Rows are made to sum to 1 first, so that what a head parks on prefix tokens does not make it look less local; a row
    of zeros counts with the others as giving nothing, a map of zeros is NaN. `class_mass` is passed on, NaN without.
    Our construction.
    """
    maps = block.reshape(-1, *block.shape[-2:]).float()
    mass = maps.sum(-1, keepdim=True)
    share = maps / torch.where(mass > 0, mass, 1.0)
    share = torch.where((mass > 0).any(-2, keepdim=True), share, torch.nan)
    steps = step_mass(share, grid)
    found = dict(zip(("shift_mass", "shift_x", "shift_y"), _best_step(steps, grid), strict=True))
    n_patches = maps.shape[-1]
    down, across = grid[0] - 1, grid[1] - 1  # where step (0, 0) lies
    near = steps[:, max(0, down - LOCAL_HOPS) : down + LOCAL_HOPS + 1, max(0, across - LOCAL_HOPS) :]
    found["self"] = steps[:, down, across]
    found["row"] = steps[:, down].sum(-1)
    found["column"] = steps[:, :, across].sum(-1)
    found["local"] = near[:, :, : min(across, LOCAL_HOPS) + LOCAL_HOPS + 1].sum((-2, -1))
    found["sink"] = share.mean(-2).topk(min(TOP_KEYS, n_patches)).values.sum(-1)
    entropy = torch.special.entr(share).sum(-1).mean(-1)
    found["uniformity"] = entropy / math.log(n_patches) if n_patches > 1 else torch.full_like(entropy, torch.nan)
    found["class_mass"] = torch.full_like(entropy, torch.nan) if class_mass is None else class_mass.flatten()
    return torch.stack([found[rule] for rule in RULES], -1).view(*block.shape[:-2], len(RULES))


def step_mass(share: Float[Tensor, "map query key"], grid: tuple[int, int]) -> Float[Tensor, "map down across"]:
    """What patches give to the patch at each step, as a mean over all patches: sums to 1 with the rows.

    Steps go from -(rows - 1) to rows - 1 down, and so across.
    """
    rows, columns = grid
    maps = share.view(len(share), rows, columns, rows, columns)
    by_row = torch.stack([maps.diagonal(down, 1, 3).sum(-1) for down in range(1 - rows, rows)], 1)
    both = [by_row.diagonal(across, 2, 3).sum(-1) for across in range(1 - columns, columns)]
    return torch.stack(both, -1) / (rows * columns)


def _best_step(steps: Float[Tensor, "map down across"], grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """The step other than (0, 0) with the most attention per patch that can take it, among those that half of them
    can: its mass, and how far it goes across and down."""
    rows, columns = grid
    down, across = torch.arange(1 - rows, rows), torch.arange(1 - columns, columns)
    takers = (rows - down.abs())[:, None] * (columns - across.abs())
    asked = (2 * takers >= rows * columns) & ~((down == 0)[:, None] & (across == 0))
    mass = torch.where(asked.to(steps.device), steps * (rows * columns) / takers.to(steps.device), -1.0).flatten(1)
    best, at = mass.max(-1)
    if not asked.any():
        nothing = torch.zeros_like(best)
        return torch.where(best.isnan(), best, nothing), nothing, nothing
    return best, across.to(at.device)[at % len(across)].float(), down.to(at.device)[at // len(across)].float()
