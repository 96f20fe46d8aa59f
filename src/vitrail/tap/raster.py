"""Where the patches lie among a block's tokens, found by changing the corners of the image.

A changed corner moves the token of that corner. Four such tokens tell how many tokens lie in front of the patches, how
many behind them, and whether the patches between lie in raster order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vitrail.tap.layout import TokenLayout
from vitrail.tap.trace import Tracer, Unit

__all__ = ["Corners", "Raster", "corners_of", "fits_raster", "raster_of_corners", "same_each_time"]

_CORNER_SHARE = 0.3
"""A corner of the image is taken to be one token if that token has this share of all movement. A plain patch embedding
moves one token (share 1); overlapping kernels move a few neighbours too, so one half would be too strict; norms over
the whole image or earlier mixing move all tokens, and then the largest share is near 1 / tokens."""

_DIFFUSE = 4
"""Movement is diffuse where no token has this many times the share of each if all moved alike."""

_FINEST_PATCH_PX = 4
"""Patches are assumed to be at least this large where no grid is known yet; the smallest in use (Swin's)."""

_SAME_TOKENS = 1e-2, 1e-3
"""Relative and absolute difference (as a share of the largest value) within which two passes of one image give the same
tokens: above what rounding in half precision makes, far below what another draw of tokens does."""

_TINY = 1e-12
"""Keeps a share of nothing from being a division by zero."""


class Corners(NamedTuple):
    """The tokens of the image's corners.

    Attributes:
        tokens: Those of left top, right top, left bottom and right bottom.
        certain: Each corner moves mainly one token.
        still: No corner moves any token: they do not show the image, or nothing of it arrives.
        diffuse: All corners move all tokens, no corner one of them much more than the others: nothing is told.
    """

    tokens: tuple[int, ...]
    certain: bool
    still: bool = False
    diffuse: bool = False


class Raster(NamedTuple):
    """Patches in raster order among tokens that are none.

    Attributes:
        in_front: Number of tokens in front of the patches.
        grid: (rows, columns) of the patches.
        behind: Number of tokens behind the patches.
    """

    in_front: int
    grid: tuple[int, int]
    behind: int = 0

    @property
    def corners(self) -> tuple[int, int, int, int]:
        """The tokens of left top, right top, left bottom and right bottom."""
        rows, columns = self.grid
        first, last = self.in_front, self.in_front + rows * columns - 1
        return first, first + columns - 1, last - columns + 1, last


def corners_of(
    tracer: Tracer,
    images: Tensor,
    unit: Unit,
    layout: TokenLayout,
    leaf: int,
    grid: tuple[int, int] | None,
    patch_step: tuple[int, int] | None = None,
    *,
    without_attention: bool = False,
) -> Corners | None:
    """Finds the tokens that move when a corner of the image does.

    Args:
        tracer: Runs the model.
        images: One image or more [image, channel, row, column]; the first is changed.
        unit: The block.
        layout: Of its tokens.
        leaf: Which leaf of the block's arguments holds them.
        grid: (rows, columns) of the patches as far as they are known, which says how large a corner is changed.
        patch_step: Pixels from one patch to the next, as far as they are known: pixels beyond the grid are no patch's.
        without_attention: Attention gives zeros, so that what enters later blocks is not mixed.

    Returns:
        The tokens; None where the block gets other tokens for these images.
    """
    height, width = images.shape[-2:]
    if grid is not None and patch_step is not None:
        height, width = min(height, grid[0] * patch_step[0]), min(width, grid[1] * patch_step[1])
    rows, columns = grid or (max(1, height // _FINEST_PATCH_PX), max(1, width // _FINEST_PATCH_PX))
    high, wide = max(1, height // rows // 2), max(1, width // columns // 2)
    batch = images[:1].repeat(5, 1, 1, 1)
    corner = batch[..., :height, :width]
    corner[1, :, :high, :wide] += 1
    corner[2, :, :high, -wide:] += 1
    corner[3, :, -high:, :wide] += 1
    corner[4, :, -high:, -wide:] += 1
    runs = tracer.run(batch, without_attention=without_attention).runs.get(unit.path, ())
    if unit.run >= len(runs):
        return None
    tokens = layout.canonical(runs[unit.run].inputs[leaf]).float()
    if tokens.shape[0] != len(batch):
        return None
    moved = (tokens[1:] - tokens[:1]).norm(dim=-1)
    share = moved.amax(1) / moved.sum(1).clamp_min(_TINY)
    return Corners(
        tuple(int(index) for index in moved.argmax(1)),
        certain=bool((share > _CORNER_SHARE).all()),
        still=not moved.any(),
        diffuse=bool(moved.any(1).all() and (share < _DIFFUSE / moved.shape[1]).all()),
    )


def same_each_time(tracer: Tracer, images: Tensor, unit: Unit, layout: TokenLayout, leaf: int) -> bool:
    """Whether one image twice on a batch gives the same tokens (ViT-MAE shuffles even where it drops none).

    Args:
        tracer: Runs the model.
        images: One image or more [image, channel, row, column]; the first is taken.
        unit: The block.
        layout: Of its tokens.
        leaf: Which leaf of the block's arguments holds them.

    Returns:
        True where both are the same up to rounding.
    """
    tokens = tracer.run(images[:1].repeat(2, 1, 1, 1)).runs[unit.path][unit.run].inputs[leaf]
    one, two = layout.canonical(tokens).flatten(1).unflatten(0, (2, -1))
    relative, absolute = _SAME_TOKENS
    return torch.allclose(one, two, rtol=relative, atol=absolute * float(one.abs().max()))


def fits_raster(corners: Corners, raster: Raster) -> bool:
    """Whether each corner is at most one patch from where a raster has it.

    A stem whose kernels overlap may move the neighbour more.

    Args:
        corners: What the image's corners move.
        raster: Where the patches are expected.

    Returns:
        True where all four are.
    """
    _, columns = raster.grid
    for token, expected in zip(corners.tokens, raster.corners, strict=True):
        row, column = divmod(token - raster.in_front, columns)
        expected_row, expected_column = divmod(expected - raster.in_front, columns)
        if max(abs(row - expected_row), abs(column - expected_column)) > 1:
            return False
    return True


def raster_of_corners(corners: Corners, n_tokens: int) -> Raster | None:
    """The raster whose corners are exactly these tokens.

    Args:
        corners: What the image's corners move.
        n_tokens: Number of tokens.

    Returns:
        The raster, with the tokens in front of it and behind; None where no raster has such corners.
    """
    left_top, right_top, left_bottom, right_bottom = corners.tokens
    columns = right_top - left_top + 1
    if columns < 1 or (left_bottom - left_top) % columns or left_bottom < left_top:
        return None
    raster = Raster(left_top, ((left_bottom - left_top) // columns + 1, columns), n_tokens - 1 - right_bottom)
    return raster if raster.corners == corners.tokens else None
