"""Arrays of a study that need all of its images."""

import numpy as np
from jaxtyping import Float32
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from vitrail.heads.pattern_map import principal_plane

__all__ = ["image_xy"]

PERPLEXITY = 30
FEW_IMAGES = 5


def image_xy(head_probability: Float32[np.ndarray, "image layer head"], seed: int) -> Float32[np.ndarray, "image xy"]:
    """A map on which images lie near each other if the same heads matter to them; layout units without meaning.

    t-SNE of each image's probabilities over all heads; below 5 images their first two principal components. One thread,
    since the order of sums decides the layout. Distances between far groups and the sizes of groups mean nothing.
    Source: our construction, after Li et al. 2023, whose overview lays out images by t-SNE.
    """
    table = head_probability.reshape(len(head_probability), -1).astype(np.float64)
    table = table[:, ~np.isnan(table).any(axis=0)]  # heads that a narrower layer does not have
    table = table - table.mean(axis=0)
    with threadpool_limits(limits=1):
        if len(table) < FEW_IMAGES or not table.any():
            return principal_plane(table)
        from sklearn.manifold import TSNE  # 0.5 s to import, and needed only here

        perplexity = min(PERPLEXITY, (len(table) - 1) / 3)
        layout = TSNE(
            n_components=2, perplexity=perplexity, init=1e-4 * _unit(principal_plane(table)), random_state=seed
        )
        return np.asarray(layout.fit_transform(table), dtype=np.float32)


def _unit(layout: Float32[np.ndarray, "image xy"]) -> Float32[np.ndarray, "image xy"]:
    """Scaled to a standard deviation of 1 along x, as t-SNE wants its start."""
    return np.asarray(layout / layout[:, 0].std(), dtype=np.float32)
