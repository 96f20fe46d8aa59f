"""The tokens of a model level by level: level 0 is what enters the first block, level l what block l - 1 returns."""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_flatten

from vitrail.errors import Unsupported
from vitrail.grid import Grid, n_patches, overlap_shares, patch_edges
from vitrail.models.noise import noise_images
from vitrail.models.open import Vit
from vitrail.tap.anatomy import Anatomy, Block
from vitrail.tap.tap import Readers, Replay, Tap

__all__ = [
    "Levels",
    "block_returned",
    "first_grid",
    "grids_returned",
    "input_tokens",
    "layers_of_own_grid",
    "level_zero",
    "on_first_grid",
    "read_levels",
    "require_one_grid",
    "sum_over_patches",
]


@dataclass(frozen=True, eq=False)
class Levels:
    """The tokens of one pass, level by level.

    Attributes:
        tokens: [image token channel] for the levels 0 to n_layers.
        logits: What the model returns.
        replay: Starts other passes from the middle.
    """

    tokens: tuple[Tensor, ...]
    logits: Tensor
    replay: Replay


def read_levels(tap: Tap, images: Float[Tensor, "image channel row column"]) -> Levels:
    """The tokens of all levels, from one pass without gradients.

    Args:
        tap: Of the model.
        images: Prepared images.

    Returns:
        Tokens, logits, and the replay of the pass.
    """
    by_layer: dict[int, Tensor] = {}

    def keep(layer: int, tokens: Tensor) -> None:
        by_layer[layer] = tokens.clone()  # some blocks go on to add to it in place

    replay, logits = tap.record(images, Readers(output=keep))
    layers = range(len(tap.anatomy.blocks))
    return Levels((level_zero(tap.anatomy, replay), *(by_layer[layer] for layer in layers)), logits, replay)


def level_zero(anatomy: Anatomy, replay: Replay) -> Float[Tensor, "image token channel"]:
    """What enters the first block: patches after embedding and position, behind the prefix tokens.

    Args:
        anatomy: Of the model.
        replay: Of a recorded pass.

    Returns:
        The tokens of level 0.
    """
    return input_tokens(anatomy, replay, 0)


def input_tokens(anatomy: Anatomy, replay: Replay, layer: int) -> Float[Tensor, "image token channel"]:
    """What enters a block.

    Args:
        anatomy: Of the model.
        replay: Of a recorded pass.
        layer: Zero-based index of the block.

    Returns:
        The tokens that the block was given, in canonical order.
    """
    block, recorded = anatomy.blocks[layer], replay.blocks[layer]
    leaf = tree_flatten((recorded.args, recorded.kwargs))[0][block.main_input]
    assert isinstance(leaf, torch.Tensor)
    return block.layout.canonical(leaf)


def require_one_grid(anatomy: Anatomy, levels: int | None = None) -> tuple[int, int]:
    """The grid of the first layers, which must all pass on the same tokens.

    Args:
        anatomy: Of the model.
        levels: Number of layers; None: all.

    Returns:
        (rows, columns) of patches.

    Raises:
        Unsupported: A layer has another grid, joins tokens late, has no map between them, or does not work on what the
            layer before gives.
    """
    blocks = anatomy.blocks[: len(anatomy.blocks) if levels is None else max(levels, 1)]
    first = blocks[0]
    for layer, block in enumerate(blocks):
        advice = "" if levels is None else f". Ask for a level up to {layer}."
        if layer > 0 and not block.fed:
            raise Unsupported(
                f"L{layer} does not work on what L{layer - 1} gives (several encoders, or one that runs for several "
                f"pictures): tokens cannot be followed through it{advice}"
            )
        if (block.grid, block.prefix, block.tokens) != (first.grid, first.prefix, first.tokens):
            raise Unsupported(
                f"L{layer} has {block.tokens} tokens on grid {block.grid}, and L0 has {first.tokens} on {first.grid}: "
                f"tokens cannot be followed through it{advice}"
            )
        if not block.maps_on_grid:
            others = next((call.queries for call in block.calls if call.queries != block.tokens), block.tokens)
            what = (
                f"it attends between {others} tokens, not the {block.tokens} that it is given"
                if block.kind == "token" and others != block.tokens
                else f"{block.kind!r} attention on grid {block.grid}"
            )
            raise Unsupported(
                f"L{layer} has no map between its patches ({what}): tokens cannot be followed through it{advice}"
            )
    assert first.grid is not None
    return first.grid


