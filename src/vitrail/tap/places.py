"""Where the keys of an attention call lie on the grid of its block, whatever the block does to its tokens first.

Windows, shifts, strides of pooling and of convolutions are not read from a configuration: a block is run on its own
input with one row or one column of patches moved at a time, and the values v in which that shows say where a key lies.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.errors import Unsupported
from vitrail.tap.anatomy import MAPLESS_KINDS, Anatomy, Block
from vitrail.tap.slots import block_on_noise, values_when_moved

__all__ = ["KeyPlaces", "find_key_places"]

_SHARE_OF_MOST = 0.5
"""A key lies in the rows that move it at least this much of what they move the key that they move most, each key
measured by the row that moves it most itself. So a weak row of a pooling kernel counts, since it moves no other key,
and the neighbours that a 3 x 3 convolution mixes in do not."""

_FAINT = 0.05
"""What moves a key less than this much of the row that moves it most is no place: gates over all channels and norms
over the image let every row through faintly."""

_STILL = 1e-4
"""A key that moves less than this much of the key that moves most lies nowhere: a class token, padding of a window."""

_RUNS_AT_ONCE = 16
"""Rows or columns that are moved in one run of the block; bounds the memory of its first, large grid."""


@dataclass(frozen=True, eq=False)
class KeyPlaces:
    """Where each key of an attention call lies, as shares of the rows and of the columns of patches.

    Attributes:
        rows: The share of the key in each row, summing to 1; all 0 for a key that lies nowhere.
        columns: The same for each column.
    """

    rows: Float[Tensor, "window key row"]
    columns: Float[Tensor, "window key column"]

    def on_grid(self, amounts: Float[Tensor, "image window key"]) -> Float[Tensor, "image row column"]:
        """Puts an amount of each key where the key lies, spread evenly over its patches.

        Args:
            amounts: Of each key; those of keys that lie nowhere are lost.

        Returns:
            The sum of what lies on each patch.
        """
        rows, columns = self.rows.flatten(0, 1), self.columns.flatten(0, 1)
        return torch.einsum("ik,kr,kc->irc", amounts.flatten(1), rows.to(amounts), columns.to(amounts))


@torch.no_grad()
def find_key_places(model: nn.Module, anatomy: Anatomy, layer: int, call: int = 0) -> KeyPlaces:
    """Finds where the keys of an attention call lie on the grid of its block.

    Args:
        model: The model; a copy that shares its weights is run.
        anatomy: Its anatomy.
        layer: Zero-based index of the block.
        call: Which attention call of the block.

    Returns:
        The places. Where the keys are the block's tokens they are known; else they are measured.

    Raises:
        Unsupported: The block has no grid, its attention has no keys that are tokens, or no patch moves a key.
    """
    block = anatomy.blocks[layer]
    if block.grid is None:
        raise Unsupported(f"The tokens of L{layer} ({block.path}) lie on no grid, so its keys have no place.")
    spec = block.calls[call]
    if spec.kind in MAPLESS_KINDS:
        raise Unsupported(
            f"L{layer} ({block.path}) has no map between tokens (kind {spec.kind!r}), so its keys have no place."
        )
    if spec.windows == 1 and spec.keys == block.tokens:
        return _places_of_tokens(block, block.grid)
    return _measured_places(model, anatomy, layer, call)


def _places_of_tokens(block: Block, grid: tuple[int, int]) -> KeyPlaces:
    nowhere = torch.zeros(1, block.prefix, 1)
    sides = [torch.eye(n) for n in grid]
    rows, columns = sides[0].repeat_interleave(grid[1], 0)[None], sides[1].repeat(grid[0], 1)[None]
    return KeyPlaces(*(torch.cat([nowhere.expand(-1, -1, each.shape[-1]), each], 1) for each in (rows, columns)))


def _measured_places(model: nn.Module, anatomy: Anatomy, layer: int, call: int) -> KeyPlaces:
    block = anatomy.blocks[layer]
    assert block.grid is not None
    moves = torch.cat(list(_changes(model, anatomy, layer, call)))  # [row or column, window, key]
    peak = torch.stack([each.amax(0) for each in moves.split(block.grid)]).amin(0)
    moved = peak > _STILL * peak.amax()
    if not moved.any():
        raise Unsupported(
            f"No patch that L{layer} ({block.path}) is given moves a key of its attention call {call}, so its keys "
            "have no place."
        )
    shares = []
    for each in moves.split(block.grid):
        share = torch.where(moved, each / each.amax(0).clamp_min(torch.finfo(each.dtype).tiny), 0)
        most = share.flatten(1).amax(1)[:, None, None]
        inside = ((share >= _SHARE_OF_MOST * most) & (share >= _FAINT)).float()
        shares.append((inside / inside.sum(0).clamp(min=1)).permute(1, 2, 0))
    return KeyPlaces(*shares)


def _changes(model: nn.Module, anatomy: Anatomy, layer: int, call: int) -> Iterator[Float[Tensor, "run window key"]]:
    """How far each key's v moves when all patches of a row do, for every row, then every column; some at a time."""
    block = anatomy.blocks[layer]
    assert block.grid is not None
    n_rows, n_columns = block.grid
    n_patches = n_rows * n_columns
    patch = torch.arange(n_patches)
    lines = torch.cat(
        [
            patch // n_columns == torch.arange(n_rows)[:, None],
            patch % n_columns == torch.arange(n_columns)[:, None],
        ]
    )
    lines = torch.cat([lines.new_zeros(len(lines), block.prefix), lines], 1)
    module, inputs = block_on_noise(model, anatomy, layer)
    for some in lines.split(_RUNS_AT_ONCE):
        v = values_when_moved(module, inputs, block, call, some, silence_earlier=True)
        yield (v[1:] - v[:1]).float().norm(dim=-1).mean(2)
