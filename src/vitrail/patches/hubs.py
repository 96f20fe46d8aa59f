"""Indiscriminative patches, or hubs: patches that nearly every query keeps, whatever the query asks.

Our construction, after Ma et al. 2022 (arXiv 2203.05922). Related to attention sinks and to high-norm tokens; whether
they can be thrown away is a matter of experiment (`docs/patches.md`), not of their name.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Hubs", "hubs", "kept_share"]

MAX_ROUNDS = 5
OUTSTANDING = 2.0
"""Standard deviations above the mean kept share that make a patch stand out."""
MAJORITY = 0.5
"""Share of the queries that must keep it."""


class Hubs(NamedTuple):
    """Which patches are hubs, the share of queries that kept each (before any was removed), and the indicator without
    hubs: their columns zero, rows summing to 1 again."""

    found: Bool[Tensor, "image patch"]
    kept_share: Float[Tensor, "image patch"]
    without: Float[Tensor, "image patch other"]


def hubs(
    indicator: Float[Tensor, "image patch other"], reachable: Int[Tensor, "patch"] | None = None
) -> Hubs:
    """Finds hubs, takes them away, and looks again until there are none, at most five times.

    A patch is a hub if its kept share f is above 0.5 and above mean + 2 standard deviations of f over the patches that
    are left. `reachable` counts the patches that each query can attend to at all, itself included, for attention within
    windows; None: all of them.
    """
    counts = _counts(indicator, reachable)
    found = torch.zeros(indicator.shape[:2], dtype=torch.bool, device=indicator.device)
    first = share = kept_share(indicator, reachable)
    open_images = torch.arange(len(indicator), device=indicator.device)
    without = indicator
    for _ in range(MAX_ROUNDS):
        new = _outstanding(share, found[open_images])
        has_new = new.any(-1)
        if not has_new.any():
            break
        open_images, new = open_images[has_new], new[has_new]
        found[open_images] |= new
        without = without.clone() if without is indicator else without
        without[open_images] = _without(without[open_images], new)
        share = kept_share(without[open_images], counts)
    return Hubs(found, first, without)


def kept_share(
    indicator: Float[Tensor, "image patch other"], reachable: Int[Tensor, "patch"] | None = None
) -> Float[Tensor, "image patch"]:
    """f_j: the share of queries i that keep patch j, I_ij >= mean_j + std_j of their row.

    0 (nobody) .. 1 (every query that can attend to it). Mean and deviation are over the patches a query can reach.
    """
    counts = _counts(indicator, reachable).to(indicator)
    mean = indicator.sum(-1) / counts
    square = torch.linalg.vector_norm(indicator, dim=-1).square() / counts
    threshold = mean + (square - mean.square()).clamp(min=0).sqrt()
    kept = (indicator >= threshold[..., None]) & (mean > 0)[..., None]
    return kept.sum(-2, dtype=indicator.dtype) / counts


def _outstanding(share: Float[Tensor, "image patch"], gone: Bool[Tensor, "image patch"]) -> Bool[Tensor, "image patch"]:
    left = torch.where(gone, torch.nan, share)
    mean = left.nanmean(-1, keepdim=True)
    deviation = (left - mean).square().nanmean(-1, keepdim=True).sqrt()
    return (left > mean + OUTSTANDING * deviation) & (left > MAJORITY)


def _without(
    indicator: Float[Tensor, "image patch other"], gone: Bool[Tensor, "image patch"]
) -> Float[Tensor, "image patch other"]:
    rest = indicator.masked_fill(gone[:, None, :], 0)
    mass = rest.sum(-1, keepdim=True)
    return rest / torch.where(mass > 0, mass, 1)


def _counts(indicator: Tensor, reachable: Int[Tensor, "patch"] | None) -> Int[Tensor, "patch"]:
    if reachable is not None:
        return reachable
    return torch.full((indicator.shape[-1],), indicator.shape[-1], device=indicator.device)