def first_grid(vit: Vit) -> Grid:
    """The grid of the first layer, the finest of a hierarchy, whose patches scores are of.

    Args:
        vit: The model.

    Returns:
        (rows, columns) of patches.

    Raises:
        Unsupported: Its tokens lie on no grid.
    """
    grid = vit.anatomy.blocks[0].grid
    if grid is None:
        raise Unsupported(f"The tokens of {vit.name} lie on no grid that could be found, so no patch has a relevance.")
    return grid


def on_first_grid(vit: Vit, values: Float[Tensor, "image row column"]) -> Float[Tensor, "image patch"]:
    """Amounts on the grid of any layer, each spread evenly over the patches of the first grid that it covers.

    Args:
        vit: The model.
        values: For each patch of a layer's grid.

    Returns:
        For each patch of the first layer's grid; sums over patches stay.

    Raises:
        Unsupported: The first layer's tokens lie on no grid.
    """
    rows, columns = (
        torch.from_numpy(overlap_shares(n_here, n_there)).to(values)
        for n_here, n_there in zip(values.shape[1:], first_grid(vit), strict=True)
    )
    return torch.einsum("irc,rp,cq->ipq", values, rows, columns).flatten(1)


_RETURNED: WeakKeyDictionary[Vit, dict[int, int]] = WeakKeyDictionary()
"""Tokens that each layer returns, by model: asked for by each measure, and found by a pass."""


def block_returned(anatomy: Anatomy, layer: int, n_tokens: int) -> Block | None:
    """The block whose tokens a layer returns: its own, or the next where the layer puts patches together on the way.

    Args:
        anatomy: Of the model.
        layer: Zero-based index.
        n_tokens: How many tokens the layer returns.

    Returns:
        The block that says on which grid they lie, if on any; None where neither has so many.
    """
    return next((block for block in anatomy.blocks[layer : layer + 2] if block.tokens == n_tokens), None)


def layers_of_own_grid(vit: Vit) -> frozenset[int]:
    """Layers that return as many tokens as they were given, on a grid; tried on one image of noise, once a model.

    Args:
        vit: The opened model.

    Returns:
        Indices of layers; without those that put patches together, as the stages of a pyramid do.
    """
    blocks = vit.anatomy.blocks
    return frozenset(
        layer for layer, n in _tokens_returned(vit).items() if blocks[layer].grid and n == blocks[layer].tokens
    )


def grids_returned(vit: Vit) -> frozenset[Grid]:
    """The grids on which layers return patches: their own, or the next layer's; tried as `layers_of_own_grid`.

    Args:
        vit: The opened model.

    Returns:
        (rows, columns) of patches, without layers whose tokens lie on no grid; empty where all merge their tokens.
    """
    returned = (block_returned(vit.anatomy, layer, n) for layer, n in _tokens_returned(vit).items())
    return frozenset(block.grid for block in returned if block is not None and block.grid is not None)


@torch.no_grad()
def _tokens_returned(vit: Vit) -> dict[int, int]:
    if vit not in _RETURNED:
        n_tokens: dict[int, int] = {}
        count = Readers(output=lambda layer, tokens: n_tokens.__setitem__(layer, tokens.shape[1]))
        vit.tap().read(noise_images(vit), count)
        _RETURNED[vit] = n_tokens
    return _RETURNED[vit]


def sum_over_patches(
    pixels: Float[Tensor, "image row column"], grid: Grid, step: tuple[int, int] | None
) -> Float[Tensor, "image patch"]:
    """The sum over the pixels of each patch.

    Args:
        pixels: One number a pixel.
        grid: (rows, columns) of patches.
        step: (rows, columns) of pixels from one patch to the next, where known (`Block.patch_step`).

    Returns:
        Sums, in the unit of the pixels; pixels behind the last patch belong to none.
    """
    for axis in (1, 2):
        edges = patch_edges(pixels.shape[axis], grid[axis - 1], step and step[axis - 1])
        pieces = pixels.narrow(axis, 0, int(edges[-1])).split(np.diff(edges).tolist(), axis)
        pixels = torch.stack([piece.sum(axis) for piece in pieces], axis)
    return pixels.reshape(len(pixels), n_patches(grid))
