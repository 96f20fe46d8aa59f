"""Which filters of the patch embedding let objects stand out.

After Nguyen et al. 2022 (arXiv 2210.07646), who call a filter good for an image when objects stand out in its global
view; the score that says how much is our construction: AUROC of the energy of object patches against the others.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.neurons.ranking import average_ranks

__all__ = ["FilterTable", "auroc", "by_class", "filter_energy", "salient_patches", "tabulate"]


def filter_energy(
    images: Float[Tensor, "image colour row column"], filters: Float[Tensor, "channel colour height width"]
) -> Float[Tensor, "image channel patch"]:
    """||max(V, 0)|| of the local view V of every patch through every filter.

    A product is positive where both factors have the same sign, so its square summed over a patch is two convolutions
    of squares, and no view has to be made.
    """
    x, f = images.float(), filters.float()
    squares = sum(
        F.conv2d((sign * x).clamp(min=0) ** 2, (sign * f).clamp(min=0) ** 2, stride=f.shape[2:]) for sign in (1, -1)
    )
    return torch.as_tensor(squares).clamp(min=0).sqrt().flatten(2)


def auroc(
    scores: Float[np.ndarray, "*batch patch"], positive: Bool[np.ndarray, "*batch patch"]
) -> Float[np.ndarray, "*batch"]:
    """Probability that a positive patch has a higher score than a negative one, ties counting half; over the last
    dimension. NaN where there are no positives or no negatives.
    """
    ranks = average_ranks(scores)
    n_positive = positive.sum(axis=-1)
    n_pairs = n_positive * (positive.shape[-1] - n_positive)
    above = np.where(positive, ranks, 0).sum(axis=-1) - n_positive * (n_positive + 1) / 2
    return np.asarray(above / np.where(n_pairs > 0, n_pairs, np.nan))


def salient_patches(rollout: Float[np.ndarray, "image patch"], share: float = 0.25) -> Bool[np.ndarray, "image patch"]:
    """The patches with the highest rollout, this share of them: what stands in for objects where there are no masks."""
    order = np.argsort(-rollout, axis=1, kind="stable")[:, : round(share * rollout.shape[1])]
    marked = np.zeros(rollout.shape, dtype=bool)
    np.put_along_axis(marked, order, True, axis=1)
    return marked


@dataclass(frozen=True, eq=False)
class FilterTable:
    """Filters over a data set: mean and standard deviation of AUROC, images with the best and worst score."""

    mean: Float[np.ndarray, "channel"]
    deviation: Float[np.ndarray, "channel"]
    best: Int[np.ndarray, "channel rank"]
    worst: Int[np.ndarray, "channel rank"]
    n_images: int


def tabulate(scores: Float[np.ndarray, "image channel"], n_extreme: int = 5) -> FilterTable:
    """Each filter over all images that have a score; `best` and `worst` number the images as they came."""
    known = np.flatnonzero(~np.isnan(scores).all(axis=1))
    order = np.argsort(scores[known], axis=0, kind="stable")
    n_extreme = min(n_extreme, len(known))
    return FilterTable(
        np.nanmean(scores[known], axis=0),
        np.nanstd(scores[known], axis=0),
        known[order[::-1][:n_extreme]].T,
        known[order[:n_extreme]].T,
        len(known),
    )


def by_class(
    scores: Float[np.ndarray, "image channel"], classes: Mapping[str, Bool[np.ndarray, "image"]], n_best: int = 3
) -> dict[str, list[tuple[int, float]]]:
    """For each class the filters with the highest mean AUROC over its images, best first."""
    ranked = {}
    for name, members in classes.items():
        means = np.nanmean(scores[members], axis=0)
        best = np.argsort(-means, kind="stable")[:n_best]
        ranked[name] = [(int(channel), float(means[channel])) for channel in best]
    return ranked
