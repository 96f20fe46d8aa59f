"""Indiscriminative patches, or hubs: patches that nearly every query keeps, whatever the query asks.

Our construction, after Ma et al. 2022 (arXiv 2203.05922). Related to attention sinks and to high-norm tokens; whether
they can be thrown away is a matter of experiment (`docs/patches.md`), not of their name.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.patches.interaction import normalised

__all__ = ["Hubs", "hubs", "kept_share", "without_hubs"]

MAX_ROUNDS = 5
OUTSTANDING = 2.0
"""Standard deviations above the mean kept share that make a patch stand out."""
MAJORITY = 0.5
"""Share of the queries that must keep it."""


class Hubs(NamedTuple):
    """Which patches are hubs, and the share of queries that kept each patch before any was removed."""

    found: Bool[Tensor, "image patch"]
    kept_share: Float[Tensor, "image patch"]


def hubs(indicator: Float[Tensor, "image patch other"], reachable: Int[Tensor, "patch"] | None = None) -> Hubs:
    """Finds hubs, takes them away, and looks again until there are none, at most five times.

    A patch is a hub if its kept share f is above 0.5 and above mean + 2 standard deviations of f over the patches that
    are left. `reachable` counts the patches that each query can attend to at all, itself included, for attention within
    windows; None: all of them.
    """
    left = torch.ones(indicator.shape[:2], dtype=torch.bool, device=indicator.device)
    first = share = kept_share(indicator, reachable)
    active = torch.arange(len(indicator), device=indicator.device)
    rest = indicator
    for _ in range(MAX_ROUNDS):
        new = _outstanding(share, left[active])
        found_some = new.any(-1)
        if not found_some.any():
            break
        if not found_some.all():
            active, new, rest = active[found_some], new[found_some], rest[found_some]
        left[active] &= ~new
        share = kept_share(rest, reachable, left[active])
    return Hubs(~left, first)


def kept_share(
    indicator: Float[Tensor, "image patch other"],
    reachable: Int[Tensor, "patch"] | None = None,
    left: Bool[Tensor, "image patch"] | None = None,
) -> Float[Tensor, "image patch"]:
    """f_j: the share of queries i that keep patch j, I_ij >= mean_j + std_j of their row.

    0 (nobody) .. 1 (every query that can attend to it). Mean and deviation are over the patches a query can reach.
    Patches that are not `left` count as if their columns were zero; scaling the rows up again would change nothing.
    """
    counts = torch.full_like(indicator[0, 0], indicator.shape[-1]) if reachable is None else reachable.to(indicator)
    rest = indicator if left is None else indicator * left[:, None].to(indicator)
    mean = rest.sum(-1) / counts
    square = torch.linalg.vector_norm(rest, dim=-1).square() / counts
    threshold = mean + (square - mean.square()).clamp(min=0).sqrt()
    threshold = torch.where(mean > 0, threshold, torch.inf)
    # Comparing straight into numbers takes a fifth of the time of booleans that are then counted.
    kept = torch.ge(indicator, threshold[..., None], out=torch.empty_like(indicator))
    return kept.sum(-2) / counts


def without_hubs(
    indicator: Float[Tensor, "image patch other"], found: Bool[Tensor, "image patch"]
) -> Float[Tensor, "image patch other"]:
    """The indicator with the columns of hubs zero and rows summing to 1 again."""
    return normalised(indicator.masked_fill(found[:, None, :], 0))


def _outstanding(share: Float[Tensor, "image patch"], left: Bool[Tensor, "image patch"]) -> Bool[Tensor, "image patch"]:
    there = torch.where(left, share, torch.nan)
    mean = there.nanmean(-1, keepdim=True)
    deviation = (there - mean).square().nanmean(-1, keepdim=True).sqrt()
    return (there > mean + OUTSTANDING * deviation) & (there > MAJORITY)
