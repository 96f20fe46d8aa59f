"""Maps on which images lie near each other if they are alike: in what each head does for them, or in any other numbers.

The study stores one when it is finished; the page computes others of what is stored. No torch.
"""

import numpy as np
import xarray as xr
from jaxtyping import Float32, Float64, Int
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from vitrail.patterns.layout import principal_plane

__all__ = ["image_xy"]

PERPLEXITY = 30
"""About how many neighbours t-SNE keeps together; scikit-learn's default."""

FEW_IMAGES = 5
"""Below so many images there are no neighbours to speak of, and no t-SNE."""

N_LANDMARKS = 5000
"""Images that t-SNE lays out: its time grows faster than their number, and 50,000 took 20 minutes."""

N_NEIGHBOURS = 5
"""Landmarks between which another image is placed, as many as for a photograph that is added to the page."""

BLOCK_IMAGES = 1024
"""Images that are placed together: a bound on the memory of their distances to all landmarks."""

START_SPREAD = 1e-4
"""Standard deviation of the layout at the start along its first axis, as scikit-learn's own initialisation has it."""


def image_xy(
    table: Float32[np.ndarray, "image ..."] | xr.DataArray, seed: int, method: str = "tsne"
) -> Float32[np.ndarray, "image xy"]:
    """A map on which images lie near each other if their rows of a table are alike: if the same heads matter to them.

    t-SNE of each image's numbers, as its probabilities over all heads; below 5 images their first two principal
    components. Of more than 5,000 images, so many are drawn as landmarks, and each other lies at the mean of the 5
    landmarks that are most like it. One thread, since the order of sums decides the layout. Distances between far
    groups and the sizes of groups mean nothing. Source: our construction, after Li et al. 2023, whose overview lays out
    images by t-SNE.

    Args:
        table: Numbers of each image, as the probability of its label with each head pruned; what is NaN for an image,
            as heads that a layer does not have, is left out. Read in pieces.
        seed: Of the landmarks and of the layout.
        method: "tsne", or "pca" for the first two principal components (of the landmarks).

    Returns:
        Positions, in layout units without meaning, or in the unit of the table for "pca".
    """
    n_images = len(table)
    drawn = np.random.default_rng(seed).permutation(n_images)[:N_LANDMARKS]
    landmarks = _rows(table, np.sort(drawn))
    columns = ~np.isnan(landmarks).any(axis=0)  # without heads that a narrower layer does not have
    center = landmarks[:, columns].mean(axis=0)
    landmarks = landmarks[:, columns] - center
    with threadpool_limits(limits=1):
        plane = principal_plane(landmarks)
        xy = plane if method == "pca" else _tsne(landmarks, plane, seed)
        if n_images == len(landmarks):
            return xy
        axes = np.linalg.lstsq(landmarks, plane.astype(np.float64), rcond=None)[0]
        pieces = []
        for start in range(0, n_images, BLOCK_IMAGES):
            rows = _rows(table, np.arange(start, min(start + BLOCK_IMAGES, n_images)))[:, columns] - center
            pieces.append(rows @ axes if method == "pca" else xy[_nearest(landmarks, rows)].mean(axis=1))
    places = np.concatenate(pieces).astype(np.float32)
    places[np.sort(drawn)] = xy
    return places


def _rows(table: "np.ndarray | xr.DataArray", rows: np.ndarray) -> Float64[np.ndarray, "row column"]:
    return np.asarray(table[rows], dtype=np.float64).reshape(len(rows), -1)


def _tsne(
    table: Float64[np.ndarray, "image column"], plane: Float32[np.ndarray, "image xy"], seed: int
) -> Float32[np.ndarray, "image xy"]:
    if len(table) < FEW_IMAGES or not table.any():
        return plane
    from sklearn.manifold import TSNE  # 0.5 s to import, and needed only here

    perplexity = min(PERPLEXITY, (len(table) - 1) / 3)
    layout = TSNE(n_components=2, perplexity=perplexity, init=START_SPREAD * _unit(plane), random_state=seed)
    return np.asarray(layout.fit_transform(table), dtype=np.float32)


def _nearest(
    landmarks: Float64[np.ndarray, "landmark column"], rows: Float64[np.ndarray, "row column"]
) -> Int[np.ndarray, "row neighbour"]:
    """The landmarks nearest to each row, by |l|^2 - 2 l r, the squared distance up to what is the row's own."""
    distance = np.square(landmarks).sum(axis=1) - 2 * (rows @ landmarks.T)
    return np.argpartition(distance, N_NEIGHBOURS, axis=1)[:, :N_NEIGHBOURS]


def _unit(layout: Float32[np.ndarray, "image xy"]) -> Float32[np.ndarray, "image xy"]:
    """Scaled to a standard deviation of 1 along x, as t-SNE wants its start."""
    return np.asarray(layout / layout[:, 0].std(), dtype=np.float32)
