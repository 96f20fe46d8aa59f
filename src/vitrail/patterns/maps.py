"""What pattern models and rules see of a head: its patch block, its class row and column, on one grid for all layers.

A block is what patches give to patches, [query key], as the model computed it: rows sum to 1 less the prefix's share.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.grid import Grid
from vitrail.models.open import Vit
from vitrail.models.token_grid import share_grids
from vitrail.patterns.names import common_grid
from vitrail.tap.attention import LayerAttention
from vitrail.tap.maps import MapSource

__all__ = ["ComparableLayers", "PatternMaps", "comparable_layers", "pool_block", "pool_maps", "read_pattern_maps"]


@dataclass(frozen=True)
class ComparableLayers:
    """The heads whose patterns can be compared.

    Attributes:
        grid: (rows, columns) that all maps are brought to.
        grids: Grid and prefix of each layer that takes part.
        class_index: Index of the class token in all of them; None without one.
        refused: Why each other layer takes no part.
        heads: Those that take part by layer and attention call, where not all do.
    """

    grid: Grid
    grids: dict[int, tuple[Grid, int]]
    class_index: int | None
    refused: dict[int, str]
    heads: dict[tuple[int, int], slice] = field(default_factory=dict)

    def heads_of(self, layer: int) -> list[slice]:
        """The heads of a layer that take part.

        Args:
            layer: Index of a layer of `grids`.

        Returns:
            Slices of the layer's heads.
        """
        return [heads for (of_layer, _), heads in self.heads.items() if of_layer == layer] or [slice(None)]

    @property
    def n_patches(self) -> int:
        """Patches of the common grid."""
        return self.grid[0] * self.grid[1]

    @property
    def prefix(self) -> int:
        """Tokens before the patches, the same in all layers that take part."""
        return next(iter(self.grids.values()))[1]

    @property
    def note(self) -> str:
        """What was done to maps of other grids; empty if nothing."""
        others = sorted({grid for grid, _ in self.grids.values() if grid != self.grid})
        if not others:
            return ""
        named = ", ".join(f"{rows} x {columns}" for rows, columns in others)
        return f"maps on grids of {named} were pooled to {self.grid[0]} x {self.grid[1]} patches"


def comparable_layers(vit: Vit) -> ComparableLayers:
    """Layers that join the patches of one grid with each other, all at once.

    Attention within windows takes no part: its zeros between windows would be the pattern. Layers of other prefixes
    than the first's take no part either.

    Args:
        vit: The model.

    Returns:
        The layers with the grid of their maps: the smallest of theirs, of at most 400 patches. With none, `grids` is
        empty.
    """
    grids_of_calls, refused = share_grids(vit)
    grids: dict[int, tuple[Grid, int]] = {}
    heads: dict[tuple[int, int], slice] = {}
    for (layer, call), tokens in grids_of_calls.items():
        prefixes = {prefix for _, prefix in grids.values()}
        if tokens.slots is not None:
            refused[layer, call] = f"L{layer} attends within windows, whose borders would pass for its pattern"
        elif prefixes and tokens.n_prefix not in prefixes:
            refused[layer, call] = (
                f"L{layer} has {tokens.n_prefix} prefix tokens, and the layers before it {prefixes.pop()}"
            )
        else:
            grids.setdefault(layer, (tokens.grid, tokens.n_prefix))
            heads[layer, call] = tokens.heads
    reasons = {layer: reason for (layer, _), reason in refused.items() if layer not in grids}
    if not grids:
        return ComparableLayers((0, 0), {}, None, reasons)
    common = common_grid([grid for grid, _ in grids.values()])
    indices = {vit.anatomy.class_index(layer) for layer in grids}
    return ComparableLayers(common, grids, indices.pop() if len(indices) == 1 else None, reasons, heads)


class PatternMaps(NamedTuple):
    """Some images' maps of one layer, on the common grid.

    Attributes:
        images: Which of the batch's images these are.
        block: What patches give to patches.
        cross: The class token's row, then its column without the corner; None without a class token.
        class_mass: What patches give the class token, mean over patches, 0 to 1; None without one.
        first_head: Which of the layer's heads the first one is.
    """

    images: slice
    block: Float[Tensor, "image head query key"]
    cross: Float[Tensor, "image head cell"] | None
    class_mass: Float[Tensor, "image head"] | None
    first_head: int = 0

    @property
    def heads(self) -> slice:
        """Which of the layer's heads these are."""
        return slice(self.first_head, self.first_head + self.block.shape[1])


def read_pattern_maps(attention: LayerAttention, layers: ComparableLayers, maps: MapSource) -> Iterator[PatternMaps]:
    """The maps of one attention call, some images at a time.

    Args:
        attention: Of a reader of the tap.
        layers: The layers that take part.
        maps: Computes attention weights.

    Yields:
        Maps in float32, which may be overwritten when the next ones are asked for; nothing for calls that take no part.
    """
    heads = layers.heads.get((attention.layer, attention.call))
    if heads is None:
        return
    start = 0
    for weights in maps.parts(attention):
        part = pool_maps(weights, attention.layer, layers, slice(start, start + len(weights)))
        yield part._replace(first_head=heads.start)
        start += len(weights)


def pool_maps(
    weights: Float[Tensor, "image head query key"], layer: int, layers: ComparableLayers, images: slice
) -> PatternMaps:
    """Brings attention maps to the common grid.

    Args:
        weights: Attention over all tokens.
        layer: The layer they are of, one that takes part.
        layers: The layers that take part.
        images: Which of the batch's images these are.

    Returns:
        The maps in float32.
    """
    grid, prefix = layers.grids[layer]
    block = pool_block(weights[..., prefix:, prefix:].float(), grid, layers.grid)
    if layers.class_index is None:
        return PatternMaps(images, block, None, None)
    column = weights[..., prefix:, layers.class_index]
    return PatternMaps(images, block, _cross(weights, grid, prefix, layers), column.float().mean(-1))


def _cross(
    weights: Float[Tensor, "image head query key"], grid: Grid, prefix: int, layers: ComparableLayers
) -> Float[Tensor, "image head cell"]:
    """The class token's row, then its column without the corner; keys are pooled by sums, queries by means."""
    at = layers.class_index
    assert at is not None
    row, column = weights[..., at, :].float(), weights[..., :, at].float()
    others = [token for token in range(prefix) if token != at]
    row_patches, column_patches, n_cells = row[..., prefix:], column[..., prefix:], row.shape[-1]
    if grid != layers.grid:
        cells = _cells(grid, layers.grid).to(row.device)
        row_patches, column_patches = row_patches @ cells, column_patches @ (cells / cells.sum(0))
    assert n_cells == prefix + grid[0] * grid[1]
    return torch.cat([row[..., :prefix], row_patches, column[..., others], column_patches], -1)


def pool_block(block: Float[Tensor, "*map query key"], grid: Grid, to: Grid) -> Float[Tensor, "*map coarse_q coarse_k"]:
    """A block on a coarser grid: what the patches of a cell give, on average, to all patches of another cell.

    Args:
        block: Attention between patches of `grid`.
        grid: (rows, columns) of patches.
        to: (rows, columns) of cells.

    Returns:
        Attention between cells, 0 to 1; the block itself where the grids are the same.
    """
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
