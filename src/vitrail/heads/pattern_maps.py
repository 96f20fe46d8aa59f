"""What pattern models and rules see of a head: its patch block, its class row and column, on one grid for all layers.

A block is what patches give to patches, [query key], as the model computed it: rows sum to 1 less the prefix's share.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.heads.maps import MapSource
from vitrail.heads.pattern_names import common_grid
from vitrail.vit.attention import LayerAttention
from vitrail.vit.ground import grounds_of_layers
from vitrail.vit.open import Vit

__all__ = ["PatternGround", "Pictures", "pattern_ground", "pictures_of", "pooled", "read_pictures"]

Grid = tuple[int, int]


@dataclass(frozen=True)
class PatternGround:
    """The heads whose patterns can be compared. `grid` is where all maps are brought to, `grids` the grid and prefix
    of each layer that takes part, `class_index` the class token's place in all of them, or None; `refused` says why
    the other layers take no part."""

    grid: Grid
    grids: dict[int, tuple[Grid, int]]
    class_index: int | None
    refused: dict[int, str]

    @property
    def n_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def prefix(self) -> int:
        return next(iter(self.grids.values()))[1]

    @property
    def note(self) -> str:
        """What was done to maps of other grids; empty if nothing."""
        others = sorted({grid for grid, _ in self.grids.values() if grid != self.grid})
        if not others:
            return ""
        named = ", ".join(f"{rows} x {columns}" for rows, columns in others)
        return f"maps on grids of {named} were pooled to {self.grid[0]} x {self.grid[1]} patches"


def pattern_ground(vit: Vit) -> PatternGround:
    """Layers that join the patches of one grid with each other, all at once; with none, `grids` is empty.

    Attention within windows takes no part: its zeros between windows would be the pattern. Layers of other prefixes
    than the first's take no part either. The grid is the smallest of those that do, and has at most 400 patches.
    """
    found, refused = grounds_of_layers(vit)
    grids: dict[int, tuple[Grid, int]] = {}
    for layer, ground in found.items():
        prefixes = {prefix for _, prefix in grids.values()}
        if ground.slots is not None:
            refused[layer] = f"L{layer} attends within windows, whose borders would pass for its pattern"
        elif prefixes and ground.prefix not in prefixes:
            refused[layer] = f"L{layer} has {ground.prefix} prefix tokens, and the layers before it {prefixes.pop()}"
        else:
            grids[layer] = (ground.grid, ground.prefix)
    if not grids:
        return PatternGround((0, 0), {}, None, refused)
    common = common_grid([grid for grid, _ in grids.values()])
    indices = {vit.anatomy.class_index(layer) for layer in grids}
    return PatternGround(common, grids, indices.pop() if len(indices) == 1 else None, refused)


class Pictures(NamedTuple):
    """Some images' maps of one layer, on the common grid. `cross` is the class token's row, then its column without
    the corner; None without a class token. `class_mass` is what patches give the class token, mean over patches."""

    images: slice
    block: Float[Tensor, "image head query key"]
    cross: Float[Tensor, "image head cell"] | None
    class_mass: Float[Tensor, "image head"] | None


def read_pictures(attention: LayerAttention, ground: PatternGround, maps: MapSource) -> Iterator[Pictures]:
    """The maps of one attention call, some images at a time, in float32; nothing for layers that take no part.

    A piece may be overwritten when the next one is asked for.
    """
    if attention.call != 0 or attention.layer not in ground.grids:
        return
    start = 0
    for weights in maps.parts(attention):
        yield pictures_of(weights, attention.layer, ground, slice(start, start + len(weights)))
        start += len(weights)


def pictures_of(
    weights: Float[Tensor, "image head query key"], layer: int, ground: PatternGround, images: slice
) -> Pictures:
    """The same of maps that are at hand; `images` says whose they are."""
    grid, prefix = ground.grids[layer]
    block = pooled(weights[..., prefix:, prefix:].float(), grid, ground.grid)
    if ground.class_index is None:
        return Pictures(images, block, None, None)
    column = weights[..., prefix:, ground.class_index]
    return Pictures(images, block, _cross(weights, grid, prefix, ground), column.float().mean(-1))


def _cross(
    weights: Float[Tensor, "image head query key"], grid: Grid, prefix: int, ground: PatternGround
) -> Float[Tensor, "image head cell"]:
    """The class token's row, then its column without the corner; keys are pooled by sums, queries by means."""
    at = ground.class_index
    assert at is not None
    row, column = weights[..., at, :].float(), weights[..., :, at].float()
    others = [token for token in range(prefix) if token != at]
    to, kept, n_cells = row[..., prefix:], column[..., prefix:], row.shape[-1]
    if grid != ground.grid:
        cells = _cells(grid, ground.grid).to(row.device)
        to, kept = to @ cells, kept @ (cells / cells.sum(0))
    assert n_cells == prefix + grid[0] * grid[1]
    return torch.cat([row[..., :prefix], to, column[..., others], kept], -1)


def pooled(block: Float[Tensor, "*map query key"], grid: Grid, to: Grid) -> Float[Tensor, "*map coarse_q coarse_k"]:
    """A block on a coarser grid: what the patches of a cell give, on average, to all patches of another cell."""
    if grid == to:
        return block
    cells = _cells(grid, to).to(block.device)
    return (cells / cells.sum(0)).T @ block @ cells


@cache
def _cells(grid: Grid, to: Grid) -> Float[Tensor, "patch cell"]:
    """1 where a patch lies in a cell of the coarser grid."""
    row, column = (torch.arange(side) * coarse // side for side, coarse in zip(grid, to, strict=True))
    cell = (row[:, None] * to[1] + column).flatten()
    return torch.nn.functional.one_hot(cell, to[0] * to[1]).float()
