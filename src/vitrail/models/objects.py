"""Objects on the grid of patches, from images of instance ids (0: background)."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from vitrail.grid import patch_edges
from vitrail.models.preprocessing import Preprocessing

__all__ = ["coverage", "in_view", "object_share", "object_shares", "patch_objects"]

Ids = Int[np.ndarray, "_ _"]

MIN_SHARE = 0.4
"""Share of a patch from which it counts as the object's: on a border most patches are shared."""

MIN_AREA = 0.02
"""Share of the view below which an object is left out: it has too few patches to say anything of."""

MIN_PATCHES = 3
"""The same in patches, for coarse grids."""


def in_view(ids: Ids, preprocessing: Preprocessing) -> Int[np.ndarray, "height width"]:
    """Instance ids as the model sees the image: resized and cropped alike, by nearest neighbour, a border being 0.

    Args:
        ids: [row column], as large as the photograph; below 65,536, 0 for background.
        preprocessing: of the model.

    Returns:
        [height width] of the view, in pixels.
    """
    low, high = (ids & 255).astype(np.uint8), (ids >> 8).astype(np.uint8)
    packed = Image.fromarray(np.stack([low, high, np.zeros_like(low)], axis=-1))
    background = replace(preprocessing, interpolation="nearest", fill=(0, 0, 0))  # a border is no object
    seen = np.asarray(background.view(packed)).astype(np.int64)
    return seen[..., 0] | seen[..., 1] << 8


def coverage(
    ids: Ids, grid: tuple[int, int], step: tuple[int, int] | None = None
) -> tuple[Int[np.ndarray, "object"], Float[np.ndarray, "object patch"]]:
    """The ids of all objects, and the share of each patch that each of them covers.

    Args:
        ids: [row column] of the view; pixels behind the last patch are left out.
        grid: rows and columns of patches.
        step: rows and columns of pixels from one patch to the next (`Block.patch_step`), as far as known.

    Returns:
        The ids [object], growing, and the shares [object patch], 0 to 1.
    """
    below, across = map(patch_edges, ids.shape, grid, step or (None, None))
    inside = ids[: below[-1], : across[-1]]
    areas = np.outer(np.diff(below), np.diff(across))
    found = np.unique(ids[ids > 0])
    shares = np.zeros((len(found), grid[0] * grid[1]))
    for row, each in enumerate(found):
        by_row = np.add.reduceat(inside == each, below[:-1], axis=0, dtype=np.int64)
        shares[row] = (np.add.reduceat(by_row, across[:-1], axis=1) / areas).reshape(-1)
    return found, shares


def object_share(ids: Ids, grid: tuple[int, int], step: tuple[int, int] | None = None) -> Float[np.ndarray, "patch"]:
    """How much of each patch lies under objects, whichever they are.

    Args:
        ids: [row column] of the view.
        grid: rows and columns of patches.
        step: rows and columns of pixels from one patch to the next (`Block.patch_step`), as far as known.

    Returns:
        Shares [patch], 0 (background) to 1.
    """
    return np.asarray(coverage((ids > 0).astype(np.int64), grid, step)[1].sum(axis=0))


def object_shares(
    masks: Sequence[Ids | None], grid: tuple[int, int], step: tuple[int, int] | None = None
) -> Float[np.ndarray, "image patch"]:
    """How much of each patch lies under objects, of several images.

    Args:
        masks: [row column] instance ids of each view, or None.
        grid: rows and columns of patches.
        step: rows and columns of pixels from one patch to the next (`Block.patch_step`), as far as known.

    Returns:
        float32 shares [image patch], 0 to 1; NaN where there is no mask.
    """
    shares = np.full((len(masks), grid[0] * grid[1]), np.nan, dtype=np.float32)
    for image, ids in enumerate(masks):
        if ids is not None:
            shares[image] = object_share(ids, grid, step)
    return shares


def patch_objects(
    ids: Ids,
    grid: tuple[int, int],
    step: tuple[int, int] | None = None,
    *,
    min_share: float = MIN_SHARE,
    min_area: float = MIN_AREA,
    min_patches: int = MIN_PATCHES,
) -> Int[np.ndarray, "patch"]:
    """Which object each patch belongs to, 0 for none.

    A patch belongs to the object that covers most of it, if that is `min_share` of it or more. Objects that cover less
    than `min_area` of the view, or have fewer than `min_patches` patches, are left out (their patches belong to none).

    Args:
        ids: [row column] of the view.
        grid: rows and columns of patches.
        step: rows and columns of pixels from one patch to the next (`Block.patch_step`), as far as known.
        min_share: share of the patch, 0 to 1.
        min_area: share of the view, 0 to 1.
        min_patches: number of patches.

    Returns:
        Instance ids [patch].
    """
    found, shares = coverage(ids, grid, step)
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
