"""The tokens of a model level by level: level 0 is what enters the first block, level l what block l - 1 returns."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_flatten

from vitrail.errors import Unsupported
from vitrail.vit.anatomy import Anatomy
from vitrail.vit.tap import Readers, Replay, Tap

__all__ = ["Levels", "entering", "read_levels", "refuse_regrouped"]


@dataclass(frozen=True, eq=False)
class Levels:
    """One pass: `tokens[level]` is [image token channel] for the levels 0 to n_layers; `replay` starts others."""

    tokens: tuple[Tensor, ...]
    logits: Tensor
    replay: Replay


def read_levels(tap: Tap, images: Float[Tensor, "image channel row column"]) -> Levels:
    """The tokens of all levels, from one pass without gradients."""
    returned: dict[int, Tensor] = {}

    def keep(layer: int, tokens: Tensor) -> None:
        returned[layer] = tokens.clone()  # some blocks go on to add to it in place

    replay, logits = tap.record(images, Readers(output=keep))
    layers = range(len(tap.anatomy.blocks))
    return Levels((entering(tap.anatomy, replay), *(returned[layer] for layer in layers)), logits, replay)


def entering(anatomy: Anatomy, replay: Replay) -> Float[Tensor, "image token channel"]:
    """What entered the first block: patches after embedding and position, behind the prefix tokens."""
    block = anatomy.blocks[0]
    recorded = replay.blocks[0]
    leaf = tree_flatten((recorded.args, recorded.kwargs))[0][block.main_input]
    assert isinstance(leaf, torch.Tensor)
    return block.layout.canonical(leaf)


def refuse_regrouped(anatomy: Anatomy, levels: int | None = None) -> tuple[int, int]:
    """The grid, if the first `levels` layers (default: all) pass on the same tokens of one grid.

    Raises `Unsupported` where a layer has another grid, joins tokens late, or has no map between them.
    """
    blocks = anatomy.blocks[: len(anatomy.blocks) if levels is None else max(levels, 1)]
    first = blocks[0]
    for layer, block in enumerate(blocks):
        same = (block.grid, block.prefix, block.tokens) == (first.grid, first.prefix, first.tokens)
        if not same or not block.maps_on_grid:
            raise Unsupported(
                f"L{layer} has {block.tokens} tokens on grid {block.grid} with {block.kind!r} attention, and L0 has "
                f"{first.tokens} on {first.grid}: tokens cannot be followed through it. Ask for a level up to {layer}."
            )
    assert first.grid is not None
    return first.grid
