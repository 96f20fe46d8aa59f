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
from scipy.stats import rankdata
from torch import Tensor

__all__ = ["FilterTable", "auroc", "best_filters_by_class", "filter_energy", "filter_table", "salient_patches"]


def filter_energy(
    images: Float[Tensor, "image colour row column"], filters: Float[Tensor, "channel colour height width"]
) -> Float[Tensor, "image channel patch"]:
    """How strongly the local view V of every patch through every filter responds: ||max(V, 0)||.

    A product is positive where both factors have the same sign, so its square summed over a patch is two convolutions
    of squares, and no view has to be made.

    Args:
        images: Prepared images.
        filters: Kernels as large as a patch.

    Returns:
        Zero or more.
    """
    x, f = images.float(), filters.float()
    squares = sum(
        F.conv2d((sign * x).clamp(min=0) ** 2, (sign * f).clamp(min=0) ** 2, stride=f.shape[2:]) for sign in (1, -1)
    )
    return torch.as_tensor(squares).clamp(min=0).sqrt().flatten(2)


def auroc(
    scores: Float[np.ndarray, "*batch patch"], positive: Bool[np.ndarray, "*batch patch"]
) -> Float[np.ndarray, "*batch"]:
    """Probability that a positive patch has a higher score than a negative one, ties counting half.

    Args:
        scores: A score for each patch; the higher, the more positive.
        positive: The patches that should score high.

    Returns:
        0 to 1, 0.5 for scores that know nothing; NaN where there are no positives or no negatives.
    """
    ranks = rankdata(scores, axis=-1)
    n_positive = positive.sum(axis=-1)
    n_pairs = n_positive * (positive.shape[-1] - n_positive)
    above = np.where(positive, ranks, 0).sum(axis=-1) - n_positive * (n_positive + 1) / 2
    return np.asarray(above / np.where(n_pairs > 0, n_pairs, np.nan))


def salient_patches(rollout: Float[np.ndarray, "image patch"], share: float = 0.25) -> Bool[np.ndarray, "image patch"]:
    """The patches with the highest rollout: what stands in for objects where there are no masks.

    Args:
        rollout: A score for each patch.
        share: Of the patches, to be marked.

    Returns:
        True for the salient patches, the same number in every image; equal scores go to the earlier patch.
    """
    order = np.argsort(-rollout, axis=1, kind="stable")[:, : round(share * rollout.shape[1])]
    salient = np.zeros(rollout.shape, dtype=bool)
    np.put_along_axis(salient, order, True, axis=1)
    return salient


@dataclass(frozen=True, eq=False)
class FilterTable:
    """How well each filter lets objects stand out, over a data set.

    Attributes:
        mean: Mean AUROC over images.
        deviation: Its standard deviation over images.
        best: The images with the highest AUROC, best first.
        worst: The images with the lowest, worst first.
        n_images: Images that have a score.
    """

    mean: Float[np.ndarray, "channel"]
    deviation: Float[np.ndarray, "channel"]
    best: Int[np.ndarray, "channel rank"]
    worst: Int[np.ndarray, "channel rank"]
    n_images: int


def filter_table(scores: Float[np.ndarray, "image channel"], n_extreme: int = 5) -> FilterTable:
    """Each filter over all images that have a score.

    Args:
        scores: AUROC of each image and filter; NaN for images without one.
        n_extreme: Best and worst images to name.

    Returns:
        The table; its `best` and `worst` are positions of images in `scores`.
    """
    scored = np.flatnonzero(~np.isnan(scores).all(axis=1))
    order = np.argsort(scores[scored], axis=0, kind="stable")
    n_extreme = min(n_extreme, len(scored))
    return FilterTable(
        np.nanmean(scores[scored], axis=0),
        np.nanstd(scores[scored], axis=0),
        scored[order[::-1][:n_extreme]].T,
        scored[order[:n_extreme]].T,
        len(scored),
    )


def best_filters_by_class(
    scores: Float[np.ndarray, "image channel"], classes: Mapping[str, Bool[np.ndarray, "image"]], n_best: int = 3
) -> dict[str, list[tuple[int, float]]]:
    """For each class the filters with the highest mean AUROC over its images.

    Args:
        scores: AUROC of each image and filter; NaN for images without one.
        classes: The images of each class.
        n_best: Filters for each class.

    Returns:
        (channel, mean AUROC) by class, best first.
    """
    ranked = {}
    for name, members in classes.items():
        means = np.nanmean(scores[members], axis=0)
        best = np.argsort(-means, kind="stable")[:n_best]
        ranked[name] = [(int(channel), float(means[channel])) for channel in best]
    return ranked
