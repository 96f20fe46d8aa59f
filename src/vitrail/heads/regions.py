"""Which part of a head's map matters: the six region modes of Li et al. 2023.

A map has three regions: the corner where prefix tokens look at prefix tokens, the rest of the prefix rows and columns,
and the patch block. In the paper the prefix is the class token alone; here distillation and register tokens belong to
it too (our extension). What a mode prunes is set to zero after the softmax, without renormalisation.
"""

from enum import IntEnum
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.errors import Unsupported, UsageError
from vitrail.vit.anatomy import Anatomy, Block
from vitrail.vit.edits import Edit
from vitrail.vit.tap import Tap

__all__ = [
    "Mode",
    "RegionModes",
    "mode_edit",
    "modes_offered",
    "region_mask",
    "region_modes",
    "require_mode",
    "why_not_all_modes",
]


class Mode(IntEnum):
    """What is pruned. In masks, CROSS = EDGE + CORNER and EVERYTHING = CROSS + PATCHES."""

    NOTHING = 1
    EVERYTHING = 2
    CROSS = 3
    """The rows and columns of the prefix, with the corner."""
    PATCHES = 4
    """Patches looking at patches."""
    EDGE = 5
    """The rows and columns of the prefix, without the corner."""
    CORNER = 6
    """The prefix looking at the prefix: with one class token, a single cell."""


class RegionModes(NamedTuple):
    """The answers of the model with parts of one head's map pruned; row i of `logits` belongs to `modes[i]`.

    `missing` says why a mode is not offered; empty when all six are.
    """

    modes: tuple[Mode, ...]
    logits: Float[Tensor, "mode image class"]
    missing: str


def region_modes(tap: Tap, anatomy: Anatomy, images: Tensor, layer: int, head: int) -> RegionModes:
    """One plain pass, then one run from block `layer` with a copy of the images for every other mode.

    Mode 1 is the plain pass itself, bitwise. The rest agree with runs of their own within 1e-5 of the largest logit in
    float32 (another batch size; weights @ v instead of the fused kernel). Raises `UsageError` for a head that is not
    there.
    """
    _check_head(anatomy, layer, head)
    modes = modes_offered(anatomy, layer)
    replay, plain = tap.record(images)
    edits = [mode_edit(anatomy, layer, head, mode, copy) for copy, mode in enumerate(modes[1:])]
    stacked = tap.run_from(layer, replay, edits=edits, copies=len(edits))
    logits = torch.cat([plain[None], stacked.reshape(len(edits), *plain.shape)])
    return RegionModes(modes, logits, why_not_all_modes(anatomy, layer))


def modes_offered(anatomy: Anatomy, layer: int) -> tuple[Mode, ...]:
    """The modes that mean something in this layer, mode 1 first."""
    if not _has_square_map(anatomy.blocks[layer]):
        return (Mode.NOTHING, Mode.EVERYTHING)
    if anatomy.class_index(layer) is None:
        return (Mode.NOTHING, Mode.EVERYTHING, Mode.PATCHES)
    return tuple(Mode)


def _has_square_map(block: Block) -> bool:
    return block.maps_on_grid and (block.kind == "window" or block.calls[0].queries == block.tokens)


def why_not_all_modes(anatomy: Anatomy, layer: int) -> str:
    """The reason that some modes are missing in this layer; empty when none is."""
    block = anatomy.blocks[layer]
    if not _has_square_map(block):
        return (
            f"Layer {layer} has no map from patches to the same patches (kind {block.kind!r}, grid {block.grid}), "
            "so only modes 1 and 2 are offered."
        )
    if anatomy.class_index(layer) is None:
        return (
            f"Layer {layer} has no class token, so there is no class row, column or corner to prune: modes 3, 5 and 6 "
            "are not offered."
        )
    return ""


def region_mask(mode: Mode, n_tokens: int, prefix: int) -> Float[Tensor, "query key"]:
    """What is kept (1) and pruned (0) of a map whose first `prefix` tokens are no patches."""
    is_prefix = torch.arange(n_tokens) < prefix
    corner = is_prefix[:, None] & is_prefix
    cross = is_prefix[:, None] | is_prefix
    pruned = {
        Mode.NOTHING: torch.zeros_like(cross),
        Mode.EVERYTHING: torch.ones_like(cross),
        Mode.CROSS: cross,
        Mode.PATCHES: ~cross,
        Mode.EDGE: cross & ~corner,
        Mode.CORNER: corner,
    }[mode]
    return (~pruned).float()


def mode_edit(anatomy: Anatomy, layer: int, head: int, mode: Mode, copy: int) -> Edit:
    """The edit of one head that a mode stands for. What prunes the whole map is the head's removal."""
    block = anatomy.blocks[layer]
    if mode is Mode.EVERYTHING or (mode is Mode.PATCHES and block.prefix == 0):
        return Edit(layer, copy=copy, prune=(head,))
    mask = torch.ones(block.heads, block.tokens, block.tokens)
    mask[head] = region_mask(mode, block.tokens, block.prefix)
    return Edit(layer, copy=copy, region=mask)


def _check_head(anatomy: Anatomy, layer: int, head: int) -> None:
    if not 0 <= layer < len(anatomy.blocks):
        raise UsageError(f"Layer {layer} was asked for; the model has layers 0 to {len(anatomy.blocks) - 1}.")
    if not 0 <= head < anatomy.blocks[layer].heads:
        raise UsageError(
            f"L{layer}H{head} was asked for; layer {layer} has heads 0 to {anatomy.blocks[layer].heads - 1}."
        )


def require_mode(anatomy: Anatomy, layer: int, mode: Mode) -> None:
    """Raises `Unsupported`, saying why, for a mode that this layer does not have."""
    if mode not in modes_offered(anatomy, layer):
        raise Unsupported(f"Region mode {int(mode)} was asked for. {why_not_all_modes(anatomy, layer)}")
