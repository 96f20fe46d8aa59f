"""Indiscriminative patches, or hubs: patches that most queries keep, whatever the query asks.

They come in rounds. Hubs of the first round, the sinks, are kept by most queries as the model has it. Those of later
rounds stand out only when the sinks are taken away: most of them are kept by fewer than half of the queries before.

Our construction, after Ma et al. 2022 (arXiv 2203.05922). Related to attention sinks and to high-norm tokens; whether
they can be thrown away is a matter of experiment (`docs/patches.md`), not of their name.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.patches.interaction import normalise_rows
from vitrail.tap.budget import budget_of

__all__ = ["Hubs", "find_hubs", "query_share", "sink_share", "without_hubs"]

MAX_ROUNDS = 5
"""Bound on the rounds of removal."""
OUTSTANDING = 2.0
"""Standard deviations above the mean kept share that make a patch stand out."""
MAJORITY = 0.5
"""Share of the queries that must keep it."""


class Hubs(NamedTuple):
    """The hubs and sinks of each image, and the share of queries that keeps each patch.

    Attributes:
        hubs: True for hubs of all rounds.
        sinks: True for hubs of the first round, which most queries keep while all patches are present.
        query_share: Share of the queries that keep each patch, before any hub was removed; 0 to 1.
    """

    hubs: Bool[Tensor, "image patch"]
    sinks: Bool[Tensor, "image patch"]
    query_share: Float[Tensor, "image patch"]


def find_hubs(indicator: Float[Tensor, "image patch other"], reachable: Int[Tensor, "patch"] | None = None) -> Hubs:
    """Finds hubs, removes them, and repeats until there are none, at most five times.

    A patch is a hub if its query share f is above 0.5 and above mean + 2 standard deviations of f over the patches that
    are left.

    Args:
        indicator: Interactions, diagonal zero, rows summing to 1 (or to 0).
        reachable: How many patches each query can attend to at all, itself included, where attention is limited to
            windows of the model; None: all of them.

    Returns:
        Masks of hubs and sinks, and the query share of the first round.
    """
    left = torch.ones(indicator.shape[:2], dtype=torch.bool, device=indicator.device)
    first = share = query_share(indicator, reachable)
    active = torch.arange(len(indicator), device=indicator.device)
    rest = indicator
    sinks = _stand_out(share, left)
    joins_images = budget_of(indicator.device).joins_images
    for _ in range(MAX_ROUNDS):
        new = _stand_out(share, left[active])
        if joins_images:  # an image without new hubs stays as it is; to ask which have some would wait for the device
            left &= ~new
            share = query_share(indicator, reachable, left)
            continue
        has_new = new.any(-1)
        if not has_new.any():
            break
        if not has_new.all():
            active, new, rest = active[has_new], new[has_new], rest[has_new]
        left[active] &= ~new
        share = query_share(rest, reachable, left[active])
    return Hubs(~left, sinks, first)


def sink_share(
    indicator: Float[Tensor, "image patch other"], sinks: Bool[Tensor, "image patch"]
) -> Float[Tensor, "image"]:
    """Share of all interactions of an image that its sinks take.

    Args:
        indicator: diagonal zero, rows summing to 1 (or to 0).
        sinks: `find_hubs(indicator).sinks`.

    Returns:
        0 without sinks, 1 if nothing else is attended to; NaN where no patch interacts.
    """
    columns = indicator.sum(-2)
    return (columns * sinks).sum(-1) / columns.sum(-1)


def query_share(
    indicator: Float[Tensor, "image patch other"],
    reachable: Int[Tensor, "patch"] | None = None,
    left: Bool[Tensor, "image patch"] | None = None,
) -> Float[Tensor, "image patch"]:
    """Share of the queries that keep each patch: I_ij >= mean_j + std_j of row i.

    Mean and deviation are over the patches a query can reach.

    Args:
        indicator: Interactions, diagonal zero, rows summing to 1 (or to 0).
        reachable: How many patches each query can attend to at all, itself included; None: all of them.
        left: Patches that count; the others do as if their columns were zero (scaling the rows up again would change
            nothing). None: all of them.

    Returns:
        0 (no query) to 1 (every query that can attend to the patch).
    """
    counts = torch.full_like(indicator[0, 0], indicator.shape[-1]) if reachable is None else reachable.to(indicator)
    rest = indicator if left is None else indicator * left[:, None].to(indicator)
    mean = rest.sum(-1) / counts
    square = torch.linalg.vector_norm(rest, dim=-1).square() / counts
    threshold = mean + (square - mean.square()).clamp(min=0).sqrt()
    threshold = torch.where(mean > 0, threshold, torch.inf)
    # Comparing straight into numbers takes a fifth of the time of booleans that are then counted.
    keeps = torch.ge(indicator, threshold[..., None], out=torch.empty_like(indicator))
    return keeps.sum(-2) / counts


def without_hubs(
    indicator: Float[Tensor, "image patch other"], is_hub: Bool[Tensor, "image patch"]
) -> Float[Tensor, "image patch other"]:
    """The indicator as if no query attended to hubs.

    Args:
        indicator: Interactions, diagonal zero.
        is_hub: The patches to leave out, such as `find_hubs(indicator).hubs`.

    Returns:
        A new indicator with the columns of hubs zero and rows summing to 1 again.
    """
    return normalise_rows(indicator.masked_fill(is_hub[:, None, :], 0))


def _stand_out(share: Float[Tensor, "image patch"], left: Bool[Tensor, "image patch"]) -> Bool[Tensor, "image patch"]:
    present = torch.where(left, share, torch.nan)
    mean = present.nanmean(-1, keepdim=True)
    deviation = (present - mean).square().nanmean(-1, keepdim=True).sqrt()
    return (present > mean + OUTSTANDING * deviation) & (present > MAJORITY)
