"""Objects on the grid of patches, from images of instance ids (0: background)."""

from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from vitrail.vit.preprocessing import Preprocessing

__all__ = ["coverage", "in_view", "patch_objects"]

Ids = Int[np.ndarray, "row column"]

MIN_SHARE = 0.4
MIN_AREA = 0.02
MIN_PATCHES = 3


def in_view(ids: Ids, preprocessing: Preprocessing) -> Int[np.ndarray, "height width"]:
    """Instance ids as the model sees the image: resized and cropped alike, by nearest neighbour; ids below 65,536."""
    low, high = (ids & 255).astype(np.uint8), (ids >> 8).astype(np.uint8)
    packed = Image.fromarray(np.stack([low, high, np.zeros_like(low)], axis=-1))
    seen = np.asarray(replace(preprocessing, interpolation="nearest").view(packed)).astype(np.int64)
    return seen[..., 0] | seen[..., 1] << 8


def coverage(ids: Ids, grid: tuple[int, int]) -> tuple[Int[np.ndarray, "object"], Float[np.ndarray, "object patch"]]:
    """The ids of all objects, and the share of each patch that each of them covers."""
    rows, columns = grid
    height, width = ids.shape[0] // rows, ids.shape[1] // columns
    cells = ids[: rows * height, : columns * width].reshape(rows, height, columns, width)
    found = np.unique(ids[ids > 0])
    shares = [(cells == each).mean(axis=(1, 3)).reshape(-1) for each in found]
    return found, np.stack(shares) if shares else np.zeros((0, rows * columns))


def patch_objects(
    ids: Ids,
    grid: tuple[int, int],
    *,
    min_share: float = MIN_SHARE,
    min_area: float = MIN_AREA,
    min_patches: int = MIN_PATCHES,
) -> Int[np.ndarray, "patch"]:
    """Which object each patch belongs to, 0 for none.

    A patch belongs to the object that covers most of it, if that is `min_share` of it or more. Objects that cover less
    than `min_area` of the view, or have fewer than `min_patches` patches, are left out (their patches belong to none).
    """
    found, shares = coverage(ids, grid)
    if not len(found):
        return np.zeros(grid[0] * grid[1], dtype=np.int64)
    best = shares.argmax(axis=0)
    owner = np.where(shares.max(axis=0) >= min_share, found[best], 0)
    area = np.array([(ids == each).mean() for each in found])
    kept = [
        each
        for each, size in zip(found, area, strict=True)
        if size >= min_area and (owner == each).sum() >= min_patches
    ]
    return np.where(np.isin(owner, kept), owner, 0).astype(np.int64)
